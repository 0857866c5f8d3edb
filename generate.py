"""Score a model on reviews, or label one text: prompts to generated words to accuracy.

python generate.py init_from=gpt2-medium                          before any fine-tuning
python generate.py init_from=resume out_dir=out checkpoint=best   after `train.py`
python generate.py init_from=resume out_dir=out text="a gorgeous film"
python generate.py init_from=resume out_dir=out export=merged
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import atomic_write, write_json
from configurator import Bounds, run_script
from dataloader import ANSWER_ROOM, CustomDataLoader, Record, SentimentTask, equal_parts, pad
from devices import (
    DeviceConfig,
    autocast,
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
from scores import Prediction, describe, summarize


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """Settings that training and scoring share."""

    init_from: Annotated[str, "gpt2-mini, gpt2, a hub id, a folder, or resume"] = "gpt2-medium"
    out_dir: Annotated[str, "folder of the run"] = "out"
    seed: Annotated[int, "of adapters, data, dropout, sampling", Bounds(0, 2**63 - 1)] = 1337
    dataset: Annotated[str, "rotten_tomatoes, movie_reviews or a folder"] = "rotten_tomatoes"
    prompt: Annotated[str, "default, terse, detailed, question, or any with {text}"] = "default"


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """Settings of `generate.py`."""

    init_from: Annotated[str, "resume (a run in out_dir), or an untrained model"] = "resume"
    checkpoint: Annotated[Literal["best", "last"], "of the run (with resume)"] = "best"
    dataset: Annotated[str, "as in train.py; auto is the run's, else rotten_tomatoes"] = "auto"
    prompt: Annotated[str, "as in train.py; auto is the run's, else default"] = "auto"
    split: Annotated[Literal["train", "validation", "test"], "split to score"] = "test"
    text: Annotated[str, "label this text instead of scoring a split"] = ""
    export: Annotated[str, "write the merged model to this new folder, for transformers"] = ""
    max_new_tokens: Annotated[int, "longest answer, in tokens", Bounds(1)] = 5
    temperature: Annotated[float, "0 is greedy", Bounds(0)] = 0.0
    top_k: Annotated[int, "sample among the k likeliest; 0 is all; 1 is greedy", Bounds(0)] = 0
    batch_size: Annotated[int, "prompts per batch", Bounds(1)] = 64


# The settings behind a model that was never trained here.
UNTRAINED = {"dataset": RunConfig.dataset, "prompt": RunConfig.prompt, "block_size": 0,
             "train_size": 0, "seed": RunConfig.seed, "dtype": RunConfig.dtype}


class ModelSampler:
    """Asks `model` the prompts of a task and reads its answers.

    Prompts run in batches of similar length behind their cached common prefix, with the adapters
    merged; a batch stops as soon as each of its rows has ended.
    """

    def __init__(
        self, model: GPT, loader: CustomDataLoader, dtype: torch.dtype = torch.float32,
        batch_size: int = 64, max_new_tokens: int = 5, temperature: float = 0.0, top_k: int = 0,
    ) -> None:
        self.model, self.loader, self.dtype = model, loader, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.temperature, self.top_k = temperature, top_k
        task, encode = loader.task, loader.tokenizer.encode_ordinary
        self.label_ids = [encode(task.answer({"label": i}))[0] for i in range(len(task.labels))]

    def predict_labels(self, dataset: Sequence[Record], progress: str = "") -> list[Prediction]:
        """Return a prediction for each record, in the order of `dataset`."""
        if not dataset:  # fewer records than processes
            return []
        room = max(ANSWER_ROOM, self.max_new_tokens)
        prompts = [self.loader.encode_prompt(record, room) for record in dataset]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        predictions: dict[int, Prediction] = {}
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), autocast(self.model.device, self.dtype):
            prefix = self.loader.prefix(prompts)
            past = self.model.prefill(self._tensor([prefix]).long())
            parts = equal_parts(
                [len(prompts[i]) - len(prefix) for i in by_length], self.batch_size)
            for part in tqdm(parts, progress, disable=not progress, leave=False, unit="batch"):
                batch = by_length[part]
                answers = self._answer([prompts[i][len(prefix) :] for i in batch], past)
                predictions.update(zip(batch, answers, strict=True))
        self.model.train(was_training)
        return [predictions[i] for i in range(len(prompts))]

    def _answer(self, prompts: list[list[int]], past: Any) -> list[Prediction]:
        """Complete `prompts`, what remains of them after the prefix that `past` holds."""
        lengths = self._tensor([len(prompt) for prompt in prompts])
        odds: list[list[float]] = []
        tokens = []
        for logits, token in self.model.stream(
            self._tensor(pad(prompts, value=0)), self.max_new_tokens, self.temperature,
            self.top_k, past, lengths,
        ):
            odds = odds or logits.log_softmax(dim=-1)[:, self.label_ids].tolist()  # (B, labels)
            tokens.append(token)
        texts = map(self._text, torch.cat(tokens, dim=1).tolist())  # (B, new tokens)
        parse = self.loader.task.parse
        return [Prediction(text, parse(text), row) for text, row in zip(texts, odds, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on beside the weights."""
        return {
            "dataset": self.loader.dataset, "prompt": self.loader.task.template,
            "dtype": str(self.dtype).removeprefix("torch."), "temperature": self.temperature,
            "top_k": self.top_k, "max_new_tokens": self.max_new_tokens,
        }

    def _text(self, ids: list[int]) -> str:
        end = self.loader.tokenizer.eot_token
        return self.loader.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.model.device)


