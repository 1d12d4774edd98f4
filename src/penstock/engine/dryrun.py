"""A pipeline's own `__call__`, run as far as its checks: which sizes it fills in, and what it refuses.

Owns the copy that runs. Its encoders answer with unknown values, and the run ends where one of them is looked into, or
where denoising begins. Does not know which arguments there are, or what follows from a refusal.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from penstock.models.sizes import call_parameters

_ENCODERS = re.compile(r"encoder|^vae$|^vqvae$")  # what they make is unknown; any other component ends the run
_ENCODES = re.compile(r"_?encode_\w+")
_BEGINS = re.compile(r"progress_bar|prepare_\w*latents\w*")
_WRONG_ARGUMENTS = (ValueError, TypeError, AssertionError)
_WRONG_COPY = (AttributeError, LookupError, RuntimeError, OSError, ArithmeticError, ImportError)
_OF_MODULES = frozenset(dir(nn.Module)) - {"__call__", "forward"}
_CPU = torch.device("cpu")
_UNPACK, _RAISE = dis.opmap["UNPACK_SEQUENCE"], dis.opmap["RAISE_VARARGS"]
_RESULTS = ("__{}__", "__r{}__")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "getitem", "call")
_LOOKS = ("bool", "len", "int", "float", "index", "contains")


@dataclass(frozen=True)
class DryRun:
    """What a pipeline's `__call__` did before it would have denoised.

    Attributes:
        values: the local names of `__call__` where it ended: its arguments, with the pipeline's own values filled in.
        refusal: the error by which it refused its arguments; None where it went on.
    """

    values: Mapping[str, Any]
    refusal: Exception | None = None


def dry_run(pipeline: Any, arguments: Mapping[str, Any]) -> DryRun:
    """Run `__call__` on a copy of a pipeline until it would look into what a component made, or denoise.

    Nothing of the pipeline changes, and no component runs: it may be placed, or have no weights.

    Args:
        pipeline: the pipeline or its skeleton.
        arguments: all that its `__call__` will be given, but for the generator.

    Returns:
        What is known. An error that the copy may have caused is no refusal.

    Cost: 1 to 6 CPU ms, and the resizing of input pictures. No random numbers are drawn but by its own generator.
    """
    call = inspect.unwrap(type(pipeline).__call__)
    extra = {"generator": torch.Generator()} if "generator" in call_parameters(type(pipeline)) else {}
    progress = _Progress()
    refusal: Exception | None = None
    trace: TracebackType | None = None
    try:
        with torch.no_grad():
            call(_copy_of(pipeline, progress), **arguments, **extra)
    except _WorkBegins as stop:
        trace = stop.__traceback__
    except _WRONG_ARGUMENTS as error:
        trace = error.__traceback__
        if not progress.has_unknowns or _is_raised_by(error, type(pipeline)):
            refusal = error
    except _WRONG_COPY as error:
        trace = error.__traceback__
    return DryRun(_locals_of(call.__code__, trace), refusal)


class _WorkBegins(BaseException):
    """The run is at its end; no `Exception`, so that no pipeline takes it for an error of its own."""


def _end(*args: Any, **kwargs: Any) -> Any:
    raise _WorkBegins


class _Progress:
    """How far a run is.

    Attributes:
        has_unknowns: a component has worked: from here on the copy differs from the pipeline.
    """

    has_unknowns = False

    def unknown(self, *args: Any, **kwargs: Any) -> _Unknown:
        """What a component would have made."""
        self.has_unknowns = True
        return _Unknown()


class _Unknown:
    """A value that is not known: whatever is made of it is not known either; to look into it ends the run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        """As many values as the caller has names for."""
        frame = sys._getframe(1)
        code, place = frame.f_code.co_code, frame.f_lasti
        return iter([self] * code[place + 1]) if code[place] == _UNPACK else _end()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls()


for _name in (
    *(form.format(name) for form in _RESULTS for name in _OPERATORS),
    *(f"__{name}__" for name in _COMPARISONS),
):
    setattr(_Unknown, _name, lambda self, *args, **kwargs: self)
for _name in _LOOKS:
    setattr(_Unknown, f"__{_name}__", _end)
_Unknown.__hash__ = object.__hash__  # type: ignore[method-assign]  # a class that compares has none by itself


class _Idle:
    """Stands for a component: its config and attributes are the component's, `work` takes its calls."""

    def __init__(self, module: nn.Module, work: Any) -> None:
        self.__dict__.update(_module=module, _work=work)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return _Idle(value, self._work)
        return self._work if inspect.ismethod(value) and name not in _OF_MODULES else value

    def __setattr__(self, name: str, value: Any) -> None:
        _end()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._work()


def _copy_of(pipeline: Any, progress: _Progress) -> Any:
    """A pipeline of the same attributes that can be called without changing the other."""
    stock: Any = type(pipeline)
    owner = _dry(stock)
    twin: Any = object.__new__(owner)
    for name, value in vars(pipeline).items():
        if isinstance(value, nn.Module):
            value = _Idle(value, progress.unknown if _ENCODERS.search(name) else _end)
        elif isinstance(value, SchedulerMixin):
            value = copy.copy(value)
        vars(twin)[name] = value
    vars(twin).update({name: progress.unknown for name in dir(owner) if _ENCODES.fullmatch(name)})
    return twin


@functools.lru_cache(64)
def _dry(owner: Any) -> type:
    """A pipeline's class whose instances are on the CPU, wherever their weights are, and never denoise."""
    device = property(lambda self: _CPU)
    ends = {name: _end for name in dir(owner) if _BEGINS.fullmatch(name)}
    names = {"__module__": owner.__module__, "__qualname__": owner.__qualname__}
    return type(owner.__name__, (owner,), {**names, **ends, "device": device, "_execution_device": device})


def _is_raised_by(error: Exception, owner: type) -> bool:
    """Whether a `raise` of diffusers or of the pipeline's own file refused, rather than an operation that failed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_code[trace.tb_lasti] != _RAISE:
        return False
    module = str(trace.tb_frame.f_globals.get("__name__"))
    return module.startswith("diffusers.") or module == owner.__module__


def _locals_of(code: CodeType, trace: TracebackType | None) -> dict[str, Any]:
    """The names of the running function, out of a traceback that passed through it."""
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return {name: value for name, value in trace.tb_frame.f_locals.items() if name != "self"}
        trace = trace.tb_next
    return {}
