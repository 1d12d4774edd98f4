"""What a function that others have put on a module may do beside computing, read from its code before it runs.

Nothing is called. What cannot be told counts as done: a function is cleared only where its code, what it has caught
and what it reaches by name show nothing that could last from call to call. Owns that reading; does not know modules'
hooks, nor what follows from it.
"""

from __future__ import annotations

import dis
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

_LIBRARIES = {
    *("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors", "penstock", "torchvision"),
    *("bitsandbytes", "torchao", "optimum", "gguf", "hqq", "gptqmodel", "modelopt", "nunchaku"),  # quantised layers
    *("xformers", "flash_attn", "sageattention", "kernels", "triton", "einops", "timm", "scipy", "PIL"),
}
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)
_STILL = (FrozenDict, logging.Logger)
_OF_C = (types.BuiltinFunctionType, types.MethodWrapperType)
_CHANGEABLE = (list, dict, set, bytearray)
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_REBINDS = {"STORE_DEREF", "DELETE_DEREF"}
_HIDDEN_STORES = {"setattr", "delattr", "__setattr__", "__dict__", "vars", "globals", "__setitem__", "register_buffer"}
_ACROSS = {
    *("mean", "sum", "prod", "norm", "std", "var", "std_mean", "var_mean", "max", "min", "amax", "amin", "aminmax"),
    *("any", "all", "median", "quantile", "logsumexp", "softmax", "argmax", "argmin", "sort", "argsort", "topk"),
    *("cumsum", "cumprod", "flip", "roll", "item", "tolist", "numpy", "allclose", "equal", "unique", "nonzero"),
    *("count_nonzero", "dist", "cdist", "cosine_similarity", "mse_loss", "l1_loss", "linalg", "fft", "matmul", "bmm"),
    *("einsum", "layer_norm", "group_norm", "instance_norm", "interpolate", "pad", "chunk", "split", "cat", "stack"),
    *("shape", "size", "numel", "narrow", "index_select", "gather", "scatter", "transpose", "permute", "reshape"),
    *("view", "flatten", "unflatten", "scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "avg_pool2d"),
}
"""Names of what looks from one number to another: a part of a batch or a sequence gives another result."""
_DRAWS = {
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "multinomial", "bernoulli"),
    *("dropout", "normal", "uniform", "poisson", "random", "randrange", "choice", "choices", "shuffle", "gauss"),
    *("standard_normal", "default_rng", "urandom", "Generator", "initial_seed"),
}
"""Names of what gives something else each time: the generator is state that calls share."""
_MAKES = {"__init__", "__new__", "__post_init__", "__setstate__", "__repr__"}
_RETURN_NONE = {"append", "appendleft", "extend", "__setitem__"}


@dataclass(frozen=True)
class Habits:
    """What a function may do.

    Attributes:
        keeps_state: something of a call may last until the next.
        looks_across: its result may depend on more than the same place of its arguments.
        only_watches: it returns nothing, and changes no tensor.
    """

    keeps_state: bool
    looks_across: bool
    only_watches: bool


def home_of(call: Any) -> str:
    """The name of the module in which a callable's code stands, whatever it was made to look like.

    `functools.wraps` and its like are not believed; what a partial, a bound method or a compiled function holds is
    looked at instead. Empty where nobody knows.
    """
    function = plain_function(call)
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__", ""))
    return str(getattr(function if inspect.isroutine(function) else type(function), "__module__", "") or "")


def is_of_library(call: Any) -> bool:
    """Whether a callable's code is torch's, a library's that models come from, Python's, or our own."""
    return _is_trusted(home_of(call))


def plain_function(call: Any) -> Any:
    """The function behind partials, bound methods and torch's compiler."""
    while True:
        if isinstance(call, partial):
            call = call.func
        elif isinstance(call, types.MethodType):
            call = call.__func__
        elif callable(inner := getattr(call, "_torchdynamo_orig_callable", None)):
            call = inner
        else:
            return call


def name_of(call: Any) -> str:
    """How to name a callable to the user who has put it there: its module and name."""
    function = plain_function(call)
    code = getattr(function, "__code__", None)
    own = code.co_qualname if code is not None else getattr(function, "__qualname__", type(function).__qualname__)
    return f"{home_of(call)}.{own}".removeprefix(".")


def habits_of(call: Any, owner: object = None) -> Habits:
    """Read what a callable may do.

    Args:
        call: a function, method, partial, or an object with a `__call__`.
        owner: the module it was put on, whose attributes it may use.

    Cost: some 100 us for each function that it leads to.
    """
    reading = _Reading(owner)
    reading.read(call)
    keeps_state = reading.keeps_state or (reading.sets_items and reading.has_tensors)
    is_watcher = not reading.works_in_place and not (reading.sets_items and reading.slices)
    return Habits(keeps_state, reading.looks_across or reading.slices, is_watcher and _returns_nothing(call))


def keeps_state(thing: object) -> bool:
    """Whether an object may keep something from one call of its methods to the next, whoever wrote its class.

    Args:
        thing: not a module of torch's own; a module's weights are no state.
    """
    reading = _Reading(thing)
    held = vars(thing).items() if hasattr(thing, "__dict__") else ()
    is_module = isinstance(thing, nn.Module)
    reading.reach([value for name, value in held if not (is_module and name in vars(nn.Module()))])
    for kind in type(thing).__mro__:
        if kind.__module__.partition(".")[0] not in ("builtins", "torch", "abc", "typing"):
            reading.read_methods(kind)
    return reading.keeps_state or (reading.sets_items and reading.has_tensors)


