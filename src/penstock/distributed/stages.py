"""Pipeline parallelism: each rank holds a run of a denoiser's blocks, so that a model runs that fits on no single one.

All ranks run the same stock forward. What lies outside of the stacks is on every rank; the blocks are dealt out in
runs of about equal bytes. In the place of another rank's block stands a shell: an object of its class with its
settings and without weights, which returns tensors of the right shapes that hold NaN. Where a rank's own run begins
it receives the real streams, and after the last block all ranks have them (`relay`).

    undo = apply_stages(pipe.transformer, row_of(pipe.transformer), mesh["pipeline"])

Owns who holds what, and the surgery on the lists of blocks. Does not know how streams travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.distributed.relay import Gate, Relay, carriers
from penstock.distributed.whole import refuse_while_split
from penstock.errors import ConfigError, GenerationError, ModelError
from penstock.models.rows.row import Layout, Row, StackRow
from penstock.models.rows.staged import ENTANGLED
from penstock.models.rows.table import blocks_of, row_of
from penstock.undo import Undo

_OFF = "Use pipeline_parallel_size=1"
_SENDABLE = {
    "torch.nn.parameter.Parameter",
    "diffusers.quantizers.gguf.utils.GGUFParameter",
    "bitsandbytes.nn.modules.Params4bit",
    "bitsandbytes.nn.modules.Int8Params",
}
"""Kinds of weights that are one tensor in memory."""


@dataclass(frozen=True)
class _Dealt:
    """A block that one of the stages holds."""

    stack: StackRow
    index: int
    module: nn.Module

    @property
    def path(self) -> str:
        """From the denoiser."""
        return f"{self.stack.path}.{self.index}"


def check_stages(denoiser: nn.Module, row: Row | None, size: int) -> None:
    """Whether a denoiser's blocks can be dealt out to so many stages.

    Args:
        denoiser: perhaps without weights, on the meta device.
        row: of its class; None where there is none.
        size: number of stages.

    Raises:
        ConfigError: where they cannot, with the reason.
        DeclarationError: for a row that says too little, or names what is not there.
    """
    if size > 1:
        _deal(denoiser, row, size)


def knows_stages(denoiser: nn.Module) -> bool:
    """Whether a row says what the blocks of a denoiser's class hand to each other, and nothing else is needed."""
    return row_of(denoiser) is not None and not _entanglement(denoiser)


def deal(denoiser: nn.Module, row: Row | None, size: int) -> tuple[tuple[str, ...], ...]:
    """By stage, the paths of the blocks that it alone holds; all else is on every rank.

    Args:
        denoiser: perhaps without weights, on the meta device.
        row: of its class.
        size: number of stages.

    Raises:
        ConfigError: where they cannot be dealt out, with the reason.
        DeclarationError: for a row that says too little, or names what is not there.
    """
    if size == 1:
        return ((),)
    return tuple(tuple(block.path for block in run) for run in _deal(denoiser, row, size))


def apply_stages(
    denoiser: nn.Module, row: Row | None, group: Group, keep: Callable[[nn.Module], bool] | None = None
) -> Undo:
    """Let go of the blocks of other stages, and exchange streams with these in each forward.

    Args:
        denoiser: changed in place.
        row: of its class.
        group: the ranks that hold the stages, in order.
        keep: whether another rank's block is held on to as it is: right for blocks that lie in a mapped file and cost
            no memory; gives the same answer on all ranks. Left out, none is: the weights of all others are let go.

    Returns:
        What puts the denoiser back; all ranks run it together, and weights that were let go come from the rank that
        has them.

    Raises:
        ConfigError: where the blocks cannot be dealt out.

    Cost: for each forward, what a stage's first block takes goes from rank to rank, and what the last block returns
    from one rank to all. One stage computes at a time.
    """
    if group.size == 1:
        return Undo()
    runs = _deal(denoiser, row, group.size)
    relay = Relay(group)
    away: list[_Away] = []
    with Undo() as undo, Undo() as failing:
        for stage, run in enumerate(runs):
            for block in run:
                gate = Gate(relay, stage, block.stack, block.module, is_last=block is runs[-1][-1])
                if keep is None or not keep(block.module):
                    away.append(_Away(block.module, stage))
                if stage == group.rank:
                    _guide(block.module, gate, undo)
                    continue
                blocks = denoiser.get_submodule(block.stack.path)
                failing.add(partial(setattr, blocks, str(block.index), block.module))
                _vacate(blocks, block, gate, undo)
        refuse_while_split(denoiser, f"in {group.size} stages", undo)
        _watch(denoiser, relay, undo)
    undo.add(partial(_bring_back, away, group))
    for one in away:
        one.let_go(group)
    return undo


