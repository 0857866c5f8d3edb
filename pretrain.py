"""Pretrain a small GPT-2 from random weights on movie reviews.

python pretrain.py config/pretrain_mini.py                     makes assets/gpt2-mini
python pretrain.py config/pretrain_mini.py init_from=resume    go on where it stopped
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import devices
import runlog
from checkpoint import read_state, write_json, write_state
from configurator import Bounds, run_script
from corpus import Windows, documents, tokenize
from datasource import read_records
from devices import autocast
from model import GPT, GPTConfig
from optimizer import OptimizerConfig, configure_optimizer, learning_rate_at

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class PretrainConfig(OptimizerConfig):
    """Settings of `pretrain.py`."""

    init_from: Annotated[Literal["scratch", "resume"], "start anew, or go on in out_dir"] = "scratch"
    out_dir: Annotated[str, "folder of the run; the model goes to its `model`"] = "out/pretrain"
    overwrite: Annotated[bool, "replace a run in out_dir"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[Dtype, "of the matrix products; auto is the fastest true one"] = "auto"
    seed: Annotated[int, "of weights, data, dropout, negatives", Bounds(0, 2**31 - 1)] = 1337
    # data
    data: Annotated[str, "imdb (from the hub) or a folder with its three splits"] = "imdb"
    passes: Annotated[int, "times a labelled review is cut into pieces", Bounds(1)] = 1
    verdict_weight: Annotated[float, "of a verdict's first token in the loss", Bounds(0)] = 1.0
    # model
    n_layer: Annotated[int, "transformer blocks", Bounds(1)] = 4
    n_head: Annotated[int, "attention heads", Bounds(1)] = 4
    n_embd: Annotated[int, "width", Bounds(1)] = 256
    block_size: Annotated[int, "tokens in a row, and the model's longest input", Bounds(2)] = 256
    dropout: Annotated[float, "of the residual stream and attention", Bounds(0, 1)] = 0.0
    # optimizer
    batch_size: Annotated[int, "rows per step", Bounds(1)] = 12
    negatives: Annotated[int, "words drawn for the sampled softmax; 0 is all", Bounds(0)] = 0
    full_softmax_iters: Annotated[int, "last steps that use all words", Bounds(0)] = 0
    eval_interval: Annotated[int, "steps between validations", Bounds(1)] = 1000
    eval_iters: Annotated[int, "batches of such a validation; the last takes all", Bounds(1)] = 20


class Vocabulary:
    """Draws the words that a step's softmax runs over.

    They are the batch's own words and `negatives` drawn by frequency^0.75 (Mikolov et al., 2013).
    A word that is there with probability Q has log Q taken from its logit, for which the sampled
    softmax has the full one's gradient in expectation as its size grows (Bengio and Senecal, 2008;
    Jean et al., 2015, section 3).
    """

    def __init__(self, tokens: np.ndarray, size: int, negatives: int) -> None:
        counts = torch.from_numpy(np.bincount(tokens, minlength=size)).double() + 1
        self.share, self.negatives = counts / counts.sum(), negatives  # (V,)
        self.proposal = self.share**0.75 / (self.share**0.75).sum()  # (V,)

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted ids (K,) with all of `tokens` among them, and log Q (K,)."""
        drawn = torch.multinomial(self.proposal, self.negatives, replacement=True)
        words = torch.cat((tokens.flatten(), drawn)).unique()
        missed = tokens.numel() * torch.log1p(-self.share[words])
        missed += self.negatives * torch.log1p(-self.proposal[words])
        return words, torch.log(-torch.expm1(missed)).float()

    def all(self) -> tuple[Tensor, Tensor]:
        """Return every id (V,) and log Q = 0 (V,): the full softmax."""
        return torch.arange(len(self.share)), torch.zeros(len(self.share))


