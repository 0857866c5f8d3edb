"""Which runs answer which question: the plan of the experiments."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

from configurator import Bounds
from dataloader import TASKS
from generate import slug
from tasks.base import ClassificationTask
from train import TrainConfig, WandbMode

ALL_LINEAR = "c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj"
RANKS = {True: (16, 128, 196), False: (8, 64)}  # by whether the task classifies
FACTORS = (0.25, 1.0, 4.0)  # by which the learning rates are multiplied


@dataclass(frozen=True)
class ExperimentsConfig(TrainConfig):
    """Settings of `python -m experiments`: those of every run, and which runs there are."""

    out_dir: Annotated[str, "folder of the runs"] = "out/experiments"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is found"] = "disabled"
    report_dir: Annotated[str, "folder of the report"] = "report"
    only: Annotated[str, "questions or runs, with commas, as dry_run=True lists them"] = ""
    seeds: Annotated[int, "runs of each kind: seed, seed + 1, ...", Bounds(1)] = 3
    full_learning_rate: Annotated[float, "peak rate of full fine-tuning", Bounds(0)] = 2.5e-4
    full_dropout: Annotated[float, "dropout of full fine-tuning", Bounds(0, 1)] = 0.05
    jobs: Annotated[int, "runs at a time; they share processors and GPUs", Bounds(1)] = 1
    processes: Annotated[int, "of torchrun in each training run", Bounds(1)] = 1
    dry_run: Annotated[bool, "list the runs and how long they may take"] = False


class Variant(NamedTuple):
    """A row of a table: its label, the name of its runs, and the settings it changes."""

    label: str
    name: str
    changes: Mapping[str, Any]
    seeds: int

    @property
    def trains(self) -> bool:
        """Whether it is trained, or the model is asked as it is."""
        return "lora_rank" in self.changes


def plan(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """Return the variants of each question; those of one name are one and the same."""
    return plan_classification(config) if classifies(config) else plan_generation(config)


def classifies(config: TrainConfig) -> bool:
    return issubclass(TASKS[config.task], ClassificationTask)


def rates(config: ExperimentsConfig, peak: float, factor: float) -> dict[str, float]:
    floor = config.min_lr / config.learning_rate
    return {"learning_rate": rounded(peak * factor), "min_lr": rounded(peak * factor * floor)}


def untrained(config: ExperimentsConfig, label: str, prompt: str) -> Variant:
    return Variant(label, f"zero_shot_{slug(prompt)}", {"prompt": prompt}, 1)


def adapted(
    config: ExperimentsConfig, label: str, rank: int = 16, alpha: float = 64.0,
    factor: float = 1.0, suffix: str = "", **changes: Any,
) -> Variant:
    name = f"r{rank}_alpha{alpha:g}{suffix}" + (f"_rate{factor:g}" if factor != 1 else "")
    return Variant(label, name, {"lora_rank": rank, "lora_alpha": alpha, **changes,
                                 **rates(config, config.learning_rate, factor)}, config.seeds)


def tuned(
    config: ExperimentsConfig, label: str = "full fine-tuning", factor: float = 1.0
) -> Variant:
    changes = {"lora_rank": 0, "dropout": config.full_dropout, "always_save_checkpoint": False}
    name = "full" + (f"_rate{factor:g}" if factor != 1 else "")
    rate = rates(config, config.full_learning_rate, factor)
    return Variant(label, name, changes | rate, config.seeds)


def plan_generation(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """Base model, LoRA and full fine-tuning where answers are long texts."""
    lora = partial(adapted, config, rank=64, alpha=256.0)
    return {
        "shares": [],
        "answers": [
            untrained(config, "base, untouched", config.prompt),
            *(lora(f"LoRA r={r}, α={4 * r}", rank=r, alpha=4.0 * r) for r in RANKS[False]),
            tuned(config),
        ],
        "targets": [
            lora("r=64, q, k, v"),
            lora("r=64, q, k, v and output", suffix="_attention",
                 lora_targets="c_attn,attn.c_proj"),
            lora("r=64, all linear layers", suffix="_all", lora_targets=ALL_LINEAR),
        ],
    }


def plan_classification(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """The homework's questions, where an answer is one word."""
    lora, full = partial(adapted, config), partial(tuned, config)
    prompts = list(dict.fromkeys([config.prompt, *TASKS[config.task].prompts]))
    peak, full_peak = config.learning_rate, config.full_learning_rate
    return {
        "shares": [],
        "zero_shot": [untrained(config, prompt, prompt) for prompt in prompts],
        "curves": [*(lora(f"LoRA r={r}, α={4 * r}", r, 4.0 * r) for r in RANKS[True]),
                   full()],
        "alpha": [lora("LoRA r=16, α=64"), lora("LoRA r=16, α=256", alpha=256.0), full()],
        "prompts": [lora(f"prompt: {config.prompt}"), *(
            lora(f"prompt: {name}", suffix=f"_{name}", prompt=name) for name in prompts[1:])],
        "grid": [lora(f"α={a:g}, rate {rounded(peak * f)}", 16, a, f)._replace(seeds=1)
                 for a in (16.0, 64.0, 256.0) for f in FACTORS],
        "rates": [*(lora(f"LoRA r=16, rate {rounded(peak * f)}", factor=f) for f in FACTORS),
                  *(full(f"full, rate {rounded(full_peak * f)}", f) for f in FACTORS)],
        "layers": [
            lora("r=16, q, k, v: a pair each"),
            lora("r=16, q, k, v: one A for all", suffix="_shared", lora_qkv="shared"),
            lora("r=16, q, k, v and output", suffix="_attention",
                 lora_targets="c_attn,attn.c_proj"),
            lora("r=16, all linear layers", suffix="_all", lora_targets=ALL_LINEAR),
        ],
    }


def rounded(number: float) -> float:
    return float(f"{number:.6g}")