class _Away:
    """A block whose weights one rank holds and the others let go.

    Args:
        block: with its weights, on every rank.
        stage: the rank that keeps them.
    """

    def __init__(self, block: nn.Module, stage: int) -> None:
        self._tensors = [*block.parameters(), *block.buffers()]
        self._forms = [(tensor.shape, tensor.dtype) for tensor in self._tensors]
        self._stage = stage

    def let_go(self, group: Group) -> None:
        """Free the weights of another rank's block; each stays the object that it was."""
        if group.rank != self._stage:
            for tensor in self._tensors:
                tensor.data = tensor.data.new_empty(0)

    def bring_back(self, group: Group) -> None:
        """Send the weights, or receive them."""
        for tensor, (shape, dtype) in zip(self._tensors, self._forms, strict=True):
            is_own = group.rank == self._stage
            memory = tensor.detach().to("cpu", dtype).contiguous() if is_own else torch.empty(shape, dtype=dtype)
            group.broadcast(memory, self._stage)
            if not is_own:
                tensor.data = memory


def _bring_back(away: list[_Away], group: Group) -> None:
    while away:
        away[0].bring_back(group)
        away.pop(0)


def _deal(denoiser: nn.Module, row: Row | None, size: int) -> list[list[_Dealt]]:
    owner = type(denoiser).__name__
    if reason := _entanglement(denoiser):
        raise ConfigError(f"{owner} cannot run in {size} stages: {reason}. {_OFF}.")
    if row is None:
        raise ConfigError(
            f"{owner} cannot run in {size} stages: no row says which streams its blocks exchange. {_OFF}, or declare "
            "its row."
        )
    blocks = _dealt(denoiser, row)
    if not blocks:
        raise ConfigError(
            f"{owner} cannot run in {size} stages: its blocks give two tensors of one stream, or it has none. {_OFF}."
        )
    if len(blocks) < size:
        raise ConfigError(
            f"{owner} cannot run in {size} stages: each needs a block of its own, and there are {len(blocks)}. "
            f"Use pipeline_parallel_size={len(blocks)} or less."
        )
    for block in blocks:
        if not any(True for _ in block.module.parameters()):
            raise ConfigError(
                f"{block.path} of {owner} has no weights: another rank holds them, and they were let go here. "
                "Load the pipeline again."
            )
        _require_sendable(owner, block, size)
    ends = list(accumulate(_lengths([_num_bytes(block.module) for block in blocks], size)))
    return [blocks[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _entanglement(denoiser: nn.Module) -> str | None:
    """Why the class's own code needs all blocks on one rank; None where it does not."""
    return next(filter(None, (ENTANGLED.get(base.__name__) for base in type(denoiser).__mro__)), None)


def _require_sendable(owner: str, block: _Dealt, size: int) -> None:
    """Refuse weights that consist of several tensors: they can be neither let go nor sent as one."""
    for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers()):
        kind = type(tensor.data)
        if kind is not Tensor and f"{kind.__module__}.{kind.__name__}" not in _SENDABLE:
            raise ConfigError(
                f"{owner} cannot run in {size} stages: the weight {block.path}.{name} is no plain tensor "
                f"({kind.__name__}), which cannot be sent between ranks. Load the model without quantisation, or use "
                "pipeline_parallel_size=1."
            )


def _dealt(denoiser: nn.Module, row: Row) -> list[_Dealt]:
    """The blocks of the last stacks, as many as pass on all that those before them gave.

    A stack before these (a refiner of one stream, or one that gives two of a kind, which code behind it tells apart)
    runs on every rank, as embedders do.
    """
    dealt: list[_Dealt] = []
    passed: set[str] | None = None
    for stack in reversed(row.stacks):
        modules = blocks_of(denoiser, stack)
        if not modules:
            continue
        streams = {stream for text in stack.gives for stream in Layout.of(text).streams}
        if len(set(stack.gives)) < len(stack.gives) or (passed is not None and not streams <= passed):
            break
        carriers(stack)
        passed = streams
        dealt[:0] = [_Dealt(stack, index, module) for index, module in enumerate(modules)]
    return dealt


def _num_bytes(block: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))


