"""Score a model on a split, or ask it one question: prompts to generated text to figures.

python generate.py init_from=gpt2-medium                          before any fine-tuning
python generate.py init_from=resume out_dir=out checkpoint=best   after `train.py`
python generate.py init_from=resume out_dir=out text="a gorgeous film"
python generate.py init_from=resume out_dir=out ask=True          answers what you type
python generate.py init_from=resume out_dir=out export=merged
python generate.py init_from=gpt2-medium shots=16 calibrate=True  learns from its context
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from checkpoints.files import anchored, atomic_write, local_path, slug, writable_folder, write_json
from checkpoints.pretrained import checkpoint_digest
from configurator import Bounds, run_script
from dataloader import CustomDataLoader, DataConfig, make_loader
from methods.build import MethodConfig, load_checkpoint
from model import Decoder
from models.export import export_model
from models.families import load_decoder
from models.tokenizer import Tokenizer, load_tokenizer
from runtime.device import (
    DeviceConfig,
    autocast,
    dtype_name,
    explain_out_of_memory,
    resolve_dtype,
    set_up_memory,
)
from runtime.processes import (
    gather_shares,
    leave_job_at_the_end,
    of_rank_zero,
    own_share,
    rank,
    start_processes,
    typed_texts,
    world_size,
)
from runtime.result_files import Stamp, results_suffix, spare_results, weights_stamp
from runtime.run_folder import FolderConfig, read_run, run_dtype
from tasks.base import filled, line_ends
from tasks.demonstrations import ShotsConfig
from tasks.registry import resolve_dataset
from tasks.scores import CONTENT_FREE, Completion, calibrate, fields
from tasks.sources import Record


@dataclass(frozen=True)
class GenerateConfig(ShotsConfig, DeviceConfig, FolderConfig):
    """Settings of `generate.py`."""

    init_from: Annotated[
        str, "resume (a run in out_dir), or an untrained model", local_path] = "resume"
    checkpoint: Annotated[Literal["best", "last"], "of the run (with resume)"] = "best"
    task: Annotated[str, "as in train.py; auto is the run's, else sentiment"] = "auto"
    dataset: Annotated[str, "as in train.py; auto is the run's or the task's", local_path] = "auto"
    prompt: Annotated[str, "as in train.py; auto is the run's, else default", line_ends] = "auto"
    block_size: Annotated[int, "longest sequence; 0 is the run's, else the model's", Bounds(0)] = 0
    split: Annotated[Literal["train", "validation", "test"], "split to score"] = "test"
    limit: Annotated[int, "examples to score; -1 is the run's test_size, 0 all", Bounds(-1)] = -1
    text: Annotated[str, "answer this text instead of scoring a split", filled] = ""
    ask: Annotated[bool, "answer the texts typed on stdin, up to an empty line"] = False
    calibrate: Annotated[bool, "also correct the likeliest label for the prompt's bias"] = False
    export: Annotated[str, "write the merged model to this new folder", local_path] = ""
    max_new_tokens: Annotated[int, "longest answer in tokens; 0 is the task's", Bounds(0)] = 0
    temperature: Annotated[float, "0 is greedy", Bounds(0)] = 0.0
    top_k: Annotated[int, "sample among the k likeliest; 0 is all; 1 is greedy", Bounds(0)] = 0
    batch_size: Annotated[int, "prompts per batch", Bounds(1)] = 64
    seed: Annotated[int, "for sampling", Bounds(0, 2**63 - 1)] = DataConfig.seed


@dataclass(frozen=True)
class ModelSettings(MethodConfig, DataConfig):
    """The settings of a run that decide its model and its questions."""


UNTRAINED = ModelSettings(lora_rank=0, train_size=0)  # a model that has no run


@dataclass(frozen=True)
class Question(ShotsConfig, DataConfig):
    """What is asked of a model, on which data, and how it answers: every "auto" is resolved."""

    split: str = "test"
    limit: int = 0  # examples to score; 0 is all
    max_new_tokens: int = 0  # 0 is the task's limit
    temperature: float = 0.0
    top_k: int = 0
    sampling_seed: int = 0
    calibrate: bool = False
    dtype: str = "auto"


class Subject(NamedTuple):
    """A model to score, its tokenizer, the settings behind it, and the folder of its results."""

    model: Decoder
    tokenizer: Tokenizer
    settings: ModelSettings
    folder: Path
    dtype: torch.dtype
    own_dtype: str  # of its run; an untrained model has that of `dtype`
    own_data: str  # digest of its run's data, if it noted one
    base: Mapping[str, str]  # digest of an untrained model
    stamp: Stamp  # of the weights in `folder`, from before they were loaded


class ModelSampler:
    """Generate the answers of `model` to the prompts of a task.

    Prompts run in batches behind their cached common prefix, with the adapters merged; as soon as
    answers have ended, the next prompts take their places. `max_new_tokens=0` is the task's
    limit, or half of the sequence if that is less. With `calibrate` a label is also chosen by how
    much likelier it is than in the answers to texts without content.
    """

    def __init__(
        self, model: Decoder, loader: CustomDataLoader, dtype: torch.dtype = torch.float32,
        batch_size: int = 64, max_new_tokens: int = 0, temperature: float = 0.0, top_k: int = 0,
        calibrate: bool = False,
    ) -> None:
        self.model, self.loader, self.dtype = model, loader, dtype
        self.batch_size, self.temperature, self.top_k = batch_size, temperature, top_k
        self.max_new_tokens = max_new_tokens or loader.longest_answer
        self.calibrate, self.reasoning = calibrate, loader.task.reasoning
        if calibrate and (self.reasoning or not loader.task.choices):
            raise ValueError("calibrate=True needs labels, and a prompt that asks for one at once")
        longest = self.max_new_tokens + loader.task.reasoning_room
        self.room = max(loader.answer_room, longest)  # tokens after a prompt
        self.choice_ids = [loader.encode_answer(choice)[0] for choice in loader.task.choices]
        if len(set(self.choice_ids)) < len(self.choice_ids):
            raise ValueError(f"two of {', '.join(loader.task.choices)} begin with the same token")

    def predict(
        self, records: Sequence[Record], progress: str = "", likelihood: bool = False
    ) -> list[Any]:
        """Return the task's prediction for each record, if asked with its answers' likelihood."""
        if not records:  # fewer records than processes
            return []
        task = self.loader.task
        empty = [empty for text in CONTENT_FREE if self.calibrate
                 and self.loader.encode_whole(empty := {task.text_field: text})]
        prompts = [self.loader.encode_prompt(each, self.room) for each in (*records, *empty)]
        likelihoods = [()] * len(prompts)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), autocast(self.model.device, self.dtype):
            if likelihood:
                likelihoods = self.loader.likelihoods(self.model, records, self.batch_size)
            thoughts = [""] * len(prompts)
            if reasoning := self.reasoning:
                said = self._complete(prompts, reasoning.tokens, progress)
                thoughts = [reasoning.cut(text) for text, *_ in said]
                prompts = reasoning.conclude(prompts, thoughts, self.loader.tokenizer)
            said = self._complete(prompts, self.max_new_tokens, progress)
        self.model.train(was_training)
        predictions = [task.judge(Completion(*one, nats, thought))
                       for one, nats, thought in zip(said, likelihoods, thoughts, strict=True)]
        return calibrate(predictions, len(empty)) if empty else predictions

    def _complete(self, prompts: list[list[int]], limit: int, progress: str) -> list[tuple]:
        """Return for each prompt: text, tokens, whether it ended, log-probability of choices."""
        prefix = self.loader.prefix(prompts)
        past = self.model.prefill(torch.tensor([prefix], device=self.model.device).long())
        said: list[list[int]] = [[] for _ in prompts]
        odds: dict[int, list[float]] = {}
        bar = tqdm(total=len(prompts), desc=progress, disable=not progress, leave=False)
        for step in self.model.stream(
            [prompt[len(prefix) :] for prompt in prompts], limit, self.temperature, self.top_k,
            past, self.batch_size,
        ):
            new = sum(row not in odds for row in step.rows)  # they stand last
            first = step.logits[len(step.rows) - new :].log_softmax(dim=-1)[:, self.choice_ids]
            odds.update(zip(step.rows[len(step.rows) - new :], first.tolist(), strict=True))
            for row, (token,) in zip(step.rows, step.tokens.tolist(), strict=True):
                said[row].append(token)
            bar.update(new)
        bar.close()
        return [(*self._text(ids), odds[row]) for row, ids in enumerate(said)]

    def describe(self) -> dict[str, Any]:
        """Return the settings and the data that the answers depend on."""
        loader, drawn = self.loader, {"batch_size": self.batch_size, "processes": world_size()}
        return {"dataset": loader.dataset, "data_sha256": loader.data_sha256,
                "prompt": loader.task.template, **({"chat": True} if loader.task.chat else {}),
                "dtype": dtype_name(self.dtype), "temperature": self.temperature,
                "top_k": self.top_k, "max_new_tokens": self.max_new_tokens,
                "block_size": loader.block_size, **loader.demonstrations.facts,
                **(drawn if self.temperature > 0 and self.top_k != 1 else {})}

    def _text(self, ids: list[int]) -> tuple[str, int, bool]:
        """Return the text up to its end, its number of tokens, and whether it ended by itself."""
        ended = ids[-1] in self.model.config.end_of_text
        ids = ids[:-1] if ended else ids
        text = self.loader.tokenizer.decode(ids)
        if (own := self.loader.demonstrations.cut(text)) != text:
            return own, len(self.loader.encode_answer(own)), True
        return text, len(ids), ended


def predict_labels(dataset: Sequence[Record], sampler: ModelSampler) -> list[int]:
    """Return the label that the model generates for each record of `dataset`; garbage is -1.

    Raises ValueError for a task whose answers are not labels.
    """
    if not sampler.loader.task.choices:
        raise ValueError(f"task={sampler.loader.task.name!r} has no labels")
    return [prediction.label for prediction in sampler.predict(dataset)]


def score(
    sampler: ModelSampler, records: Sequence[Record], folder: Path | None = None, suffix: str = "",
    subject: Subject | None = None,
) -> dict[str, Any]:
    """Return the scores of `records`, which all processes share.

    With a `folder`, write each prediction to `predictions{suffix}.jsonl` in it, then the scores to
    `results{suffix}.json`. Raises ValueError if the weights of `subject` were replaced meanwhile.
    """
    task = sampler.loader.task
    share = sampler.predict(own_share(records), "scoring" if folder else "", task.likelihood)
    predictions = gather_shares(share)
    results = task.summarize(records, predictions) | sampler.describe()
    results |= subject.base if subject else {}
    if folder is None or rank() > 0:
        return results
    if subject and subject.stamp != weights_stamp(folder):
        raise ValueError(f"{folder} changed while it was scored: nothing is written")
    with atomic_write(folder / f"predictions{suffix}.jsonl") as path, open(path, "w") as file:
        for record, prediction in zip(records, predictions, strict=True):
            file.write(json.dumps(task.row(record) | fields(prediction)) + "\n")
    write_json(folder / f"results{suffix}.json", results)
    return results


def resolve_question(config: GenerateConfig, settings: ModelSettings, dtype: str) -> Question:
    """Resolve every "auto" of `config` by the `settings` behind the model.

    Another task than the model's comes with its own default data set and prompt.
    """
    task = settings.task if config.task == "auto" else config.task
    if task != settings.task:
        settings = replace(settings, task=task, dataset="auto", prompt="default")
    settings = resolve_dataset(settings)
    if config.shots and config.split == "train" and not (config.text or config.ask):
        raise ValueError(f"shots={config.shots} shows examples of split=train: score another")
    own_limit = settings.test_size if config.split == "test" else 0
    resolved = {
        "task": task, "seed": settings.seed, "sampling_seed": config.seed, "dtype": dtype,
        "block_size": config.block_size or settings.block_size,
        "limit": own_limit if config.limit < 0 else config.limit,
    }
    asked = {name: value for name, value in asdict(config).items() if value != "auto"}
    known = asdict(settings) | asked | resolved
    return Question(**{field.name: known[field.name] for field in dataclasses.fields(Question)})


def load_subject(config: GenerateConfig) -> Subject:
    """Load the model that `config` names: an untrained one, or a checkpoint of a run."""
    device = start_processes(config.device)
    if config.init_from != "resume":
        folder = Path(config.out_dir, f"zero_shot-{slug(config.init_from)}")
        model = load_decoder(config.init_from).to(device)
        dtype = of_rank_zero(resolve_dtype(config.dtype, device))
        base = {"base_sha256": checkpoint_digest(config.init_from)}
        return Subject(model, load_tokenizer(config.init_from), UNTRAINED, folder, dtype,
                       dtype_name(dtype), "", base, {})
    folder, run = Path(config.out_dir, config.checkpoint), read_run(config.out_dir)
    stamp = weights_stamp(folder)
    dtype = of_rank_zero(run_dtype(run, config.dtype, device))
    settings = run.config(ModelSettings)
    if settings.keeps_base and "base_sha256" in run.facts:
        run.refuse_changed_inputs(base_sha256=checkpoint_digest(settings.init_from))
    model = load_checkpoint(folder, settings, device, dtype)
    own_data = str(run.facts.get("data_sha256", ""))
    # A fully tuned checkpoint needs its base no more.
    tokenizer = load_tokenizer(settings.init_from if settings.keeps_base else folder)
    run.refuse_changed_inputs(**tokenizer.digests)
    return Subject(model, tokenizer, settings, folder, dtype, run.dtype, own_data, {}, stamp)


def prepare(sampler: ModelSampler, question: Question, records: Sequence[Record]) -> None:
    """Show the examples that `question` asks for, and say how many of the `records` are cut."""
    loader = sampler.loader
    if question.shots:
        loader.show(question, records, sampler.room)
    if (cut := loader.texts_cut(records, sampler.room)) and rank() == 0:
        print(f"{cut:,} of {len(records):,} texts are cut to fit into {loader.block_size} tokens")


def tell(sampler: ModelSampler, question: Question, text: str) -> None:
    """Print the answer to one text."""
    task = sampler.loader.task
    records = [{task.text_field: text}]
    prepare(sampler, question, records)
    if rank() == 0:
        print(*task.tell(*sampler.predict(records)), sep="\n", flush=True)


def answer(config: GenerateConfig) -> None:
    """Export the model, answer one text, or score a split; rank 0 writes and prints."""
    subject = load_subject(config)
    if config.export:
        if rank() == 0:
            export_model(subject.model, subject.tokenizer, Path(config.export))
            print(f"written: {config.export}")
        return
    question = resolve_question(config, subject.settings, dtype_name(subject.dtype))
    own = resolve_question(GenerateConfig(task=question.task, split=question.split),
                           subject.settings, subject.own_dtype)
    loader = make_loader(question, subject.model.config, subject.tokenizer)
    question, own = (replace(asked, max_new_tokens=asked.max_new_tokens or loader.longest_answer)
                     for asked in (question, own))
    sampler = ModelSampler(subject.model, loader, subject.dtype, config.batch_size,
                           question.max_new_tokens, question.temperature, question.top_k,
                           question.calibrate)
    if config.text or config.ask:
        for text in typed_texts() if config.ask else [config.text]:
            tell(sampler, question, text)
        return
    records = loader.spread(question.split, question.limit)
    prepare(sampler, question, records)
    suffix = results_suffix(asdict(question), asdict(own), subject.settings.task)
    own_data = subject.own_data if anchored(question.dataset) == anchored(own.dataset) else ""
    facts = sampler.describe() | subject.base
    suffix = spare_results(writable_folder(subject.folder), suffix, facts, own_data)
    results = score(sampler, records, subject.folder, suffix, subject)
    if rank() == 0:
        print(f"{subject.folder}, {loader.dataset} {question.split}:",
              loader.task.describe(results))
        print(f"written: {subject.folder / f'results{suffix}.json'}")


@explain_out_of_memory()
@leave_job_at_the_end()
def main(config: GenerateConfig) -> None:
    set_up_memory()
    torch.manual_seed(config.seed + rank())
    if sum(map(bool, (config.export, config.text, config.ask))) > 1:
        raise ValueError("export writes a model, text and ask question it: choose one of them")
    # An export keeps every digit of the weights it was trained on.
    answer(replace(config, dtype="float32") if config.export else config)


if __name__ == "__main__":
    run_script(main, GenerateConfig)
