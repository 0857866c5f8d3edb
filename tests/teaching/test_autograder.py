"""The zip for Gradescope, unpacked and run as Gradescope does, in folders of the test."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from made_plain import plain_submission

from teaching.autograder import write_autograder
from teaching.parts import FIRST, SECOND
from teaching.rubric import RUBRIC

# What Gradescope documents of results.json: the fields, and which values they may have.
FIELDS = {"score": (int, float), "execution_time": (int, float), "output": str, "visibility": str,
          "stdout_visibility": str, "tests": list, "leaderboard": list, "extra_data": dict}
TEST_FIELDS = {"score": (int, float), "max_score": (int, float), "status": str, "name": str,
               "number": str, "output": str, "visibility": str, "tags": list}
VISIBILITY = ("hidden", "after_due_date", "after_published", "visible")


def faults(results: dict[str, Any]) -> list[str]:
    """Return what Gradescope would not accept in a results.json."""
    found = [f"{name}: {value!r}" for name, value in results.items()
             if name not in FIELDS or not isinstance(value, FIELDS[name])]
    found += [f"no {name}" for name in ("score", "tests") if name not in results]
    for test in results.get("tests", []):
        found += [f"{name}: {value!r}" for name, value in test.items()
                  if name not in TEST_FIELDS or not isinstance(value, TEST_FIELDS[name])]
        if not 0 <= test["score"] <= test["max_score"] or test["visibility"] not in VISIBILITY:
            found.append(f"{test['name']}: {test['score']} of {test['max_score']}")
        if test["status"] != ("passed" if test["score"] == test["max_score"] else "failed"):
            found.append(f"{test['name']}: {test['status']}")
    return found


def unpack(archive: Path, base: Path) -> None:
    """Unpack the zip to source/ with its rights, as `unzip` does; make the other folders."""
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            path = Path(opened.extract(info, base / "source"))
            path.chmod(info.external_attr >> 16 & 0o777)
    (base / "submission").mkdir()


def run_autograder(base: Path) -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(base), "AUTOGRADER": str(base),
                   "AUTOGRADER_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([base / "source" / "run_autograder"], cwd=base, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((base / "results" / "results.json").read_text())


def test_zip_has_what_gradescope_runs_and_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (write_autograder(tmp_path / name, ",".join(FIRST)) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        rights = {name: archive.getinfo(name).external_attr >> 16
                  for name in ("setup.sh", "run_autograder", "lora.py")}
        setup, requirements = (archive.read(name).decode()
                               for name in ("setup.sh", "requirements-autograder.txt"))
    assert stat.S_IMODE(rights["setup.sh"]) == stat.S_IMODE(rights["run_autograder"]) == 0o755
    assert stat.S_IMODE(rights["lora.py"]) == 0o644
    assert {"teaching/checks.py", "teaching/worker.py", "model.py", "methods/dpo.py"} <= names
    assert not any(name.startswith(("tests/", "docs/", "assets/")) for name in names)
    assert "gradescope-utils" in requirements
    assert "requirements-autograder.txt" in setup
    for script in ("setup.sh", "run_autograder"):
        with zipfile.ZipFile(first) as archive:
            checked = subprocess.run(["bash", "-n"], input=archive.read(script), check=False)
        assert checked.returncode == 0


@pytest.mark.faults
def test_zip_grades_as_on_gradescope(tmp_path: Path) -> None:
    unpack(write_autograder(tmp_path / "made", ",".join(FIRST)), tmp_path)
    for file, text in plain_submission().items():
        path = tmp_path / "submission" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    results = run_autograder(tmp_path)
    assert faults(results) == []
    assert results["score"] == 25
    tests = {test["number"]: test for test in results["tests"]}
    rows = [row for row in RUBRIC.values() if row.part not in SECOND]
    assert {(row.number, row.points, row.visible) for row in rows} == {
        (number, test["max_score"], test["visibility"] == "visible")
        for number, test in tests.items()}
    shutil.rmtree(tmp_path / "submission")
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "essay.txt").write_text("no code")
    results = run_autograder(tmp_path)  # it ends well: a missing file would be the grader's fault
    assert (results["score"], faults(results)) == (0, [])
    assert "holds no Python file" in results["output"]


def test_schema_check_sees_what_gradescope_would_refuse() -> None:
    test = {"name": "a", "score": 1.0, "max_score": 2, "status": "failed", "visibility": "visible"}
    good = {"score": 1.0, "tests": [test]}
    assert faults(good) == []
    for change in ({"score": "1"}, {"points": 1}):
        assert faults(good | change)
    assert faults({"tests": []}) == ["no score"]
    for change in ({"score": 3.0}, {"status": "passed"}, {"visibility": "shown"}, {"max": 2}):
        assert faults(good | {"tests": [test | change]})
