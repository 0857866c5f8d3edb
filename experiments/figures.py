"""The report's figures, readable in print and with any colour vision."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.escaping import label as shown
from experiments.escaping import one_line
from tasks.scores import wilson_interval

# Okabe and Ito's colours; markers and dashes distinguish the lines without them.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."),
          ("#CC79A7", "D", ":"), ("#E69F00", "v", "-"), ("#56B4E9", "P", "--")]
Metrics = Sequence[Mapping[str, float]]


def validation_curves(
    series: Sequence[tuple[str, Sequence[Metrics]]], key: str = "validation_accuracy",
    title: str = "validation accuracy (generated answers)", first: int = 0,
) -> Figure:
    """Draw the validation loss, and `key` from step `first` on: the mean and range of the seeds.

    `series` holds labels, at least one, each with the logged metrics of its runs. The loss before
    the first step does not appear: it is so high that it would flatten all curves.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, other = figure.subplots(1, 2)
    for (label, runs), style in zip(series, cycle(STYLES), strict=False):
        band(loss, label, runs, "validation_loss", style, first=1)
        band(other, label, runs, key, style, first)
    loss.set(xlabel="optimizer steps", ylabel="validation loss (nats a token)")
    other.set(xlabel="optimizer steps", ylabel=title)
    for panel in (loss, other):
        panel.grid(alpha=0.3)
    loss.legend(title="mean; band: all seeds" if max(map(len, dict(series).values())) > 1 else "")
    return figure


def band(
    axes: Axes, label: str, runs: Sequence[Metrics], key: str, style: tuple[str, str, str],
    first: int,
) -> None:
    """Draw the mean of the logged `key` over the runs, from step `first` on, and its range."""
    colour, marker, dashes = style
    values: dict[float, list[float]] = {}
    for metrics in runs:
        for line in metrics:
            if key in line and line["iteration"] >= first:
                values.setdefault(line["iteration"], []).append(line[key])
    steps = sorted(values)
    means = [statistics.mean(values[step]) for step in steps]
    axes.plot(steps, means, dashes, color=colour, marker=marker, markersize=4,
              label=shown(label))
    axes.fill_between(steps, [min(values[step]) for step in steps],
                      [max(values[step]) for step in steps], color=colour, alpha=0.2, linewidth=0)


def accuracy_dots(points: Sequence[tuple[str, Sequence[float], int]]) -> Figure:
    """Draw the accuracy of each (label, accuracies of its seeds, number of test examples)."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(points)), layout="constrained")
    axes = figure.subplots()
    for place, (_, accuracies, n) in enumerate(points):
        mean = statistics.mean(accuracies)
        low, high = wilson_interval(mean * n, n)
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=4,
                      color=STYLES[0][0], label=None if place else "mean, 95 % interval")
        axes.plot(accuracies, [place] * len(accuracies), "|", markersize=12, color=STYLES[1][0],
                  label=None if place else "each seed")
    axes.set_yticks(range(len(points)), [one_line(label)[:40] for label, *_ in points],
                    parse_math=False)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set(xlabel="test accuracy, best checkpoint")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


class Method(NamedTuple):
    """A method in a figure: its runs' accuracies on `n` test examples, and their metrics."""

    name: str
    weights: int  # trained ones
    accuracies: Sequence[float]
    n: int
    runs: Sequence[Metrics]


