"""Write sections with their figures as `report.md`, and as one page, `report.html`."""

import base64
import html
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import markdown

from checkpoints.files import atomic_write
from experiments.results import Section

EXTENSIONS = ("tables", "fenced_code", "md_in_html")
# The page runs no script and loads nothing, whatever texts it holds.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<title>"""
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px }
th, td { border-bottom: 1px solid #bbb; padding: .3em .7em; text-align: right }
th:first-child, td:first-child, pre { text-align: left } td { vertical-align: top }
img { max-width: 100% }
pre { overflow-x: auto; background: #f4f4f4; padding: .7em; font-size: 13px }
td pre { white-space: pre-wrap; overflow-wrap: anywhere; width: 22em; margin: 0 }"""


def check_folder(folder: Path, title: str, pictures: Collection[str]) -> None:
    """Raise ValueError if `folder` cannot hold a report, or holds somebody else's files.

    A report of this program is known by its `title`; the `pictures` beside a `report.md` are its
    own.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"report_dir={str(folder)!r}: {there} is no folder that can be written to")
    titles = {"report.md": title, "report.html": f"<title>{title[2:]}"}
    foreign = {name for name, text in titles.items() if not has_title(folder / name, text)}
    if "report.md" in foreign:
        foreign |= {f"{name}.png" for name in pictures}
    for name in sorted(foreign):
        if (folder / name).exists():
            raise ValueError(f"report_dir={str(folder)!r} holds a {name} that this program did "
                             "not write; choose another folder")


def has_title(path: Path, title: str) -> bool:
    """Return whether a file has `title` near its beginning."""
    return path.is_file() and title.encode() in path.read_bytes()[:2000]


def write_page(
    folder: Path, title: str, head: Sequence[str], sections: Mapping[str, Section],
    pictures: Collection[str],
) -> Path:
    """Write `head`, which begins with `title`, and the sections; return the path of `report.md`.

    Raises ValueError as `check_folder` does, OSError if the files cannot be written.
    """
    check_folder(folder, title, pictures)
    lines = [*head]
    for name, section in sections.items():
        lines += ["", f"## {section.title}", "", section.basis, "", *section.lines]
        if section.figure:
            lines += ["", f"![{section.title}]({name}.png)"]
    text = "\n".join(lines) + "\n"
    with atomic_write(folder / "report.md") as path:  # first: it says whose the pictures are
        path.write_text(text, "utf-8")
    for name, section in sections.items():
        if section.figure:
            section.figure.suptitle(section.basis, fontsize="small")
            with atomic_write(folder / f"{name}.png") as path:
                section.figure.savefig(path, dpi=150, format="png")
    with atomic_write(folder / "report.html") as path:
        path.write_text(to_html(text, folder), "utf-8")
    return folder / "report.md"


def section_html(section: Section) -> str:
    """Return a section as a part of a page: its title, its picture, and the numbers below it."""
    head, lines = (markdown.markdown("\n".join(text), extensions=EXTENSIONS) for text in (
        [f"### {section.title}", "", section.basis], section.lines))
    if not section.figure:
        return head + lines
    file = io.BytesIO()
    section.figure.savefig(file, dpi=110, format="png")
    title = html.escape(section.title)
    return (f'{head}<img alt="{title}: the table below has the numbers" '
            f'src="{data_uri(file.getvalue())}">{lines}')


def data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def to_html(text: str, folder: Path) -> str:
    """Return the report as one HTML page with its pictures inside."""
    body = markdown.markdown(text, extensions=EXTENSIONS)

    def inline(match: re.Match) -> str:
        return f'{match[1]}src="{data_uri((folder / match[2]).read_bytes())}"'

    body = re.sub(r'(<img [^<>]*)src="(\w+\.png)"', inline, body)
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    return f"{PAGE}{title}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
