"""Fine-tune a decoder on instruction prompts, with LoRA or in full, and score it on the test split.

python train.py config/quickstart.py                 two minutes on a laptop, offline
python train.py lora_rank=16 lora_alpha=64           gpt2-medium, as in the homework
python train.py init_from=resume out_dir=out         resumes a run
torchrun --nproc_per_node=2 train.py ...             the same run, its batches shared by two devices
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import anchored
from checkpoints.pretrained import PACKAGED, checkpoint_digest
from checkpoints.trained_format import trained_state
from checkpoints.trainer_state import STATE_FILE, TrainerState
from configurator import Bounds, run_script
from dataloader import Batch, DataConfig, make_loader
from generate import ModelSampler, score
from lora import count_parameters
from methods.build import MethodConfig, build_model, load_checkpoint, save_checkpoint
from methods.dpo import PreferenceConfig
from methods.pairs import PairBatch, reference_log_probs
from model import Decoder
from models.families import load_decoder
from models.tokenizer import load_tokenizer
from runtime import result_files, run_folder
from runtime.device import (
    DeviceConfig,
    PhaseMemory,
    autocast,
    describe,
    dtype_name,
    explain_out_of_memory,
    set_up_memory,
)
from runtime.kv_cache import SharedPrefix
from runtime.metrics import MetricsLog
from runtime.optimizer import OptimizerConfig, configure_optimizer, set_learning_rate
from runtime.processes import (
    any_rank,
    check_same_processes,
    check_shares,
    leave_job_at_the_end,
    of_rank_zero,
    own_share,
    rank,
    start_processes,
    stop_on_signal,
    sum_over_ranks,
    world_size,
)
from runtime.tracking import TrackingConfig, start_tracking
from tasks.registry import resolve_dataset
from tasks.scores import table
from tasks.sources import NAMES


@dataclass(frozen=True)
class TrainConfig(
    TrackingConfig, OptimizerConfig, PreferenceConfig, MethodConfig, DataConfig,
    run_folder.NewFolderConfig, DeviceConfig,
):
    """Settings of `train.py`; the defaults are the homework's."""

    batch_size: Annotated[int, "mean examples of a forward pass", Bounds(1)] = 64
    gradient_accumulation_steps: Annotated[int, "passes per optimizer step", Bounds(1)] = 2
    eval_interval: Annotated[int, "steps between validations", Bounds(1)] = 10
    eval_iters: Annotated[int, "validation batches; 0 is the whole split", Bounds(0)] = 0
    eval_batch_size: Annotated[int, "examples per batch in validation and test", Bounds(1)] = 64
    baseline: Annotated[bool, "score the untouched model on the test split, too"] = False
    eval_only: Annotated[bool, "validate once and stop"] = False
    always_save_checkpoint: Annotated[bool, "save `last` at every validation"] = True
    log_interval: Annotated[int, "steps between logged training losses", Bounds(1)] = 1
    compile: Annotated[bool, "torch.compile the blocks; for GPUs"] = False
    backend: Annotated[Literal["auto", "nccl", "gloo"], "torchrun's; auto is nccl on CUDA"] = "auto"

    @property
    def window(self) -> int:
        """Examples of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


# A resumed run may train longer, its decay as it was planned, and on another device.
MAY_CHANGE = ("max_iters", "eval_only", "device", "backend", "gradient_checkpointing")
MAY_DIFFER = (*MAY_CHANGE, "lr_decay_iters", "dtype")  # `resumed` has checked or set these
PROGRESS = ("iteration", "evaluated", "checkpoints")


def train_step(
    model: Decoder, batches: list[Batch] | list[PairBatch], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, grad_clip: float, dtype: torch.dtype,
) -> dict[str, float]:
    """Take one optimizer step on a window of batches; return its loss and other measures by name.

    The loss is the sum over the supervised tokens of the whole window, on all ranks, divided by
    their number (over pairs, for preferences): it does not depend on how the window is split.
    """
    total = sum(batch.weight for batch in batches)
    measures = torch.zeros(len(batches), len(batches[0].measures), device=model.device)
    with autocast(model.device, dtype):
        prefix = SharedPrefix(model.prefill, batches[0].prefix.to(model.device))
    for i in own_share(range(len(batches))):
        with autocast(model.device, dtype):
            batch = batches[i].to(model.device)
            means = batch.measure(model, prefix.past) * (batch.weight / total)  # the loss first
        scaler.scale(means[0]).backward()
        measures[i] = means.detach()
    prefix.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum_over_ranks([measures, *(parameter.grad for parameter in trained)])
    if not (losses := measures[:, 0]).isfinite().all():
        i = losses.isfinite().logical_not().nonzero()[0].item()
        raise FloatingPointError(f"the loss of batch {i + 1} of {len(batches)} is {losses[i]:g}")
    scaler.unscale_(optimizer)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(trained, grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # in place: new tensors would fragment the memory
    return dict(zip(batches[0].measures, measures.sum(dim=0).tolist(), strict=True))


@torch.no_grad()
def validate(
    model: Decoder, batches: list[Batch] | list[PairBatch], dtype: torch.dtype
) -> dict[str, float]:
    """Return the loss over fixed batches, on all ranks, as `train_step` does."""
    model.eval()
    total = torch.zeros(len(batches[0].measures), device=model.device)
    with autocast(model.device, dtype):
        past = model.prefill(batches[0].prefix.to(model.device))
        for batch in own_share(batches):
            batch = batch.to(model.device)
            total += batch.measure(model, past) * batch.weight
    sum_over_ranks([total])
    model.train()
    means = [value / sum(batch.weight for batch in batches) for value in total.tolist()]
    return dict(zip(batches[0].measures, means, strict=True))


class Run:
    """A model in training, its data, its optimizer, and its progress."""

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        check_shares(config.gradient_accumulation_steps)
        if not resume:
            run_folder.refuse_loss(config)
        self.config, self.folder = config, Path(config.out_dir)
        self.device = start_processes(config.device, config.backend)
        if config.compile and self.device.type == "cpu":
            raise ValueError("compile=True makes training on a CPU slower; it is for GPUs")
        saved = run_folder.read_run(config.out_dir) if resume else None
        self.dtype = of_rank_zero(run_folder.run_dtype(saved, config.dtype, self.device))
        torch.manual_seed(config.seed)
        self.model = build_model(config.init_from, config, self.device, self.dtype)
        torch.manual_seed(config.seed + rank())  # all ranks share their adapters, not their dropout
        self.read_data(saved)
        self.optimizer = configure_optimizer(self.model, config, config.lora_plus_ratio)
        # The default scale of 2^16 overflows in the first steps, which a short run cannot spare.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**12, enabled=self.dtype == torch.float16)
        self.iteration, self.evaluated, self.memory = 0, False, PhaseMemory(self.device)
        self.checkpoints: dict[str, dict[str, float]] = {}  # iteration and loss of best and last
        self.lock = run_folder.lock_folder(self.folder) if rank() == 0 else None
        if saved:
            self.load_state(saved)
        elif rank() == 0:
            run_folder.refuse_loss(config)  # again, now that this process holds the lock
            run_folder.start_folder(config, self.reference, **self.facts)
        self.metrics = (MetricsLog(self.folder, start_tracking(config, self.folder))
                        if rank() == 0 and not (saved and config.eval_only) else MetricsLog(None))
        if config.compile:
            for block in self.model.blocks:
                block.compile(dynamic=True)

    def read_data(self, saved: run_folder.SavedRun | None) -> None:
        """Read all splits: what is wrong with one is an error now, not after the training."""
        config = self.config
        self.loader = make_loader(config, self.model.config, load_tokenizer(config.init_from))
        self.digests = {"base_sha256": checkpoint_digest(config.init_from),
                        "data_sha256": self.loader.data_sha256, **self.loader.tokenizer.digests}
        self.loader.batches(self.loader.spread("test", config.test_size), config.eval_batch_size)
        self.reference: dict[str, Tensor] = {}
        if self.loader.task.pairs and config.preference_loss == "dpo":
            self.reference = reference_log_probs(
                self.loader, self.model, config, self.dtype, self.folder if saved else None)
            self.digests["reference_sha256"] = run_folder.tensors_digest(self.reference)
        self.validation = self.loader.spread(
            "validation", config.eval_iters * config.eval_batch_size)
        self.validation_batches = self.loader.batches(self.validation, config.eval_batch_size)

    @property
    def facts(self) -> dict[str, Any]:
        """What `config.json` says about the run beside its settings."""
        return {**describe(self.device), "dtype": dtype_name(self.dtype), **self.digests,
                "processes": world_size(), "parameters": count_parameters(self.model)._asdict(),
                "validation_reviews": len(self.validation)}

    def evaluate(self) -> None:
        """Validate, log, and save the checkpoints that are due."""
        self.memory.end("training")
        measures = validate(self.model, self.validation_batches, self.dtype)
        loss = measures.pop("loss")
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.iteration}: the validation loss is {loss}")
        task, results = self.loader.task, measures or {"perplexity": math.exp(min(loss, 700.0))}
        summary = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
        if task.quick:
            sampler = ModelSampler(
                self.model, self.loader, self.dtype, self.config.eval_batch_size)
            scores = score(sampler, self.validation)
            results = {name: scores[name] for name in task.logged}
            summary = task.describe(scores)
        if not self.evaluated:
            logged = {f"validation_{name}": value for name, value in results.items()}
            self.metrics.log(self.iteration, validation_loss=loss, **logged,
                             **self.memory.end("validation"))
        self.evaluated = True
        if rank() == 0:
            tqdm.write(f"step {self.iteration}: validation loss {loss:.4f}, {summary}")
            self.save_due_checkpoints(loss)

    def save_due_checkpoints(self, loss: float) -> None:
        improved = loss < self.checkpoints.get("best", {}).get("loss", math.inf)
        last = self.iteration >= self.config.max_iters
        if self.config.eval_only or (self.iteration == 0 and not last):
            return  # an untrained model is no candidate
        if improved:
            self.save_checkpoint("best", loss)
        if improved or last or self.config.always_save_checkpoint:
            self.save_checkpoint("last", loss)
            self.save_state()

    def save_checkpoint(self, name: str, loss: float) -> None:
        result_files.forget_results(self.folder / name)
        save_checkpoint(self.folder / name, self.config, self.model, self.loader.tokenizer)
        self.checkpoints[name] = {"iteration": self.iteration, "loss": loss}

    @property
    def state(self) -> TrainerState:
        weights = trained_state(self.model)
        return TrainerState(weights, self.optimizer, self.scaler, self.device)

    def save_state(self) -> None:
        """Write what the next step depends on; the data order follows from the iteration."""
        self.state.save(self.folder, asdict(self.config),
                        **{name: getattr(self, name) for name in PROGRESS})

    def load_state(self, saved: run_folder.SavedRun) -> None:
        """Continue from the saved state; raises ValueError for one that is damaged or another's."""
        check_same_processes(saved.processes)
        saved.refuse_changed_inputs(**self.digests)
        state = self.state.read(self.folder, *PROGRESS)
        if changed := run_folder.changed_settings(state["settings"], self.config, MAY_DIFFER):
            raise ValueError(f"{self.folder / STATE_FILE} is another run's: {changed}")
        if state["iteration"] > self.config.max_iters:
            raise ValueError(f"max_iters={self.config.max_iters} is less than the "
                             f"{state['iteration']} steps that the run has taken")
        self.state.restore(state, self.folder, generators=rank() == 0)
        self.iteration, self.evaluated = state["iteration"], state["evaluated"]
        if rank() == 0:  # the only rank that writes
            self.checkpoints = state["checkpoints"]
            if saved.dtype != dtype_name(self.dtype):
                print(f"resumed in {dtype_name(self.dtype)}; the run began in {saved.dtype}")
        if rank() == 0 and not self.config.eval_only:  # a validation alone changes no run
            run_folder.continue_folder(
                self.config, saved, self.iteration, self.evaluated, **self.facts)

    def close(self) -> None:
        try:
            self.metrics.close()
        finally:
            if self.lock:
                self.lock.release()


