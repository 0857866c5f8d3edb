"""Score a model on a split, or ask it one question: prompts to generated text to figures.

python generate.py init_from=gpt2-medium                          before any fine-tuning
python generate.py init_from=resume out_dir=out checkpoint=best   after `train.py`
python generate.py init_from=resume out_dir=out text="a gorgeous film"
python generate.py init_from=resume out_dir=out export=merged
python generate.py init_from=gpt2-medium task=python_codes
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from checkpoint import atomic_write, write_json
from configurator import Bounds, run_script
from dataloader import TASKS, CustomDataLoader, find_task, make_task
from datasource import Record
from devices import (
    DeviceConfig,
    device_name,
    end_processes,
    gather_shares,
    of_rank_zero,
    out_of_memory_told,
    own_share,
    rank,
    resolve_dtype,
    set_up_memory,
    start_processes,
)
from export import export_model
from model import GPT, load_checkpoint
from runlog import read_run
from sampler import ModelSampler


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """Settings that training and scoring share."""

    init_from: Annotated[str, "gpt2-mini, gpt2, a hub id, a folder, or resume"] = "gpt2-medium"
    out_dir: Annotated[str, "folder of the run"] = "out"
    seed: Annotated[int, "of adapters, data, dropout, sampling", Bounds(0, 2**63 - 1)] = 1337
    task: Annotated[str, f"what is asked: {', '.join(TASKS)}"] = "sentiment"
    dataset: Annotated[str, "a name or a folder (see README); auto is the task's own"] = "auto"
    prompt: Annotated[str, "a template of the task's, or any with {text}"] = "default"


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """Settings of `generate.py`."""

    init_from: Annotated[str, "resume (a run in out_dir), or an untrained model"] = "resume"
    checkpoint: Annotated[Literal["best", "last"], "of the run (with resume)"] = "best"
    task: Annotated[str, "as in train.py; auto is the run's, else sentiment"] = "auto"
    dataset: Annotated[str, "as in train.py; auto is the run's, else the task's own"] = "auto"
    prompt: Annotated[str, "as in train.py; auto is the run's, else default"] = "auto"
    block_size: Annotated[int, "longest sequence; 0 is the run's, else the model's", Bounds(0)] = 0
    split: Annotated[Literal["train", "validation", "test"], "split to score"] = "test"
    limit: Annotated[int, "examples to score; -1 is the run's test_size, 0 all", Bounds(-1)] = -1
    text: Annotated[str, "answer this text instead of scoring a split"] = ""
    export: Annotated[str, "write the merged model to this new folder, for transformers"] = ""
    max_new_tokens: Annotated[int, "longest answer in tokens; 0 is the task's", Bounds(0)] = 0
    temperature: Annotated[float, "0 is greedy", Bounds(0)] = 0.0
    top_k: Annotated[int, "sample among the k likeliest; 0 is all; 1 is greedy", Bounds(0)] = 0
    batch_size: Annotated[int, "prompts per batch", Bounds(1)] = 64


# The settings behind a model that was never trained here.
UNTRAINED = {
    "task": RunConfig.task, "dataset": RunConfig.dataset, "prompt": RunConfig.prompt,
    "seed": RunConfig.seed, "dtype": RunConfig.dtype, "block_size": 0, "train_size": 0,
    "test_size": 0,
}


def score(
    sampler: ModelSampler, records: Sequence[Record], folder: Path | None = None, suffix: str = ""
) -> dict[str, Any]:
    """Return the scores of `records`, which all processes share. With a `folder`, write every
    prediction to `predictions{suffix}.jsonl` in it, then the scores to `results{suffix}.json`.
    """
    task = sampler.loader.task
    share = sampler.predict(own_share(records), "scoring" if folder else "", task.likelihood)
    predictions = gather_shares(share)
    results = task.summarize(records, predictions) | sampler.describe()
    if folder is None or rank() > 0:
        return results
    with atomic_write(folder / f"predictions{suffix}.jsonl") as path, open(path, "w") as file:
        for record, prediction in zip(records, predictions, strict=True):
            file.write(json.dumps(task.row(record) | prediction._asdict()) + "\n")
    write_json(folder / f"results{suffix}.json", results)
    return results


def slug(text: str) -> str:
    """Turn any text into a part of a file name; different texts give different names."""
    name = re.sub(r"\W+", "-", text)
    if name == text and len(name) <= 40:
        return name
    return f"{name[:40].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def results_suffix(
    config: GenerateConfig, settings: Mapping[str, Any], longest_answer: int
) -> str:
    """Name what differs from the run's own test score, so that no result overwrites another."""
    own = own_settings(config, settings)
    parts = [config.split] if config.split != "test" else []
    if config.task not in ("auto", settings["task"]):
        parts.append(f"task_{config.task}")
    for name in ("dataset", "prompt"):
        if (value := getattr(config, name)) not in ("auto", own[name]):
            parts.append(f"{name}_{slug(value)}")
    parts += [f"{name}{value}" for name, value, known in (
        ("block", config.block_size, (0, settings["block_size"])),
        ("limit", limit_of(config, settings),
         (settings["test_size"] if config.split == "test" else 0,)),
        ("tokens", config.max_new_tokens, (0, longest_answer)),
    ) if value not in known]
    if config.temperature > 0 and config.top_k != 1:
        parts.append(f"temperature{config.temperature:g}_top{config.top_k}_seed{config.seed}")
    if config.dtype not in ("auto", settings["dtype"]):
        parts.append(config.dtype)
    return "".join(f"-{part}" for part in parts)


