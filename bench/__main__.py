"""Compare the speed and memory of this package, a homework solution, and transformers with peft.

python -m bench                                 all measurements, on GPT-2's 124M shape
python -m bench what=train,score                the comparison, under six minutes on two cores
python -m bench what=growth model=gpt2-mini     how our cost grows; needs no rivals
python -m bench what=train,score model=smollm2  the comparison on a checkpoint, of any family

GPT-2's sizes get random weights, but answer as a fine-tuned model does: with a label word, then
end-of-text. Each contender runs in a separate process; the processes take turns.
"""

import operator
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from bench.flops import matrix_peak, useful_flops
from bench.report import check_folder, markdown, write
from bench.rivals import folder_loader
from bench.worker import (
    SHAPES,
    Contender,
    Measure,
    Way,
    Worker,
    random_checkpoint,
    sized_reviews,
    spread,
    stored_checkpoint,
)
from checkpoints.files import local_path, writable_folder
from configurator import Bounds, run_script
from dataloader import CustomDataLoader, DataConfig
from methods.bitfit import is_bias_name
from model import MAX_RANK
from models.families import load_config, parameter_names
from runtime.device import (
    DTYPES,
    DeviceConfig,
    describe,
    dtype_name,
    explain_out_of_memory,
    resolve_device,
    resolve_dtype,
)
from runtime.run_folder import git_commit
from tasks.base import line_ends
from tasks.sentiment import SentimentTask
from tasks.sources import Record
from train import TrainConfig

PARTS = ("train", "score", "methods", "shots", "growth")
WINDOW = 128  # reviews per optimizer step
RIVALS = ("handout", "peft")
SIBLINGS = ("bitfit", "bottleneck", "prefix", "full")  # of LoRA
SHOTS: Mapping[str, Way] = {"0": "ours", "4": "shots4", "16": "shots16"}
MIB = 2**20


@dataclass(frozen=True)
class BenchConfig(DeviceConfig):
    """Settings of `python -m bench`."""

    model: Annotated[
        str, f"{', '.join(SHAPES)} (random weights), smollm2, a hub id, a folder or a .gguf file",
        local_path] = "gpt2"
    what: Annotated[str, f"parts to measure: {', '.join(PARTS)}"] = "train,score,growth"
    prompt: Annotated[str, "as in train.py", line_ends] = "default"
    lora_rank: Annotated[int, "rank of the adapters on q, k and v", Bounds(1, MAX_RANK)] = 128
    batch_size: Annotated[int, "reviews in one of our micro-batches", Bounds(1)] = 16
    eval_batch_size: Annotated[int, "reviews that ours scores at once", Bounds(1)] = 64
    rounds: Annotated[int, "measurements per contender, after a warm-up", Bounds(1)] = 5
    dataset: Annotated[str, "rotten_tomatoes, movie_reviews or a folder"] = "movie_reviews"
    seed: Annotated[int, "seed of the weights and the reviews", Bounds(0, 2**63 - 1)] = 1337
    out_dir: Annotated[str, "folder for bench.json, .md and .png", local_path] = "out/bench"


def require_rivals() -> None:
    """Raise ValueError if a rival is not installed, and name the command that installs it."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise ValueError(f"what=train and what=score need {' and '.join(missing)}: "
                         "pip install -r requirements-dev.txt")


def compute_dtype(config: BenchConfig) -> str:
    return dtype_name(resolve_dtype(config.dtype, resolve_device(config.device)))


def open_checkpoint(config: BenchConfig) -> AbstractContextManager[str]:
    """Return a context whose value is the folder of the model to measure."""
    if config.model in SHAPES:
        return random_checkpoint(config.model, config.seed)
    return stored_checkpoint(config.model)


def contenders(config: BenchConfig) -> list[Contender]:
    """Return ours in float32 and in the chosen dtype, and the rivals; slow ones get few reviews."""
    ours = [Contender("ours", dtype, WINDOW, WINDOW)
            for dtype in dict.fromkeys(("float32", compute_dtype(config)))]
    if resolve_device(config.device).type != "cpu":
        return ours + [Contender(way, "float32", WINDOW, WINDOW) for way in ("full", *RIVALS)]
    return [*ours, Contender("full", "float32", 32, 32), Contender("handout", "float32", 8, 4),
            Contender("peft", "float32", 8, 16)]


def training_config(config: BenchConfig, contender: Contender) -> TrainConfig:
    """Return the homework's training settings for one contender."""
    method = contender.way if contender.way in SIBLINGS else "lora"
    rank = config.lora_rank if method == "lora" else 0
    return TrainConfig(
        method=method, prompt=config.prompt,
        device=config.device, dtype=contender.dtype, dataset=config.dataset, train_size=0,
        batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed,
        lora_rank=rank, lora_alpha=4.0 * rank)