def score(
    sampler: ModelSampler, records: Sequence[Record], folder: Path | None = None, suffix: str = ""
) -> dict[str, Any]:
    """Return the scores of `records`, which all processes share. With a `folder`, write every
    prediction to `predictions{suffix}.jsonl` in it, then the scores to `results{suffix}.json`.
    """
    share = sampler.predict_labels(own_share(records), progress="scoring" if folder else "")
    predictions = gather_shares(share)
    labels = [record["label"] for record in records]
    results = summarize(labels, predictions, sampler.loader.task.labels) | sampler.describe()
    if folder is None or rank() > 0:
        return results
    with atomic_write(folder / f"predictions{suffix}.jsonl") as path, open(path, "w") as file:
        for record, prediction in zip(records, predictions, strict=True):
            row = {"text": record["text"], "truth": record["label"], **prediction._asdict()}
            file.write(json.dumps(row) + "\n")
    write_json(folder / f"results{suffix}.json", results)
    return results


def slug(text: str) -> str:
    """Turn any text into a part of a file name; different texts give different names."""
    name = re.sub(r"\W+", "-", text)
    if name == text and len(name) <= 40:
        return name
    return f"{name[:40].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def results_suffix(config: GenerateConfig, settings: Mapping[str, Any]) -> str:
    """Name what differs from the run's own test score, so that no result overwrites another."""
    parts = [config.split] if config.split != "test" else []
    parts += [slug(value) for value, own in (
        (config.dataset, settings["dataset"]), (config.prompt, settings["prompt"]),
    ) if value not in ("auto", own)]
    if config.temperature > 0 and config.top_k != 1:
        parts.append(f"temperature{config.temperature:g}_top{config.top_k}_seed{config.seed}")
    if config.max_new_tokens != GenerateConfig.max_new_tokens:
        parts.append(f"tokens{config.max_new_tokens}")
    if config.dtype not in ("auto", settings["dtype"]):
        parts.append(config.dtype)
    return "".join(f"-{part}" for part in parts)


def label_text(sampler: ModelSampler, text: str) -> None:
    """Print the continuation of the prompt for `text`, its label and both labels' probabilities."""
    (prediction,) = sampler.predict_labels([{"text": text}])
    labels = sampler.loader.task.labels
    print(f"continuation: {prediction.generated!r}")
    print(f"label: {labels[prediction.label] if prediction.label >= 0 else 'garbage'}")
    for word, logprob in zip(labels, prediction.label_logprobs, strict=True):
        print(f"P({word}) = {math.exp(logprob):.4f}")


def make_loader(settings: Mapping[str, Any], model: GPT) -> CustomDataLoader:
    """Serve the data that `settings` name in sequences that `model` can hold."""
    longest = model.config.block_size
    if settings["block_size"] > longest:
        raise ValueError(f"block_size={settings['block_size']}, but the model has {longest}")
    loader = CustomDataLoader(
        settings["dataset"], SentimentTask(settings["prompt"]), settings["block_size"] or longest,
        settings["train_size"], settings["seed"],
    )
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
    """Export, label one text, or score a split; what is written and printed is rank 0's."""
    model, dtype, settings, folder = load_subject(config)
    if config.export:
        if rank() == 0:
            export_model(model, Path(config.export))
            print(f"written: {config.export}")
        return
    chosen = {name: value for name, value in
              (("dataset", config.dataset), ("prompt", config.prompt)) if value != "auto"}
    loader = make_loader(settings | chosen, model)
    sampler = ModelSampler(model, loader, dtype, config.batch_size, config.max_new_tokens,
                           config.temperature, config.top_k)
    if config.text:
        if rank() == 0:
            label_text(sampler, config.text)
        return
    suffix = results_suffix(config, settings)
    results = score(sampler, loader.records(config.split), folder, suffix)
    if rank() == 0:
        print(f"{folder}, {loader.dataset} {config.split}: {describe(results)}")
        print(f"written: {folder / f'results{suffix}.json'}")


@out_of_memory_told()
def main(config: GenerateConfig) -> None:
    set_up_memory()
    torch.manual_seed(config.seed + rank())
    if config.export and config.text:
        raise ValueError("export writes a model, text labels one review: choose one of them")
    try:
        # An export keeps every digit of the weights it was trained on.
        answer(replace(config, dtype="float32") if config.export else config)
    finally:
        end_processes()


if __name__ == "__main__":
    run_script(main, GenerateConfig)
