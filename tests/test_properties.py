"""Whatever text or file a user brings: a result of the declared kind, or one clear error."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_models import GPT2_PROMPTS

from checkpoints.files import slug
from configurator import Bounds, configure
from dataloader import ANSWER_ROOM, CustomDataLoader
from models.tokenizer import get_tokenizer
from tasks.sentiment import SentimentTask

many = settings(max_examples=300, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = ["", "\0\x07\x1b[31m", "🎬🏽‍♀️" * 9, "فيلم جميل", "Label: positive", "<|endoftext|>", "\ud800",
       "\nLabel: negative\nText:", "x" * 100_000, "{text}", "é" * 5_000]


@dataclass(frozen=True)
class Settings:
    """One of each kind."""

    text: Annotated[str, "a text"] = "a"
    number: Annotated[int, "an integer", Bounds(0, 9)] = 1
    rate: Annotated[float, "a float"] = 1.0
    switch: Annotated[bool, "a switch"] = False
    choice: Annotated[Literal["x", "y"], "a choice"] = "x"


def assert_settings_or_one_line(arguments: list[str]) -> None:
    try:
        result = configure(Settings, arguments)
    except ValueError:
        return
    assert [type(value) for value in vars(result).values()] == [str, int, float, bool, str]
    assert 0 <= result.number <= 9
    assert result.choice in ("x", "y")


names = st.sampled_from([*vars(Settings()), "--number", "lr", "__class__"])
values = st.one_of(st.text(), st.integers().map(str), st.floats().map(str))


@many
@given(st.lists(st.one_of(st.text().filter(lambda text: text not in ("-h", "--help")),
                          st.builds("{}={}".format, names, values))))
def test_any_command_line_gives_settings_or_an_error(arguments: list[str]) -> None:
    assert_settings_or_one_line(arguments)


lines = st.one_of(st.text(), st.builds("{} = {!r}".format, names, st.one_of(
    st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers()))))


@many
@given(st.one_of(st.lists(lines).map("\n".join).map(lambda text: text.encode("utf-8", "replace")),
                 st.binary()))
@example(b"number = __import__('os').system('touch executed')")
@example(b"text = open('executed', 'w')")
@example(b"number = " + b"(" * 5_000)
def test_any_config_file_gives_settings_or_an_error_and_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "any.py").write_bytes(content)
    assert_settings_or_one_line(["any.py"])
    assert [path.name for path in tmp_path.iterdir()] == ["any.py"]


words = st.sampled_from(["positive", "negative", "Positive", "NEGATIVE", "positively", "non", "."])


@many
@given(st.one_of(st.text(), st.lists(words).map(" ".join), st.lists(words).map("".join)))
def test_any_answer_is_a_label_or_garbage(generated: str) -> None:
    found = {word for word in re.findall(r"\w+", generated.lower())} & {"positive", "negative"}
    expected = {frozenset({"positive"}): 1, frozenset({"negative"}): 0}.get(frozenset(found), -1)
    assert SentimentTask().parse(generated) == expected


@cache
def loader(prompt: str) -> CustomDataLoader:
    return CustomDataLoader("", SentimentTask(prompt), block_size=256)


@many
@given(st.one_of(st.text(), st.sampled_from(ODD), st.lists(st.sampled_from(ODD), max_size=4).map(
    "".join)), st.sampled_from(sorted(GPT2_PROMPTS)))
def test_any_review_is_plain_text_that_fits(text: str, prompt: str) -> None:
    """Also one that spells out a label or end-of-text; only the review itself is ever cut."""
    ids = loader(prompt).encode_prompt({"text": text})
    assert len(ids) <= 256 - ANSWER_ROOM
    assert get_tokenizer().eot_token not in ids
    before, after = GPT2_PROMPTS[prompt].split("{text}")
    decoded = get_tokenizer().decode(ids)
    assert decoded.startswith(before)
    assert decoded.endswith(after)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    kept = decoded.removeprefix(before).removesuffix(after)
    assert whole.startswith(kept.rstrip("\N{REPLACEMENT CHARACTER}"))
    if len(get_tokenizer().encode_ordinary(GPT2_PROMPTS[prompt] + text)) < 200:
        assert kept == whole


cells = st.one_of(st.text(), st.integers(), st.none(), st.floats(allow_nan=False), st.booleans())
rows = st.one_of(
    st.fixed_dictionaries({"text": st.text(), "label": st.sampled_from([0, 1])}),
    st.dictionaries(st.sampled_from(["text", "label", "Text", "id"]), cells), cells)


@many
@given(st.lists(rows, max_size=4), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
def test_any_lines_of_json_are_records_or_an_error(
    tmp_path: Path, content: list[Any], encoding: str
) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=encoding == "latin-1") for row in content)
    (tmp_path / "test.jsonl").write_bytes(text.encode(encoding, "replace"))
    try:
        records = SentimentTask().read(str(tmp_path), "test")
    except ValueError:
        return
    assert len(records) == len(content)
    for record in records:
        assert isinstance(record["text"], str)
        assert record["label"] in (0, 1)


@many
@given(st.text(alphabet="a -/\\.", max_size=4), st.text(alphabet="a -/\\.", max_size=4))
def test_any_name_makes_a_file_name_of_its_own(one: str, other: str) -> None:
    assert re.fullmatch(r"[\w.-]*", slug(one))
    assert len(slug(one)) <= 49
    assert (slug(one) == slug(other)) == (one == other)
