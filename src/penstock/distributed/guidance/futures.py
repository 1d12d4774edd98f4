"""Tensors that another rank is still computing: they have a shape before they have a value.

Owns the tensor class and the right order of what is done with it. Does not know who computes, or how results travel.

A future can be sliced, scaled, subtracted from another one and so on without being waited for: such operations are
recorded, and done when the values arrive. Whatever needs the value, or changes something in place, waits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from penstock.errors import GenerationError

_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
"""Operations whose outcome, or whose draw from the random stream, cannot be put off."""


class FutureTensor(Tensor):
    """A tensor whose value is fetched when it is first needed.

    All ranks see the same futures and need them at the same points of the program, so `resolve` may be a collective.

    `print` shows the value only if it is there: a rank that prints alone must not wait for the others.
    Changing the shape in place (`unsqueeze_`) is refused. Gradients do not pass.

    Cost: nothing is copied, but for tensors that are no futures and take part in a recorded operation: they may be
    changed before it is done, so a copy is kept, at most of the future's size. 0.1 to 0.2 ms per operation.
    """

    _resolve: Callable[[], Tensor] | None
    _value: Tensor | None
    _readers: list[_Record]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        resolve: Callable[[], Tensor],
        strides: Sequence[int] | None = None,
    ) -> Self:
        """Makes a future.

        Args:
            shape: Of the value.
            dtype: Of the value.
            device: Of the value.
            resolve: Returns the value; called at most once, by the first that needs it.
            strides: Of the value; those of a contiguous tensor if left out.
        """
        future = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device(device), strides=None if strides is None else [*strides]
        )
        future._resolve, future._value, future._readers = resolve, None, []
        return future

    @property
    def is_pending(self) -> bool:
        """Whether the value is not here yet."""
        return self._value is None

    def value(self) -> Tensor:
        """The value; waits for it, and then does whatever was recorded of it.

        Raises:
            GenerationError: If what arrives is not of the shape or dtype that was announced.
        """
        if self._value is None:
            assert self._resolve is not None
            value = wait(self._resolve())
            if self._value is None:  # else what resolved it has delivered it as well
                deliver([self], [value])
        assert self._value is not None
        return self._value

    def _accept(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise GenerationError(
                f"A future of shape {tuple(self.shape)} and {self.dtype} became {tuple(value.shape)} and "
                f"{value.dtype}. What was computed from its shape is wrong. Run without guidance and tile parallelism."
            )
        self._value, self._resolve = value.detach(), None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records the operation, or waits and does it."""
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], FutureTensor):
            raise GenerationError(
                f"{func} would change the shape {tuple(args[0].shape)} of a future in place. "
                "Its shape is fixed before its value is known. Use the form that returns a new tensor."
            )
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, FutureTensor) and leaf.is_pending for leaf in leaves):
            parts = func.decompose(*args, **kwargs)  # inference mode hands over composite operations whole
            if parts is not NotImplemented:
                return parts
            record = _record(func, args, kwargs)
            if record is not None:
                return record
        result = func(*wait(args), **wait(kwargs))
        futures = {id(leaf._value): leaf for leaf in leaves if isinstance(leaf, FutureTensor)}
        return tree_map(lambda leaf: futures.get(id(leaf), leaf), result)  # in place: the same object comes back

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # What torch reads from memory, past its own dispatch.

    def numpy(self, *, force: bool = False) -> Any:
        """The value as an array, like `Tensor.numpy`."""
        return self.value().numpy(force=force)

    def tolist(self) -> Any:
        """The value as nested lists."""
        return self.value().tolist()

    def data_ptr(self) -> int:
        """The address of the value."""
        return self.value().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of the value."""
        return self.value().untyped_storage()

    def __dlpack__(self, **options: Any) -> Any:
        return self.value().__dlpack__(**options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.value().clone()

    def __format__(self, specification: str) -> str:
        return format(self.value(), specification) if specification else repr(self)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        if self._value is None:
            return f"FutureTensor(pending, shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
        return repr(self._value)


def deliver(futures: Sequence[FutureTensor], values: Sequence[Tensor]) -> None:
    """Hands over values, ahead of their being asked for.

    Whatever was recorded of the futures is done now, and waits for what else it needs: from here on the values may be
    changed in place.

    Args:
        futures: Pending ones.
        values: One for each.

    Raises:
        GenerationError: If a value is not of the shape or dtype that was announced.
    """
    for future, value in zip(futures, values, strict=True):
        future._accept(value)
    for future in futures:
        readers, future._readers = future._readers, []
        for reader in readers:
            reader.run()


def wait(tree: Any) -> Any:
    """Returns the tree with each future in it replaced by its value.

    Args:
        tree: Lists, tuples, dicts and output objects of diffusers, nested; or a tensor.
    """
    return tree_map(_arrived, tree, is_leaf=lambda node: isinstance(node, BaseOutput))


def _arrived(leaf: Any) -> Any:
    if isinstance(leaf, FutureTensor):
        return leaf.value()
    if not isinstance(leaf, BaseOutput):
        return leaf
    output = copy.copy(leaf)  # not `tree_map`, which loses fields that are None
    for name, value in leaf.items():
        output[name] = wait(value)
    return output


class _Record:
    """An operation that was put off."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.results: list[FutureTensor] = []

    def run(self) -> None:
        """Does it, once."""
        args, kwargs = wait((self.args, self.kwargs))
        if self.results[0].is_pending:  # else the last of the arguments to arrive has done it
            deliver(self.results, tree_leaves(self.func(*args, **kwargs)))

    def resolver(self, index: int) -> Callable[[], Tensor]:
        """What the result of this index is resolved by."""

        def resolve() -> Tensor:
            self.run()
            return self.results[index].value()

        return resolve


def _record(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Puts an operation off and returns its futures; None where it cannot be put off."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pending = [leaf for leaf in tensors if isinstance(leaf, FutureTensor) and leaf.is_pending]
    if func._schema.is_mutable or not _NEEDS_VALUES.isdisjoint(func.tags):
        return None
    most = max(leaf.numel() for leaf in pending)
    if len(pending) < len(tensors) and (
        torch.Tag.pointwise not in func.tags or any(leaf.numel() > most for leaf in tensors)
    ):
        return None  # weights, or large tables: not worth a copy
    layout = _layout(func, args, kwargs)
    if layout is None:
        return None
    record = _Record(func, *tree_map(_kept, (args, kwargs)))
    device = kwargs.get("device") or pending[0].device
    leaves, tree = layout
    for index, leaf in enumerate(leaves):
        record.results.append(
            FutureTensor.of(leaf.shape, leaf.dtype, device, record.resolver(index), strides=leaf.stride())
        )
    for future in {id(leaf): leaf for leaf in pending}.values():
        future._readers.append(record)
    return tree_unflatten(record.results, tree)


def _layout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any] | None:
    """The results of an operation without their values; None where they cannot be foretold."""
    shadows, options = tree_map(_shadow, (args, kwargs))
    if "device" in options:
        options["device"] = "meta"
    try:
        leaves, tree = tree_flatten(func(*shadows, **options))
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return None  # done for real, it either works or says what is wrong
    return (leaves, tree) if leaves and all(isinstance(leaf, Tensor) for leaf in leaves) else None


def _shadow(leaf: Any) -> Any:
    """A tensor's shape, dtype and strides, on the meta device."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _kept(leaf: Any) -> Any:
    """What a record holds on to: a future as it is, a copy of a tensor that may change."""
    if isinstance(leaf, FutureTensor) and leaf.is_pending:
        return leaf
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
