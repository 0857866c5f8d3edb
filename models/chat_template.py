"""Render a model's chat template, in a sandbox and within limits: it comes from a stranger."""

import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_RENDERING = 10.0  # seconds of the processor; a chat takes less than a millisecond
LARGEST_PRODUCT = 10**6  # characters or items


def render(template: str, messages: Sequence[str], names: Mapping[str, str]) -> str:
    """Return the chat of `messages`, the user's first, up to where the model answers.

    `names` are the special tokens that the template may use. Raises ValueError if it fails.
    """
    said = [{"role": ("user", "assistant")[i % 2], "content": message}
            for i, message in enumerate(messages)]
    try:
        with _time_limit():
            return _compile(template).render(
                messages=said, tools=None, documents=None, add_generation_prompt=True, **names)
    except (Exception, _TooSlow) as error:  # a template may do anything, such as divide by zero
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the model's chat template fails: {reason}") from None


@lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    """Compile a template with the settings and functions that templates rely on.

    Templates get no date: the same question must have the same prompt on every day.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Run a template without access to Python; refuse products and powers of absurd size."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        first, second = (len(side) if isinstance(side, Sized) else side for side in (left, right))
        grows = operator == "**" or isinstance(left, Sized) or isinstance(right, Sized)
        if grows and abs(first * second) > LARGEST_PRODUCT:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _TooSlow(BaseException):
    """Ends a rendering; no Exception, because jinja ignores those that constants raise."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `_TooSlow` in a template that runs for more than `LONGEST_RENDERING`.

    Python calls `check` at each line of the template and at each call of a function. No garbage is
    collected meanwhile: an exception in a finalizer would be ignored, and end the tracing.
    """
    collects = gc.isenabled()
    end, tracer, steps = time.thread_time() + LONGEST_RENDERING, sys.gettrace(), count(1)

    def check(frame: Any, event: str, argument: Any) -> Any:
        if next(steps) % 100 == 0 and time.thread_time() > end:  # reading the clock takes time
            raise _TooSlow(f"it runs for more than {LONGEST_RENDERING:g} seconds")
        return check if frame.f_code.co_filename == "<template>" else None

    gc.disable()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(tracer)
        if collects:
            gc.enable()


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks what a model said, leaves the text as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
