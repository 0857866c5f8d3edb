"""Pretrain a small GPT-2 from random weights on movie reviews.

python -m pretraining config/pretrain_mini.py                     trains assets/gpt2-mini
python -m pretraining config/pretrain_mini.py init_from=resume    resumes the run
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn
from tqdm import tqdm

from checkpoints.files import anchored, local_path, write_json
from checkpoints.trainer_state import STATE_FILE, TrainerState
from configurator import Bounds, run_script
from model import GPT, GPTConfig
from pretraining.corpus import SPLITS, Windows, documents, read_reviews, tokenize
from pretraining.sampled_softmax import Vocabulary, evaluate, predict, token_losses
from runtime.device import (
    DeviceConfig,
    describe,
    dtype_name,
    explain_out_of_memory,
    resolve_device,
    resolve_dtype,
    set_up_memory,
)
from runtime.metrics import MetricsLog
from runtime.optimizer import OptimizerConfig, configure_optimizer, set_learning_rate
from runtime.processes import stop_on_signal
from runtime.result_files import forget_checkpoint
from runtime.run_folder import (
    NewFolderConfig,
    changed_settings,
    lock_folder,
    refuse_foreign_folder,
    reopen,
    start_folder,
)
from tasks.sources import NAMES, data_digest

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "dropout")


@dataclass(frozen=True)
class PretrainConfig(OptimizerConfig, NewFolderConfig, DeviceConfig):
    """Settings of `python -m pretraining`."""

    init_from: Annotated[Literal["scratch", "resume"], "start anew, or resume out_dir"] = "scratch"
    out_dir: Annotated[
        str, "folder of the run; model/ holds the result", local_path] = "out/pretrain"
    seed: Annotated[int, "seed of weights, data, dropout, negatives", Bounds(0, 2**31 - 1)] = 1337
    data: Annotated[str, "imdb (from the hub) or a folder with its splits", local_path] = "imdb"
    passes: Annotated[int, "times each labelled review is split into pieces", Bounds(1)] = 1
    verdict_weight: Annotated[float, "loss weight of a verdict's first token", Bounds(0)] = 1.0
    n_layer: Annotated[int, "transformer blocks", Bounds(1)] = 4
    n_head: Annotated[int, "attention heads", Bounds(1)] = 4
    n_embd: Annotated[int, "width", Bounds(1)] = 256
    block_size: Annotated[int, "tokens in a row, and the model's longest input", Bounds(1)] = 256
    dropout: Annotated[float, "GPT-2's own dropout", Bounds(0, 1)] = 0.0
    batch_size: Annotated[int, "rows per step", Bounds(1)] = 12
    negatives: Annotated[int, "words of the sampled softmax; 0 means a full one", Bounds(0)] = 0
    full_softmax_iters: Annotated[int, "last steps, which use the full softmax", Bounds(0)] = 0
    eval_interval: Annotated[int, "steps between validations and saves", Bounds(1)] = 1000
    eval_iters: Annotated[int, "validation batches, but all at the end; 0 is all", Bounds(0)] = 20
    log_interval: Annotated[int, "steps between logged training losses", Bounds(1)] = 10


class Run:
    """A model in pretraining, its data, its optimizer, and its progress."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.folder = config, Path(config.out_dir)
        resume = config.init_from == "resume"
        if not resume:
            refuse_loss(config)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        torch.manual_seed(config.seed)
        self.model = GPT(GPTConfig(**{name: getattr(config, name) for name in SHAPE}))
        self.model.to(self.device)
        self.optimizer = configure_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.iteration, self.seconds = 0, 0.0
        self.lock = lock_folder(self.folder)
        self.data_sha256 = data_digest(config.data, SPLITS)
        text, held_out = read_reviews(config.data)
        self.rows = Windows(
            tokenize(documents(text, config.passes, config.seed)), config.block_size, config.seed)
        self.validation = Windows(
            tokenize(documents(held_out, 1, config.seed)), config.block_size, config.seed)
        self.vocabulary = Vocabulary(
            self.rows.tokens, self.model.config.vocab_size, config.negatives)
        if resume:
            self.load_state()
        else:
            self.start_folder()
        self.metrics = MetricsLog(self.folder)

    def start_folder(self) -> None:
        refuse_loss(self.config)  # again, now that this process holds the lock
        forget_checkpoint(self.folder / "model")
        start_folder(self.config, **describe(self.device), dtype=dtype_name(self.dtype))

    def step(self) -> float:
        """Take one optimizer step; return its unweighted loss in nats per token."""
        config, device = self.config, self.device
        torch.manual_seed((config.seed << 32) + self.iteration)  # seeds negatives and dropout
        set_learning_rate(self.optimizer, self.iteration, config)
        tokens, verdicts = self.rows.batch(self.iteration, config.batch_size)
        sampled = config.negatives and self.iteration < config.max_iters - config.full_softmax_iters
        words = self.vocabulary.draw(tokens) if sampled else self.vocabulary.all()
        logits, targets = predict(self.model, tokens, words, self.dtype)
        losses = token_losses(logits, targets, words.log_q.to(device))  # (B·T,)
        weights = torch.where(verdicts.flatten().to(device), config.verdict_weight, 1.0)
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.iteration}: the loss is {loss}")
        self.scaler.scale((losses * weights).sum() / weights.sum()).backward()
        self.scaler.unscale_(self.optimizer)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return loss

    def evaluate(self, model: GPT, batches: int, logged_as: str = "") -> dict[str, float]:
        scores = evaluate(
            model, self.validation, self.vocabulary, self.dtype, self.config.batch_size, batches)
        self.metrics.log(self.iteration, seconds=self.seconds,
                         **{logged_as + name: value for name, value in scores.items()})
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
        tqdm.write(f"step {self.iteration}: {shown}")
        return scores

    @property
    def state(self) -> TrainerState:
        return TrainerState(self.model.state_dict(), self.optimizer, self.scaler, self.device)

    def save_state(self) -> None:
        """Write all that the next step depends on; data and seeds follow from the iteration."""
        self.state.save(self.folder, asdict(self.config), iteration=self.iteration,
                        seconds=self.seconds, data_sha256=self.data_sha256)

    def load_state(self) -> None:
        """Continue from the saved state.

        Raises FileNotFoundError if there is none, ValueError if it belongs to other settings.
        """
        if not (self.folder / STATE_FILE).is_file():
            raise FileNotFoundError(f"out_dir={str(self.folder)!r} holds no run: there is no "
                                    f"{self.folder / STATE_FILE}")
        state = self.state.read(self.folder, "iteration", "seconds")
        changed = changed_settings(state["settings"], self.config, ("init_from", "eval_iters"))
        if changed:
            raise ValueError(f"a resumed run keeps its settings, but {changed}")
        if state.get("data_sha256", self.data_sha256) != self.data_sha256:
            raise ValueError(f"data={self.config.data!r} changed since the run began")
        self.state.restore(state, self.folder)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        reopen(self.folder, self.iteration + 1, evaluated=False)


