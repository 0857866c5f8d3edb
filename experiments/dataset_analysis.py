"""Summarise a task's data set: rows, duplicates, lengths in tokens, cut texts, kinds of answers.

python -m experiments.dataset_analysis task=python_codes dataset=python_codes_mini block_size=256
python -m experiments.dataset_analysis dataset=movie_reviews
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from checkpoints.files import atomic_write, local_path, writable_folder
from configurator import Bounds, run_script
from dataloader import CustomDataLoader
from experiments.figures import length_histograms
from models.tokenizer import load_tokenizer
from tasks.registry import TaskConfig, make_task, resolve_dataset
from tasks.scores import table
from tasks.sources import SPLITS

MARK = "experiments.dataset_analysis"  # in the metadata of its picture


@dataclass(frozen=True)
class AnalysisConfig(TaskConfig):
    """Settings of `python -m experiments.dataset_analysis`."""

    block_size: Annotated[int, "longest sequence in tokens", Bounds(16)] = 1024
    out_dir: Annotated[str, "folder for lengths.png", local_path] = "out/analysis"
    init_from: Annotated[str, "the model whose tokens are counted", local_path] = "gpt2-mini"


class Lengths(NamedTuple):
    """Tokens of each example of a split, and how many prompts and answers the loader cuts."""

    questions: list[int]
    answers: list[int]  # code with its fences, without end-of-text
    prompts_cut: int
    answers_cut: int


def measure(loader: CustomDataLoader, split: str) -> Lengths:
    """Count the tokens of a split's whole questions and answers, and those that `loader` cuts."""
    task, encode = loader.task, loader.tokenizer.encode_ordinary
    records, end = loader.records(split), loader.tokenizer.eot_token
    examples = [loader.encode(record) for record in records]
    prompts = [len(loader.encode_whole(record)) for record in records]
    return Lengths(
        [len(encode(record[task.text_field])) for record in records],
        [len(encode(task.answer(record))) for record in records],
        sum(len(example.prompt) < length
            for example, length in zip(examples, prompts, strict=True)),
        sum(example.answer[-1] != end for example in examples),
    )


def spread(values: Sequence[int]) -> str:
    """Return the median, the 90th percentile and the maximum."""
    return "{:.0f} / {:.0f} / {:.0f}".format(*np.percentile(values, (50, 90, 100)))


def main(config: AnalysisConfig) -> None:
    picture = writable_folder(Path(config.out_dir)) / "lengths.png"
    if picture.exists() and MARK.encode() not in picture.read_bytes():
        raise ValueError(f"{picture} is no picture of this command; choose another out_dir")
    task, dataset = make_task(config.task, config.prompt), resolve_dataset(config).dataset
    loader = CustomDataLoader(
        dataset, task, config.block_size, tokenizer=load_tokenizer(config.init_from))
    lengths = {split: measure(loader, split) for split in SPLITS}
    print(f"{dataset}: " + ", ".join(f"{name} {number:,}"
                                     for name, number in task.census(dataset).items()))
    rows = [{
        "split": split, task.noun: f"{len(found.questions):,}",
        "question tokens": spread(found.questions), "answer tokens": spread(found.answers),
        "questions cut": f"{found.prompts_cut:,}", "answers cut": f"{found.answers_cut:,}",
    } for split, found in lengths.items()]
    print("", "Tokens: median / 90th percentile / maximum. The loader cuts examples that, with "
          f"their instruction, exceed {config.block_size} tokens.", "", table(rows), "", sep="\n")
    for split in SPLITS:
        facts = task.facts(loader.records(split))
        print(f"{split}: " + "; ".join(f"{name} {value}" for name, value in facts.items()))
    pooled = [[length for found in lengths.values() for length in found[kind]] for kind in (0, 1)]
    with atomic_write(picture) as path:
        length_histograms(*pooled, config.block_size).savefig(
            path, dpi=150, format="png", metadata={"Description": MARK})
    print(f"written: {picture}")


if __name__ == "__main__":
    run_script(main, AnalysisConfig)
