"""The report's sections on tasks whose answers are long texts: figures, curves, examples."""

import html
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints.files import read_json
from experiments.figures import validation_curves
from experiments.results import (
    Row,
    Section,
    basis,
    commands,
    losses,
    mean_and_deviation,
    plain,
    predictions_beside,
)
from tasks.code_scores import strip_fences
from tasks.scores import markdown_table
from train import TrainConfig

EXAMPLES = 10  # shown side by side
METRICS = {  # of the results: its title, by what it is multiplied, its digits
    "perplexity": ("perplexity", 1, 2), "bleu": ("BLEU", 1, 1), "chrf": ("chrF", 1, 1),
    "rouge_l": ("ROUGE-L", 1, 3), "exact_match": ("exact match, %", 100, 1),
    "parses": ("parse, %", 100, 1), "ended": ("ended by itself, %", 100, 1),
    "tokens": ("tokens", 1, 0),
}


def results_of(row: Row) -> list[dict[str, Any]]:
    """Return the results of the best checkpoints, or of the untouched model."""
    if row.trains:
        return [run.results["best"] for run in row.runs]
    return [read_json(path) for path in row.untrained]


def predictions_of(row: Row) -> list[dict[str, Any]]:
    """Return what the first seed's best checkpoint, or the untouched model, said."""
    if row.trains:
        return row.runs[0].predictions["best"]
    return predictions_beside(row.untrained[0])


def metrics_table(rows: Sequence[Row]) -> list[str]:
    lines = [["", "seeds", "validation loss", *(title for title, *_ in METRICS.values())]]
    for row in rows:
        found = results_of(row)
        loss = mean_and_deviation(losses(row)) if row.runs else ""
        cells = [cell(found, name) for name in METRICS] if found else [""] * len(METRICS)
        lines.append([plain(row.label), row.seeds, loss, *cells])
    return markdown_table(lines)


def cell(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return the mean of a metric over the seeds, and the mean of its interval's ends."""
    _, factor, digits = METRICS[name]
    value = mean_and_deviation([factor * result[name] for result in results], digits)
    low, high = (factor * statistics.mean(result["interval_95"][name][end] for result in results)
                 for end in (0, 1))
    return f"{value} ({low:.{digits}f} to {high:.{digits}f})"


def right_answers(rows: Sequence[Row]) -> list[str]:
    """Say what the right answers themselves would get."""
    found = [result for row in rows for result in results_of(row)]
    if not found:
        return []
    return [f"Of the {found[0]['n']} right answers {found[0]['references_parse']:.1%} parse; they "
            f"have {found[0]['reference_tokens']:.0f} tokens. All figures are of the best "
            "checkpoint; perplexity is of the right answer's tokens, the rest of what was "
            "generated."]


def section(rows: Sequence[Row], title: str, more: Sequence[str] = ()) -> Section:
    series = [(row.label, [run.metrics for run in row.runs]) for row in rows if row.runs]
    title_of_steps = "training loss of a step (nats a token)"
    figure = validation_curves(series, "train_loss", title_of_steps, first=1) if series else None
    return Section(title, basis([row for row in rows if row.trains]),
                   [*right_answers(rows), *metrics_table(rows), *more, *commands(rows)], figure)


def compared(rows: Sequence[Row], config: TrainConfig) -> Section:
    return section(rows, "The untouched model, LoRA of two ranks, full fine-tuning",
                   examples([row for row in rows if results_of(row)], config.seed))


def targets(rows: Sequence[Row], config: TrainConfig) -> Section:
    return section(rows, "Which layers?")


def examples(rows: Sequence[Row], seed: int) -> list[str]:
    """Return test questions, drawn with `seed`, each with what the rows' models answered."""
    if not rows:
        return []
    said = [predictions_of(row) for row in rows]
    number = len(said[0])
    drawn = sorted(random.Random(seed).sample(range(number), min(EXAMPLES, number)))
    titles = ["question", "right answer", *(row.label for row in rows)]
    lines = ["<table>", html_row("th", map(html.escape, titles))]
    for i in drawn:
        texts = [strip_fences(said[0][i]["reference"]),
                 *(strip_fences(answers[i]["generated"]) for answers in said)]
        cells = [in_one_line(said[0][i]["question"], "<br>"), *map(preformatted, texts)]
        lines.append(html_row("td", cells))
    about = (f"{len(drawn)} of the {number} test examples, drawn with seed {seed}, with the first "
             "seed's answers, verbatim:")
    return ["", about, "", *lines, "</table>"]


def html_row(tag: str, cells: Any) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def preformatted(code: str) -> str:
    return f"<pre>{in_one_line(code, '&#10;')}</pre>"


def in_one_line(text: str, line_end: str) -> str:
    """Escape any text, its line ends too: a blank line would end the table."""
    lines = html.escape(text).encode("utf-8", "replace").decode().splitlines()
    return line_end.join(lines)