def take_step(run: Run) -> str:
    """Take the next optimizer step and log it; return a summary for the progress bar."""
    config, started = run.config, time.perf_counter()
    rate = set_learning_rate(run.optimizer, run.iteration, config)
    if rank() > 0:  # only rank 0 saves its generator; the others derive theirs from the step
        torch.manual_seed(config.seed + rank() + world_size() * run.iteration)
    batches = run.loader.window(run.iteration, config.window, config.batch_size)
    try:
        measures = train_step(
            run.model, batches, run.optimizer, run.scaler, config.grad_clip, run.dtype)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {run.iteration}: {error}") from None
    speed = config.window / (time.perf_counter() - started)
    if run.iteration % config.log_interval == 0:
        run.metrics.log(
            run.iteration, **{f"train_{name}": value for name, value in measures.items()},
            learning_rate=rate, reviews_per_second=speed)
    run.iteration, run.evaluated = run.iteration + 1, False
    return f"loss {measures['loss']:.3f}, {speed:.1f} {run.loader.task.noun}/s"


def fit(run: Run) -> None:
    """Train until max_iters, validating on the way; a signal saves, then KeyboardInterrupt."""
    config = run.config
    bar = tqdm(total=config.max_iters, initial=run.iteration, disable=rank() > 0, unit="step")
    with stop_on_signal() as stopped, bar:
        while not any_rank(bool(stopped)):
            finished = run.iteration >= config.max_iters
            due = finished or run.iteration % config.eval_interval == 0
            if config.eval_only or (due and not run.evaluated):
                run.evaluate()
            if finished or config.eval_only:
                if any_rank(bool(stopped)):  # during the validation
                    break
                return
            bar.set_postfix_str(take_step(run), refresh=False)
            bar.update()
        if rank() == 0:
            run.save_state()
            print(f"stopped at step {run.iteration}; resume with init_from=resume "
                  f"out_dir={config.out_dir}", file=sys.stderr)
        raise KeyboardInterrupt