def accuracy_over_weights(methods: Sequence[Method]) -> Figure:
    """Draw the methods' accuracy over the weights that they train, and their learning curves.

    The weights are on a logarithmic axis; bars are 95 % intervals of the mean.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes, loss = figure.subplots(1, 2)
    for (name, weights, accuracies, n, runs), style in zip(methods, cycle(STYLES), strict=False):
        colour, marker, _ = style
        band(loss, name, runs, "validation_loss", style, first=1)
        mean = statistics.mean(accuracies)
        low, high = wilson_interval(mean * n, n)
        axes.errorbar(weights, mean, yerr=[[mean - low], [high - mean]], fmt=marker, capsize=4,
                      color=colour, label=shown(name))
        axes.plot([weights] * len(accuracies), accuracies, "_", markersize=12, color=colour)
    axes.set(xscale="log", xlabel="trained weights", ylabel="test accuracy, best checkpoint")
    loss.set(xlabel="optimizer steps", ylabel="validation loss (nats a token)")
    for panel in (axes, loss):
        panel.grid(alpha=0.3)
    axes.legend(title="mean, 95 % interval; dash: a seed")
    return figure


def accuracy_over_shots(
    series: Mapping[str, Mapping[int, Sequence[float]]], level: float | None
) -> Figure:
    """Draw the accuracy over the number of examples, for each name; bands hold all draws.

    `level` is a line for a model trained on all examples.
    """
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("symlog", base=2, linthresh=1)
    banded_lines(axes, series)
    if level is not None:
        axes.axhline(level, color="k", linestyle=":", label="LoRA on the training set")
    axes.set(xlabel="labelled examples", ylabel="test accuracy", ylim=(0, 1))
    axes.legend(title="mean; band: all draws", loc="lower right")
    return figure


def banded_lines(axes: Axes, series: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Draw each name's mean over x, and a band from the lowest to the highest; tick each x."""
    styled = zip(series.items(), cycle(STYLES), strict=False)
    for (name, points), (colour, marker, dashes) in styled:
        places = sorted(points)
        axes.plot(places, [statistics.mean(points[x]) for x in places], dashes, marker=marker,
                  color=colour, label=shown(name))
        axes.fill_between(places, [min(points[x]) for x in places],
                          [max(points[x]) for x in places], color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({x for points in series.values() for x in points}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def heat_map(alphas: Sequence[float], rates: Sequence[float], loss: np.ndarray) -> Figure:
    """Draw the validation `loss` (alphas, rates) and write each value into its cell."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(loss, cmap="cividis_r")
    middle = (np.nanmin(loss) + np.nanmax(loss)) / 2
    for (i, j), value in np.ndenumerate(loss):
        text = "–" if np.isnan(value) else f"{value:.3f}"
        axes.text(j, i, text, ha="center", va="center", color="w" if value > middle else "k")
    axes.set_xticks(range(len(rates)), map("{:g}".format, rates))
    axes.set_yticks(range(len(alphas)), map("{:g}".format, alphas))
    axes.set(xlabel="learning rate", ylabel="α (r = 16)")
    figure.colorbar(image, label="validation loss (nats a token)")
    return figure


def spectra(series: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw the singular values of each layer in a panel for each part of `series`."""
    figure = Figure(figsize=(1 + 3.4 * len(series), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(series), sharey=True))
    for axes, (part, layers) in zip(panels, series.items(), strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
        for layer, (values, colour) in enumerate(zip(layers, colours, strict=True)):
            ends = layer in (0, len(layers) - 1)
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1,
                      label=f"layer {layer}" if ends else None)
        axes.set(title=shown(part), xlabel="index", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("singular value of ΔW")
    panels[-1].legend()
    return figure


def similarities(maps: Mapping[str, np.ndarray]) -> Figure:
    """Draw φ(i, j) as a heat map for each part, all on one scale from 0 to the largest."""
    most = max(float(values.max()) for values in maps.values())
    figure = Figure(figsize=(1 + 3.2 * len(maps), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(maps)))
    for axes, (part, values) in zip(panels, maps.items(), strict=True):
        rows, columns = values.shape
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=most, aspect="auto",
                            origin="lower", extent=(0.5, columns + 0.5, 0.5, rows + 0.5))
        axes.set(title=shown(part), xlabel="j, of the second run")
    panels[0].set_ylabel("i, of the first run")
    figure.colorbar(image, ax=list(panels), label="φ(i, j)")
    return figure


def accuracy_by_rank(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], n: int) -> Figure:
    """Draw the accuracy on `n` examples over the directions kept, for each run."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    styled = zip(curves.items(), cycle(STYLES), strict=False)
    for (name, (kept, accuracies)), (colour, marker, dashes) in styled:
        low, high = zip(*(wilson_interval(value * n, n) for value in accuracies), strict=True)
        axes.plot(kept, accuracies, dashes, marker=marker, color=colour, label=shown(name))
        axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(sorted({k for kept, _ in curves.values() for k in kept}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="singular directions kept in every ΔW", ylabel="validation accuracy")
    axes.grid(alpha=0.3)
    axes.legend(title="band: 95 % interval")
    return figure


def over_strength(
    values: Mapping[float, float], title: str, n: int = 0, here: float | None = None
) -> Figure:
    """Draw a share over the factor of ΔW, with its 95 % interval if it is of `n` examples.

    `here` marks one factor.
    """
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    colour, marker, _ = STYLES[0]
    axes.plot(values.keys(), values.values(), marker=marker, markersize=4, color=colour)
    if n:
        low, high = zip(*(wilson_interval(value * n, n) for value in values.values()), strict=True)
        axes.fill_between(values.keys(), low, high, color=colour, alpha=0.15, linewidth=0)
    if here is not None:
        axes.axvline(here, color=STYLES[1][0], linestyle="--")
    axes.set(xlabel="s, the factor of ΔW (0: base, 1: as trained)", ylabel=shown(title),
             ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    return figure


def rate_lines(series: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Draw the best validation loss over the learning rate.

    `series` holds, by label and learning rate, the loss of each seed.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="learning rate", ylabel="best validation loss (nats a token)")
    banded_lines(axes, series)
    axes.legend(title="mean; band: all seeds")
    return figure


def length_histograms(questions: Sequence[int], answers: Sequence[int], block_size: int) -> Figure:
    """Draw the lengths of questions and answers in tokens, and the limit of a sequence."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    named = {"tokens of a question": questions, "tokens of an answer": answers}
    for axes, (title, lengths), style in zip(figure.subplots(1, 2), named.items(), STYLES,
                                            strict=False):
        axes.hist(lengths, bins=min(60, max(2, len(set(lengths)))), color=style[0])
        if max(lengths) > block_size / 4:
            axes.axvline(block_size, color="k", linestyle="--",
                         label=f"longest sequence: {block_size}")
            axes.legend()
        axes.set(xlabel=title, ylabel="examples")
        axes.grid(alpha=0.3)
    return figure
