"""Show any text as text: in one line, in Markdown and in the page made of it, in a figure."""

import html
import re
from collections.abc import Iterable

# What a page cannot hold or would not show: control characters but tab and line feed, marks that
# reverse the direction of a line, halves of a character.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
                    "\ufeff\ufffe\uffff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write hidden characters as escapes, such as `\x00`."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_html(text: str) -> str:
    """Escape any text for HTML."""
    return html.escape(visible(text))


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def in_words(error: Exception) -> str:
    """Return an error in one line, without the number that the system gives it."""
    if isinstance(error, OSError) and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(str(error)) or type(error).__name__


def plain(text: str) -> str:
    """Escape any text, so that Markdown, a table's cell too, shows it verbatim, in one line."""
    escaped = re.sub(r"([|*_`\[\\])", r"\\\1", html.escape(one_line(text), quote=False))
    return escaped.replace("$", "&#36;").replace("~", "&#126;")  # not every renderer unescapes \$


def code(text: str) -> str:
    """Return a name or a path as code."""
    return f"`{text}`" if re.fullmatch(r"[\w./-]+", text) else f"<code>{plain(text)}</code>"


def fenced(lines: Iterable[str]) -> list[str]:
    """Return lines of any text as a block of code, in a fence longer than any inside."""
    text = visible("\n".join(lines))
    fence = "~" * max(4, 1 + max(map(len, re.findall("~+", text)), default=0))
    return [fence, text, fence]


def label(text: str) -> str:
    """Return any text as a figure's label: matplotlib would read what `$` encloses as formulas."""
    return one_line(text)[:60].replace("$", r"\$")