class _Reading:
    """One callable, and all that it leads to."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._seen: set[int] = set()
        self.keeps_state = False
        self.looks_across = False
        self.works_in_place = False
        self.sets_items = False
        self.slices = False
        self.has_tensors = False

    def read(self, call: Any) -> None:
        """Read a callable, once."""
        if id(call) in self._seen:
            return
        self._seen.add(id(call))
        if isinstance(call, partial):
            self.read(call.func)
            self.reach([*call.args, *call.keywords.values()])
        elif isinstance(call, types.MethodType):
            if _is_own_forward(call):
                return
            self.read(call.__func__)
            self.reach([call.__self__])
        elif callable(inner := getattr(call, "_torchdynamo_orig_callable", None)):
            self.read(inner)
        elif isinstance(call, types.FunctionType):
            if not is_of_library(call) or call.__closure__:
                self._read_function(call)
        elif not inspect.isroutine(call):
            self.reach([call])
            if isinstance(method := inspect.getattr_static(type(call), "__call__", None), types.FunctionType):
                self.read(method)

    def read_methods(self, kind: type) -> None:
        """Read the methods that a class brings."""
        for name, method in vars(kind).items():
            if isinstance(method, types.FunctionType) and name not in _MAKES:
                self._read_codes(method)

    def _read_function(self, function: types.FunctionType) -> None:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        self.reach([*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
        if not is_of_library(function):  # else only what it was given is others'
            self._read_codes(function)

    def _read_codes(self, function: types.FunctionType) -> None:
        outer = set(function.__code__.co_freevars)
        for code in _codes(function.__code__):
            if any(isinstance(names, tuple) and "out" in names for names in code.co_consts):
                self.keeps_state = self.works_in_place = True  # a keyword: the result goes into what is there
            for step in dis.get_instructions(code):
                self._read_step(step, outer, function.__globals__)

    def _read_step(self, step: dis.Instruction, outer: set[str], names: dict[str, Any]) -> None:
        name = step.argval if isinstance(step.argval, str) else ""
        if step.opname in _STORES or (step.opname in _REBINDS and name in outer) or name in _HIDDEN_STORES:
            self.keeps_state = True
        self.slices |= step.opname in ("BUILD_SLICE", "BINARY_SLICE", "STORE_SLICE")
        self.sets_items |= step.opname in ("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR")
        self.looks_across |= name in _ACROSS or step.argrepr in ("@", "@=")
        self.keeps_state |= name in _DRAWS
        if step.opname == "IMPORT_NAME" and not _is_trusted(name):
            self.keeps_state = True
        if step.opname == "LOAD_GLOBAL":
            self.reach([names[name]] if name in names else [])
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            self._read_attribute(name)

    def _read_attribute(self, name: str) -> None:
        if name.endswith("_") and not name.startswith("_"):  # torch's operations in place
            self.keeps_state = self.works_in_place = True
        own = getattr(self._owner, "__dict__", {})
        if name in own:
            self.reach([own[name]])
        elif name in own.get("_buffers", ()) or name in own.get("_parameters", ()):
            self.has_tensors = True
        elif self._owner is not None:
            found = inspect.getattr_static(type(self._owner), name, None)
            if isinstance(found, (types.FunctionType, *_CHANGEABLE)):
                self.reach([found])

    def reach(self, values: Iterable[Any]) -> None:
        """What the function can get at: others' functions are read as well, and what may change is state."""
        for value in values:
            self.has_tensors |= isinstance(value, Tensor)
            if value is self._owner or isinstance(value, (Tensor, *_CONSTANTS, *_STILL)):
                continue
            if isinstance(value, (tuple, frozenset)):
                self.reach(value)
            elif isinstance(value, _OF_C):
                if not isinstance(value.__self__, (types.ModuleType, type)):  # a method: of what may change
                    self.reach([value.__self__])
            elif isinstance(value, (types.FunctionType, types.MethodType, partial)):
                self.read(value)
            elif id(value) not in self._seen:
                self._seen.add(id(value))
                self._reach_object(value)

    def _reach_object(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self.keeps_state |= not _is_trusted(value.__name__)
        elif isinstance(value, type):
            is_others = not _is_trusted(value.__module__)
            self.reach([found for found in vars(value).values() if is_others and isinstance(found, _CHANGEABLE)])
        elif isinstance(value, nn.Module):
            self.keeps_state |= not _is_trusted(type(value).__module__)
        elif isinstance(value, _CHANGEABLE) or not hasattr(value, "__dict__"):
            self.keeps_state |= isinstance(value, _CHANGEABLE) or not callable(value)  # C functions keep nothing
        else:
            self.reach(list(vars(value).values()))
            for kind in type(value).__mro__:
                if not _is_trusted(kind.__module__):
                    self.read_methods(kind)


def _is_own_forward(call: types.MethodType) -> bool:
    """Whether this is a module's forward as its class has it; whether that was replaced is looked for there."""
    owner: Any = call.__self__
    return isinstance(owner, nn.Module) and call.__func__ is getattr(type(owner), "forward", None)


def _is_trusted(home: str) -> bool:
    top = home.partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _returns_nothing(call: Callable[..., Any]) -> bool:
    """Whether every way out of a function gives None."""
    function = plain_function(call)
    if not inspect.isroutine(function):
        function = plain_function(inspect.getattr_static(type(function), "__call__", None))
    if not isinstance(function, types.FunctionType):
        return False
    steps = list(dis.get_instructions(function.__code__))
    if function.__code__.co_name == "<lambda>" and any(
        (step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in _RETURN_NONE) or step.argval == "print"
        for step in steps
    ):
        return True
    return all(
        before.opname == "LOAD_CONST" and before.argval is None and not step.is_jump_target
        for before, step in pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ) and not any(step.opname == "RETURN_CONST" and step.argval is not None for step in steps)
