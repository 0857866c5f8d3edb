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
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import atomic_write, write_json
from configurator import Bounds, run_script
from dataloader import TASKS, CustomDataLoader, collate, equal_parts, find_task, make_task, pad
from methods.build import load_checkpoint
from model import GPT, IGNORE
from models.tokenizer import vocabulary_files
from runtime.device import (
    DeviceConfig,
    autocast,
    device_name,
    out_of_memory_told,
    resolve_dtype,
    set_up_memory,
)
from runtime.processes import (
    end_processes,
    gather_shares,
    of_rank_zero,
    own_share,
    rank,
    start_processes,
)
from runtime.run_folder import read_run
from tasks.scores import Completion
from tasks.sources import Record


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


class ModelSampler:
    """Asks `model` the prompts of a task and reads its answers.

    Prompts run in batches of similar length behind their cached common prefix, with the adapters
    merged; a batch stops as soon as each of its rows has ended. `max_new_tokens=0` is the task's
    own number, or half of the sequence if that is less.
    """

    def __init__(
        self, model: GPT, loader: CustomDataLoader, dtype: torch.dtype = torch.float32,
        batch_size: int = 64, max_new_tokens: int = 0, temperature: float = 0.0, top_k: int = 0,
    ) -> None:
        self.model, self.loader, self.dtype = model, loader, dtype
        self.batch_size, self.temperature, self.top_k = batch_size, temperature, top_k
        self.max_new_tokens = max_new_tokens or loader.longest_answer
        self.choice_ids = [loader.tokenizer.encode_ordinary(choice)[0]
                           for choice in loader.task.choices]
        if len(set(self.choice_ids)) < len(self.choice_ids):
            raise ValueError(f"two of {', '.join(loader.task.choices)} begin with the same token")

    def predict(
        self, records: Sequence[Record], progress: str = "", likelihood: bool = False
    ) -> list[Any]:
        """Return the task's prediction for each record, in the order of `records`.

        With `likelihood` they tell how likely the model finds the right answers, too.
        """
        if not records:  # fewer records than processes
            return []
        room = max(self.loader.answer_room, self.max_new_tokens)
        prompts = [self.loader.encode_prompt(record, room) for record in records]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), autocast(self.model.device, self.dtype):
            right = self._likelihoods(records) if likelihood else [(0.0, 0)] * len(records)
            said = self._complete(prompts, progress)
        self.model.train(was_training)
        judge = self.loader.task.judge
        return [judge(Completion(*one, *other)) for one, other in zip(said, right, strict=True)]

    def _complete(self, prompts: list[list[int]], progress: str) -> list[tuple[Any, ...]]:
        """Return for each prompt the text, its tokens, whether it ended, the choices' odds."""
        prefix = self.loader.prefix(prompts)
        past = self.model.prefill(self._tensor([prefix]).long())
        own = [prompt[len(prefix) :] for prompt in prompts]
        found: dict[int, tuple[Any, ...]] = {}
        parts = self._by_length(own)
        for batch in tqdm(parts, progress, disable=not progress, leave=False, unit="batch"):
            found.update(zip(batch, self._answer([own[i] for i in batch], past), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _by_length(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return batches of the numbers of `sequences`, shortest first."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        parts = equal_parts([len(sequences[i]) for i in order], self.batch_size)
        return [order[part] for part in parts]

    def _likelihoods(self, records: Sequence[Record]) -> list[tuple[float, int]]:
        """Return the nats of each right answer, its end-of-text included, and its tokens."""
        examples = [self.loader.encode(record) for record in records]
        prefix = self.loader.prefix([example.prompt for example in examples])
        past = self.model.prefill(self._tensor([prefix]).long())
        found: dict[int, tuple[float, int]] = {}
        for numbers in self._by_length([prompt + answer for prompt, answer in examples]):
            batch = collate([examples[i] for i in numbers], prefix).to(self.model.device)
            _, nats = self.model(batch.inputs, batch.targets, past, reduction="none")
            tokens = (batch.targets != IGNORE).sum(dim=1).tolist()  # of each row's answer
            for i, part in zip(numbers, nats.split(tokens), strict=True):
                found[i] = part.sum().item(), len(part)
        return [found[i] for i in range(len(records))]

    def _answer(self, prompts: list[list[int]], past: Any) -> list[tuple[Any, ...]]:
        """Complete `prompts`, what remains of them after the prefix that `past` holds."""
        lengths = self._tensor([len(prompt) for prompt in prompts])
        odds: list[list[float]] = []
        tokens = []
        for logits, token in self.model.stream(
            self._tensor(pad(prompts, value=0)), self.max_new_tokens, self.temperature,
            self.top_k, past, lengths,
        ):
            odds = odds or logits.log_softmax(dim=-1)[:, self.choice_ids].tolist()  # (B, choices)
            tokens.append(token)
        said = torch.cat(tokens, dim=1).tolist()  # (B, new tokens)
        return [(*self._text(ids), row) for ids, row in zip(said, odds, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on beside the weights."""
        return {
            "dataset": self.loader.dataset, "prompt": self.loader.task.template,
            "dtype": str(self.dtype).removeprefix("torch."), "temperature": self.temperature,
            "top_k": self.top_k, "max_new_tokens": self.max_new_tokens,
            "block_size": self.loader.block_size,
        }

    def _text(self, ids: list[int]) -> tuple[str, int, bool]:
        """Return the text up to end-of-text, its tokens, and whether it ended so."""
        ended = self.loader.tokenizer.eot_token in ids
        length = ids.index(self.loader.tokenizer.eot_token) if ended else len(ids)
        return self.loader.tokenizer.decode(ids[:length]), length, ended

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.model.device)


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


def export_model(model: GPT, folder: Path) -> None:
    """Write `model`, its adapters merged, and GPT-2's tokenizer to a new folder, or nothing at all.

    transformers loads the folder, and so do the programs that convert from it.
    Raises ValueError if `folder` exists, OSError if it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"export={str(folder)!r} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch, folder.name)
        model.save_pretrained(made)
        for source, name in zip(vocabulary_files(), ("merges.txt", "vocab.json"), strict=True):
            shutil.copyfile(source, made / name)
        write_json(made / "tokenizer_config.json", {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size})
        made.rename(folder)


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
