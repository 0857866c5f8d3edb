"""Grade a submission: unpack it over the handout, run it in the sandbox, write the results."""

import ast
import io
import json
import py_compile
import shutil
import stat
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gradescope_utils.autograder_utils.json_test_runner import JSONTestRunner

from checkpoints.files import write_json
from tasks.scores import table
from teaching.parts import CUTS, FRONT
from teaching.rubric import RUBRIC
from teaching.sandbox import Limits, Sandbox
from teaching.starter import handout_sources
from teaching.suite import make_suite

RESULTS = "results.json"
LARGEST = 4 * 2**20  # bytes of a submission's sources
MOST = 500  # files
# Folders that are not graded; the last is what macOS adds to a zip.
FOREIGN = ("teaching", "tests", "__pycache__", ".git", ".venv", "__MACOSX")
HOMEWORK = frozenset({*FRONT, *(cut.file for cut in CUTS)})
# A file that would hide one of these modules is no part of an answer.
OWN = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}


class Grade(NamedTuple):
    """The points of one submission: Gradescope's results, and which protection held."""

    results: dict[str, Any]
    holds: list[str]

    @property
    def points(self) -> dict[str, float]:
        """The points of each test, by its name in the rubric."""
        named = {row.number: name for name, row in RUBRIC.items()}
        return {named[test["number"]]: test["score"] for test in self.results["tests"]}


def read_submission(path: Path) -> dict[str, str]:
    """Return the Python files of a folder or a zip by their paths in it.

    The folders above the homework's files are left out of the paths. Raises ValueError for what is
    no submission or too large, OSError for what cannot be read.
    """
    if path.is_dir():
        found = folder_files(path)
    elif zipfile.is_zipfile(path):
        found = zip_files(path)
    else:
        raise ValueError(f"submission={str(path)!r} must be a folder or a zip")
    files: dict[str, str] = {}
    for name, data in found:
        files[name] = data.decode("utf-8", "replace")
        if len(files) > MOST or sum(map(len, files.values())) > LARGEST:
            raise ValueError(f"{path}: more than {MOST} Python files or {LARGEST:,} bytes")
    if not files:
        raise ValueError(f"{path} holds no Python file")
    above = folder_above(files)
    if above is None:
        raise ValueError(f"{path} holds none of {', '.join(sorted(HOMEWORK))}")
    return {name.removeprefix(above): text for name, text in files.items()
            if name.startswith(above)}


def folder_above(names: Iterable[str]) -> str | None:
    """Return the path before most of the homework's files, "" or with a slash; None without any."""
    found = Counter(name.removesuffix(file) for name in names for file in HOMEWORK
                    if f"/{name}".endswith(f"/{file}"))
    return min(found, key=lambda above: (-found[above], len(above)), default=None)


def graded(name: str) -> bool:
    """Tell whether a path of a submission is a Python file to grade."""
    parts = PurePosixPath(name).parts
    return (name.endswith(".py") and not name.startswith("/") and ".." not in parts
            and not set(parts) & set(FOREIGN))


def folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.rglob("*.py")):
        name = file.relative_to(path).as_posix()
        if graded(name) and file.is_file() and not file.is_symlink():
            with open(file, "rb") as source:
                yield name, source.read(LARGEST + 1)


