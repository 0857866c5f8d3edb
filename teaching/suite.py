"""The checks as tests of one submission, with the points and the visibility of the rubric."""

import unittest
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradescope_utils.autograder_utils.decorators import number, partial_credit, visibility

from teaching.checks import CHECKS, Claims
from teaching.rubric import RUBRIC
from teaching.sandbox import Seen


class HomeworkTests(unittest.TestCase):
    """The tests of one submission; `seen` holds what the probes saw of it."""

    seen: Mapping[str, Seen]


def make_test(name: str) -> Callable[..., None]:
    """Return the method that grades the test `name`, with its points and what it says."""
    row = RUBRIC[name]

    def test(self: HomeworkTests, set_score: Callable[[float], None]) -> None:
        set_score(0.0)
        seen = self.seen[name]
        if seen.value is None:
            self.fail(f"{seen.error}. Look at {row.look}.")
        claims = claims_of(name, seen.value)
        missed = [text for holds, text in claims if not holds]
        set_score(round(row.points * (1 - len(missed) / len(claims)), 2))
        if missed:
            self.fail(f"{missed[0]} Look at {row.look}.")

    test.__name__, test.__doc__ = f"test_{name}", row.title
    shown = visibility("visible" if row.visible else "after_published")
    return shown(number(row.number)(partial_credit(row.points)(test)))


def claims_of(name: str, value: dict[str, Any]) -> Claims:
    """Return the claims of a test; what does not even have their form fails as one."""
    try:
        return CHECKS[name](value)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, IndexError):
        return [(False, "Expected results of other types or shapes.")]


for _name in RUBRIC:
    setattr(HomeworkTests, f"test_{_name}", make_test(_name))


def make_suite(seen: Mapping[str, Seen], names: Sequence[str]) -> unittest.TestSuite:
    """Return the tests `names` for what the probes have seen of one submission."""
    suite = unittest.TestSuite()
    for name in names:
        case = HomeworkTests(f"test_{name}")
        case.seen = seen
        suite.addTest(case)
    return suite
