"""The house stands as drawn: six files at the top, imports one way, short files and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRONT = ("configurator", "lora", "model", "dataloader", "generate", "train")
# A room may import the rooms before it: files at the top, folders behind them.
ORDER = ("configurator", "lora", "checkpoints", "runtime", "model", "models", "methods", "tasks",
         "dataloader", "generate", "train", "bench", "experiments", "pretraining", "preferences",
         "teaching", "demo")
LONGEST = {"lora": 260, "model": 390, "dataloader": 330, "train": 400, "generate": 380,
           "configurator": 140}
SOURCES = sorted(path for path in ROOT.rglob("*.py")
                 if path.relative_to(ROOT).parts[0] in {*ORDER, *(f"{name}.py" for name in FRONT)})


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of this project that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        yield from (name for name in names if name.partition(".")[0] in ORDER)


def room(name: str) -> str:
    return name.partition(".")[0]


def backward_arrows(arrows: dict[str, set[str]]) -> list[str]:
    return [f"{name} imports {other}" for name, others in arrows.items() for other in others
            if ORDER.index(room(other)) > ORDER.index(room(name))
            or (name in ("lora", "configurator"))]


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Return the names that lie on a circle, or behind one: what is left without leaves."""
    left = {name: set(others) for name, others in arrows.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    return set(left)


ARROWS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def test_imports_run_one_way_between_rooms() -> None:
    assert sum(map(len, ARROWS.values())) > 100
    assert backward_arrows(ARROWS) == []


def test_imports_make_no_circle_between_files() -> None:
    assert circles(ARROWS) == set()


@pytest.mark.parametrize(("arrows", "expected"), [
    ({"model": {"train"}}, ["model imports train"]),
    ({"tasks.base": {"dataloader"}}, ["tasks.base imports dataloader"]),
    ({"lora": {"configurator"}}, ["lora imports configurator"]),
    ({"experiments.plan": {"train"}}, []),
])
def test_an_arrow_that_runs_back_is_seen(
    arrows: dict[str, set[str]], expected: list[str]
) -> None:
    assert backward_arrows(arrows) == expected


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_six_files_stand_at_the_top() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(FRONT)


def test_every_folder_with_code_is_in_the_order() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "config"}
    assert folders <= set(ORDER)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST.get(module(path), 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = 60 if (module(path), node.name) == ("train", "fit") else 40
            assert node.end_lineno - node.lineno < limit, f"{path}:{node.lineno} {node.name}"


def test_tests_mirror_the_tree() -> None:
    rooms = {path.parent for path in SOURCES if path.parent != ROOT}
    for folder in rooms:
        assert list((ROOT / "tests" / folder.name).glob("test_*.py")), folder.name
    for path in (ROOT / "tests").glob("*/test_*.py"):
        assert ROOT / path.parent.name in rooms


def test_nothing_that_was_saved_is_unpickled_or_executed() -> None:
    loads = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("exec", "eval", "pickle.load", "pickle.loads"), path
                loads += [ast.unparse(node)] if call == "torch.load" else []
    assert loads
    assert all("weights_only=True" in load for load in loads)
