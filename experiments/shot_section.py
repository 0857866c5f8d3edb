"""The report's section about learning from the context, beside LoRA on the same examples."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.escaping import plain
from experiments.figures import accuracy_over_shots
from experiments.finished_runs import Scores
from experiments.results import Row, Section, basis, commands, mean_and_deviation
from tasks.scores import markdown_table
from train import TrainConfig

# The figures of a prompt with examples: what the table and the curves call them.
WAYS = {"accuracy": "generated", "constrained_accuracy": "constrained",
        "calibrated_accuracy": "calibrated"}
TAUGHT = "LoRA on the same examples"


def shots(rows: Sequence[Row], config: TrainConfig) -> Section:
    """Compare examples in the prompt with LoRA trained on the same ones, and with reasoning."""
    shown = {row.changes["shots"]: row for row in rows if "shots" in row.changes}
    taught = {row.changes["train_size"]: row for row in rows if "train_size" in row.changes}
    reasoned = [row for row in rows if not row.trains and "shots" not in row.changes]
    (whole,) = [row for row in rows if row.trains and row not in taught.values()]
    lines = [["examples", "draws", *WAYS.values(), TAUGHT]]
    for number in sorted({*shown, *taught}):
        lines.append([str(number), *shot_cells(shown.get(number)),
                      trained_cell(taught[number]) if number in taught else ""])
    everything = f"{config.train_size:,}" if config.train_size else "all"
    lines.append([everything, "", "", "", "", trained_cell(whole)])
    text = ["A prompt shows labelled training examples, each in the form of the question with its "
            "answer; their numbers per label differ by one at most. Cells hold the mean ± standard "
            "deviation over the draws, then the lowest and the highest. Constrained accuracy takes "
            "the likeliest label word; calibrated divides by its probability for texts without "
            "content (Zhao et al. 2021). Generated answers are scored separately: one without "
            "exactly one label word is wrong."]
    return Section("Examples in the prompt, or LoRA on the same ones?", basis(rows),
                   [*text, *markdown_table(lines), *reasoning_table(reasoned), *commands(rows)],
                   draw(shown, taught, whole))


def shot_cells(row: Row | None) -> list[str]:
    """Return the number of draws and the accuracy of each of `WAYS`; empty where none fits."""
    found = row.untrained if row else []
    if not found:
        return ["", row.trouble if row else "do not fit", *[""] * (len(WAYS) - 1)]
    return [str(len(found)), *(spread(scores_of(found, way)) for way in WAYS)]


def scores_of(found: Sequence[Scores], way: str) -> list[float]:
    """Return a result of each draw; one that was scored without calibration counts as 0."""
    return [float(each.results.get(way, 0.0)) for each in found]


def trained_cell(row: Row) -> str:
    accuracies = trained_accuracies(row)
    return spread(accuracies) if accuracies else row.trouble


def trained_accuracies(row: Row) -> list[float]:
    return [run.results["best"]["accuracy"] for run in row.runs]


def spread(values: Sequence[float]) -> str:
    """Return mean and deviation, and the ends of their range if there are several."""
    ends = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return mean_and_deviation(values) + ends


def reasoning_table(rows: Sequence[Row]) -> list[str]:
    """Return a table of the prompts that let the model reason, and one of its thoughts each."""
    lines, said = [["prompt", "n", "generated", "garbage", "constrained"]], []
    for row in rows:
        found = row.untrained
        if not found:
            lines.append([plain(row.label), "", row.trouble, "", ""])
            continue
        results = found[0].results
        lines.append([
            plain(row.label), f"{results['n']:,}", f"{results['accuracy']:.3f}",
            f"{results['garbage'] / results['n']:.1%}", f"{results['constrained_accuracy']:.3f}"])
        said += ["", f"{plain(row.label)}: {thought(found[0].predictions[0])}"]
    return ["", "Prompts that let the model reason before it answers:",
            *markdown_table(lines), *said] if rows else []


def thought(prediction: Mapping[str, Any]) -> str:
    said = plain(str(prediction.get("reasoning", ""))[:300])
    return f"on “{plain(prediction['text'][:120])}” the model reasons “{said}”."


def draw(shown: Mapping[int, Row], taught: Mapping[int, Row], whole: Row) -> Any:
    """Return the figure of accuracies over the number of examples; None without finished runs."""
    series = {title: {number: scores_of(row.untrained, way)
                      for number, row in shown.items() if row.untrained}
              for way, title in WAYS.items()}
    series[TAUGHT] = {number: trained_accuracies(row)
                      for number, row in taught.items() if row.runs}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    level = trained_accuracies(whole)
    return accuracy_over_shots(series, statistics.mean(level) if level else None)
