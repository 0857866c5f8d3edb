"""Read the folders of runs: refuse what no report can show, and tell which are outdated."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.files import read_json
from checkpoints.pretrained import PACKAGED, checkpoint_digest
from experiments.escaping import in_words
from runtime.folder_guard import FINE_TUNING, settings_of
from runtime.metrics import METRICS_FILE, read_metrics
from runtime.run_folder import CONFIG_FILE, SavedRun, changed_settings, is_finished, read_run
from tasks.base import Task
from tasks.registry import make_task, resolve_dataset
from tasks.sources import data_digest
from train import TrainConfig

UNREADABLE = (OSError, ValueError, RecursionError)  # the last for JSON nested too deeply
SHARES = ("accuracy", "constrained_accuracy")


class Scores(NamedTuple):
    """The results of a model, and the predictions behind them, one for each test example."""

    results: dict[str, Any]
    predictions: list[dict[str, Any]]


class TrainedRun(NamedTuple):
    """What the folder of a finished run of `train.py` holds."""

    saved: SavedRun
    metrics: list[dict[str, float]]
    results: dict[str, dict[str, Any]]  # of the best and the last checkpoint
    predictions: dict[str, list[dict[str, Any]]]  # of both, for each test example
    checkpoint_bytes: int

    @property
    def config(self) -> TrainConfig:
        return self.saved.config(TrainConfig)

    @property
    def validation_loss(self) -> float:
        """The lowest loss after step 0, which chose the best checkpoint."""
        return min(later_losses(self.metrics))


def find_runs(root: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of finished runs of `train.py` in `root` or below, newest first.

    With them comes a sentence on each run that is unfinished or damaged.
    """
    finished, notes = [], []
    for path in sorted(root.rglob(CONFIG_FILE), key=lambda path: -path.stat().st_mtime):
        try:
            if str(path).encode("utf-8", "replace").decode() != str(path):
                raise ValueError(f"{path.parent} is named in another encoding than UTF-8")
            read_json(path)  # `settings_of` takes a damaged file for another program's
            if FINE_TUNING not in (settings_of(path.parent) or {}):
                continue
            if is_finished(path.parent):
                load_run(path.parent)
                finished.append(path.parent)
            else:
                notes.append(f"{path.parent} is not finished")
        except UNREADABLE as error:
            notes.append(in_words(error))
    return finished, notes


def load_run(folder: Path) -> TrainedRun:
    """Read a finished run of `train.py`, again only if its files have changed.

    Raises OSError or ValueError, naming the file, for one that is missing, damaged, or lacks what
    the report shows.
    """
    files = [folder / CONFIG_FILE, folder / METRICS_FILE]
    for name in ("best", "last"):
        files += [folder / name / "results.json", folder / name / "predictions.jsonl"]
    return _load_run(folder, tuple(map(stamp, files)))


def stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced. Raises OSError if it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    about = path.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


