"""The handout: what is cut and what is not, how it answers, and that it can be solved."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import teaching.__main__
from configurator import ROOT
from teaching.cutting import cut, find_body, functions, put_back
from teaching.parts import CUTS, FIRST, FRONT, SECOND, cuts_of, read_solution
from teaching.starter import needed_files, write_starter

ALL = ",".join(FIRST + SECOND)


@pytest.fixture(scope="module")
def handout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teaching") / "handout"
    write_starter(folder, ",".join(FIRST))
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


def solve(folder: Path, assigned: str) -> None:
    """Copy the solution's bodies into a handout."""
    for each in cuts_of(assigned):
        path = folder / each.file
        path.write_text(put_back(path.read_text("utf-8"), read_solution(each.file), [each.name]),
                        "utf-8")


@pytest.mark.parametrize("each", CUTS, ids=lambda cut: cut.name)
def test_each_cut_keeps_signature_and_docstring_and_leaves_only_its_todo(each: tuple) -> None:
    source = read_solution(each.file)
    missing = cut(source, [(each.name, each.message)])
    before, after = (dict(functions(ast.parse(text)))[each.name] for text in (source, missing))
    assert ast.dump(before.args) == ast.dump(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after)
    (error,) = after.body[-1:]
    assert ast.unparse(error) == f"raise NotImplementedError({each.message!r})"
    assert len(after.body) == 1 + (ast.get_docstring(after) is not None)
    body = find_body(source, each.name)
    lines = source.splitlines(keepends=True)
    assert missing.startswith("".join(lines[: body.start]))
    assert missing.endswith("".join(lines[body.end :]))
    assert max(map(len, missing.splitlines())) <= 100
    assert put_back(missing, source, [each.name]) == source


def test_handout_has_the_homeworks_files_and_none_of_the_teachers(handout: Path) -> None:
    names = {path.name for path in handout.iterdir()}
    assert names >= {*FRONT, "requirements.txt", "run_in_colab.ipynb", "wandb_api.json", "config"}
    assert not names & {"teaching", "docs", "tests", "requirements-dev.txt", ".git"}
    assert list(handout.rglob("*.partial*")) == []
    assert json.loads((handout / "wandb_api.json").read_text()) == {"key": ""}
    assert "homework.md" not in {path.name for path in handout.rglob("*")}
    presets = {path.name for path in (handout / "config").iterdir()}
    assert {"quickstart.py", "experiments_t4.py"} <= presets
    assert not {"dpo_mini.py", "pretrain_mini.py"} & presets


def test_no_assigned_body_is_left_anywhere_in_the_handout(handout: Path) -> None:
    text = "\n".join(path.read_text("utf-8") for path in handout.rglob("*.py"))
    for each in cuts_of(",".join(FIRST)):
        source, lines = read_solution(each.file), read_solution(each.file).splitlines(keepends=True)
        body = find_body(source, each.name)
        assert "".join(lines[body.start : body.end]) not in text, each.name


def test_handout_solved_by_the_solutions_bodies_is_the_solution(tmp_path: Path) -> None:
    write_starter(tmp_path / "handout", ALL)
    changed = {each.file for each in CUTS}
    for file in needed_files():
        same = (tmp_path / "handout" / file).read_text("utf-8") == read_solution(file)
        assert same == (file not in changed), file
    solve(tmp_path / "handout", ALL)
    for file in [*needed_files(), "config/quickstart.py", "requirements.txt"]:
        assert (tmp_path / "handout" / file).read_bytes() == (ROOT / file).read_bytes(), file


def test_every_module_imports_and_running_says_in_one_line_what_is_to_do(handout: Path) -> None:
    modules = [file[:-3].replace("/", ".") for file in needed_files() if "__" not in file]
    # One process imports everything and then runs each script, as a user would one by one.
    script = (f"import importlib, runpy, sys\nfor name in {modules}:\n"
              "    importlib.import_module(name)\n"
              "for words in (['train.py', '--help'], ['train.py', 'config/quickstart.py'],\n"
              "              ['generate.py', 'init_from=gpt2-mini', 'dataset=movie_reviews']):\n"
              "    sys.argv = words\n"
              "    try: runpy.run_path(words[0], run_name='__main__')\n"
              "    except SystemExit as end: print(words[0], 'ended', end.code)\n")
    done = run(handout, "-c", script)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if " ended " in line] == [
        "train.py ended 0", "train.py ended 2", "generate.py ended 2"]
    assert "lora_rank=128" in done.stdout
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [
        ["error", " TODO training"], ["error", " TODO attention"]]


def test_a_part_is_assigned_or_given(tmp_path: Path) -> None:
    write_starter(tmp_path / "a", "lora,predict_labels")
    given = [each for each in CUTS if each.part not in ("lora", "predict_labels")]
    for each in given:
        assert f"TODO {each.part}" not in (tmp_path / "a" / each.file).read_text("utf-8")
    assert "TODO lora" in (tmp_path / "a" / "lora.py").read_text("utf-8")
    readme = (tmp_path / "a" / "README.md").read_text("utf-8")
    assert "| predict_labels |" in readme
    assert "build_model" not in readme
    assert "Hand in `generate.py`, `lora.py`, `tasks/base.py` with their folders" in readme
    assert "points; some are hidden" in readme


@pytest.mark.parametrize(("words", "message"), [
    ([], "'' must be one of starter, "),
    (["start"], "'start' must be one of starter, "),
    (["starter", "assign=lora,pilot"], "there is no part 'pilot'; there are lora, trainable"),
    (["starter", "assign= "], "must name at least one of lora"),
    (["starter", "out_dir=."], "out_dir='.' is not empty: choose a new folder"),
    (["starter", "dir=x"], "unknown setting 'dir'"),
])
def test_a_users_error_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["teaching", *words])
    with pytest.raises(SystemExit) as ended:
        teaching.__main__.main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


@pytest.mark.faults
def test_solved_handout_passes_the_quickstart_to_the_digit(tmp_path: Path) -> None:
    write_starter(tmp_path / "handout", ",".join(FIRST))
    solve(tmp_path / "handout", ",".join(FIRST))
    tables = []
    for name, folder in (("ours", ROOT), ("theirs", tmp_path / "handout")):
        done = run(folder, "train.py", "config/quickstart.py", f"out_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if "/s" not in line])
    assert tables[0] == tables[1]
    assert any(line.split()[:1] == ["best"] for line in tables[0])