def predict(
    model: GPT, tokens: Tensor, words: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return logits (B·T, K) over `words` for rows `tokens` (B, T+1), and the targets (B·T,).

    The model runs with an embedding of those words alone, so that nothing else gets a gradient.
    """
    ids, log_q = (tensor.to(model.device) for tensor in words)
    inside = torch.searchsorted(ids, tokens.to(model.device))  # (B, T+1), positions in ids
    table = F.embedding(ids, model.transformer.wte.weight).to(dtype)  # (K, C)
    with autocast(model.device, dtype):
        logits, _ = torch.func.functional_call(
            model, {"transformer.wte.weight": table}, (inside[:, :-1],))  # (B, T, K)
    return logits.flatten(0, 1) - log_q, inside[:, 1:].flatten()


@torch.no_grad()
def evaluate(
    model: GPT, windows: Windows, vocabulary: Vocabulary, config: PretrainConfig,
    dtype: torch.dtype, batches: int = 0,
) -> dict[str, float]:
    """Return loss (nats a token, full softmax), perplexity and the share of right verdicts.

    They are over the first `batches` batches of rows in the order of the stream, or over all.
    """
    model.eval()
    total = right = asked = count = 0.0
    rows = range(min(windows.rows, batches * config.batch_size or windows.rows))
    for start in range(0, len(rows), config.batch_size):
        tokens, verdicts = windows.take(rows[start : start + config.batch_size])
        logits, targets = predict(model, tokens, vocabulary.all(), dtype)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        chosen = verdicts.flatten().to(model.device)
        right += (logits[chosen].argmax(dim=1) == targets[chosen]).sum().item()
        asked, count = asked + chosen.sum().item(), count + targets.numel()
    model.train()
    loss = total / count
    return {"validation_loss": loss, "perplexity": math.exp(loss),
            "verdict_accuracy": right / max(1, asked)}


class Pretraining:
    """A model in pretraining, its data, and the folder of the run."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.folder = config, Path(config.out_dir)
        self.state_file = self.folder / "trainer_state.pt"
        resume = config.init_from == "resume"
        if self.state_file.exists() and not (resume or config.overwrite):
            raise ValueError(f"out_dir={config.out_dir!r} holds a run; go on with init_from=resume,"
                             " choose another out_dir, or overwrite=True to replace it")
        state = read_state(self.state_file) if resume else None  # before minutes of reading text
        self.device = devices.resolve_device(config.device)
        self.dtype = devices.resolve_dtype(config.dtype, self.device)
        torch.manual_seed(config.seed)
        shape = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
        self.model = GPT(GPTConfig(**{k: getattr(config, k) for k in shape})).to(self.device)
        self.optimizer = configure_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.iteration, self.seconds = 0, 0.0
        if state:
            self.load_state(state)
        self.read_corpus()
        if not state:
            runlog.start_folder(asdict(config), device=devices.device_name(self.device),
                                dtype=str(self.dtype).removeprefix("torch."))
        self.metrics = runlog.MetricsLog(asdict(config) | {"wandb_mode": "disabled"})

    def read_corpus(self) -> None:
        """Hold out every hundredth review; the others are the text to train on.

        Each text counts once, and in an order that does not depend on the files'.
        """
        config = self.config
        found = {review["text"]: review for split in ("train", "test", "unsupervised")
                 for review in read_records(config.data, split)}
        reviews = [found[text] for text in sorted(found)]
        held_out = documents(reviews[::100], 1, config.seed)
        del reviews[::100]
        corpus = tokenize(documents(reviews, config.passes, config.seed))
        self.windows = Windows(corpus, config.block_size, config.seed)
        self.validation = Windows(tokenize(held_out), config.block_size, config.seed)
        self.vocabulary = Vocabulary(corpus.tokens, self.model.config.vocab_size, config.negatives)

    def step(self) -> float:
        """Take one optimizer step; return its loss in nats a token, verdicts weighted."""
        config, device = self.config, self.device
        torch.manual_seed((config.seed << 32) + self.iteration)  # of negatives and dropout
        rate = learning_rate_at(self.iteration, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, verdicts = self.windows.batch(self.iteration, config.batch_size)
        sampled = config.negatives and self.iteration < config.max_iters - config.full_softmax_iters
        words = self.vocabulary.draw(tokens) if sampled else self.vocabulary.all()
        logits, targets = predict(self.model, tokens, words, self.dtype)
        weights = torch.where(verdicts.flatten().to(device), config.verdict_weight, 1.0)
        losses = F.cross_entropy(logits, targets, reduction="none")  # (B·T,)
        loss = (losses * weights).sum() / weights.sum()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.iteration}: the loss is {loss.item()}")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return loss.item()

    def save_state(self) -> None:
        write_state(self.state_file, {
            "settings": asdict(self.config), "iteration": self.iteration, "seconds": self.seconds,
            "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        })

    def load_state(self, state: dict) -> None:
        changed = runlog.changed_settings(
            state["settings"] | {"init_from": "resume"}, asdict(self.config))
        if changed:
            raise ValueError(f"a resumed run keeps its settings, but {changed}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]


def pretrain(config: PretrainConfig) -> dict[str, float]:
    devices.keep_freed_memory()
    run = Pretraining(config)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} weights on {run.device}, "
          f"{run.dtype}; {len(run.windows.corpus.tokens):,} tokens to train on, "
          f"{len(run.validation.corpus.tokens):,} to validate on", flush=True)
    bar = tqdm(total=config.max_iters, initial=run.iteration, unit="step")
    with devices.stop_on_signal() as stopped, bar:
        while run.iteration < config.max_iters and not stopped:
            started = time.perf_counter()
            loss = run.step()
            run.seconds += time.perf_counter() - started
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if run.iteration % 10 == 0:
                run.metrics.log(run.iteration, train_loss=loss)
            if run.iteration % config.eval_interval == 0:
                scores = evaluate(run.model, run.validation, run.vocabulary, config, run.dtype,
                                  config.eval_iters)
                run.metrics.log(run.iteration, seconds=run.seconds, **scores)
                tqdm.write(f"step {run.iteration}: {scores}")
                run.save_state()
    run.save_state()
    if stopped:
        print(f"stopped at step {run.iteration}; go on with init_from=resume", file=sys.stderr)
        raise KeyboardInterrupt
    run.model.half().save_pretrained(run.folder / "model")
    model = GPT.from_pretrained(str(run.folder / "model")).to(run.device)
    scores = evaluate(model, run.validation, run.vocabulary, config, run.dtype)
    scores["tokens_seen"] = config.max_iters * config.batch_size * config.block_size
    scores["seconds"] = run.seconds
    write_json(run.folder / "model" / "results.json", scores)
    print(scores)
    runlog.plot_losses(run.folder)
    return scores


@devices.out_of_memory_told()
def main(config: PretrainConfig) -> None:
    pretrain(config)


if __name__ == "__main__":
    run_script(main, PretrainConfig)