def zip_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a zip; a link in it is no file, and no size it states is believed."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if graded(info.filename) and not stat.S_ISLNK(info.external_attr >> 16):
                try:
                    with archive.open(info) as source:
                        yield info.filename, source.read(LARGEST + 1)
                except (RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
                    raise ValueError(f"{path}: {info.filename}: {error}") from None


class Workshop:
    """The handout, or other `sources`, compiled once, over which each submission is laid."""

    def __init__(
        self, assigned: str, folder: Path, sources: Mapping[str, str] | None = None
    ) -> None:
        self.names = [name for name, row in RUBRIC.items() if row.part in assigned.split(",")]
        self.sources = dict(sources or handout_sources(assigned))
        self.compiled: dict[str, Path] = {}
        for file, text in self.sources.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            self.compiled[file] = Path(py_compile.compile(str(path), invalidation_mode=mode))

    @property
    def preload(self) -> dict[str, list[str]]:
        """The modules of others that the handout imports, and what it takes from them."""
        own = {PurePosixPath(file).parts[0].removesuffix(".py") for file in self.sources}
        found: dict[str, set[str]] = {}
        for text in self.sources.values():
            for node in ast.parse(text).body:
                if isinstance(node, ast.Import):
                    found |= {alias.name: set() for alias in node.names if alias.name not in found}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    taken = found.setdefault(node.module, set())
                    taken |= {alias.name for alias in node.names}
        return {name: sorted(taken) for name, taken in sorted(found.items())
                if name.partition(".")[0] not in own}

    def lay_out(self, submission: Mapping[str, str], folder: Path) -> None:
        """Write handout and submission to `folder`, and take the right to write away."""
        for file, text in (self.sources | submission).items():
            if submission.get(file, text) != self.sources.get(file) and is_foreign(file):
                continue
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            if text == self.sources.get(file):
                own = self.compiled[file]
                cache = path.parent / own.parent.name
                cache.mkdir(exist_ok=True)
                shutil.copyfile(own, cache / own.name)
        for path in folder.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        folder.chmod(0o555)


def is_foreign(file: str) -> bool:
    """Tell whether a file would stand in for a module of Python's or torch."""
    return PurePosixPath(file).parts[0].removesuffix(".py") in OWN


@contextmanager
def laid_out(workshop: Workshop, submission: Mapping[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "submission"
        folder.mkdir()
        folder.parent.chmod(0o755)
        workshop.lay_out(submission, folder)
        try:
            yield folder
        finally:
            for path in [folder, *folder.rglob("*")]:
                if path.is_dir():
                    path.chmod(0o755)


def grade(workshop: Workshop, sandbox: Sandbox, submission: Mapping[str, str]) -> Grade:
    """Run the tests of the assigned parts on a submission's files."""
    with laid_out(workshop, submission) as folder:
        seen, holds = sandbox.observe(folder, workshop.names)
    stream = io.StringIO()
    JSONTestRunner(stream=stream, visibility="visible", stdout_visibility="hidden").run(
        make_suite(seen, workshop.names))
    results = json.loads(stream.getvalue())
    results["execution_time"] = float(results["execution_time"])
    results["score"] = round(results["score"], 2)
    results["output"] = about(holds)
    return Grade(results, holds)


def about(holds: Sequence[str]) -> str:
    kernel = ", ".join(holds) if holds else "nothing: this system has no namespaces for it"
    return f"The submission ran in limited processes. The system ensured: {kernel}."


@contextmanager
def open_workshop(assigned: str, limits: Limits) -> Iterator[tuple[Workshop, Sandbox]]:
    """Prepare the handout and start the worker."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(assigned, Path(folder))
        with Sandbox(limits, workshop.preload) as sandbox:
            yield workshop, sandbox


def grade_path(path: Path, assigned: str, limits: Limits, out: Path) -> Grade:
    """Grade the folder or zip at `path` and write `results.json` to the folder `out`.

    What is no submission gets results without a test, then raises as `read_submission` does.
    """
    try:
        files = read_submission(path)
    except (ValueError, OSError) as error:
        write_json(out / RESULTS, {"score": 0.0, "output": str(error), "tests": []})
        raise
    with open_workshop(assigned, limits) as (workshop, sandbox):
        result = grade(workshop, sandbox, files)
    write_json(out / RESULTS, result.results)
    return result


def show(result: Grade) -> str:
    """Return the results as a table for people, then what each failed test said."""
    rows, said = [], []
    for test in result.results["tests"]:
        rows.append({"test": test["number"], "what": test["name"],
                     "points": f"{test['score']:g} of {test['max_score']:g}"})
        if text := test.get("output", "").strip():
            said.append(f"{test['number']} {test['name']}: {text}")
    total = sum(test["max_score"] for test in result.results["tests"])
    return "\n".join([table(rows), "", *said, *[""] * bool(said), result.results["output"],
                      f"{result.results['score']:g} of {total:g} points"])
