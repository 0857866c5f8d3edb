"""Run one contender in a process and measure its time and memory."""

import multiprocessing
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bench.generators import Generator, TransformersGenerator
from bench.rivals import HandoutStyle, Ours, PeftStyle, Shown
from checkpoints.layouts import END_OF_TEXT
from methods.build import save_model
from model import GPT, SIZES, GPTConfig
from models.families import load_decoder
from models.tokenizer import Tokenizer, get_tokenizer, load_tokenizer
from runtime.device import peak_memory, resolve_device, set_up_memory
from tasks.sources import Record
from train import TrainConfig

# The embedded model has 256 positions; here it gets 1,024, for long reviews.
SHAPES = {"gpt2-mini": GPTConfig(n_layer=4, n_head=4, n_embd=256), **SIZES}
Way = Literal["ours", "full", "bitfit", "bottleneck", "prefix", "shots4", "shots16", "handout",
              "peft", "generator", "transformers"]
WAYS = {"ours": Ours, "full": Ours, "bitfit": Ours, "bottleneck": Ours, "prefix": Ours,
        "shots4": partial(Shown, 4), "shots16": partial(Shown, 16),
        "handout": HandoutStyle, "peft": PeftStyle,
        "generator": Generator, "transformers": TransformersGenerator}


class Contender(NamedTuple):
    """A contender, its precision, and the reviews of one measurement."""

    way: Way
    dtype: str
    train: int = 0
    score: int = 0

    @property
    def name(self) -> str:
        return f"{self.way}.{self.dtype}"


class Measure(NamedTuple):
    """What a worker returns for one call."""

    result: Any
    seconds: float
    memory: int  # peak bytes so far: allocated on CUDA, else resident
    age: float  # seconds since the process started


def work(pipe: Connection, way: Way, folder: str, config: TrainConfig, started: float) -> None:
    """Run each (verb, argument) that `pipe` delivers; send a `Measure` back until it closes."""
    set_up_memory()
    device = resolve_device(config.device)
    contender = WAYS[way](folder, config, device)
    on_cuda = device.type == "cuda"
    while True:
        try:
            verb, argument = pipe.recv()
        except EOFError:
            return
        begun = time.perf_counter()
        result = (checkpoint_bytes(contender) if verb == "checkpoint_bytes" else
                  getattr(contender, verb)(argument))
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        memory = peak_memory(device)
        pipe.send(Measure(result, seconds, memory, time.time() - started))


def checkpoint_bytes(contender: Any) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        contender.save(Path(scratch))
        return sum(path.stat().st_size for path in Path(scratch).iterdir())


class Worker:
    """A contender in a separate process."""

    def __init__(self, contender: Contender, folder: str, config: TrainConfig) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, contender.way, folder, config, time.time())
        self.process = context.Process(target=work, args=arguments, daemon=True)
        # The child inherits the handler: only the parent handles Ctrl-C.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()

    def ask(self, verb: str, argument: Any) -> Measure:
        """Run one verb in the process; raise OSError if the process has died."""
        try:
            self.pipe.send((verb, argument))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise OSError(f"{self.contender.name}: the process died with exit code "
                          f"{self.process.exitcode}") from None

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


@contextmanager
def random_checkpoint(size: str, seed: int) -> Iterator[str]:
    """Yield a folder with a random GPT-2 that answers each prompt with " positive", end-of-text.

    In the final state, channel 0 marks that the last token was " positive", channel 1 that it was
    any other.
    """
    torch.manual_seed(seed)
    model = GPT(SHAPES[size])
    (word,) = get_tokenizer().encode_ordinary(" positive")
    norm, wte = model.transformer.ln_f, model.transformer.wte.weight
    with torch.no_grad():
        wte[:, :2] = 0.0
        wte[word, 0], wte[word, 1] = 10.0, 1.0
        wte[END_OF_TEXT, 0] = -2.0  # the norm flips the sign: the word is followed by end-of-text
        norm.weight[0], norm.weight[1], norm.bias[1] = -1.0, 0.0, 20.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        yield folder


@contextmanager
def stored_checkpoint(name: str) -> Iterator[str]:
    """Yield a folder with the model called `name` in float32 and its tokenizer.

    From this folder all contenders load the same weights, whatever the format of the original.
    Raises as `Decoder.from_pretrained` does.
    """
    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), load_decoder(name), tokenizer)
        yield folder


def spread(records: Sequence[Record], number: int, rng: random.Random) -> list[Record]:
    """Draw `number` records in random order, with lengths distributed as in `records`."""
    by_length = sorted(records, key=lambda record: len(record["text"]))
    size = len(by_length) / number
    return rng.sample([by_length[int((i + rng.random()) * size)] for i in range(number)], number)


def sized_reviews(
    tokens: int, number: int, records: Sequence[Record], tokenizer: Tokenizer
) -> list[Record]:
    """Return `number` reviews of about `tokens` tokens each, from the words of real ones."""
    stream = tokenizer.encode_ordinary(" ".join(record["text"] for record in records))
    starts = range(0, number * tokens, tokens)
    return [{"text": tokenizer.decode(stream[start : start + tokens]), "label": 1}
            for start in starts]
