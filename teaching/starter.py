"""Write what students get: the solution's files without the bodies of the assigned parts."""

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoints.files import atomic_write, writable_folder
from configurator import ROOT
from teaching.cutting import cut
from teaching.parts import CUTS, FRONT, Cut, cuts_of, read_solution
from teaching.rubric import RUBRIC

MARK = "handout.json"  # in the handout: which parts are assigned
STARTS = (*FRONT, "experiments/__main__.py", "experiments/dataset_analysis.py",
          "experiments/anatomy.py")  # what students run; the notebook runs the experiments
EXTRAS = ("requirements.txt", "run_in_colab.ipynb", "LICENSE", "config", "assets")
ELSEWHERE = ("dpo_*", "pretrain_*")  # presets of rooms that the handout does not have


def module_file(name: str) -> str | None:
    """Return the file of one of our modules; None for a module of others."""
    path = name.replace(".", "/")
    found = (f"{path}.py", f"{path}/__init__.py")
    return next((file for file in found if (ROOT / file).is_file()), None)


def imported(source: str) -> Iterator[str]:
    """Yield the files of our own that a source imports."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (file for file in map(module_file, names) if file)


def needed_files(starts: Sequence[str] = STARTS) -> list[str]:
    """Return the Python files that `starts`, the handout's commands, import, directly or not."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(read_solution(file))
            init = Path(file).parent / "__init__.py"
            waiting += [init.as_posix()] if (ROOT / init).is_file() else []
    return sorted(found)


def handout_sources(assigned: str) -> dict[str, str]:
    """Return the Python files of the handout, by path, with the assigned bodies cut."""
    cuts = cuts_of(assigned)
    return {file: cut(read_solution(file), todos(cuts, file)) for file in needed_files()}


def todos(cuts: list[Cut], file: str) -> list[tuple[str, str]]:
    return [(each.name, each.message) for each in cuts if each.file == file]


def extra_files() -> Iterator[str]:
    """Yield the files that are no modules: presets, assets, requirements, the notebook."""
    for name in EXTRAS:
        path = ROOT / name
        inside = path.rglob("*") if path.is_dir() else [path]
        yield from (file.relative_to(ROOT).as_posix() for file in sorted(inside)
                    if file.is_file() and "__pycache__" not in file.parts
                    and not any(map(file.match, ELSEWHERE)))


def instructions(assigned: str) -> str:
    """Return the handout's README: what to write, and how it is graded."""
    names = assigned.split(",")
    rows = [row for row in RUBRIC.values() if row.part in names]
    lines = ["# LoRA on GPT-2: what you write", "",
             "Each body below is missing. Running a command says in one line which one it met.", "",
             "| part | function | file | what to write |", "|---|---|---|---|"]
    lines += [f"| {each.part} | `{each.name}` | `{each.file}` | {each.todo} |"
              for each in cuts_of(assigned)]
    total = sum(row.points for row in rows)
    files = ", ".join(f"`{file}`" for file in sorted({each.file for each in cuts_of(assigned)}))
    hidden = "" if all(row.visible for row in rows) else "; some are hidden and not listed here"
    lines += ["", f"Hand in {files} with their folders, as a zip.", "",
              f"The tests give {total:g} points{hidden}.", "",
              "| part | test | points |",
              "|---|---|---|"]
    lines += [f"| {row.part} | {row.title} | {row.points:g} |" for row in rows if row.visible]
    lines += ["", "```", "pip install -r requirements.txt",
              "python train.py config/quickstart.py", "```", "",
              "`python train.py --help` lists the settings. `wandb_api.json` has room for your "
              "key; without one nothing is sent.", ""]
    return "\n".join(lines)


def write_starter(folder: Path, assigned: str) -> list[Cut]:
    """Write the handout to a new `folder`; return what was cut.

    Raises ValueError if the folder holds files already, OSError if it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"out_dir={str(folder)!r} is not empty: choose a new folder")
    writable_folder(folder)
    texts = handout_sources(assigned)
    texts["README.md"] = instructions(assigned)
    texts["wandb_api.json"] = json.dumps({"key": ""}) + "\n"
    for file in extra_files():
        with atomic_write(folder / file) as temporary:
            temporary.write_bytes((ROOT / file).read_bytes())
    # The mark comes last: a folder that has it is complete.
    texts[MARK] = json.dumps({"assigned": assigned.split(",")}) + "\n"
    for file, text in texts.items():
        with atomic_write(folder / file) as temporary:
            temporary.write_text(text, "utf-8", newline="\n")
    return [each for each in CUTS if each.part in assigned.split(",")]
