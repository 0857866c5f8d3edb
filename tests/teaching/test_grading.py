"""The grader is graded: solution, starter, a plain submission, mistakes, and hostile code."""

import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_mutants import MUTANTS, Mutant
from made_plain import plain_submission

import teaching.__main__
from configurator import ROOT
from teaching.checks import CHECKS
from teaching.cutting import without_function
from teaching.grading import Grade, Workshop, grade, open_workshop, read_submission, show
from teaching.model_probes import PROBES
from teaching.parts import CUTS, FIRST, SECOND, read_solution
from teaching.rubric import RUBRIC
from teaching.sandbox import Limits, Sandbox
from teaching.starter import needed_files

ALL = ",".join(FIRST + SECOND)
SOLUTION = {each.file: read_solution(each.file) for each in CUTS}
Bench = tuple[Workshop, Sandbox]
LIMITS = Limits(seconds=4, total_seconds=60, memory_mib=512)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "secret-key")
        with open_workshop(ALL, LIMITS) as opened:
            yield opened


@pytest.fixture(scope="module")
def solved(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The solution in place of the handout: a submission is only what differs from it."""
    sources = {file: read_solution(file) for file in needed_files()}
    return Workshop(ALL, tmp_path_factory.mktemp("solved"), sources), bench[1]


def lost(result: Grade) -> dict[str, float]:
    """Return the points that a submission lost, by test."""
    return {name: round(RUBRIC[name].points - points, 2)
            for name, points in result.points.items() if points < RUBRIC[name].points}


def said(result: Grade, name: str) -> str:
    """Return what a failed test said."""
    (test,) = [each for each in result.results["tests"]
               if each["number"] == RUBRIC[name].number]
    return test.get("output", "")


def mutated(mutant: Mutant) -> dict[str, str]:
    source = read_solution(mutant.file)
    for old, new in mutant.changes:
        assert source.count(old) == 1, f"{mutant.name}: {old}"
        source = source.replace(old, new)
    return {mutant.file: source}


def test_rubric_probes_and_checks_name_the_same_tests_and_give_25_points() -> None:
    assert RUBRIC.keys() == PROBES.keys() == CHECKS.keys()
    assert sum(row.points for row in RUBRIC.values() if row.part in FIRST) == 25
    assert {row.part for row in RUBRIC.values()} == {*FIRST, *SECOND}
    assert len({row.number for row in RUBRIC.values()}) == len(RUBRIC)
    assert {row.visible for row in RUBRIC.values()} == {True, False}


def test_solution_gets_all_points_the_starter_none_and_each_mistake_its_own(
    bench: Bench, solved: Bench
) -> None:
    solution = grade(*bench, SOLUTION)
    assert lost(solution) == {}, show(solution)
    assert solution.results["score"] == sum(row.points for row in RUBRIC.values())
    starter = grade(*bench, {"notes.py": ""})
    assert set(starter.points.values()) == {0.0}
    for name, row in RUBRIC.items():
        assert f"TODO {row.part}" in said(starter, name) or row.part == "training"
    assert len(MUTANTS) >= 25
    assert {mutant.test for mutant in MUTANTS} == RUBRIC.keys()
    for mutant in MUTANTS:
        result = grade(*solved, mutated(mutant))
        assert lost(result).keys() == {mutant.test, *mutant.also}, f"{mutant.name}: {show(result)}"
        assert RUBRIC[mutant.test].look in said(result, mutant.test)


def test_submission_without_our_extras_gets_all_points(bench: Bench) -> None:
    files = plain_submission()
    for extra in ("lora_groups", "_save_to_state_dict", "adapter", "lora_scaling", "from_linear"):
        layer = files["lora.py"].partition("class LoRALinear")[2].partition("\ndef ")[0]
        assert extra not in layer
    result = grade(*bench, files)
    assert set(lost(result)) == {name for name, row in RUBRIC.items() if row.part in SECOND}
    assert result.results["score"] == 25


# Each is the body of mark_only_lora_as_trainable, and what its test should say.
HOSTILE = {
    "hangs": ("while True: pass", "it takes longer than 4 s"),
    "exits": ("import sys; sys.exit(0)", "it ends the process, with exit code 0"),
    "exits at once": ("import os; os._exit(3)", "it ends the process, with exit code 3"),
    "dies": ("import ctypes; ctypes.string_at(0)", "it dies of SIGSEGV"),
    "floods": ("while True: print('x' * 10_000)", "it writes more than 1 MiB"),
    "forks": ("import os\n    while True: os.fork()", "it starts another process"),
    "starts a program": ("import subprocess; subprocess.run(['ls'])", "starts another process"),
    "takes all memory": ("return torch.ones(2**31)", "it needs more memory"),
    "raises": ("raise KeyboardInterrupt('now')", "KeyboardInterrupt: now (lora.py:"),
    "recurses": ("return mark_only_lora_as_trainable(model)", "RecursionError"),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', 9))", "uses the network"),
    "rewrites the tests": (f"open({str(ROOT / 'teaching/checks.py')!r}, 'w')", "it writes /"),
    "rewrites itself": ("open(__file__, 'a')", "it writes /"),
    "reads the solution": (f"print(open({str(ROOT / 'lora.py')!r}).read())", "it reads /"),
    "imports the solution": (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, teaching.checks",
        "trainable"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "it sends a signal"),
    "prints a result": (
        """print('["", "done", {"value": {"from_True": [], "from_False": []}}]')""",
        "Expected lora_A and lora_B"),
    "writes a result": (
        """import os
    for number in range(3, 64):
        try: os.write(number, b'["", "done", {"value": {}}]\\n')
        except OSError: pass""", "it writes to the grader's pipe"),
}


def hostile(body: str) -> dict[str, str]:
    name = "mark_only_lora_as_trainable"
    source = without_function(SOLUTION["lora.py"], name, f"def {name}(model):\n    {body}")
    return {"lora.py": source}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_loses_its_test_alone_and_hears_why(solved: Bench, name: str) -> None:
    body, message = HOSTILE[name]
    result = grade(*solved, hostile(body))
    assert lost(result) == {"trainable": 2.0}, show(result)
    assert message in said(result, "trainable")
    assert len(said(result, "trainable").strip().splitlines()) == 1


def test_what_python_does_not_see_the_kernel_refuses(solved: Bench) -> None:
    """The hook knows Python's calls alone; ctypes reaches the kernel without it."""
    source, target = (os.fsencode(ROOT / name) for name in ("lora.py", "teaching"))
    result = grade(*solved, hostile(f"""import ctypes
    libc = ctypes.CDLL(None)
    seen = ctypes.create_string_buffer(100)
    count = libc.read(libc.open({source!r}, 0), seen, 100)
    made = [libc.open({target!r} + b'/x', 0o101, 0o600), libc.open(b'/tmp/x', 0o101, 0o600)]
    freed = [libc.umount({source!r}), libc.umount2({target!r}, 2)]
    address = bytes([2, 0, 0, 9, 127, 0, 0, 1]) + bytes(8)
    linked = libc.connect(libc.socket(2, 1, 0), address, 16)
    raise ValueError(str([count, made, freed, linked]))"""))
    if not result.holds:
        pytest.skip("this system has no namespaces")
    assert "ValueError: [0, [-1, -1], [-1, -1], -1]" in said(result, "trainable")
    assert "The system ensured: no network" in result.results["output"]


def test_code_that_hangs_or_fails_at_import_costs_its_own_tests(solved: Bench) -> None:
    generate = read_solution("generate.py")
    for text, message in (("raise RuntimeError('no')\n", "importing generate fails: RuntimeError"),
                          ("while True: pass\n", "it takes longer than 4 s"),
                          ("def f(:\n", "importing generate fails: SyntaxError")):
        result = grade(*solved, {"generate.py": text + generate})
        assert lost(result) == {"labels": 2.0, "garbage": 1.0, "prompts": 1.0}
        assert all(message in said(result, name) for name in ("labels", "garbage", "prompts"))


def test_no_process_is_left_behind(solved: Bench) -> None:
    """A process that leaves its group, by the kernel's own call, ends with its submission."""
    def found() -> set[Path]:
        return {path for path in Path("/proc").glob("[0-9]*/environ") if running(path, solved)}

    before = found()  # workers of tests that run beside this one
    grade(*solved, hostile("""import ctypes, os
    libc = ctypes.CDLL(None)
    if libc.fork() == 0:
        libc.setsid()
        while True: pass"""))
    deadline = time.monotonic() + 10  # the kernel needs a moment to end what was killed
    while left := found() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def running(path: Path, solved: Bench) -> bool:
    """Tell whether a process, other than the worker, has the worker's environment."""
    own = Path(f"/proc/{solved[1].process.pid}/environ")
    try:
        return path != own and path.read_bytes() == own.read_bytes()
    except OSError:  # it has ended, or is another user's
        return False


def test_secrets_of_the_environment_do_not_reach_a_submission(solved: Bench) -> None:
    assert os.environ["WANDB_API_KEY"] == "secret-key"  # when the worker started
    result = grade(*solved, hostile("import os; raise ValueError(sorted(os.environ.items()))"))
    assert "OMP_NUM_THREADS" in said(result, "trainable")
    assert "secret-key" not in said(result, "trainable")


def test_points_are_those_of_the_assigned_parts(bench: Bench, tmp_path: Path) -> None:
    result = grade(Workshop("trainable,dpo", tmp_path), bench[1], SOLUTION)
    assert result.points == {"trainable": 2.0, "preference": 5.0}


# --- what is handed in -----------------------------------------------------------------------


def packed(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_folder_and_zip_are_read_alike_with_or_without_a_folder_on_top(tmp_path: Path) -> None:
    files = {"lora.py": "a = 1\n", "methods/build.py": "b = 2\n"}
    for name, text in files.items():
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text(text)
    (tmp_path / "work" / "notes.txt").write_text("no code")
    assert read_submission(tmp_path / "work") == files
    assert read_submission(packed(tmp_path / "flat.zip", files)) == files
    nested = {f"my homework/2/{name}": text for name, text in files.items()}
    extra = {"__MACOSX/my homework/2/._lora.py": "\0", "my homework/notes.py": ""}
    assert read_submission(packed(tmp_path / "nested.zip", nested | extra)) == files
    alone = {"methods/build.py": "b = 2\n"}
    assert read_submission(packed(tmp_path / "alone.zip", alone)) == alone


def test_nothing_of_a_submission_lands_outside_or_replaces_the_grader(
    tmp_path: Path, bench: Bench
) -> None:
    files = {"lora.py": "a = 1\n", "../out.py": "", "/etc/x.py": "", "teaching/checks.py": "",
             "tests/x.py": "", "a/../../b.py": ""}
    (tmp_path / "link.py").symlink_to(ROOT / "lora.py")
    (tmp_path / "lora.py").write_text("a = 1\n")
    assert read_submission(packed(tmp_path / "odd.zip", files)) == {"lora.py": "a = 1\n"}
    assert read_submission(tmp_path) == {"lora.py": "a = 1\n"}
    assert lost(grade(*bench, SOLUTION | {"torch.py": "raise SystemExit", "json.py": "1/0"})) == {}


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path, "must be a folder or a zip"),
    (lambda path: path.mkdir(), "holds no Python file"),
    (lambda path: path.write_bytes(b"PK\3\4 no zip"), "must be a folder or a zip"),
    (lambda path: packed(path, {"work/a.py": ""}), "holds none of configurator.py, dataloader.py"),
    (lambda path: packed(path, {"a.py": "x" * 5_000_000}), "more than 500 Python files or"),
    (lambda path: packed(path, {f"a{i}.py": "" for i in range(501)}), "more than 500 Python files"),
])
def test_what_is_no_submission_is_refused_in_a_line_and_in_the_results(
    make: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "answer")
    monkeypatch.setattr(sys, "argv", [
        "teaching", "grade", str(tmp_path / "answer"), f"out_dir={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as ended:
        teaching.__main__.main()
    printed = capsys.readouterr()
    assert (ended.value.code, len(printed.err.splitlines())) == (2, 1)
    assert message in printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["score"] == 0
    assert message in results["output"]


@pytest.mark.faults
def test_grade_prints_a_table_and_writes_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [
        "teaching", "grade", str(packed(tmp_path / "a.zip", SOLUTION)),
        f"out_dir={tmp_path / 'out'}", "assign=trainable,training"])
    teaching.__main__.main()
    printed = capsys.readouterr().out
    assert re.search(r"^ 2\.1 +exactly the adapters are trainable +2 of 2$", printed, re.MULTILINE)
    assert "4 of 4 points" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["score"] == 4