def refuse_loss(config: PretrainConfig) -> None:
    """Raise ValueError if a new run in `out_dir` would lose files, unless `overwrite` allows it."""
    refuse_foreign_folder(config)
    held = (STATE_FILE, "model", "results.json")
    if any(Path(config.out_dir, name).exists() for name in held) and not config.overwrite:
        raise ValueError(
            f"out_dir={config.out_dir!r} holds a run; resume it with init_from=resume, choose "
            "another out_dir, or overwrite=True to replace it")


def fit(run: Run) -> None:
    """Train until max_iters, with periodic validations and saves; a signal saves and stops."""
    config = run.config
    bar = tqdm(total=config.max_iters, initial=run.iteration, unit="step")
    with stop_on_signal() as stopped, bar:
        while run.iteration < config.max_iters and not stopped:
            started = time.perf_counter()
            loss = run.step()
            run.seconds += time.perf_counter() - started
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if run.iteration % config.log_interval == 0:
                run.metrics.log(run.iteration, train_loss=loss)
            if run.iteration % config.eval_interval == 0:
                run.evaluate(run.model, config.eval_iters)
                run.save_state()
    run.save_state()
    if run.iteration < config.max_iters:
        print(f"stopped at step {run.iteration}; resume with init_from=resume and "
              "the same settings", file=sys.stderr)
        raise KeyboardInterrupt


def pretrain(run: Run) -> dict[str, float]:
    """Train to the end; return the scores of the saved float16 model."""
    config = run.config
    size = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{size:,} weights on {run.device}, {run.dtype}; {len(run.rows.tokens):,} tokens to "
          f"train on, {len(run.validation.tokens):,} to validate on")
    fit(run)
    run.model.half().save_pretrained(run.folder / "model")
    saved = GPT.from_pretrained(run.folder / "model").to(run.device)
    scores = run.evaluate(saved, 0, logged_as="final_")
    tokens = config.max_iters * config.batch_size * config.block_size
    write_json(run.folder / "results.json",
               scores | {"tokens_seen": tokens, "seconds": run.seconds})
    run.metrics.close()
    return scores


@explain_out_of_memory()
def main(config: PretrainConfig) -> dict[str, float]:
    set_up_memory()
    run = Run(replace(config, data=anchored(config.data, NAMES)))
    try:
        return pretrain(run)
    finally:
        run.lock.release()


if __name__ == "__main__":
    run_script(main, PretrainConfig)
