"""The rules of the house, as `docs/architecture.md` states them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "penstock"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OTHER_SOURCES = [
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "demo").glob("*.py")),  # not demo/work, where training leaves its results
    *sorted((ROOT / "demo" / "video").glob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]

NOUNS = {
    *("bytesize", "config", "errors", "machine", "plan", "profile", "report", "request", "timeline", "undo", "waits"),
    "interception",
    "wire",
}
MAY_IMPORT = {
    **{noun: NOUNS for noun in NOUNS},
    "weights": NOUNS,
    "models": NOUNS | {"weights"},
    "planner": NOUNS,
    "offload": NOUNS | {"weights", "models"},
    "distributed": NOUNS | {"models"},
    "media": NOUNS,
    "engine": NOUNS | {"weights", "models", "planner", "offload", "distributed", "media"},
    "server": NOUNS | {"media", "engine"},
    "cli": NOUNS | {"weights", "models", "media", "planner", "offload", "distributed", "engine", "server"},
}
TORCH_FREE = NOUNS | {"media", "planner", "cli", "server"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate"}
BANNED_NAMES = {"util", "utils", "common", "misc", "helper", "helpers", "base", "manager"}
BROAD_EXCEPTS = {
    "engine/fleet.py": 1,
    "engine/generate.py": 1,
    "engine/tasks.py": 1,
    "engine/work.py": 1,
    "engine/worker.py": 1,
    "cli/failures.py": 1,
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8


def unit_of(path: Path) -> str:
    """The top-level unit a source file belongs to: its folder, or its own name."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, is inside a function) of every import that runs."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or "", inside_function
        yield from imports(child, inside_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def own_unit(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "penstock" and len(parts) > 1 else None


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    unit = unit_of(path)
    if unit in ("__init__", "__main__"):
        return
    for name, _ in imports(ast.parse(path.read_text("utf-8"))):
        other = own_unit(name)
        assert other in {None, unit} | MAY_IMPORT[unit], f"{unit} may not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_command_line_imports_our_own_modules_inside_functions(path: Path) -> None:
    if unit_of(path) == "cli":
        return
    hidden = [name for name, inside in imports(ast.parse(path.read_text("utf-8"))) if inside and own_unit(name)]
    assert not hidden


@pytest.mark.parametrize("path", [path for path in SOURCES if unit_of(path) in TORCH_FREE], ids=relative)
def test_torch_free_units_import_nothing_heavy(path: Path) -> None:
    loud = [name for name, inside in imports(ast.parse(path.read_text("utf-8"))) if not inside]
    assert not HEAVY & {name.split(".")[0] for name in loud}
    if unit_of(path) == "cli":
        assert not {own_unit(name) for name in loud} & {"weights", "models", "engine", "media"}


@pytest.mark.parametrize("path", [*SOURCES, *OTHER_SOURCES], ids=relative)
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        assert (function.end_lineno or 0) - function.lineno < MAX_FUNCTION_LINES, function.name
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        assert count <= MAX_PARAMETERS, function.name


@pytest.mark.parametrize("path", [*SOURCES, *OTHER_SOURCES], ids=relative)
def test_files_are_named_by_nouns(path: Path) -> None:
    assert path.stem not in BANNED_NAMES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_exceptions_are_caught_by_name(path: Path) -> None:
    broad = 0
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "bare except"
            broad += isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    assert broad == BROAD_EXCEPTS.get(str(path.relative_to(PACKAGE)), 0)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), "module docstring"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in [tree, *classes]:
        for node in owner.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_source_has_its_test(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    if inside.name == "__init__.py" and len(inside.parts) > 1:
        return  # a folder's docstring
    name = "test_package.py" if inside.stem in ("__init__", "__main__") else f"test_{inside.stem}.py"
    assert (ROOT / "tests" / inside.parent / name).is_file()


def test_importing_penstock_is_light() -> None:
    code = "import sys, penstock; print(sorted({'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_servers_process_needs_no_torch() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in SOURCES
        if unit_of(path) == "server"
    ]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {names}]; print({HEAVY} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_needs_no_torch() -> None:
    code = "import sys, penstock.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
