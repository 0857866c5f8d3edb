"""Make the teacher's side of the homework from the solution.

python -m teaching starter out_dir=handout            what students get
python -m teaching autograder out_dir=autograder      the zip that Gradescope runs
python -m teaching grade SUBMISSION                   the same tests at home, on a folder or zip
python -m teaching report OUT                         a report's skeleton, with a student's runs
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from checkpoints.files import local_path, writable_folder
from configurator import Bounds, configure, run_script
from teaching.autograder import write_autograder
from teaching.course_report import write_course_report
from teaching.grading import RESULTS, grade_path, show
from teaching.parts import FIRST, chosen_parts
from teaching.sandbox import Limits
from teaching.starter import write_starter


@dataclass(frozen=True)
class AssignConfig:
    """The setting that says which parts students write."""

    assign: Annotated[
        str, "parts that students write; method and dpo are a second assignment", chosen_parts
    ] = ",".join(FIRST)


@dataclass(frozen=True)
class StarterConfig(AssignConfig):
    """Settings of `python -m teaching starter`."""

    out_dir: Annotated[str, "a new folder for the handout", local_path] = "handout"


@dataclass(frozen=True)
class AutograderConfig(AssignConfig):
    """Settings of `python -m teaching autograder`."""

    out_dir: Annotated[str, "folder of autograder.zip", local_path] = "autograder"


@dataclass(frozen=True)
class GradeConfig(AssignConfig):
    """Settings of `python -m teaching grade`."""

    submission: Annotated[str, "folder or zip to grade", local_path] = "submission"
    out_dir: Annotated[str, "folder of results.json", local_path] = "out/grade"
    seconds: Annotated[float, "longest time of a test", Bounds(0.1)] = Limits().seconds
    total_seconds: Annotated[
        float, "longest time of a submission", Bounds(0.1)] = Limits().total_seconds
    memory_mib: Annotated[
        int, "memory of a submission beside torch's own", Bounds(64)] = Limits().memory_mib


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `python -m teaching report`."""

    runs: Annotated[str, "folder of the student's runs", local_path] = "out"
    out_dir: Annotated[str, "folder of report.md and its figures", local_path] = "course-report"


def starter(config: StarterConfig) -> None:
    cuts = write_starter(Path(config.out_dir), config.assign)
    print(f"written: {config.out_dir}, {len(cuts)} bodies to write in "
          f"{len({cut.file for cut in cuts})} files")


def autograder(config: AutograderConfig) -> None:
    print(f"written: {write_autograder(Path(config.out_dir), config.assign)}")


def grade(config: GradeConfig) -> None:
    limits = Limits(config.seconds, config.total_seconds, config.memory_mib)
    out = writable_folder(Path(config.out_dir))
    print(show(grade_path(Path(config.submission), config.assign, limits, out)))
    print(f"written: {out / RESULTS}")


def report(config: ReportConfig) -> None:
    print(f"written: {write_course_report(Path(config.runs), Path(config.out_dir))}")


class Command(NamedTuple):
    """A job of this room: its function, its settings, and the setting of a bare word."""

    run: Callable[[Any], None]
    config: type
    bare: str = ""


COMMANDS = {
    "starter": Command(starter, StarterConfig),
    "autograder": Command(autograder, AutograderConfig),
    "grade": Command(grade, GradeConfig, "submission"),
    "report": Command(report, ReportConfig, "runs"),
}


def parse(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the command that `arguments` begin with, and the settings for it.

    Raises ValueError for an unknown command.
    """
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        raise ValueError(f"{name!r:.80} must be one of {', '.join(COMMANDS)}, as in "
                         "python -m teaching starter out_dir=handout")
    command = COMMANDS[name]
    rest = [f"{command.bare}={word}" if command.bare and not is_setting(word) else word
            for word in rest]
    return command, rest


def is_setting(word: str) -> bool:
    """Tell whether a word is no path: `key=value`, an option, or a config file."""
    return "=" in word or word.startswith("-")


def settings(arguments: Sequence[str]) -> object:
    """Return the settings of a whole command line; raises ValueError as `configure` does."""
    command, rest = parse(arguments)
    return configure(command.config, rest)


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    try:
        command, sys.argv[1:] = parse(sys.argv[1:])
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(2) from None
    run_script(command.run, command.config)


if __name__ == "__main__":
    main()