def take_turns(
    rivals: Sequence[Contender], verb: str, records: Sequence[Record], folder: str,
    config: BenchConfig,
) -> tuple[dict[str, list[Measure]], dict[str, dict[str, float]]]:
    """Run `verb` in each contender once to warm up and then `rounds` times, in turns.

    Returns each contender's measures, its checkpoint's size last, and the machine's median peaks
    for each precision.
    """
    rng, device = random.Random(config.seed), resolve_device(config.device)
    workers: dict[str, Worker] = {}
    measures: dict[str, list[Measure]] = {rival.name: [] for rival in rivals}
    peaks: dict[str, list[dict[str, float]]] = {rival.dtype: [] for rival in rivals}
    for turn in tqdm(range(config.rounds + 1), verb, unit="round"):
        for rival in rivals:
            if turn == 0:  # one after another: a start would slow another's first step down
                workers[rival.name] = Worker(rival, folder, training_config(config, rival))
            chosen = spread(records, getattr(rival, verb), rng)
            measures[rival.name].append(workers[rival.name].ask(verb, chosen))
        for dtype, found in peaks.items():
            found.append(matrix_peak(DTYPES[dtype], device))
    for name, worker in workers.items():
        measures[name].append(worker.ask("checkpoint_bytes", None))
        worker.stop()
    medians = {dtype: {kind: statistics.median(peak[kind] for peak in found) for kind in found[0]}
               for dtype, found in peaks.items()}
    return measures, medians


def review_loader(config: BenchConfig, folder: str) -> CustomDataLoader:
    """Return a loader for the model in `folder`; raise ValueError if its tokenizer misfits."""
    return folder_loader(folder, DataConfig(dataset=config.dataset, prompt=config.prompt))


def mean_tokens(
    config: BenchConfig, folder: str, records: Sequence[Record]
) -> tuple[float, float]:
    """Return the mean tokens of a review after the prefix, and its share of the window's prefix."""
    loader = review_loader(config, folder)
    prompts = [loader.encode_prompt(record) for record in records]
    prefix = len(loader.prefix(prompts))
    return statistics.mean(map(len, prompts)) - prefix, prefix / WINDOW


def compare(config: BenchConfig, folder: str, verbs: Sequence[str]) -> dict[str, Any]:
    """Measure all contenders; return their speed and memory, and our ratios to the rivals."""
    records = SentimentTask().read(config.dataset, "train")
    own, prefix = mean_tokens(config, folder, records)
    rivals, shape = contenders(config), load_config(folder)
    report: dict[str, Any] = {
        "contenders": {rival.name: {} for rival in rivals}, "ratios": {}, "spreads": {},
        "memory_ratios": {}, "peaks": {}}
    for verb in verbs:
        measures, peaks = take_turns(rivals, verb, records, folder, config)
        report["peaks"][verb] = peaks
        speeds = {}
        for rival in rivals:
            first, *rounds, saved = measures[rival.name]
            speeds[rival.name] = [getattr(rival, verb) / measure.seconds for measure in rounds]
            speed = statistics.median(speeds[rival.name])
            rank = 0 if rival.way == "full" else config.lora_rank
            rate = speed * useful_flops(shape, own, prefix, rank, verb)
            report["contenders"][rival.name] |= {
                f"{verb}_reviews_per_second": speed, f"{verb}_gflops": rate / 1e9,
                f"{verb}_share_of_plain_peak": rate / peaks[rival.dtype]["plain"],
                f"{verb}_share_of_best_peak": rate / peaks[rival.dtype]["best"],
                f"{verb}_memory_mib": rounds[-1].memory / MIB,
                f"{verb}_seconds_to_first": first.age,
            }
            report["contenders"][rival.name].setdefault("checkpoint_bytes", saved.result)
        add_ratios(report, verb, speeds)
    return report


def add_ratios(report: dict[str, Any], verb: str, speeds: dict[str, list[float]]) -> None:
    """Add to `report` our speed and memory relative to each rival."""
    memory = {name: row[f"{verb}_memory_mib"] for name, row in report["contenders"].items()}
    for name in (name for name in speeds if name.startswith("ours.")):
        for rival in RIVALS:
            key = f"{verb}.{rival}.{name.removeprefix('ours.')}"
            rounds = zip(speeds[name], speeds[f"{rival}.float32"], strict=True)
            ahead = [ours / theirs for ours, theirs in rounds]
            report["ratios"][key] = statistics.median(ahead)
            report["spreads"][key] = min(ahead), max(ahead)
            report["memory_ratios"][key] = memory[name] / memory[f"{rival}.float32"]


