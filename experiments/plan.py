"""The plan of the experiments: which runs answer which question."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

from checkpoints.files import local_path, slug
from configurator import Bounds
from dataloader import make_loader
from methods.bitfit import is_bias_name
from methods.build import MethodName
from model import GPT
from models.families import family_of, load_config, parameter_names
from models.tokenizer import load_tokenizer
from runtime.tracking import WandbMode
from tasks.base import Answers
from tasks.demonstrations import ShotsConfig
from tasks.registry import find_task
from train import TrainConfig

RANKS: dict[Answers, tuple[int, ...]] = {"word": (16, 128, 196), "text": (8, 64)}
FACTORS = (0.25, 1.0, 4.0)  # of the learning rates
SHOTS = (1, 2, 4, 8, 16)
FEW_STEPS = 20  # optimizer steps on a few examples, each of which sees them all
# The rates in the middle of the grids of LoRA's siblings, which want larger ones than LoRA.
PEAKS: dict[MethodName, float] = {"bitfit": 4e-3, "bottleneck": 2e-3, "prefix": 0.16}


@dataclass(frozen=True)
class ExperimentsConfig(TrainConfig):
    """Settings of `python -m experiments`: those of every run, and which runs to start."""

    out_dir: Annotated[str, "folder of the runs", local_path] = "out/experiments"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is given"] = "disabled"
    report_dir: Annotated[str, "folder of the report", local_path] = "report"
    only: Annotated[str, "questions or runs with commas; dry_run=True lists them"] = ""
    seeds: Annotated[int, "runs of each variant: seed, seed + 1, ...", Bounds(1)] = 3
    draws: Annotated[int, "draws of the examples that a prompt shows", Bounds(1)] = 5
    full_learning_rate: Annotated[float, "peak rate of full fine-tuning", Bounds(0)] = 2.5e-4
    full_dropout: Annotated[float, "dropout of full fine-tuning", Bounds(0, 1)] = 0.05
    jobs: Annotated[int, "runs in parallel; they share processors and GPUs", Bounds(1)] = 1
    processes: Annotated[int, "torchrun processes of each training run", Bounds(1)] = 1
    dry_run: Annotated[bool, "list the runs and their estimated time"] = False


class Variant(NamedTuple):
    """A row of a table: its label, the name of its runs, and the settings it changes."""

    label: str
    name: str
    changes: Mapping[str, Any]
    seeds: int

    @property
    def trains(self) -> bool:
        """Whether its runs train; if not, generate.py scores the base model."""
        return "lora_rank" in self.changes


class About(NamedTuple):
    """What decides which questions a model can answer; a model out of reach counts as a GPT-2."""

    fuses_qkv: bool = True
    chats: bool = False
    has_biases: bool = True


def about_model(init_from: str) -> About:
    with suppress(OSError, ValueError):  # whose reason the run itself gives
        return About(family_of(init_from) is GPT, load_tokenizer(init_from).has_chat,
                     any(map(is_bias_name, parameter_names(init_from))))
    return About()


def rates(config: ExperimentsConfig, peak: float, factor: float) -> dict[str, float]:
    """Return the settings of a learning rate: `factor` times `peak`, with the same decay."""
    floor = config.min_lr / config.learning_rate
    return {"learning_rate": rounded(peak * factor), "min_lr": rounded(peak * factor * floor)}


def untrained(label: str, prompt: str) -> Variant:
    """Return the base model, scored with a prompt."""
    return Variant(label, f"zero_shot_{slug(prompt)}", {"prompt": prompt}, 1)


def adapted(
    config: ExperimentsConfig, label: str, rank: int = 16, alpha: float = 64.0,
    factor: float = 1.0, suffix: str = "", **changes: Any,
) -> Variant:
    """Return a variant that trains LoRA; `suffix` names its other `changes`."""
    name = f"r{rank}_alpha{alpha:g}{suffix}" + (f"_rate{factor:g}" if factor != 1 else "")
    return Variant(label, name, {"lora_rank": rank, "lora_alpha": alpha, **changes,
                                 **rates(config, config.learning_rate, factor)}, config.seeds)


def tuned(
    config: ExperimentsConfig, label: str = "full fine-tuning", factor: float = 1.0
) -> Variant:
    """Return full fine-tuning."""
    changes = {"lora_rank": 0, "dropout": config.full_dropout, "always_save_checkpoint": False}
    name = "full" + (f"_rate{factor:g}" if factor != 1 else "")
    rate = rates(config, config.full_learning_rate, factor)
    return Variant(label, name, changes | rate, config.seeds)


def sibling(config: ExperimentsConfig, method: MethodName, factor: float) -> Variant:
    """Return a variant that trains another method than LoRA or full fine-tuning."""
    changes = rates(config, PEAKS[method], factor)
    name = method + (f"_rate{factor:g}" if factor != 1 else "")
    return Variant(f"{method}, rate {changes['learning_rate']:g}", name,
                   {"method": method, "lora_rank": 0, **changes}, config.seeds)


def shown(config: ExperimentsConfig, number: int) -> Variant:
    """Return the base model with `number` examples in its prompt, also calibrated."""
    changes = {"prompt": config.prompt, "shots": number, "calibrate": True}
    return Variant(f"{number} shots", f"shots{number}", changes, config.draws if number else 1)


def taught(config: ExperimentsConfig, number: int) -> Variant:
    """Return LoRA trained on the examples that `shown` puts into the prompt."""
    few = {"train_size": number, "train_balanced": True, "batch_size": number,
           "gradient_accumulation_steps": 1, "max_iters": FEW_STEPS, "eval_interval": FEW_STEPS,
           "warmup_iters": 0}
    variant = adapted(config, f"LoRA on {number}", suffix=f"_on{number}", factor=4.0, **few)
    return variant._replace(seeds=config.draws)


def plan_shots(config: ExperimentsConfig) -> list[Variant]:
    """Return the variants that learn from a few examples, or reason, as far as they fit."""
    fitting = [number for number in SHOTS if number in fitting_shots(config, config.prompt)]
    reasoned = [name for name in find_task(config.task)().reasoned
                if 0 in fitting_shots(config, name)]
    return [shown(config, 0), *(shown(config, number) for number in fitting),
            *(taught(config, number) for number in SHOTS), adapted(config, "LoRA on all"),
            *(untrained(name, name) for name in reasoned)]


def fitting_shots(config: ExperimentsConfig, prompt: str) -> list[int]:
    """Return the numbers of examples, 0 too, beside which every test question fits uncut.

    If the model or the data is out of reach, all count as fitting: the run itself says why.
    """
    try:
        loader = make_loader(replace(config, prompt=prompt, train_size=0),
                             load_config(config.init_from), load_tokenizer(config.init_from))
        questions = loader.spread("test", config.test_size)
        if loader.texts_cut(questions):
            return []
    except (OSError, ValueError):
        return [0, *SHOTS]
    found, plain = [0], loader.demonstrations
    with suppress(ValueError):  # too long, for this number and for all larger ones
        for number in SHOTS:
            for seed in range(config.seed, config.seed + config.draws):
                loader.demonstrations = plain
                loader.show(ShotsConfig(number, seed), questions, loader.answer_room)
                if loader.texts_cut(questions):
                    return found
            found.append(number)
    return found


def plan_texts(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """Return the questions about a task of long answers."""
    lora = partial(adapted, config, rank=64, alpha=256.0)
    return {
        "shares": [],
        "answers": [
            untrained("base, untouched", config.prompt),
            *(lora(f"LoRA r={r}, α={4 * r}", rank=r, alpha=4.0 * r) for r in RANKS["text"]),
            tuned(config),
        ],
        "targets": [
            lora("r=64, q, k, v"),
            lora("r=64, q, k, v and output", suffix="_attention", lora_targets="attention"),
            lora("r=64, all linear layers", suffix="_all", lora_targets="all"),
        ],
    }


def plan_words(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """Return the homework's questions, about a task whose answers are single words."""
    lora, full = partial(adapted, config), partial(tuned, config)
    model = about_model(config.init_from)
    prompts = [name for name in dict.fromkeys([config.prompt, *find_task(config.task).prompts])
               if name != "chat" or model.chats]
    peak, full_peak = config.learning_rate, config.full_learning_rate
    at_rates = [*(lora(f"LoRA r=16, rate {rounded(peak * f)}", factor=f) for f in FACTORS),
                *(full(f"full, rate {rounded(full_peak * f)}", f) for f in FACTORS)]
    siblings = [method for method in PEAKS if method != "bitfit" or model.has_biases]
    return {
        "shares": [],
        "zero_shot": [untrained(prompt, prompt) for prompt in prompts],
        "curves": [*(lora(f"LoRA r={r}, α={4 * r}", r, 4.0 * r) for r in RANKS["word"]),
                   full()],
        "alpha": [lora("LoRA r=16, α=64"), lora("LoRA r=16, α=256", alpha=256.0), full()],
        "prompts": [lora(f"prompt: {config.prompt}"), *(
            lora(f"prompt: {name}", suffix=f"_{name}", prompt=name) for name in prompts[1:])],
        "grid": [lora(f"α={a:g}, rate {rounded(peak * f)}", 16, a, f)._replace(seeds=1)
                 for a in (16.0, 64.0, 256.0) for f in FACTORS],
        "rates": at_rates,
        "methods": [*at_rates, *(sibling(config, m, f) for m in siblings for f in FACTORS)],
        "layers": [
            lora("r=16, q, k, v: a pair each"),
            *([lora("r=16, q, k, v: one A for all", suffix="_shared", lora_qkv="shared")]
              if model.fuses_qkv else []),
            lora("r=16, q, k, v and output", suffix="_attention", lora_targets="attention"),
            lora("r=16, all linear layers", suffix="_all", lora_targets="all"),
        ],
        "shots": plan_shots(config),
    }


def rounded(number: float) -> float:
    return float(f"{number:.6g}")


PLANS: dict[Answers, Callable[[ExperimentsConfig], dict[str, list[Variant]]]] = {
    "word": plan_words, "text": plan_texts,
}


def plan(config: ExperimentsConfig) -> dict[str, list[Variant]]:
    """Return the variants of each question; variants of one name share their runs."""
    return PLANS[find_task(config.task).answers](config)