def _lengths(num_bytes: Sequence[int], size: int) -> tuple[int, ...]:
    """Blocks of each run, so that the largest run has as few bytes as can be."""
    sums = [0, *accumulate(num_bytes)]

    @cache
    def best(begin: int, num_runs: int) -> tuple[int, tuple[int, ...]]:
        if num_runs == 1:
            return sums[-1] - sums[begin], (len(num_bytes) - begin,)
        found = []
        for end in range(begin + 1, len(num_bytes) - num_runs + 2):
            most, lengths = best(end, num_runs - 1)
            found.append((max(most, sums[end] - sums[begin]), (end - begin, *lengths)))
        return min(found)

    return best(0, size)[1]


def _guide(block: nn.Module, gate: Gate, undo: Undo) -> None:
    """Lead an own block's arguments and results through its gate."""
    compute = block.forward
    own = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = gate.enter(args, kwargs)
        return gate.leave(compute(*args, **kwargs))

    def restore() -> None:
        if vars(block).get("forward") is not forward:
            return  # somebody else's by now
        if own is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = own

    undo.add(restore)
    vars(block)["forward"] = forward


def _vacate(blocks: nn.Module, block: _Dealt, gate: Gate, undo: Undo) -> None:
    """Put a shell in the place of another rank's block."""
    shell: Any = _shell(block.module)
    key = list(blocks._modules)[block.index]
    path = block.path

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = gate.enter(args, kwargs)
        return gate.leave(gate.placeholder(args, kwargs))

    def restore() -> None:
        if blocks._modules[key] is shell:
            blocks._modules[key] = block.module

    undo.add(restore)
    vars(shell)["forward"] = forward
    shell.register_state_dict_pre_hook(partial(_refuse, path, "a state_dict() would lack it"))
    blocks._modules[key] = shell


def _shell(block: nn.Module) -> nn.Module:
    """An object of a block's class with its settings: no weights, no hooks, and nothing that leads to either."""
    shell: nn.Module = object.__new__(type(block))
    nn.Module.__init__(shell)
    shell.training = block.training
    for name, value in vars(block).items():
        if not name.startswith("_") and not callable(value):
            vars(shell)[name] = value
    return shell


def _refuse(path: str, consequence: str, *_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        f"{path} is not on this rank, and {consequence}: pipeline parallelism left it to another one. "
        "Load the pipeline again without it; load adapters before it is split."
    )


def _watch(denoiser: nn.Module, relay: Relay, undo: Undo) -> None:
    """Begin and end the relay with the denoiser's forward; its first result must not hold what shells returned."""
    is_proven = False

    def begin(*_: Any) -> None:
        relay.begin()

    def end(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal is_proven
        relay.end()
        if not is_proven and any(bool(tensor.isnan().any()) for tensor in _tensors(output)):
            raise GenerationError(
                f"{type(denoiser).__name__} returns NaN in {relay.group.size} stages. Either it does so on one rank "
                f"too, or it keeps for later what a block returns, which only one stage has. {_OFF} to find out."
            )
        is_proven = True

    undo.add(denoiser.register_forward_pre_hook(begin).remove)
    undo.add(denoiser.register_forward_hook(end).remove)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _tensors(value))
