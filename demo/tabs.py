"""What each tab of the page shows, in HTML: functions of what a visitor chose, and of no state."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

from experiments.answerers import Answerer, checked, load_finished, with_bases
from experiments.escaping import in_html, in_words
from experiments.finished_runs import UNREADABLE, load_run
from experiments.jobs import job_of
from experiments.page import section_html
from experiments.prompt_tokens import ROLES, prompt_tokens
from experiments.selected import accuracy_section, chances_section, comparison, spectrum_section

COPY = "navigator.clipboard.writeText(this.previousSibling.textContent)"


def in_a_sentence(fill: Callable[..., str]) -> Callable[..., str]:
    """Make `fill` say what is wrong in a sentence."""
    @wraps(fill)
    def filled(*values: object) -> str:
        try:
            return fill(*values)
        except (*UNREADABLE, FloatingPointError, NotImplementedError) as error:
            return f'<p class="sorry" role="alert">{in_html(in_words(error))}</p>'
    return filled


def card(model: Answerer, text: str, strength: float = 1.0, about: str = "") -> str:
    """Return the answer of a model, the probability of each label, and the seconds it took."""
    prediction, seconds = model.answer(text, strength)
    answer = prediction.generated.strip() or "(no words)"
    parts = [f"<h3>{in_html(model.name)}{about}</h3><p>{in_html(model.about)}</p>",
             f"<pre>{in_html(answer)}</pre>"]
    if model.task.choices:
        label = model.task.labels[prediction.label] if prediction.label >= 0 else "garbage"
        parts += [f'<p>label <b class="label {in_html(label)}">{in_html(label)}</b></p>']
        for word, logprob in zip(model.task.labels, prediction.label_logprobs, strict=True):
            name, chance = in_html(f"P({word})"), f"{math.exp(logprob):.4f}"
            parts += [f'<p class="chance"><span>{name} =</span> <b>{chance}</b>'
                      f'<meter value="{chance}" aria-label="{name}"></meter></p>']
    cut = model.loader.texts_cut([{model.task.text_field: text}], model.sampler.room)
    note = f"; the text is cut to fit into {model.loader.block_size} tokens" if cut else ""
    return f'<article>{"".join(parts)}<footer>{seconds:.2f} s{note}</footer></article>'


@in_a_sentence
def ask(text: str, folders: Sequence[str]) -> str:
    """Return the answers of the chosen runs, each after that of the model it began from."""
    checked(text)
    cards = [card(model, text) for model in with_bases(folders)]
    return f'<div class="cards">{"".join(cards)}</div>'


@in_a_sentence
def strength(text: str, folder: str, factor: float) -> str:
    """Return the answer with ΔW times `factor`, and the last label's probability over factors."""
    run = load_finished(checked(text) and folder, lora=True)
    answer = f'<div class="cards">{card(run, text, factor, f", ΔW × {factor:g}")}</div>'
    section = section_html(chances_section(run, text, factor)) if run.task.choices else ""
    return answer + section


@in_a_sentence
def accuracy(folder: str, track: Callable[..., Iterable[float]] = iter) -> str:
    """Return the accuracy on validation reviews over factors of ΔW; `track` shows the progress."""
    return section_html(accuracy_section(load_finished(folder, lora=True), track))


@in_a_sentence
def inside(text: str, folder: str) -> str:
    """Return which words moved the answer, and the singular values of ΔW."""
    run = load_finished(checked(text) and folder, lora=True)
    words = moved(run, text.split()) if run.task.choices else ""
    return words + section_html(spectrum_section(run.singular_values()))


def moved(run: Answerer, words: Sequence[str]) -> str:
    """Return the words before training and with LoRA, each over what leaving it out changes."""
    label = in_html(f"P({run.task.labels[-1]})")
    parts = ["<h3>Which words moved the answer?</h3>",
             f"<p>Under each word: the change of {label} when the word is left out.</p>"]
    found = [run.without_words(words, factor) for factor in (0.0, 1.0)]
    most = max(abs(change) for _, changes in found for change in changes) or 1
    for name, (whole, changes) in zip(("Before training", "With LoRA"), found, strict=True):
        parts += [f'<h4>{name}: {label} = {whole:.4f}</h4><p class="words">']
        parts += [f'<span style="--change: {change / most:.2f}">{in_html(word)}'
                  f"<small>{change:+.4f}</small></span> "
                  for word, change in zip(words, changes, strict=True)] + ["</p>"]
    return "".join(parts)


@in_a_sentence
def curves(folders: Sequence[str]) -> str:
    """Return the validation curves of the runs, the report's tables, and their commands."""
    runs = {Path(folder): load_run(Path(folder)) for folder in folders}
    commands = [job_of(folder, run.config).command for folder, run in runs.items()]
    return section_html(comparison(runs)) + "<h3>The commands</h3>" + "".join(
        f'<p class="command"><code>{in_html(line)}</code><button onclick="{COPY}">Copy</button></p>'
        for line in commands)


@in_a_sentence
def prompt(folder: str, number: float, shots: float) -> str:
    """Return the tokens of a training example behind `shots` others, coloured by their roles."""
    run = load_finished(folder)
    records = run.loader.records("train")
    record = records[(int(number) - 1) % len(records)]
    tokens = prompt_tokens(run.loader, record, int(shots), run.sampler.room)
    counts = Counter(token.role for token in tokens)
    legend = (f'<span class="{role}">{role}: {counts[role]} tokens</span>' for role in ROLES)
    pieces = "".join(f'<span class="{role}">{in_html(piece)}</span>' for piece, role in tokens)
    shown = pieces.replace("\n", "⏎\n")
    return f'<p class="legend">{" ".join(legend)}</p><p class="tokens">{shown}</p>'
