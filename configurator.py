"""Typed settings for every script: dataclass defaults, then config files, then `key=value`.

Config files look like nanoGPT's (`name = literal`, one per line) but are parsed, never executed.
"""

import ast
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

ROOT = Path(__file__).parent  # holds assets/ and config/
ALIASES = {"rank": "lora_rank", "alpha": "lora_alpha", "lr": "learning_rate"}
KINDS = {bool: "True or False", int: "an integer", float: "a finite number"}
Config = TypeVar("Config")


class Bounds(NamedTuple):
    """Inclusive range of a number setting, given as the third argument of `Annotated`."""

    low: float
    high: float = math.inf


def configure(
    cls: type[Config], argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> Config:
    """Build `cls` from `defaults` and `argv` (the command line), read from left to right.

    `--help` prints `description` first. Config files are found in the working directory or ROOT.
    Raises ValueError for an unknown name, a bad value or a bad config file, saying what is allowed.
    """
    hints = get_type_hints(cls, include_extras=True)
    names = [*hints, *(alias for alias in ALIASES if ALIASES[alias] in hints)]
    if unknown := (defaults or {}).keys() - hints.keys():
        raise ValueError(f"saved by another version: unknown {', '.join(sorted(unknown))}")
    values = {name: _coerce(f"saved setting {name}={value!r:.80}", str(value), hints[name])
              for name, value in (defaults or {}).items()}
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            print(_help(cls, hints, description or sys.modules[cls.__module__].__doc__ or ""))
            raise SystemExit(0)
        for place, name, text in _assignments(argument):
            name = ALIASES.get(name, name)
            if name not in hints:
                raise ValueError(f"{place}: unknown setting {name!r}{_suggest(name, names)}")
            values[name] = _coerce(f"{place}: {name}={text!r:.80}", text, hints[name])
    return cls(**values)


def run_script(main: Callable[[Config], object], cls: type[Config]) -> None:
    """Run `main(configure(cls))`; a user's error ends in one line on stderr and exit code 2."""
    try:
        main(configure(cls, description=sys.modules[main.__module__].__doc__))
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        print("error:", *(str(error) or type(error).__name__).split(), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _assignments(argument: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, name, text) for a `key=value` argument or for each line of a config file."""
    if "=" in argument:
        name, _, text = argument.partition("=")
        yield "command line", name.removeprefix("--").replace("-", "_"), text
    elif argument.startswith("-"):
        raise ValueError(f"command line: {argument} needs a value, as in {argument}=...")
    elif path := next(filter(Path.is_file, (Path(argument), ROOT / argument)), None):
        yield from _read_file(str(path))
    else:
        known = [str(Path(argument).parent / path.name) for folder in (Path(), ROOT)
                 for path in (folder / argument).parent.glob("*.py")]
        hint = _suggest(argument, known)
        raise ValueError(f"config file {argument!r} not found{hint}; settings are key=value")


def _read_file(path: str) -> Iterator[tuple[str, str, str]]:
    try:
        source = Path(path).read_text("utf-8-sig")
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", str(error)) or "nested too deeply"
        raise ValueError(f"{path}:{line}: not a config file: {reason}") from None
    for statement in statements:
        place = f"{path}:{statement.lineno}"
        match statement:
            case ast.Expr(ast.Constant(str())):  # a docstring
                pass
            case ast.Assign([ast.Name(name)], ast.Constant(str(text))):
                yield place, name, text
            case ast.Assign([ast.Name(name)], (
                ast.Constant(int() | float())
                | ast.UnaryOp(ast.USub(), ast.Constant(int() | float()))
            ) as number):
                yield place, name, ast.get_source_segment(source, number)
            case _:
                raise ValueError(f"{place}: only `name = text, number, True or False` is allowed")


def _coerce(where: str, text: str, hint: Any) -> Any:
    """Turn `text` into the declared type of its setting, by its choices, bounds or function."""
    kind, _, *rules = get_args(hint)
    if choices := get_args(kind):  # Literal["a", "b"]
        if text not in choices:
            raise ValueError(f"{where} must be one of {', '.join(choices)}")
        return text
    if kind is str:  # a text's rule is a function: it returns the value or raises ValueError
        return rules[0](where, text) if rules else text
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        value = None
    if value is None or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} must be {KINDS[kind]}")
    low, high = rules[0] if rules else Bounds(-math.inf)
    if not low <= value <= high:
        limit = f"at least {low:g}" if value < low else f"at most {high:g}"
        raise ValueError(f"{where} must be {limit}")
    return value


def _suggest(name: str, known: Sequence[str]) -> str:
    return "".join(f"; did you mean {close!r}?" for close in get_close_matches(name, known, n=1))


def _help(cls: type, hints: dict[str, Any], description: str) -> str:
    """List every setting of `cls` with its default and the reason that stands beside it."""
    lines = [description, "Settings (key=value or config/NAME.py):"]
    for field in fields(cls):  # type: ignore[arg-type]
        kind, reason, *_ = get_args(hints[field.name])
        choices = f" (one of {', '.join(get_args(kind))})" if get_args(kind) else ""
        lines.append(f"  {field.name}={field.default}\n      {reason}{choices}")
    aliases = [f"{alias} = {name}" for alias, name in ALIASES.items() if name in hints]
    return "\n".join([*lines, *([f"Aliases: {', '.join(aliases)}"] if aliases else [])])
