"""The tables of docs/teaching.md are those of the code."""

import re

from made_mutants import MUTANTS

from configurator import ROOT
from teaching.parts import CUTS
from teaching.rubric import RUBRIC

PAGE = (ROOT / "docs" / "teaching.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table behind a heading, without its head."""
    lines = PAGE.split(f"\n## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    table = lines[start + 1 :]
    end = next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def test_mistakes_of_the_page_are_those_that_the_test_makes() -> None:
    assert rows("The grader, graded") == [
        [mutant.name, mutant.test, ", ".join(mutant.also)] for mutant in MUTANTS]


def test_rubric_of_the_page_is_the_codes() -> None:
    assert rows("Rubric of the programming part") == [
        [row.number, row.title, f"{row.points:g}", "shown" if row.visible else "hidden"]
        for row in RUBRIC.values()]


def test_page_explains_every_part_and_quotes_a_message_that_exists() -> None:
    parts = [cells[0].strip("`") for cells in rows("What is assigned, and why")]
    assert parts == list(dict.fromkeys(cut.part for cut in CUTS))
    (quoted,) = re.findall(r"^error: (TODO .*)…$", PAGE, re.MULTILINE)
    assert any(cut.message.startswith(quoted.strip()) for cut in CUTS)
