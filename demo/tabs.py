"""What each tab of the page shows, in HTML: functions of what a visitor chose, and of no state."""

import html
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

from experiments.answerers import Answerer, load, load_finished
from experiments.escaping import in_words, visible
from experiments.finished_runs import UNREADABLE, load_run
from experiments.jobs import job_of
from experiments.page import section_html
from experiments.prompt_tokens import ROLES, prompt_tokens
from experiments.selected import accuracy_section, chances_section, comparison, spectrum_section
from generate import GenerateConfig

MOST_CHARACTERS, MOST_WORDS = 10_000, 80
STRENGTHS = [i / 10 for i in range(21)]
MEASURED, REVIEWS = [i / 4 for i in range(9)], 200  # of the accuracy, which takes longer
COPY = "navigator.clipboard.writeText(this.previousSibling.textContent)"


def in_a_sentence(fill: Callable[..., str]) -> Callable[..., str]:
    """Make `fill` say what is wrong in a sentence."""
    @wraps(fill)
    def filled(*values: object) -> str:
        try:
            return fill(*values)
        except (*UNREADABLE, FloatingPointError, NotImplementedError) as error:
            return f'<p class="sorry" role="alert">{shown(in_words(error))}</p>'
    return filled


def shown(text: str) -> str:
    return html.escape(visible(text))


def checked(text: str) -> str:
    if not text.strip():
        raise ValueError("Type a review first: this text holds no words.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"This text has {len(text):,} characters; the page takes at most "
                         f"{MOST_CHARACTERS:,}.")
    return text


def card(model: Answerer, text: str, strength: float = 1.0, about: str = "") -> str:
    """Return the answer of a model, the probability of each label, and the seconds it took."""
    prediction, seconds = model.answer(text, strength)
    answer = prediction.generated.strip() or "(no words)"
    parts = [f"<h3>{shown(model.name)}{about}</h3><pre>{shown(answer)}</pre>"]
    if model.task.choices:
        label = model.task.labels[prediction.label] if prediction.label >= 0 else "garbage"
        parts += [f'<p>label <b class="label {shown(label)}">{shown(label)}</b></p>']
        for word, logprob in zip(model.task.labels, prediction.label_logprobs, strict=True):
            name, chance = shown(f"P({word})"), f"{math.exp(logprob):.4f}"
            parts += [f'<p class="chance">{name} = <b>{chance}</b>'
                      f'<meter value="{chance}" aria-label="{name}"></meter></p>']
    cut = model.loader.texts_cut([{model.task.text_field: text}], model.sampler.room)
    note = f"; the text is cut to fit into {model.loader.block_size} tokens" if cut else ""
    return f'<article>{"".join(parts)}<footer>{seconds:.2f} s{note}</footer></article>'


@in_a_sentence
def ask(text: str, folders: Sequence[str]) -> str:
    """Return the answers of the chosen runs and, before them, of the models they began from."""
    checked(text)
    runs = [load_finished(folder) for folder in folders]
    bases = dict.fromkeys(run.base() for run in runs) or [
        load(GenerateConfig(init_from="gpt2-mini"))]
    cards = [card(model, text) for model in (*bases, *runs)]
    return f'<div class="cards">{"".join(cards)}</div>'


@in_a_sentence
def strength(text: str, folder: str, factor: float) -> str:
    """Return the answer with ΔW times `factor`, and the last label's probability over factors."""
    run = load_finished(checked(text) and folder, lora=True)
    answer = f'<div class="cards">{card(run, text, factor, f", ΔW × {factor:g}")}</div>'
    if not run.task.choices:
        return answer
    chances = {each: run.chance_at(each, text) for each in STRENGTHS}
    return answer + section_html(chances_section(f"P({run.task.labels[-1]})", chances, factor))


@in_a_sentence
def accuracy(folder: str, track: Callable[[Iterable[float]], Iterable[float]] = iter) -> str:
    """Return the accuracy on validation reviews over factors of ΔW; `track` shows the progress."""
    run = load_finished(folder, lora=True)
    if not run.task.choices:
        raise ValueError(f"task={run.task.name} has no labels to count.")
    found = {factor: run.accuracy_at(factor, REVIEWS) for factor in track(MEASURED)}
    return section_html(accuracy_section(found, len(run.loader.spread("validation", REVIEWS))))


@in_a_sentence
def inside(text: str, folder: str) -> str:
    """Return which words moved the answer, and the singular values of ΔW."""
    run = load_finished(checked(text) and folder, lora=True)
    words = moved(run, text.split()) if run.task.choices else ""
    return words + section_html(spectrum_section(run.singular_values()))


def moved(run: Answerer, words: Sequence[str]) -> str:
    """Return the words before training and with LoRA, each over what leaving it out changes."""
    if len(words) > MOST_WORDS:
        raise ValueError(f"This text has {len(words)} words; this tab takes at most {MOST_WORDS}.")
    label = shown(f"P({run.task.labels[-1]})")
    parts = ["<h3>Which words moved the answer?</h3>",
             f"<p>Under each word: the change of {label} when the word is left out.</p>"]
    for name, factor in ((run.base().name, 0.0), (run.name, 1.0)):
        whole, changes = run.without_words(words, factor)
        most = max(map(abs, changes)) or 1
        parts += [f'<h4>{shown(name)}: {label} = {whole:.4f}</h4><p class="words">']
        parts += [f'<span style="--change: {change / most:.2f}">{shown(word)}'
                  f"<small>{change:+.4f}</small></span> "
                  for word, change in zip(words, changes, strict=True)] + ["</p>"]
    return "".join(parts)


@in_a_sentence
def curves(folders: Sequence[str]) -> str:
    """Return the validation curves of the runs, the report's tables, and their commands."""
    if not folders:
        raise ValueError("Choose a run above.")
    runs = {Path(folder): load_run(Path(folder)) for folder in folders}
    commands = [job_of(folder, run.config).command for folder, run in runs.items()]
    return section_html(comparison(runs)) + "<h3>The commands</h3>" + "".join(
        f'<p class="command"><code>{shown(line)}</code><button onclick="{COPY}">Copy</button></p>'
        for line in commands)


@in_a_sentence
def prompt(folder: str, number: float, shots: float) -> str:
    """Return the tokens of a training example behind `shots` others, coloured by their roles."""
    run = load_finished(folder)
    records = run.loader.records("train")
    record = records[(int(number) - 1) % len(records)]
    tokens = prompt_tokens(run.loader, record, int(shots), run.sampler.room)
    counts = Counter(token.role for token in tokens)
    legend = (f'<span class="{role[:6]}">{role}: {counts[role]} tokens</span>' for role in ROLES)
    pieces = (f'<span class="{role[:6]}">{shown(piece)}</span>' for piece, role in tokens)
    return f'<p class="legend">{" ".join(legend)}</p><p class="tokens">{"".join(pieces)}</p>'
