"""What is gathered while what computes: the next unit, also across forwards, in the order in which units run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock.distributed.hsdp.order import Order
from penstock.distributed.hsdp.shards import Gather, apply_hsdp_to_model, shard_group, shard_mesh
from penstock.errors import GenerationError
from tests.distributed.hsdp.toys import Toy, config, held_bytes, outputs, tokens, toy
from tests.ranks import run_ranks


class Backwards(Toy):
    """A model that runs its blocks last to first."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        for block in reversed(self.blocks):
            tokens = block(tokens)
        return self.head(tokens)


class Logged(Gather):
    """A gather that writes down that it was issued."""

    def __init__(self, events: list[str], name: str) -> None:
        super().__init__(shard_group(shard_mesh("cpu", 1, dist.get_world_size())))
        self.events, self.name = events, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.events.append(f"gather {self.name}")
        return super().__call__(*args, **kwargs)


def events(kind: type[Toy], num_forwards: int, options: dict[str, Any]) -> list[list[str]]:
    """What each forward of a sharded toy does, in order; `run N` is when block N begins to compute."""
    model = toy(kind=kind)
    expected = outputs(model)
    apply_hsdp_to_model(model, config(), **options)
    log: list[str] = []
    model.set_custom_all_gather(Logged(log, "root"))
    for number, block in enumerate(model.blocks):
        block.set_custom_all_gather(Logged(log, str(number)))
        block.to_in.register_forward_pre_hook(lambda *_, number=number: log.append(f"run {number}"))
    forwards = []
    for _ in range(num_forwards):
        assert torch.equal(outputs(model), expected)
        forwards.append([*log])
        log.clear()
    return forwards


def test_the_next_block_is_gathered_before_a_block_computes() -> None:
    for first, second, third in run_ranks(2, events, Toy, 3, {}):
        assert " ".join(first) == (
            "gather root gather 0 gather 1 run 0 gather 2 run 1 gather 0 run 2"  # the last: for the next forward
        )
        assert " ".join(second) == "gather root gather 1 run 0 gather 2 run 1 gather 0 run 2"
        assert third == second  # as many gathers as units


@pytest.mark.parametrize(
    ("options", "steady"),
    [
        ({"repeats": False}, "gather root gather 0 gather 1 run 0 gather 2 run 1 run 2"),
        ({"prefetch": 0}, "gather root gather 0 run 0 gather 1 run 1 gather 2 run 2"),
        ({"prefetch": 2}, "gather root gather 2 run 0 gather 0 run 1 gather 1 run 2"),
    ],
)
def test_how_far_ahead(options: dict[str, Any], steady: str) -> None:
    for forwards in run_ranks(2, events, Toy, 3, options):
        assert " ".join(forwards[-1]) == steady


def test_a_unit_is_never_ahead_of_itself() -> None:
    for forwards in run_ranks(2, events, Toy, 3, {"prefetch": 9}):
        assert [event for event in forwards[-1] if event.startswith("run")] == ["run 0", "run 1", "run 2"]
        assert sorted(event for event in forwards[-1] if event.startswith("gather")) == [
            "gather 0",
            "gather 1",
            "gather 2",
            "gather root",
        ]


def test_the_order_is_that_in_which_blocks_ran() -> None:
    for forwards in run_ranks(2, events, Backwards, 3, {}):
        assert " ".join(forwards[0]).startswith("gather root gather 0 gather 2")  # as supposed
        assert " ".join(forwards[2]) == "gather root gather 1 run 2 gather 0 run 1 gather 2 run 0"


class Stop(Exception):
    """What a callback raises in the middle of a forward."""


def interrupted() -> tuple[bool, bool, int]:
    model = toy()
    expected = outputs(model)
    apply_hsdp_to_model(model, config())
    outputs(model)
    outputs(model)
    held = held_bytes()
    model.blocks[1].to_in.register_forward_pre_hook(stop)
    for _ in range(3):
        with pytest.raises(Stop):
            outputs(model)
    model.blocks[1].to_in._forward_pre_hooks.clear()
    first = outputs(model)
    second = outputs(model)
    grown = held_bytes() - held - first.nbytes - second.nbytes
    return torch.equal(first, expected), torch.equal(second, expected), grown


def stop(module: nn.Module, args: Any) -> None:
    raise Stop


def test_a_forward_that_did_not_end_leaves_nothing_behind() -> None:
    assert run_ranks(2, interrupted) == [(True, True, 0)] * 2


def records() -> int:
    model = toy()
    apply_hsdp_to_model(model, config())
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
    order = next(owner for owner in hooks if isinstance(owner, Order))
    expected = outputs(model)
    kept = []
    for _ in range(3):
        order.num_calls = 998
        for _ in range(3):
            assert torch.equal(outputs(model), expected)
        kept.append(len(model._get_fsdp_state()._comm_ctx.post_forward_order))
    return len(set(kept))


def test_fsdps_record_of_forwards_does_not_grow_for_ever() -> None:
    assert run_ranks(2, records) == [1, 1]


def without_reset() -> str:
    model = toy()
    apply_hsdp_to_model(model, config())
    model.blocks[1].to_in.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        outputs(model)
    type(model).reset_iter_state = None
    try:
        model(tokens())
    except GenerationError as error:
        return str(error)
    finally:
        del type(model).reset_iter_state
    return ""


def test_where_torch_cannot_clear_up_the_next_forward_is_refused() -> None:
    for said in run_ranks(2, without_reset):
        assert "number 1 of Toy, did not end" in said
