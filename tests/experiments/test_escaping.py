"""No text that a report shows becomes markup: in Markdown, in the page, in a figure."""

import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import make_run, missing, row, zero_shot

from checkpoints.files import read_json, write_json
from experiments.escaping import code, fenced, in_words, one_line, plain, visible
from experiments.plan import ExperimentsConfig
from experiments.report import write_report
from experiments.results import Row
from tasks.code_scores import summarize
from tasks.scores import TextPrediction

NASTY = [
    "~~~~", "~~~~~~~~~~", "```", "````python", "<script>alert(1)</script>", "</details>", "</pre>",
    "</code></td></table>", "| cell | <b>bold</b> |", "[x](javascript:alert(1))",
    "![](http://example.com/x.png)", 'src="curves.png"', 'src="no.png"', "&lt;b&gt; &amp;",
    "$", r"$\foo$", r"$\frac{1$ \$", "*em* **strong** _em_ ~~gone~~ `code` \\", "# head", "---",
    "<!-- no end", "<![CDATA[", "<?php", "[ref]: http://example.com", "<http://example.com>",
    "a\n\n~~~~\n<script>b</script>\n\nc", "\r~~~~\r\n<img src=x onerror=y>", "\x00\x1b[31m",
    "half \ud83d, turned \u202etxt\u2066, apart \u2028<b>", "\x02wzxhzdk:0\x03", "\tx",
]
ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "em", "code", "pre",
           "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "img", "br"}


class Page(HTMLParser):
    """Collects the tags with their attributes, and the texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags += [(tag, f"{name}={value:.40}") for name, value in attributes] or [(tag, "")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "br"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    handle_pi = unknown_decl = handle_comment


def fences_left_open(lines: list[str]) -> list[str]:
    """Return the fences that no later fence of at least their length closes (CommonMark)."""
    fences: list[str] = []
    for line in (line for line in lines if line.startswith("~~~") and not line.strip("~")):
        if not fences:
            fences.append(line)
        elif len(line) >= len(fences[-1]):
            fences.pop()
    return fences


def written(
    folder: Path, questions: dict[str, list[Row]], command: str, **settings: object
) -> Page:
    config = ExperimentsConfig(report_dir=str(folder / "report"), **settings)
    path = write_report(questions, config, command, list(questions))
    lines = path.read_text("utf-8").splitlines()
    assert fences_left_open(lines) == []
    page = Page(path.with_suffix(".html"))
    assert {tag for tag, _ in page.tags} <= ALLOWED
    policy = [value for tag, value in page.tags if tag == "meta" and "content" in value]
    assert policy[0].startswith("content=default-src 'none'")
    assert all(value.startswith(("src=data:image/png;base64,", "alt=")) for tag, value in page.tags
               if tag == "img")
    assert visible(command).expandtabs(4) in "".join(page.texts)
    return page


@pytest.mark.parametrize("nasty", [*NASTY, "\n".join(NASTY)], ids=repr)
def test_words_report_shows_any_text_and_makes_nothing_of_it(nasty: str, tmp_path: Path) -> None:
    done = make_run(tmp_path / "done", "110", prompt=visible(f"{{text}}{nasty}"))
    about = read_json(done.folder / "config.json")
    write_json(done.folder / "config.json", about | {"processor": visible(nasty), "commit": "abc"})
    later, label = missing(tmp_path / "later"), f"prompt: {nasty}"
    rows = [row(label, done), row("later", later, errors={"later": nasty})]
    zero = Row(label, {"prompt": "x"}, [zero_shot(tmp_path, [nasty])], {})
    page = written(tmp_path, {"zero_shot": [zero], "curves": rows, "prompts": rows},
                   f"python -m experiments 'prompt={{text}}{nasty}'",
                   init_from="gpt2-mini", dataset=f"data/{nasty}")
    text, in_lines = "".join(page.texts), " ".join("".join(page.texts).split())
    assert f"{nasty[:60]!r:64} -> {nasty!r}" in text  # the answer
    for shown in (label, f"data/{nasty}", f"failed: {nasty}", f"processor {visible(nasty)}"):
        assert one_line(shown) in in_lines
    assert [tag for tag, _ in page.tags].count("table") == 4
    assert [tag for tag, _ in page.tags].count("details") == 3


@pytest.mark.parametrize("texts", [NASTY[i::4] for i in range(4)], ids=range(4))
def test_texts_report_shows_any_text_and_makes_nothing_of_it(
    texts: list[str], tmp_path: Path
) -> None:
    settings = {"task": "python_codes"}
    done = make_run(tmp_path / "done", "1", **settings)
    said = [f"x{text}x" for text in texts]
    rows = [{"question": text, "reference": text, "generated": text} for text in said]
    for name in ("best", "last"):
        write_json(done.folder / name / "results.json", summarize(
            list(map(visible, said)), [TextPrediction(text, 5, True, 1.0, 2) for text in said],
            str.split))
        (done.folder / name / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = written(tmp_path, {"answers": [row("<i>LoRA</i>", done)]}, "python -m experiments",
                   init_from="gpt2-mini", **settings)
    for text in said:
        assert "".join(page.texts).count(visible(text.replace("\r\n", "\n"))) >= 2


@pytest.mark.parametrize("nasty", NASTY, ids=repr)
def test_any_text_is_one_line_of_a_file(nasty: str) -> None:
    for text in (plain(nasty), code(nasty), one_line(nasty), in_words(ValueError(nasty))):
        assert len(text.splitlines()) == 1
        assert text.encode("utf-8").isascii()
    (first, *_, last) = "\n".join(fenced([nasty])).split("\n")
    assert first == last
    assert first not in nasty
    assert html.unescape(plain("a & b")) == "a & b"


def test_any_text_fits_into_a_cell() -> None:
    assert plain("a|b\n <i> *c* [d](e)") == "a\\|b &lt;i&gt; \\*c\\* \\[d](e)"
    assert plain("$x$ ~y~ \u202e") == r"&#36;x&#36; &#126;y&#126; \\u202e"


def test_name_is_code_and_a_fence_is_as_long_as_it_was() -> None:
    assert code("out/gpt2-mini_1.0") == "`out/gpt2-mini_1.0`"
    assert code("a`<b>") == "<code>a\\`&lt;b&gt;</code>"
    assert fenced(["a", "b"]) == ["~~~~", "a\nb", "~~~~"]


def test_errors_of_the_system_name_the_file_and_not_a_number(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_text()
    assert in_words(caught.value) == f"{tmp_path}/none: No such file or directory"
