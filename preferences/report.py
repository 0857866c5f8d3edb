"""The report of the experiment: the frontier, the training, samples before and after."""

import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from experiments import page
from experiments.escaping import code, fenced, plain
from experiments.figures import STYLES, band
from experiments.results import Section
from preferences.evaluation import Point, best_of, best_of_kl, point, standard_error
from preferences.pairs import Row
from preferences.plan import Policy, PreferencesConfig
from runtime.device import describe, resolve_device
from runtime.metrics import read_metrics
from runtime.run_folder import git_commit
from tasks.scores import markdown_table

TITLE = "# Preferences with"  # the model follows
PICTURES = ("frontier", "training")
SHOWN = 6  # beginnings in the table of samples
Judged = Mapping[str, Sequence[Sequence[Row]]]  # for each policy, the rows of each of its runs


def check_folder(folder: Path) -> None:
    """Raise ValueError if `folder` cannot hold a report, or holds somebody else's files."""
    page.check_folder(folder, TITLE, PICTURES)


def write_report(
    config: PreferencesConfig, policies: Sequence[Policy], judged: Judged, drawn: Sequence[Row],
    command: str,
) -> Path:
    """Write `report.md`, its pictures and `report.html`; return the path of `report.md`.

    `drawn` holds the base's samples of the held-out beginnings, from which best-of-n chooses.
    """
    sections = {"frontier": frontier(config, judged, drawn), "training": training(policies),
                "samples": samples(policies, judged, config.seed)}
    return page.write_page(
        Path(config.report_dir), TITLE, head(config, command), sections, PICTURES)


def head(config: PreferencesConfig, command: str) -> list[str]:
    about = describe(resolve_device(config.device))
    machine = ", ".join(plain(str(value)) for value in about.values())
    held_out = (f" {code(config.held_out_reward_model)} ranked no pair and judges all policies."
                if config.held_out_reward_model else
                " No held-out reward model was given: a policy that deceives the one it was trained"
                " on would not be seen.")
    return [f"{TITLE} {plain(Path(config.init_from).name)}", "",
            f"{code(config.init_from)} continues {config.train_prompts:,} beginnings of texts from "
            f"{code(config.data)} {config.samples} times each, by up to {config.response_tokens} "
            "tokens at temperature 1. "
            f"{code(config.reward_model)}, a classifier, gives each text the probability of its "
            f"last label as reward, up to the first line end; all pairs with different rewards are "
            f"trained on.{held_out} All figures are of {config.test_prompts:,} other beginnings, "
            f"{config.seeds} {'runs' if config.seeds > 1 else 'run'} for each policy. "
            f"Machine: {machine}. Commit: {code(str(git_commit()))}.", "", *fenced([command])]


def mean_point(runs: Sequence[Sequence[Row]]) -> Point:
    """Return the mean over runs; its errors are over the beginnings, which all runs share."""
    points = [point(rows) for rows in runs]

    def mean(name: str) -> float | None:
        values = [getattr(each, name) for each in points]
        return None if None in values else statistics.mean(values)

    def error(name: str) -> float:
        return standard_error([statistics.mean(row[name] for row in group)
                               for group in zip(*runs, strict=True)])

    means = {name: mean(name) for name in Point._fields}
    return Point(**means | {"kl_error": error("kl"), "reward_error": error("reward")})


def frontier(config: PreferencesConfig, judged: Judged, drawn: Sequence[Row]) -> Section:
    points = {label: mean_point(runs) for label, runs in judged.items()}
    rows = [["policy", "reward", "each run", "held-out reward", "KL (nats)", "perplexity",
             "tokens", "ended"]]
    for label, at in points.items():
        each = ", ".join(f"{point(run).reward:.3f}" for run in judged[label])
        rows.append([plain(label), f"{at.reward:.3f} ± {1.96 * at.reward_error:.3f}", each,
                     "" if at.held_out is None else f"{at.held_out:.3f}",
                     f"{at.kl:.2f} ± {1.96 * at.kl_error:.2f}", f"{at.perplexity:.1f}",
                     f"{at.tokens:.1f}", f"{at.ended:.2f}"])
    bests = {n: best_of(drawn, n) for n in powers_of_two(config.best_of)}
    for n, best in bests.items():
        rewards, error = [row["reward"] for row in best], standard_error(
            [row["reward"] for row in best])
        held_out = [row["held_out"] for row in best if "held_out" in row]
        rows.append([f"best of {n}", f"{statistics.mean(rewards):.3f} ± {1.96 * error:.3f}", "",
                     f"{statistics.mean(held_out):.3f}" if held_out else "",
                     f"≤ {best_of_kl(n):.2f}", "", "", ""])
    text = ["Reward: mean of the training reward model, with the 95 % interval over the "
            "beginnings; the runs differ by seed. KL: of a whole sample from the policy as it was, "
            "the sum over its tokens of the exact divergence of the next token. Perplexity: of the "
            "samples under the policy as it was; a high one means that they are no longer its "
            "language. Best of n draws n samples and keeps the one with the largest reward; "
            "log n − (n − 1) / n bounds its divergence."]
    figure = draw_frontier(points, {n: best for n, best in bests.items() if n > 1})
    runs = "1 run" if config.seeds == 1 else f"{config.seeds} runs"
    basis = f"{config.test_prompts} held-out beginnings, {runs} each"
    return Section("Reward over distance", basis, [*text, *markdown_table(rows)], figure)


def powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(1, most.bit_length()) if 2**i <= most]


def draw_frontier(points: Mapping[str, Point], bests: Mapping[int, Sequence[Row]]) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    trained, held_out = figure.subplots(1, 2, sharey=True)
    for (label, at), (colour, marker, _) in zip(points.items(), cycle(STYLES), strict=False):
        trained.errorbar(at.kl, at.reward, xerr=1.96 * at.kl_error, yerr=1.96 * at.reward_error,
                         fmt=marker, color=colour, capsize=3, label=label)
        if at.held_out is not None:
            held_out.plot(at.kl, at.held_out, marker, color=colour)
    for axes, name in ((trained, "reward"), (held_out, "held_out")):
        means = {n: [row[name] for row in best if name in row] for n, best in bests.items()}
        if means and all(means.values()):
            axes.plot([best_of_kl(n) for n in means], [statistics.mean(v) for v in means.values()],
                      "k:", label=f"best of 2 to {max(means)}")
        axes.set(xlabel="KL from the policy as it was (nats a sample)", ylim=(0, 1))
        axes.grid(alpha=0.3)
    trained.set(ylabel="mean reward", title="reward model that ranked the pairs")
    held_out.set(title="held-out reward model")
    trained.legend(loc="lower right")
    return figure


def training(policies: Sequence[Policy]) -> Section:
    """Show the measures of training, among them the weight σ(−m) of a pair's gradient."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = {"validation_reward_accuracy": "accuracy of the implicit reward",
              "validation_gradient_weight": "weight of the gradient, σ(−m)",
              "validation_chosen_log_prob": "log π(chosen), nats",
              "validation_rejected_log_prob": "log π(rejected), nats"}
    shown = [policy for policy in policies if policy.beta is not None]
    rows = [["policy", "step", "validation loss", "accuracy", "margin", "σ(−m)", "log π(chosen)",
             "log π(rejected)"]]
    for policy, style in zip(shown, cycle(STYLES), strict=False):
        logs = [read_metrics(job.folder) for job in policy.jobs]
        for axes, key in zip(panels.flat, titles, strict=True):
            band(axes, policy.label, logs, key, style, first=0)
        rows += [[plain(policy.label), *cells] for cells in ends(logs[0])]
    for axes, title in zip(panels.flat, titles.values(), strict=True):
        axes.set(xlabel="optimizer steps", title=title)
        axes.grid(alpha=0.3)
    panels[0, 0].legend()
    text = ["On the validation pairs, first and last validation of the first run. The loss falls "
            "because the gap between the two log-probabilities grows; nothing in it keeps the "
            "chosen one from falling, too."]
    return Section("What the training does to both answers", "validation pairs",
                   [*text, *markdown_table(rows)], figure)


def ends(log: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return the cells of the first and the last validation of a run."""
    names = ("loss", "reward_accuracy", "margin", "gradient_weight", "chosen_log_prob",
             "rejected_log_prob")
    lines = [line for line in log if "validation_gradient_weight" in line]
    return [[str(line["iteration"]), *(f"{line[f'validation_{name}']:.3f}" for name in names)]
            for line in (lines[:1] + lines[-1:])]


def samples(policies: Sequence[Policy], judged: Judged, seed: int) -> Section:
    """Show the base's and each policy's samples of a few beginnings, drawn by the seed."""
    base = judged["base"][0]
    chosen = random.Random(f"samples {seed}").sample(range(len(base)), min(SHOWN, len(base)))
    rows = [["beginning", "policy", "continuation", "reward"]]
    for i in sorted(chosen):
        for label in ("base", *(policy.label for policy in policies)):
            row = judged[label][0][i]
            rows.append([plain(row["prompt"]) if label == "base" else "", plain(label),
                         plain(row["text"]), f"{row['reward']:.2f}"])
    return Section("Samples before and after", "of the first run of each policy, drawn by the seed",
                   markdown_table(rows), None)