def score_checkpoint(run: Run, name: str) -> dict[str, Any]:
    """Score the checkpoint called `name`, as saved, on the test split; "base" is untrained."""
    config = run.config
    if name == "base":
        model = load_decoder(config.init_from).to(run.device)
    else:
        model = load_checkpoint(run.folder / name, config, run.device, run.dtype)
    sampler = ModelSampler(model, run.loader, run.dtype, config.eval_batch_size)
    return score(sampler, run.loader.spread("test", config.test_size), run.folder / name)


def score_test(run: Run) -> dict[str, dict[str, Any]]:
    """Score the checkpoints, and with `baseline` their base, on the test split; print a table."""
    scores, rows, task, config = {}, [], run.loader.task, run.config
    if config.keeps_base or config.baseline:
        run_folder.read_run(config.out_dir).refuse_changed_inputs(  # it is loaded again
            base_sha256=checkpoint_digest(config.init_from))
    checkpoints = {"base": {"iteration": 0}} if config.baseline else {}
    checkpoints |= of_rank_zero(run.checkpoints)
    for name, saved in checkpoints.items():
        twin = next((other for other in scores if checkpoints[other] == saved), "")
        if twin and rank() == 0:  # saved at the same validation: the weights are equal
            result_files.copy_results(run.folder / twin, run.folder / name)
        scores[name] = scores[twin] if twin else score_checkpoint(run, name)
        run.metrics.log(run.iteration, **run.memory.end("test"),
                        **{f"test_{task.headline}_{name}": scores[name][task.headline]})
        loss = f"{saved['loss']:.4f}" if "loss" in saved else ""
        rows.append({"checkpoint": name, "step": str(saved["iteration"]), "validation loss": loss,
                     **task.columns(scores[name])})
    if rank() == 0:
        run_folder.mark_finished(run.metrics, run.iteration)
        print("", table(rows), "", *run_folder.next_steps(config.out_dir), sep="\n")
    return scores


