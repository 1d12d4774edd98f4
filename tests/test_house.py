"""The rules of the house, as `docs/architecture.md` states them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import processes

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


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def forbidden_imports(path: Path) -> Iterator[str]:
    unit = unit_of(path)
    for name, is_inside in imports(tree_of(path)):
        other = own_unit(name)
        if unit not in ("__init__", "__main__") and other not in {None, unit} | MAY_IMPORT[unit]:
            yield f"{unit} may not import {name}"
        if is_inside and other and unit != "cli":
            yield f"{name} is imported inside a function"


def heavy_imports(path: Path) -> Iterator[str]:
    loud = [name for name, is_inside in imports(tree_of(path)) if not is_inside]
    for name in loud:
        if name.split(".")[0] in HEAVY:
            yield f"imports {name} when it loads"
        if unit_of(path) == "cli" and own_unit(name) in {"weights", "models", "engine", "media"}:
            yield f"imports {name} when it loads"


def large_parts(path: Path) -> Iterator[str]:
    num_lines = len(path.read_text("utf-8").splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{num_lines} lines, at most {MAX_FILE_LINES}"
    for function in functions(path):
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            yield f"{function.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        if count > MAX_PARAMETERS:
            yield f"{function.name} has {count} parameters, at most {MAX_PARAMETERS}"


def broad_excepts(path: Path) -> Iterator[str]:
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    yield from (f"line {node.lineno}: bare except" for node in handlers if node.type is None)
    names = [node.type.id for node in handlers if isinstance(node.type, ast.Name)]
    broad = sum(name in ("Exception", "BaseException") for name in names)
    listed = BROAD_EXCEPTS.get(str(path.relative_to(PACKAGE)), 0)
    if broad != listed:
        yield f"{broad} broad excepts, where {listed} are listed"


def missing_docstrings(path: Path) -> Iterator[str]:
    tree = tree_of(path)
    if not ast.get_docstring(tree):
        yield "the module has no docstring"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in [tree, *classes]:
        for node in owner.body:
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{node.name} has no docstring"


def missing_tests(path: Path) -> Iterator[str]:
    inside = path.relative_to(PACKAGE)
    if inside.name == "__init__.py" and len(inside.parts) > 1:
        return  # a folder's docstring
    name = "test_package.py" if inside.stem in ("__init__", "__main__") else f"test_{inside.stem}.py"
    if not (ROOT / "tests" / inside.parent / name).is_file():
        yield f"tests/{inside.parent / name} is not there"


def offences(rule: Callable[[Path], Iterator[str]], paths: list[Path]) -> str:
    """What a rule finds in some files, one line each; nothing where it is kept."""
    return "\n".join(f"{relative(path)}: {offence}" for path in paths for offence in rule(path))


def test_imports_run_one_way_and_only_the_command_line_hides_them() -> None:
    assert not (found := offences(forbidden_imports, SOURCES)), found


def test_torch_free_units_import_nothing_heavy() -> None:
    assert not (found := offences(heavy_imports, [path for path in SOURCES if unit_of(path) in TORCH_FREE])), found


def test_files_and_functions_are_small() -> None:
    assert not (found := offences(large_parts, [*SOURCES, *OTHER_SOURCES])), found


def test_files_are_named_by_nouns() -> None:
    assert not (found := [relative(path) for path in [*SOURCES, *OTHER_SOURCES] if path.stem in BANNED_NAMES]), found


def test_exceptions_are_caught_by_name() -> None:
    assert not (found := offences(broad_excepts, SOURCES)), found


def test_every_public_name_has_a_docstring() -> None:
    assert not (found := offences(missing_docstrings, SOURCES)), found


def test_every_source_has_its_test() -> None:
    assert not (found := offences(missing_tests, SOURCES)), found


ROGUE = """
import torch
def f(a, b, c, d, e, f, g, h, i):
    from penstock.engine import build
    try:
        pass
    except Exception:
        pass
    except:
        pass
""" + "\n".join(["    a = 1"] * 400)


def test_every_rule_finds_its_offender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.test_house.PACKAGE", tmp_path)
    monkeypatch.setattr("tests.test_house.ROOT", tmp_path)
    path = tmp_path / "media" / "rogue.py"
    path.parent.mkdir()
    path.write_text(ROGUE, "utf-8")
    expected = {
        forbidden_imports: ["media may not import penstock.engine", "penstock.engine is imported inside a function"],
        heavy_imports: ["imports torch when it loads"],
        large_parts: ["410 lines", "f has 408 lines, at most 60", "f has 9 parameters, at most 8"],
        broad_excepts: ["line 9: bare except", "1 broad excepts, where 0 are listed"],
        missing_docstrings: ["the module has no docstring", "f has no docstring"],
        missing_tests: ["tests/media/test_rogue.py is not there"],
    }
    for rule, sayings in expected.items():
        found = offences(rule, [path])
        assert all(saying in found for saying in sayings), found
        assert found.count("media/rogue.py: ") == len(sayings)


def test_importing_penstock_is_light() -> None:
    code = "import sys, penstock; print(sorted({'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_needs_no_torch() -> None:
    code = "import sys, penstock.cli.app; print('torch' in sys.modules)"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


STARTERS = {
    "subprocess": {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {"fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "spawnv", "spawnve", "spawnvp"},
    "multiprocessing": {"Process", "Pool", "get_context", "Manager"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
}
MAY_START = {"tests/processes.py", "tests/ranks.py"}


def starts(tree: ast.AST) -> set[str]:
    """What a file names that starts processes: as an attribute of its module, or imported from it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "", alias.name) for alias in node.names)
    return {f"{module}.{name}" for module, name in found if name in STARTERS.get(module.partition(".")[0], ())}


def test_processes_of_tests_are_started_in_one_place() -> None:
    """There they are bound to the test; elsewhere one could outlive it."""
    paths = [path for path in OTHER_SOURCES if relative(path).startswith("tests/")]
    found = {relative(path): names for path in paths if (names := starts(ast.parse(path.read_text("utf-8"))))}
    assert found.keys() == MAY_START, found


@pytest.mark.parametrize(
    "code", ["subprocess.run([])", "from subprocess import Popen", "class A(subprocess.Popen): ...", "os.fork()"]
)
def test_a_process_started_elsewhere_is_found(code: str) -> None:
    assert starts(ast.parse(code)) and not starts(ast.parse("processes.run([]); subprocess.PIPE"))