def compare_methods(config: BenchConfig, folder: str) -> dict[str, dict[str, float]]:
    """Measure LoRA and its siblings: ms per review and MiB of training and scoring."""
    biased = any(map(is_bias_name, parameter_names(folder)))
    ways = ["ours", *(way for way in SIBLINGS if biased or way != "bitfit")]
    each = [Contender(way, compute_dtype(config), WINDOW, WINDOW) for way in ways]
    records = SentimentTask().read(config.dataset, "train")
    points: dict[str, dict[str, float]] = {"lora" if way == "ours" else way: {} for way in ways}
    for verb in ("train", "score"):
        measures, _ = take_turns(each, verb, records, folder, config)
        for point, contender in zip(points.values(), each, strict=True):
            _, *rounds, _ = measures[contender.name]
            seconds = statistics.median(measure.seconds for measure in rounds)
            point |= {f"{verb}_ms": 1e3 * seconds / WINDOW,
                      f"{verb}_mib": rounds[-1].memory / MIB}
    return points


def compare_shots(config: BenchConfig, folder: str) -> dict[str, dict[str, float]]:
    """Measure scoring with examples in the prompt: ms per review, relative to none, and MiB."""
    number = 4 * WINDOW  # the examples are read once, whatever the number of reviews
    each = [Contender(way, compute_dtype(config), WINDOW, number) for way in SHOTS.values()]
    records = SentimentTask().read(config.dataset, "train")
    measures, _ = take_turns(each, "score", records, folder, config)
    rounds = [[one.seconds for one in measures[contender.name][1:-1]] for contender in each]
    return {shots: {
        "score_ms": 1e3 * statistics.median(own) / number,
        "times_zero_shot": statistics.median(map(operator.truediv, own, rounds[0])),
        "score_mib": measures[contender.name][-2].memory / MIB,
    } for shots, own, contender in zip(SHOTS, rounds, each, strict=True)}


def grow(config: BenchConfig, tokens: int, number: int, folder: str) -> dict[str, float]:
    """Measure ours once: ms per review and MiB of training and scoring reviews of `tokens`."""
    records = SentimentTask().read(config.dataset, "train")
    if tokens:
        tokenizer = review_loader(config, folder).tokenizer
        records = sized_reviews(tokens, number, records, tokenizer)
    contender = Contender("ours", compute_dtype(config), number, number)
    point = {}
    for verb in ("train", "score"):
        measures, _ = take_turns([contender], verb, records, folder, config)
        _, *rounds, _ = measures[contender.name]
        seconds = statistics.median(measure.seconds for measure in rounds)
        point |= {f"{verb}_ms": 1e3 * seconds / number, f"{verb}_mib": rounds[-1].memory / MIB}
    return point


def growth(config: BenchConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Measure ours along each axis, with everything else as in `config`.

    Reviews take up to half of a sequence. Only random weights come in several sizes.
    """
    axes: dict[str, Sequence[Any]] = {
        "batch_size": (1, 4, 16, 64, 128), "review_tokens": (10, 30, 100, 250, 500),
        "lora_rank": (4, 16, 64, 128, 256, 512),
    }
    if config.model in SHAPES:
        on_cpu = resolve_device(config.device).type == "cpu"
        axes["model"] = tuple(SHAPES)[: 3 if on_cpu else None]
    found: dict[str, dict[str, dict[str, float]]] = {axis: {} for axis in axes}
    config = replace(config, rounds=min(3, config.rounds))
    with open_checkpoint(config) as folder:
        longest = review_loader(config, folder).block_size // 2
        for size in axes["batch_size"]:
            point = replace(config, batch_size=size, eval_batch_size=size)
            found["batch_size"][str(size)] = grow(point, 0, WINDOW, folder)
        for tokens in (tokens for tokens in axes["review_tokens"] if tokens <= longest):
            found["review_tokens"][str(tokens)] = grow(config, tokens, config.batch_size, folder)
        for rank in axes["lora_rank"]:
            point = replace(config, lora_rank=rank)
            found["lora_rank"][str(rank)] = grow(point, 0, config.batch_size, folder)
    for size in axes.get("model", ()):
        point = replace(config, model=size)
        with open_checkpoint(point) as folder:
            found["model"][size] = grow(point, 0, config.batch_size, folder)
    return found


@explain_out_of_memory()
def main(config: BenchConfig) -> None:
    parts = config.what.replace(",", " ").split()
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"what={config.what!r} must list one or more of {', '.join(PARTS)}")
    verbs = [verb for verb in ("train", "score") if verb in parts]
    if verbs:  # growth measures only ours
        require_rivals()
    check_folder(writable_folder(Path(config.out_dir)))
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]), "settings": asdict(config),
        "machine": describe(resolve_device(config.device)) | {"commit": str(git_commit())},
    }
    if verbs:
        with open_checkpoint(config) as folder:
            report |= compare(config, folder, verbs)
    if "methods" in parts:
        with open_checkpoint(config) as folder:
            report["methods"] = compare_methods(config, folder)
    if "shots" in parts:
        with open_checkpoint(config) as folder:
            report["shots"] = compare_shots(config, folder)
    if "growth" in parts:
        report["growth"] = growth(config)
    write(report, Path(config.out_dir))
    print(markdown(report))


if __name__ == "__main__":
    run_script(main, BenchConfig)