def print_start(run: Run) -> None:
    count, loader = count_parameters(run.model), run.loader
    print(f"{run.config.init_from} on {run.device}, {run.dtype}: training {count.trained:,} of "
          f"{count.total:,} parameters ({count.share:.2%}) on {len(loader.records('train')):,} "
          f"{loader.task.noun}", *loader.notes(), sep="\n")


def train(config: TrainConfig, resume: bool = False) -> dict[str, dict[str, Any]]:
    """Run `config` to its end; return the test results of the best and the last checkpoint."""
    config = resolve_dataset(config)
    config = replace(config, init_from=anchored(config.init_from, PACKAGED),
                     dataset=anchored(config.dataset, NAMES),
                     lr_decay_iters=config.lr_decay_iters or config.max_iters)
    run = Run(config, resume)
    if rank() == 0:
        print_start(run)
    try:
        fit(run)
        if config.eval_only:
            return {}
        run.model = run.optimizer = None  # free memory for the checkpoints
        return score_test(run)
    finally:
        run.close()


@explain_out_of_memory()
@leave_job_at_the_end()
def main(config: TrainConfig) -> None:
    set_up_memory()
    resume = config.init_from == "resume"
    config = run_folder.resumed_settings(config, MAY_CHANGE) if resume else config
    train(config, resume and run_folder.has_state(config))


if __name__ == "__main__":
    run_script(main, TrainConfig)
