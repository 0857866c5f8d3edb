"""The page shows what the scripts compute, and says in a sentence what it cannot show."""

import html
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from configurator import configure
from demo import tabs
from experiments.answerers import load_finished
from generate import GenerateConfig
from runtime.run_folder import FINISHED_FILE
from train import TrainConfig

TEXT = "train film 3 is witty"
ODD = "${alert(1)} {{x}} <img src=x onerror=alert(2)> & \"q\" \x00 \u202e $x$ |"


def chances(shown: str) -> list[str]:
    return re.findall(r"P\(\w+\) =</span> <b>(\d\.\d{4})</b>", shown)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What generate.py prints for `TEXT`."""
    settings = [f"text={TEXT}", "device=cpu", "dtype=float32", *arguments]
    generate.main(configure(GenerateConfig, settings))
    return capsys.readouterr().out


@pytest.fixture
def lora(trained: Path) -> str:
    return str(trained / "lora")


def test_answers_are_those_of_generate_to_four_digits(
    trained: Path, lora: str, reviews: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tabs.ask(TEXT, [lora, str(trained / "bitfit")])
    expected = [printed(capsys, f"init_from={trained / 'base'}", f"dataset={reviews}"),
                printed(capsys, f"out_dir={lora}"),
                printed(capsys, f"out_dir={trained / 'bitfit'}")]
    assert chances(shown) == re.findall(r"P\(\w+\) = (\S+)", "".join(expected))
    labels = re.findall(r"^label: (\w+)", "".join(expected), re.MULTILINE)
    assert re.findall(r'<b class="label (\w+)">\1</b>', shown) == labels
    assert [name for name in re.findall("<h3>(.*?)</h3>", shown)] == [
        "base", lora, str(trained / "bitfit")]
    assert "LoRA, r = 2; task sentiment" in shown


def test_strength_shows_the_answer_at_s(lora: str) -> None:
    run = load_finished(lora)
    for factor in (0.0, 0.3, 1.0, 2.0):
        shown = tabs.strength(TEXT, lora, factor)
        assert f"{lora}, ΔW × {factor:g}</h3>" in shown
        assert chances(shown)[1] == f"{run.chance_at(factor, TEXT):.4f}"
        assert f"<td>{run.chance_at(factor, TEXT):.4f}</td>" in shown
    assert "<img" in tabs.accuracy(lora)


def test_inside_shows_words_with_their_changes(lora: str) -> None:
    shown = tabs.inside(f"{ODD} film", lora)
    words = [html.unescape(word) for word in re.findall(r'--change: [^"]+">(.*?)<small>', shown)]
    assert words == [*ODD.replace("\x00", r"\x00").replace("\u202e", r"\u202e").split(), "film"] * 2
    _, changes = load_finished(lora).without_words([*ODD.split(), "film"], 1.0)
    assert re.findall("<small>(.*?)</small>", shown)[len(changes):] == [
        f"{change:+.4f}" for change in changes]


def test_curves_end_with_the_commands_that_made_the_runs(trained: Path, lora: str) -> None:
    shown = tabs.curves([lora, str(trained / "bitfit")])
    commands = [html.unescape(line) for line in re.findall("<code>(.*?)</code>", shown)]
    for folder, command in zip((lora, trained / "bitfit"), commands, strict=True):
        start, script, *settings = shlex.split(command)
        assert (start, script) == ("python", "train.py")
        again, own = configure(TrainConfig, settings), tabs.load_run(Path(folder)).config
        assert again == own


def test_prompts_colour_every_token(lora: str) -> None:
    shown = tabs.prompt(lora, 4, 0)
    legend, tokens = shown.split('<p class="tokens">')
    assert re.findall(r"(\w+): (\d+) tokens", legend) == [
        (role, str(tokens.count(f'class="{role}"')))
        for role in ("shared", "text", "instruction", "supervised")]
    assert '<span class="supervised"> positive</span><span class="supervised">&lt;|end' in tokens
    assert tabs.prompt(lora, 4 + 48, 0) == shown  # it begins again behind the last example


def test_texts_of_a_visitor_are_never_html(lora: str) -> None:
    for shown in (tabs.ask(ODD, [lora]), tabs.strength(ODD, lora, 1.0), tabs.inside(ODD, lora),
                  tabs.ask(TEXT, ["<img src=y>"])):
        assert "<img src=" not in shown
        assert "\x00" not in shown


def sentence(shown: str) -> str:
    match = re.fullmatch(r'<p class="sorry" role="alert">(.*)</p>', shown)
    assert match, shown[:200]
    return html.unescape(match[1])


@pytest.mark.parametrize("fill", [lambda text, run: tabs.ask(text, [run]), tabs.inside,
                                  lambda text, run: tabs.strength(text, run, 1.0)])
def test_bad_texts_get_a_sentence(fill: Callable[[str, str], str], lora: str) -> None:
    assert sentence(fill(" \n", lora)) == "Type a text first: this one holds no words."
    assert sentence(fill("x" * 100_000, lora)) == (
        "This text has 100,000 characters; at most 10,000 are taken.")


def test_a_long_text_is_cut_and_says_so(lora: str) -> None:
    assert "s; the text is cut to fit into 128 tokens</footer>" in tabs.ask("film " * 500, [lora])
    assert sentence(tabs.inside("film " * 81, lora)) == (
        "This text has 81 words; leaving out each in turn takes at most 80.")


def test_runs_that_cannot_be_shown_get_a_sentence(
    trained: Path, lora: str, tmp_path: Path
) -> None:
    writing = shutil.copytree(lora, tmp_path / "writing")
    (writing / FINISHED_FILE).unlink()
    (writing / "metrics.jsonl").write_text("")
    broken = shutil.copytree(lora, tmp_path / "broken")
    (broken / "best" / "adapter_model.safetensors").write_bytes(b"no weights")
    for run, message in ((writing, "is not finished: wait"), (broken, "adapter_model.safetensors"),
                         (tmp_path / "none", "is not finished"), (None, "no finished run yet")):
        for shown in (tabs.ask(TEXT, [run]), tabs.strength(TEXT, run, 1.0),
                      tabs.accuracy(run), tabs.inside(TEXT, run), tabs.prompt(run, 1, 0)):
            assert message in sentence(shown)
    bitfit = str(trained / "bitfit")
    for shown in (tabs.strength(TEXT, bitfit, 1.0), tabs.accuracy(bitfit),
                  tabs.inside(TEXT, bitfit)):
        assert "trained method=bitfit and has no ΔW: this part is for LoRA runs." in sentence(shown)
    assert sentence(tabs.curves([])) == "Choose a run."
    assert "are too long" in sentence(tabs.prompt(lora, 1, 8))