def limit_of(config: GenerateConfig, settings: Mapping[str, Any]) -> int:
    """Return how many examples to score; 0 is all."""
    if config.limit >= 0:
        return config.limit
    return settings["test_size"] if config.split == "test" else 0


def dataset_of(settings: Mapping[str, Any]) -> str:
    """Return the data set that `settings` name; auto is the one of their task."""
    dataset = settings["dataset"]
    return find_task(settings["task"]).dataset if dataset == "auto" else dataset


def own_settings(config: GenerateConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's `settings` for the task that is asked: another one has its own data."""
    task = settings["task"] if config.task == "auto" else config.task
    other = {"task": task, "dataset": "auto", "prompt": "default"}
    settings = {**settings, **({} if task == settings["task"] else other)}
    return {**settings, "dataset": dataset_of(settings)}


def question_settings(config: GenerateConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's `settings` with what is asked instead."""
    chosen = {name: value for name in ("dataset", "prompt")
              if (value := getattr(config, name)) != "auto"}
    block_size = config.block_size or settings["block_size"]
    return {**own_settings(config, settings), **chosen, "block_size": block_size}


def make_loader(settings: Mapping[str, Any], model: GPT) -> CustomDataLoader:
    """Serve the data that `settings` name in sequences that `model` can hold."""
    longest = model.config.block_size
    if settings["block_size"] > longest:
        raise ValueError(f"block_size={settings['block_size']}, but the model has {longest}")
    task = make_task(settings["task"], settings["prompt"])
    loader = CustomDataLoader(dataset_of(settings), task, settings["block_size"] or longest,
                              settings["train_size"], settings["seed"])
    if model.config.vocab_size < loader.tokenizer.n_vocab:
        raise ValueError(f"the model knows {model.config.vocab_size} tokens, but GPT-2's "
                         f"tokenizer makes {loader.tokenizer.n_vocab}")
    return loader


def load_subject(config: GenerateConfig) -> tuple[GPT, torch.dtype, dict[str, Any], Path]:
    """Return the model to score, its compute dtype, the settings behind it, and its folder."""
    device = start_processes(config.device)
    if config.init_from != "resume":
        folder = Path(config.out_dir, f"zero_shot-{slug(config.init_from)}")
        model = GPT.from_pretrained(config.init_from).to(device)
        dtype = of_rank_zero(resolve_dtype(config.dtype, device))
        return model, dtype, dict(UNTRAINED), folder
    folder, run = Path(config.out_dir, config.checkpoint), read_run(config.out_dir)
    dtype = of_rank_zero(run_dtype(run, config.dtype, device))
    settings = run["settings"] | {"dtype": run["dtype"]}  # what auto came to
    return load_checkpoint(folder, settings, device, dtype), dtype, settings, folder


def run_dtype(run: Mapping[str, Any] | None, name: str, device: torch.device) -> torch.dtype:
    """Resolve the dtype called `name`; auto is that of a saved `run` on hardware like its own."""
    own = run is not None and name == "auto" and run["device"] == device_name(device)
    return resolve_dtype(run["dtype"] if own else name, device)


def answer(config: GenerateConfig) -> None:
    """Export, answer one text, or score a split; what is written and printed is rank 0's."""
    model, dtype, settings, folder = load_subject(config)
    if config.export:
        if rank() == 0:
            export_model(model, Path(config.export))
            print(f"written: {config.export}")
        return
    loader = make_loader(question_settings(config, settings), model)
    sampler = ModelSampler(model, loader, dtype, config.batch_size, config.max_new_tokens,
                           config.temperature, config.top_k)
    if config.text:
        if rank() == 0:
            (prediction,) = sampler.predict([{loader.task.text_field: config.text}])
            print("\n".join(loader.task.tell(prediction)))
        return
    suffix = results_suffix(config, settings, loader.longest_answer)
    records = loader.spread(config.split, limit_of(config, settings))
    results = score(sampler, records, folder, suffix)
    if rank() == 0:
        print(f"{folder}, {loader.dataset} {config.split}: {loader.task.describe(results)}")
        print(f"written: {folder / f'results{suffix}.json'}")


@out_of_memory_told()
def main(config: GenerateConfig) -> None:
    set_up_memory()
    torch.manual_seed(config.seed + rank())
    if config.export and config.text:
        raise ValueError("export writes a model, text asks it: choose one of them")
    try:
        # An export keeps every digit of the weights it was trained on.
        answer(replace(config, dtype="float32") if config.export else config)
    finally:
        end_processes()


if __name__ == "__main__":
    run_script(main, GenerateConfig)
