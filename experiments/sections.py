"""The report's sections about tasks whose answers are single words, and about cost."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.escaping import fenced, plain
from experiments.figures import (
    Method,
    accuracy_dots,
    accuracy_over_weights,
    heat_map,
    rate_lines,
    validation_curves,
)
from experiments.finished_runs import TrainedRun
from experiments.plan import RANKS
from experiments.results import (
    Row,
    Section,
    basis,
    commands,
    losses,
    mean_and_deviation,
)
from lora import count_parameters, mark_only_lora_as_trainable
from model import GPT, SIZES
from models.families import family_of, load_config
from runtime.device import shapes_only
from runtime.metrics import training_seconds
from tasks.registry import find_task
from tasks.scores import markdown_table, wilson_interval
from train import TrainConfig


def interval(accuracy: float, n: int) -> str:
    return "{:.3f} to {:.3f}".format(*wilson_interval(accuracy * n, n))


def accuracy_cells(runs: Sequence[TrainedRun], checkpoint: str) -> list[str]:
    results = [run.results[checkpoint] for run in runs]
    accuracies = [result["accuracy"] for result in results]
    garbage = statistics.mean(result["garbage"] / result["n"] for result in results)
    mean = statistics.mean(accuracies)
    return [mean_and_deviation(accuracies), interval(mean, results[0]["n"]), f"{garbage:.1%}"]


def difference(runs: Sequence[TrainedRun], others: Sequence[TrainedRun]) -> str:
    """Return the mean difference in accuracy of the best checkpoints ± half its 95 % interval.

    Pairs the results by example, each averaged over the seeds first; the interval covers the
    choice of test examples, not that of seeds.
    """
    if len({tuple(questions(run)) for run in (*runs, *others)}) > 1:
        return "other test examples"
    mine, theirs = (np.mean([right(run) for run in side], axis=0) for side in (runs, others))
    gap = mine - theirs
    if len(gap) == 1:  # no interval
        return f"{gap.mean():+.3f}"
    return f"{gap.mean():+.3f} ± {1.96 * gap.std(ddof=1) / len(gap) ** 0.5:.3f}"


def right(run: TrainedRun) -> list[bool]:
    """Return whether the best checkpoint got each test example right."""
    return [row["label"] == row["truth"] for row in run.predictions["best"]]


def questions(run: TrainedRun) -> list[tuple[str, int]]:
    """Return the texts and the right labels of the test examples."""
    return [(row["text"], row["truth"]) for row in run.predictions["best"]]


def accuracy_table(rows: Sequence[Row], against: Row) -> list[str]:
    """Return a table of the best and last checkpoints' scores, one line for each variant."""
    titles = ["", "seeds", "validation loss", "best: test accuracy", "95 % interval", "garbage",
              "last: test accuracy", "95 % interval", "garbage",
              f"best, minus {plain(against.label)} (± half its 95 % interval)"]
    lines = [titles]
    for row in rows:
        runs = row.runs
        if not runs:
            lines.append([plain(row.label), row.seeds, *[""] * 8])
            continue
        other = row is against or not against.runs
        lines.append([
            plain(row.label), row.seeds, mean_and_deviation(losses(row)),
            *accuracy_cells(runs, "best"), *accuracy_cells(runs, "last"),
            "" if other else difference(runs, against.runs),
        ])
    return markdown_table(lines)


def shares(rows: Sequence[Row], config: TrainConfig) -> Section:
    ranks = RANKS[find_task(config.task).answers]
    titles = ["model", "all weights", *(f"r = {rank}" for rank in ranks)]
    family = family_of(config.init_from)
    shapes = {config.init_from: load_config(config.init_from)} | (SIZES if family is GPT else {})
    lines = [titles]
    for name, shape in shapes.items():
        cells = []
        for rank in ranks:
            with shapes_only():
                model = family(replace(shape, lora_rank=rank))
            count = count_parameters(mark_only_lora_as_trainable(model))
            cells.append(f"{count.trained:,} ({count.share:.2%})")
        lines.append([plain(name), f"{count.total - count.trained:,}", *cells])
    text = ["Each layer gets a pair of matrices for each of q, k and v. The counts come from the "
            "models themselves; the share is of all weights, including the adapters."]
    return Section("How many weights does LoRA train?", "", text + markdown_table(lines))


