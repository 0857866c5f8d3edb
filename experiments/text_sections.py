"""The report's sections about tasks whose answers are long texts: scores, curves, examples.

The task decides which scores the table shows, how an answer looks, and which sentence describes
the right answers.
"""

import html
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.escaping import in_html, one_line, plain
from experiments.figures import validation_curves
from experiments.results import (
    Row,
    Section,
    basis,
    commands,
    losses,
    mean_and_deviation,
)
from tasks.base import Task
from tasks.registry import make_task
from tasks.scores import Metric, markdown_table
from train import TrainConfig

EXAMPLES = 10  # number of test examples shown


def answers(rows: Sequence[Row], config: TrainConfig) -> Section:
    task = make_task(config.task)
    found = section(rows, "Base model, LoRA of two ranks, full fine-tuning", task)
    shown = examples([row for row in rows if results_of(row)], task, config.seed)
    return found._replace(lines=[*found.lines, *shown, *commands(rows)])


def targets(rows: Sequence[Row], config: TrainConfig) -> Section:
    found = section(rows, "Which layers?", make_task(config.task))
    return found._replace(lines=[*found.lines, *commands(rows)])


def section(rows: Sequence[Row], title: str, task: Task) -> Section:
    """Return a section with a table of scores and the curves of training and validation loss."""
    series = [(row.label, [run.metrics for run in row.runs]) for row in rows if row.runs]
    title_of_steps = "training loss of a step (nats a token)"
    figure = validation_curves(series, "train_loss", title_of_steps, first=1) if series else None
    return Section(title, basis([row for row in rows if row.trains]),
                   [*introduction(rows, task), *metrics_table(rows, task.metrics)], figure)


def introduction(rows: Sequence[Row], task: Task) -> list[str]:
    """Return the task's sentence on the right answers, and whose scores the table shows."""
    found = [result for row in rows for result in results_of(row)]
    if not found:
        return []
    sentences = [task.explain_references(found[0]), "All scores are of the best checkpoint."]
    return [" ".join(filter(None, sentences))]


def results_of(row: Row) -> list[dict[str, Any]]:
    """Return the results of the best checkpoints, or of the base model."""
    if row.trains:
        return [run.results["best"] for run in row.runs]
    return [scores.results for scores in row.untrained]


def predictions_of(row: Row) -> list[dict[str, Any]]:
    """Return the predictions of the first seed's best checkpoint, or of the base model."""
    if row.trains:
        return row.runs[0].predictions["best"]
    return row.untrained[0].predictions


def metrics_table(rows: Sequence[Row], metrics: Mapping[str, Metric]) -> list[str]:
    """Return a table with a line for each row and a column for each of the task's metrics."""
    lines = [["", "seeds", "validation loss", *(metric.title for metric in metrics.values())]]
    for row in rows:
        found = results_of(row)
        loss = mean_and_deviation(losses(row)) if row.runs else ""
        cells = [score_cell(found, *item) if found else "" for item in metrics.items()]
        lines.append([plain(row.label), row.seeds, loss, *cells])
    return markdown_table(lines)


def score_cell(results: Sequence[Mapping[str, Any]], name: str, metric: Metric) -> str:
    """Return the mean of a score over the seeds and, if it has one, the mean interval."""
    cell = mean_and_deviation([metric.factor * result[name] for result in results], metric.digits)
    intervals = [result["interval_95"][name] for result in results
                 if name in result.get("interval_95", {})]
    if not intervals:
        return cell
    low, high = map(statistics.mean, zip(*intervals, strict=True))
    return f"{cell} ({metric.show(low)} to {metric.show(high)})"


def examples(rows: Sequence[Row], task: Task, seed: int) -> list[str]:
    """Return test questions, drawn with `seed`, each with the answers of the rows' models.

    Leaves out rows whose models answered other questions than the first row's.
    """
    if not rows:
        return []
    found = [(row.label, predictions_of(row)) for row in rows]
    first = found[0][1]
    questions = [example[task.text_field] for example in first]
    found = [(label, answers) for label, answers in found
             if [example[task.text_field] for example in answers] == questions]
    number = len(questions)
    drawn = sorted(random.Random(seed).sample(range(number), min(EXAMPLES, number)))
    titles = ["question", "right answer", *(one_line(label) for label, _ in found)]
    lines = ["<table>", html_row("th", map(html.escape, titles))]
    for i in drawn:
        texts = [first[i]["reference"], *(answers[i]["generated"] for _, answers in found)]
        question = in_one_line(questions[i], "<br>")
        lines.append(html_row("td", [question, *map(preformatted, map(task.display, texts))]))
    about = (f"{len(drawn)} of the {number} test examples, drawn with seed {seed}, and the first "
             "seed's answers, verbatim:")
    return ["", about, "", *lines, "</table>"]


def html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def preformatted(text: str) -> str:
    return f"<pre>{in_one_line(text, '&#10;')}</pre>"


def in_one_line(text: str, line_end: str) -> str:
    """Escape any text and its line ends, because a blank line would end the table."""
    lines = text.replace("\r\n", "\n").split("\n")
    return line_end.join(in_html(line).replace("\t", "&#9;") for line in lines)
