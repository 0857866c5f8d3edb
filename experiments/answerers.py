"""The models of finished runs, ready to answer: loaded once, asked by one thread at a time."""

import gc
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from dataloader import make_loader
from experiments.finished_runs import load_run
from experiments.subspaces import scaled, singular_values, updates
from generate import GenerateConfig, ModelSampler, load_subject, resolve_question
from runtime.device import dtype_name, explain_out_of_memory
from runtime.result_files import weights_stamp
from runtime.run_folder import is_finished
from tasks.sources import Record

MOST_MODELS = 6  # kept in memory
MOST_CHARACTERS, MOST_WORDS = 10_000, 80
LOADING = Lock()


class Answerer:
    """A model that answers as `generate.py text=` does, with its ΔW at any strength.

    `strength` multiplies ΔW: 0 is the model before training, 1 the trained one. A model that no
    LoRA trained has no ΔW, and answers alike at any strength.
    """

    def __init__(self, config: GenerateConfig) -> None:
        subject = load_subject(config)
        question = resolve_question(config, subject.settings, dtype_name(subject.dtype))
        self.loader = make_loader(question, subject.model.config, subject.tokenizer)
        self.sampler = ModelSampler(subject.model, self.loader, subject.dtype)
        self.config = config
        self.task, self.settings, self.lock = self.loader.task, subject.settings, Lock()
        trained = config.init_from == "resume"
        self.is_lora = trained and self.settings.trained == "lora"
        self.name = config.out_dir if trained else Path(config.init_from).name
        method = f"LoRA, r = {self.settings.lora_rank}" if self.is_lora else self.settings.trained
        self.about = f"{method if trained else 'before training'}; task {self.task.name}"
        self.chance_at = lru_cache(maxsize=4096)(self._chance_at)
        self.accuracy_at = lru_cache(maxsize=64)(self._accuracy_at)

    def predict(self, records: Sequence[Record], strength: float = 1.0) -> list[Any]:
        """Return the task's predictions, as `ModelSampler.predict` does."""
        with self.lock, scaled(self.sampler.model, strength), explain_out_of_memory():
            return self.sampler.predict(records)

    def answer(self, text: str, strength: float = 1.0) -> tuple[Any, float]:
        """Return the prediction for one text and the seconds it took."""
        started = time.perf_counter()
        (prediction,) = self.predict([{self.task.text_field: text}], strength)
        return prediction, time.perf_counter() - started

    def _chance_at(self, strength: float, text: str) -> float:
        """Return the probability of the task's last label (positive)."""
        return math.exp(self.answer(text, strength)[0].label_logprobs[-1])

    def _accuracy_at(self, strength: float, limit: int) -> float:
        """Return the accuracy on `limit` validation examples."""
        records = self.loader.spread("validation", limit)
        return self.task.summarize(records, self.predict(records, strength))["accuracy"]

    def without_words(self, words: Sequence[str], strength: float) -> tuple[float, list[float]]:
        """Return the last label's probability, and its change when each word is left out.

        Raises ValueError for more than `MOST_WORDS` words, because each is a question.
        """
        if len(words) > MOST_WORDS:
            raise ValueError(f"This text has {len(words)} words; leaving out each in turn takes at "
                             f"most {MOST_WORDS}.")
        shorter = [[*words[:i], *words[i + 1 :]] for i in range(len(words))]
        whole, *others = (self.chance_at(strength, " ".join(each)) for each in (words, *shorter))
        return whole, [chance - whole for chance in others]

    def singular_values(self) -> dict[str, list[list[float]]]:
        with self.lock:  # during an answer the weights are merged
            return singular_values(updates(self.sampler.model))

    def base(self) -> "Answerer":
        """Return the model before training, which is asked the same in the same precision."""
        asked = ("init_from", "task", "dataset", "prompt", "block_size")
        return load(GenerateConfig(dtype=dtype_name(self.sampler.dtype), **{
            name: getattr(self.settings, name) for name in asked}))


def checked(text: str) -> str:
    """Return a text that somebody typed; raise ValueError if it is empty or far too long."""
    if not text.strip():
        raise ValueError("Type a text first: this one holds no words.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"This text has {len(text):,} characters; at most {MOST_CHARACTERS:,} "
                         "are taken.")
    return text


@lru_cache(maxsize=MOST_MODELS)
def _load(config: GenerateConfig, stamp: tuple[Any, ...]) -> Answerer:
    gc.collect()  # an Answerer refers to itself, and would keep its weights when it is dropped
    return Answerer(config)


def load(config: GenerateConfig) -> Answerer:
    """Return the model of `config`; it is loaded again only if its weights were replaced."""
    with LOADING:
        stamp = weights_stamp(Path(config.out_dir, config.checkpoint))
        return _load(config, tuple(stamp.items()))


def load_finished(folder: str | None, lora: bool = False) -> Answerer:
    """Return the best checkpoint of a run, with `lora` only if LoRA trained it.

    Raises ValueError or OSError, in a sentence for the reader, for a run that cannot be shown.
    """
    if not folder:
        raise ValueError("There is no finished run yet: train one first.")
    if not is_finished(Path(folder)):
        raise ValueError(f"{folder} is not finished: wait until its training ends.")
    load_run(Path(folder))
    found = load(GenerateConfig(out_dir=folder))
    if lora and not found.is_lora:
        raise ValueError(f"{folder} trained method={found.settings.trained} and has no ΔW: this "
                         "part is for LoRA runs.")
    return found


def with_bases(folders: Iterable[str]) -> Iterator[Answerer]:
    """Yield runs, each base before the first run that began from it; gpt2-mini if there is none.

    They are loaded one after the other, because memory may not hold all at once.
    """
    bases: set[GenerateConfig] = set()
    for run in map(load_finished, folders):
        base = run.base()
        if base.config not in bases:
            bases.add(base.config)
            yield base
        yield run
    if not bases:
        yield load(GenerateConfig(init_from="gpt2-mini"))