def zero_shot(rows: Sequence[Row], config: TrainConfig) -> Section:
    lines = [["prompt", "n", "accuracy", "95 % interval", "garbage", "constrained accuracy",
              "95 % interval"]]
    shown: list[str] = []
    for row in rows:
        found = row.untrained
        if not found:
            lines.append([plain(row.label), "", row.trouble, *[""] * 4])
            continue
        scores = found[0].results
        n, constrained = scores["n"], scores["constrained_accuracy"]
        lines.append([plain(row.label), f"{n:,}", f"{scores['accuracy']:.3f}",
                      interval(scores["accuracy"], n), f"{scores['garbage'] / n:.1%}",
                      f"{constrained:.3f}", interval(constrained, n)])
        shown = shown or ["", f"Some answers to the prompt {plain(row.label)}, verbatim:", "",
                          *fenced(verbatim(found[0].predictions))]
    text = ["A garbage answer does not hold exactly one label word; it counts as wrong. The "
            "constrained accuracy takes the likeliest label word as the answer. Decoding is "
            "greedy."]
    return Section("What does the model know before fine-tuning?", "",
                   text + markdown_table(lines) + shown + commands(rows))


def verbatim(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return six test examples, evenly spaced, each with the model's answer."""
    return [f"{row['text'][:60]!r:64} -> {row['generated']!r}"
            for row in predictions[:: max(1, len(predictions) // 6)][:6]]


def curve_section(rows: Sequence[Row], title: str) -> Section:
    """Return a section that compares accuracies with the last row and draws validation curves."""
    series = [(row.label, [run.metrics for run in row.runs]) for row in rows if row.runs]
    untrained = {run.metrics[0].get("validation_loss") for row in rows for run in row.runs}
    text = [f"Before the first step the validation loss is {loss:.3f}."
            for loss in sorted(filter(None, untrained))[:1]]
    return Section(title, basis(rows), [*text, *accuracy_table(rows, rows[-1]), *commands(rows)],
                   validation_curves(series) if series else None)


def curves(rows: Sequence[Row], config: TrainConfig) -> Section:
    return curve_section(rows, "LoRA of three ranks against full fine-tuning")


def alpha(rows: Sequence[Row], config: TrainConfig) -> Section:
    return curve_section(rows, "What does α do at r = 16?")


def dot_section(rows: Sequence[Row], title: str, text: Sequence[str]) -> Section:
    """Return a section that compares accuracies with the first row and draws their intervals."""
    points = [(row.label, [run.results["best"]["accuracy"] for run in row.runs],
               row.runs[0].results["best"]["n"]) for row in rows if row.runs]
    return Section(title, basis(rows), [*text, *accuracy_table(rows, rows[0]), *commands(rows)],
                   accuracy_dots(points) if points else None)


def prompts(rows: Sequence[Row], config: TrainConfig) -> Section:
    return dot_section(rows, "Does the prompt matter?", [
        "LoRA r=16, α=64. Each run trains and is scored with the same prompt."])


def layers(rows: Sequence[Row], config: TrainConfig) -> Section:
    return dot_section(rows, "Which layers, and one A or three?", ["LoRA r=16, α=64."])


def grid(rows: Sequence[Row], config: TrainConfig) -> Section:
    alphas = list(dict.fromkeys(row.changes["lora_alpha"] for row in rows))
    rates = list(dict.fromkeys(row.changes["learning_rate"] for row in rows))
    loss, cells = np.full((len(alphas), len(rates)), np.nan), {}
    for row in rows:
        place = alphas.index(row.changes["lora_alpha"]), rates.index(row.changes["learning_rate"])
        if runs := row.runs:
            loss[place] = statistics.mean(losses(row))
            accuracy, bounds, _ = accuracy_cells(runs, "best")
            cells[place] = f"{loss[place]:.3f}; {accuracy} ({bounds})"
        else:
            cells[place] = row.trouble
    lines = [["", *map("rate {:g}".format, rates)]]
    for i, value in enumerate(alphas):
        lines.append([f"α = {value:g}", *(cells[i, j] for j in range(len(rates)))])
    text = ["LoRA r=16. Each cell holds the best checkpoint's validation loss and its test "
            "accuracy. AdamW's first steps move B by about the learning rate, whatever the size "
            "of the gradient, and so the layer's weight by α / r times that: cells with the same "
            "product α × rate start alike."]
    return Section(
        "Learning rate and α", basis(rows), [*text, *markdown_table(lines), *commands(rows)],
        None if np.isnan(loss).all() else heat_map(alphas, rates, loss))


def method_of(row: Row) -> str:
    return row.changes.get("method") or ("lora" if row.changes["lora_rank"] else "full")


def best_rate(name: str, rows: Sequence[Row]) -> tuple[Row, str]:
    """Return the row of the lowest validation loss, and a line that names its learning rate.

    Some of the `rows`, which differ in their rate, must have finished runs.
    """
    best = min((row for row in rows if row.runs), key=lambda row: statistics.mean(losses(row)))
    rate, grid = best.changes["learning_rate"], [row.changes["learning_rate"] for row in rows]
    edge = ", at the edge of the grid" if rate in (min(grid), max(grid)) else ""
    return best, f"- {name}: lowest validation loss at a rate of {rate:g}{edge}."


def rates(rows: Sequence[Row], config: TrainConfig) -> Section:
    lines, series, best = [], {}, rows[0]
    for name, method in (("LoRA r=16, α=64", "lora"), ("full fine-tuning", "full")):
        kind = [row for row in rows if method_of(row) == method]
        series[name] = {row.changes["learning_rate"]: losses(row) for row in kind if row.runs}
        if series[name]:
            best, line = best_rate(name, kind)
            lines.append(line)
    return Section(
        "LoRA and full fine-tuning, each at its best learning rate", basis(rows),
        [*lines, *accuracy_table(rows, best), *commands(rows)],
        rate_lines(series) if lines else None)


METHODS = {
    "lora": "LoRA r=16, α=64", "bitfit": "BitFit", "bottleneck": "bottleneck adapters",
    "prefix": "prefix tuning", "full": "full fine-tuning",
}


def methods(rows: Sequence[Row], config: TrainConfig) -> Section:
    """Compare the methods, each at the rate that was best on the validation split."""
    lines, chosen = [], []
    for method, name in METHODS.items():
        kind = [row for row in rows if method_of(row) == method]
        if any(row.runs for row in kind):
            best, line = best_rate(name, kind)
            lines.append(line)
            chosen.append(best._replace(label=f"{name}, rate {best.changes['learning_rate']:g}"))
    title = "LoRA and its siblings, each at its best learning rate"
    if not chosen:
        return Section(title, basis(rows), [*accuracy_table(rows, rows[0]), *commands(rows)])
    points = [Method(METHODS[method_of(row)], row.runs[0].saved.facts["parameters"]["trained"],
                     [run.results["best"]["accuracy"] for run in row.runs],
                     row.runs[0].results["best"]["n"], [run.metrics for run in row.runs])
              for row in chosen]
    text = ["", "Merged LoRA, BitFit and full fine-tuning answer as fast as the untouched model. A "
            "bottleneck or a prefix cannot be merged: `python -m bench what=methods` measures what "
            "that costs."]
    return Section(title, basis(rows), [
        *lines, *accuracy_table(chosen, chosen[0]), *cost_table(chosen), *text,
        *commands(rows)], accuracy_over_weights(points))


def cost(rows: Sequence[Row]) -> Section:
    """Return the section on weights, time, memory and disk space of finished rows."""
    text = ["The time is that of the optimizer steps alone; programs that ran beside them may "
            "have slowed them down. Memory is the most that the process held up to its last "
            "validation (on a GPU, what torch allocated). The checkpoint's size is that of the "
            "best one's weights on disk. The commands are in the sections above."]
    return Section("What does it cost?", basis(rows), text + cost_table(rows))


def cost_table(rows: Sequence[Row]) -> list[str]:
    """Return a table with one line for each set of runs."""
    noun = find_task(rows[0].runs[0].config.task).noun
    lines = [["", "trained", "share", "training, s", f"{noun}/s", "memory, MiB", "checkpoint, MB"]]
    priced: dict[str, Row] = {}
    for row in rows:
        priced.setdefault(row.jobs[0].name, row)
    for row in priced.values():
        first, seconds, memory = row.runs[0], [], []
        config, parameters = first.config, first.saved.facts["parameters"]
        for run in row.runs:
            seconds.append(training_seconds(run.metrics, config.window, config.max_iters))
            memory.append(max(line.get("memory_mib", 0.0) for line in run.metrics))
        examples = config.max_iters * config.window
        speed = f"{examples / statistics.mean(seconds):.1f}" if all(seconds) else "–"
        lines.append([
            plain(row.label), f"{parameters['trained']:,}",
            f"{parameters['trained'] / parameters['total']:.2%}", mean_and_deviation(seconds, 1),
            speed, f"{statistics.mean(memory):,.0f}",
            f"{first.checkpoint_bytes / 1e6:.1f}" if first.checkpoint_bytes else "–"])
    return markdown_table(lines)
