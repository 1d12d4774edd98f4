"""Which arguments a pipeline cannot do without, though its signature gives them the default None.

Owns the reading of `__call__`: an argument that goes into a processor, or is taken apart, without a word on None is
needed. In doubt it is not. Does not know values.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

_DEEPEST = 3  # calls within calls
_REFUSES = "check_inputs"  # which asks for None in order to refuse it
_PROCESSOR = "processor"
_INSTEAD = ("latents", "image_latents", "image_embeds")


@functools.lru_cache(512)
def does_without(owner: type, name: str) -> bool:
    """Whether a pipeline's `__call__` may be given None for an argument, as far as its source tells.

    Args:
        owner: the pipeline's class.
        name: of the argument.

    Cost: the source is parsed, about 10 CPU ms; kept for each class and name.
    """
    return _does_without(owner, inspect.unwrap(vars_of(owner, "__call__")), name, _DEEPEST)


def vars_of(owner: type, name: str) -> Any:
    """A method as it stands in the class, without its wrappers; None where there is none."""
    found = inspect.getattr_static(owner, name, None)
    return getattr(found, "__func__", found)


def _does_without(owner: type, function: Any, name: str, depth: int) -> bool:
    tree = _tree(function) if inspect.isfunction(function) else None
    if tree is None or not depth or any(_asks(node, name) for node in ast.walk(tree)):
        return True
    last = _line_of_new_value(tree, name)
    others = {one.arg for one in ast.walk(tree) if isinstance(one, ast.arg)} - {"self", name, *_INSTEAD}
    uses = [node for node in _always_run(tree, others) if getattr(node, "lineno", last) <= last]
    if not any(_is(node, name) and isinstance(node.ctx, ast.Load) for node in uses):  # type: ignore[attr-defined]
        return True
    calls = [node for node in uses if isinstance(node, ast.Call)]
    return any(_callee_does_without(owner, function, call, name, depth) for call in calls)


def _always_run(node: ast.AST, others: set[str]) -> Iterator[ast.AST]:
    """A piece of source and its parts, without what runs for some values of other arguments only."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == _REFUSES:
        return
    yield node
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, (ast.If, ast.IfExp)) and any(
        isinstance(one, ast.Name) and one.id in others for one in ast.walk(node.test)
    ):
        parts = [node.test]
    for part in parts:
        yield from _always_run(part, others)


def _line_of_new_value(tree: ast.AST, name: str) -> float:
    """The line from which on the name stands for something else, such as the picture that was made."""
    stores = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(_is(one, name) for one in _targets(node))
    ]
    return min((node.end_lineno or node.lineno for node in stores), default=float("inf"))


def _targets(node: ast.Assign) -> Iterator[ast.AST]:
    for target in node.targets:
        yield from target.elts if isinstance(target, ast.Tuple) else (target,)


def _callee_does_without(owner: type, function: Any, call: ast.Call, name: str, depth: int) -> bool:
    """Whether the argument goes into a call that may be given None for it."""
    places: list[int | str | None] = [index for index, value in enumerate(call.args) if _is(value, name)]
    places += [keyword.arg for keyword in call.keywords if _is(keyword.value, name)]
    if not places:
        return False
    words = ast.unparse(call.func).split(".")
    if any(_PROCESSOR in word for word in words) or hasattr(builtins, words[0]):
        return False
    callee: Any = None
    if len(words) == 2 and words[0] == "self":
        callee = inspect.unwrap(vars_of(owner, words[1]) or _nothing)
    elif len(words) == 1:
        callee = function.__globals__.get(words[0])
    if not inspect.isfunction(callee):
        return words[0] not in ("PIL", "np", "torch")
    names = [one for one in inspect.signature(callee).parameters if one != "self"]
    given = [_named(place, names) for place in places]
    return all(_does_without(owner, callee, one, depth - 1) for one in given if one)


def _nothing() -> None:
    pass


def _named(place: int | str | None, names: list[str]) -> str:
    """The parameter at a place or of a name; empty where there is none."""
    if isinstance(place, int):
        return names[place] if place < len(names) else ""
    return place if place in names else ""


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _asks(node: ast.AST, name: str) -> bool:
    """Whether a piece of source looks whether the argument is there, and does not refuse it then."""
    if isinstance(node, ast.If) and all(isinstance(one, ast.Raise) for one in node.body):
        return False
    return any(_compares(one, name) for one in _conditions(node))


def _conditions(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield from _parts(node.test)
    elif isinstance(node, ast.BoolOp):
        yield from node.values


def _parts(test: ast.AST) -> Iterator[ast.AST]:
    """A condition, and what it is put together from."""
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _parts(value)
    elif isinstance(test, ast.UnaryOp):
        yield from _parts(test.operand)
    else:
        yield test


def _compares(test: ast.AST, name: str) -> bool:
    if _is(test, name):
        return True
    if not isinstance(test, ast.Compare):
        return False
    sides = [test.left, *test.comparators]
    has_none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
    return has_none and any(_is(side, name) for side in sides)


@functools.lru_cache(512)
def _tree(function: Callable[..., Any]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # it was typed in, or made by a program
        return None
