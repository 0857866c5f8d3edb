"""Write the zip that Gradescope runs: the grader, the solution as its reference, two scripts."""

import zipfile
from pathlib import Path

from checkpoints.files import atomic_write, writable_folder
from teaching.parts import read_solution
from teaching.starter import needed_files

NAME = "autograder.zip"
REQUIREMENTS, SETUP, RUN = "requirements-autograder.txt", "setup.sh", "run_autograder"
STARTS = ("teaching/__main__.py", "teaching/worker.py")
WHEN = (2020, 1, 1, 0, 0, 0)  # of every file: the same solution gives the same zip
GRADER = "gradescope-utils>=0.5  # the decorators and the results of Gradescope\n"
SETUP_TEXT = """\
#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image.
set -euo pipefail
source_folder="$(cd "$(dirname "$0")" && pwd)"
if command -v apt-get > /dev/null; then
    apt-get update && apt-get install -y python3 python3-pip python3-venv
fi
venv="${AUTOGRADER_VENV:-/opt/autograder}"
python3 -m venv "$venv"
"$venv/bin/pip" install -r "$source_folder/requirements-autograder.txt"
"""
RUN_TEXT = """\
#!/usr/bin/env bash
# Gradescope runs this for each submission. AUTOGRADER is the folder that holds source/,
# submission/ and results/; AUTOGRADER_PYTHON the Python that setup.sh prepared.
set -uo pipefail
base="${AUTOGRADER:-/autograder}"
python="${AUTOGRADER_PYTHON:-${AUTOGRADER_VENV:-/opt/autograder}/bin/python}"
mkdir -p "$base/results"
rm -f "$base/results/results.json"
chmod -R go-rwx "$base/source"  # where the system has no namespaces, the user's rights still hold
cd "$base/source"
"$python" -m teaching grade "submission=$base/submission" "out_dir=$base/results" \\
    "assign=@ASSIGN@"
status=$?
# A submission that holds no code has its results; only a fault of the grader leaves none.
[ -s "$base/results/results.json" ] || exit "$status"
"""


def zip_contents(assigned: str) -> dict[str, str]:
    """Return the files of the zip, by their paths in it."""
    files = {file: read_solution(file) for file in needed_files(STARTS)}
    # The grader cuts its own handout, over which it lays the submissions.
    files |= {file: read_solution(file) for file in needed_files()}
    return files | {
        REQUIREMENTS: read_solution("requirements.txt") + GRADER,
        SETUP: SETUP_TEXT, RUN: RUN_TEXT.replace("@ASSIGN@", assigned)}


def write_autograder(folder: Path, assigned: str) -> Path:
    """Write the zip to `folder`; return its path. Raises OSError if it cannot be written."""
    path = writable_folder(folder) / NAME
    with atomic_write(path) as temporary, zipfile.ZipFile(
            temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(zip_contents(assigned).items()):
            info = zipfile.ZipInfo(name, WHEN)
            rights = 0o755 if name in (SETUP, RUN) else 0o644
            info.external_attr, info.compress_type = (0o100000 | rights) << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, text)
    return path