@cache
def _load_run(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> TrainedRun:
    saved, metrics = load_started(folder)
    facts, where = saved.facts, folder / CONFIG_FILE
    check_numbers(facts, ["validation_reviews"], where)
    if not isinstance(facts.get("parameters"), dict):
        raise ValueError(f"{where}: it lacks the number of parameters")
    check_numbers(facts["parameters"], ["trained", "total"], where)
    if not later_losses(metrics):
        raise ValueError(f"{folder / METRICS_FILE}: there is no validation loss after step 0")
    task = make_task(saved.config(TrainConfig).task)
    scores = {name: load_scores(folder / name / "results.json", task) for name in ("best", "last")}
    results = {name: found.results for name, found in scores.items()}
    predictions = {name: found.predictions for name, found in scores.items()}
    weights = sum(path.stat().st_size for path in (folder / "best").glob("[!.]*.safetensors"))
    return TrainedRun(saved, metrics, results, predictions, weights)


def load_started(folder: Path) -> tuple[SavedRun, list[dict[str, float]]]:
    """Read the settings and the metrics of a run of `train.py`, finished or not.

    Raises OSError or ValueError, naming the file, if they are missing or damaged: every value of
    the metrics must be a finite number, every speed and the number of processes positive.
    """
    saved, metrics, path = read_run(str(folder)), read_metrics(folder), folder / METRICS_FILE
    if type(saved.processes) is not int or saved.processes < 1:
        raise ValueError(f"{folder / CONFIG_FILE}: processes={saved.processes!r:.80} must be a "
                         "positive integer")
    for line in metrics:
        check_numbers(line, ["iteration", *line], path)
        if line.get("reviews_per_second", 1.0) <= 0:
            raise ValueError(f"{path}: reviews_per_second must be positive")
    return saved, metrics


def later_losses(metrics: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the validation losses after step 0."""
    return [line["validation_loss"] for line in metrics
            if "validation_loss" in line and line["iteration"] > 0]


def load_scores(path: Path, task: Task) -> Scores:
    """Read a file of results and the predictions beside it. Raises as `load_run` does."""
    results = read_json(path)
    check_results(results, task, path)
    beside = path.with_name("predictions" + path.stem.removeprefix("results") + ".jsonl")
    predictions = read_predictions(beside, task)
    if len(predictions) != results["n"]:
        raise ValueError(f"{beside} holds {len(predictions)} predictions, not {results['n']}")
    return Scores(results, predictions)


def check_results(results: Mapping[str, Any], task: Task, path: Path) -> None:
    """Raise ValueError for results without what the report shows of the task."""
    if task.answers == "word":
        check_numbers(results, ["n", *SHARES, "garbage"], path)
        if not all(0 <= results[name] <= 1 for name in SHARES):
            raise ValueError(f"{path}: an accuracy must be between 0 and 1")
        return
    check_numbers(results, ["n", *task.metrics], path)
    try:
        task.explain_references(results)
        for low, high in results.get("interval_95", {}).values():
            check_numbers({"low": low, "high": high}, ["low", "high"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or another task's: {error}") from None


def check_numbers(values: Mapping[str, Any], names: Iterable[str], where: Path) -> None:
    """Raise ValueError unless each of `names` has a finite number, small enough to sum."""
    for name in names:
        value = values.get(name)
        if type(value) not in (int, float) or not -1e300 < value < 1e300:
            raise ValueError(f"{where}: {name} must be a finite number, not {value!r:.80}")


def read_predictions(path: Path, task: Task) -> list[dict[str, Any]]:
    """Return the lines of a file, each with the fields that the report shows."""
    kinds: dict[str, type] = {task.text_field: str, "generated": str}
    kinds |= {"truth": int, "label": int} if task.answers == "word" else {"reference": str}
    rows = []
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        for name, kind in kinds.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise ValueError(f"{path}:{number}: it lacks {name}")
        rows.append(row)
    return rows


def other_settings(
    saved: SavedRun, metrics: Sequence[Mapping[str, float]], settings: Mapping[str, Any]
) -> str:
    """Name the settings in which a saved run differs from `settings`, or return "".

    It also differs if it has taken more steps, because somebody trained it longer by hand.
    """
    planned = resolve_dataset(TrainConfig(**settings))
    planned = replace(planned, lr_decay_iters=planned.lr_decay_iters or planned.max_iters)
    kept = {"max_iters": TrainConfig.max_iters, **saved.settings}
    kept["lr_decay_iters"] = kept.get("lr_decay_iters") or kept["max_iters"]
    steps = max((line["iteration"] for line in metrics), default=0)
    longer = f"{steps} steps, now {planned.max_iters}" if steps > planned.max_iters else ""
    return changed_settings(kept, planned) or longer


def changed_sources(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say whether the local data or base model of a run has changed since; else return "".

    The `facts` of an older run lack a digest, and a source may be out of reach now: neither counts
    as changed.
    """
    base = str(settings.get("init_from", TrainConfig.init_from))
    sources = [("data", "data_sha256", data_digest,
                str(settings.get("dataset", TrainConfig.dataset)))]
    if base in PACKAGED or Path(base).exists():  # the hub is not asked
        sources.append(("base model", "base_sha256", checkpoint_digest, base))
    changed = [name for name, fact, digest, source in sources
               if facts.get(fact) and digest_now(digest, source) not in ("", facts[fact])]
    return f"its {' and '.join(changed)} changed" if changed else ""


@cache
def digest_now(digest: Callable[[str], str], source: str) -> str:
    """Return the digest of a source when first asked, or "" if it cannot be read."""
    try:
        return digest(source)
    except UNREADABLE:
        return ""
