"""Fine-tune a GPT-2 on instruction prompts, with LoRA or in full, and score it on the test split.

python train.py config/quickstart.py                 two minutes on a laptop, offline
python train.py lora_rank=16 lora_alpha=64           gpt2-medium, as in the homework
python train.py init_from=resume out_dir=out         go on where a run stopped
torchrun --nproc_per_node=2 train.py ...             the same run, its batches shared by two devices
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints.peft_format import save_adapter
from checkpoints.trainer_state import read_state, write_state
from configurator import Bounds, configure, run_script
from dataloader import Batch
from generate import ModelSampler, RunConfig, dataset_of, make_loader, run_dtype, score
from lora import check_state, count_parameters
from methods.build import build_model, load_checkpoint
from model import GPT
from runtime.device import autocast, describe, out_of_memory_told, peak_memory, set_up_memory
from runtime.optimizer import OptimizerConfig, configure_optimizer, set_learning_rate
from runtime.processes import (
    any_rank,
    end_processes,
    of_rank_zero,
    own_share,
    rank,
    start_processes,
    stop_on_signal,
    sum_over_ranks,
    world_size,
)
from runtime.run_folder import (
    MetricsLog,
    changed_settings,
    forget_metrics,
    lock_folder,
    read_run,
    refuse_loss,
    start_folder,
)
from tasks.scores import table

Qkv = Literal["split", "shared"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
Backend = Literal["auto", "nccl", "gloo"]


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig, RunConfig):
    """Settings of `train.py`; the defaults are the homework's."""

    overwrite: Annotated[bool, "replace a run of other settings in out_dir"] = False
    # data
    train_size: Annotated[int, "examples drawn from the training split; 0 is all", Bounds(0)] = 5000
    block_size: Annotated[int, "longest sequence in tokens; 0 is the model's own", Bounds(0)] = 0
    batch_size: Annotated[int, "mean examples of a forward pass", Bounds(1)] = 64
    gradient_accumulation_steps: Annotated[int, "passes per optimizer step", Bounds(1)] = 2
    # model
    lora_rank: Annotated[int, "rank of A and B; 0 is full fine-tuning", Bounds(0)] = 128
    lora_alpha: Annotated[float, "the update is scaled by alpha / rank", Bounds(0)] = 512.0
    lora_dropout: Annotated[float, "dropout on the input of A", Bounds(0, 1)] = 0.05
    lora_targets: Annotated[str, "c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"] = "c_attn"
    lora_qkv: Annotated[Qkv, "a pair each for q, k and v, or one A for the three"] = "split"
    dropout: Annotated[float, "GPT-2's own dropout", Bounds(0, 1)] = 0.0
    # evaluation and logging
    eval_interval: Annotated[int, "steps between validations", Bounds(1)] = 10
    eval_iters: Annotated[int, "validation batches; 0 is the whole split", Bounds(0)] = 0
    eval_batch_size: Annotated[int, "examples per batch in validation and test", Bounds(1)] = 64
    test_size: Annotated[int, "examples of the test split, evenly spread; 0 is all", Bounds(0)] = 0
    baseline: Annotated[bool, "score the untouched model on the test split, too"] = False
    eval_only: Annotated[bool, "validate once and stop"] = False
    always_save_checkpoint: Annotated[bool, "save `last` at every validation"] = True
    log_interval: Annotated[int, "steps between logged training losses", Bounds(1)] = 1
    wandb_project: Annotated[str, "Weights & Biases project"] = "lora-homework"
    wandb_mode: Annotated[WandbMode, "auto is online where a key is found"] = "auto"
    # system
    compile: Annotated[bool, "torch.compile the blocks; for GPUs"] = False
    backend: Annotated[Backend, "of torchrun's processes; auto is nccl on CUDA"] = "auto"


# More iterations are welcome in a resumed run: the decay, if any, keeps the steps it was made for.
LONGER = ("max_iters", "eval_only")
MAY_DIFFER = {*LONGER, "lr_decay_iters", "device", "dtype"}  # what resuming settles before
STATE_FIELDS = {"settings", "iteration", "evaluated", "checkpoints", "weights", "optimizer",
                "scaler", "rng", "cuda_rng"}


class SharedPrefix:
    """Keys and values of a prefix that batches share: it runs once, and is differentiated once.

    The batches add up their gradients in `past`; `backward` takes the sum on to the adapters.
    """

    def __init__(self, model: GPT, prefix: Tensor) -> None:
        made = model.prefill(prefix.to(model.device))
        self.made = [tensor for pair in made for tensor in pair]
        self.leaves = [self._leaf(tensor) for tensor in self.made]
        self.past = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))

    @staticmethod
    def _leaf(made: Tensor) -> Tensor:
        leaf = made.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        leaf.requires_grad = made.requires_grad
        leaf.grad = torch.zeros_like(leaf) if made.requires_grad else None
        return leaf

    def backward(self) -> None:
        pairs = [(made, leaf.grad.to(made.dtype))
                 for made, leaf in zip(self.made, self.leaves, strict=True) if made.requires_grad]
        if pairs:  # none without a prefix, or where no adapter acts on keys and values
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)


def train_step(
    model: GPT, batches: list[Batch], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, grad_clip: float, dtype: torch.dtype,
) -> float:
    """Take one optimizer step on a window of batches; return its loss in nats a token.

    The loss is the sum over the supervised tokens of the whole window, on all ranks, over their
    number, so that it does not depend on how the window is cut into batches.
    """
    supervised = sum(batch.supervised_tokens for batch in batches)
    losses = torch.zeros(len(batches), device=model.device)
    with autocast(model.device, dtype):
        prefix = SharedPrefix(model, batches[0].prefix)
    for i in own_share(range(len(batches))):
        with autocast(model.device, dtype):
            batch = batches[i].to(model.device)
            _, loss = model(batch.inputs, batch.targets, prefix.past)
            loss = loss * (batch.supervised_tokens / supervised)
        scaler.scale(loss).backward()
        losses[i] = loss.detach()
    prefix.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum_over_ranks([losses, *(parameter.grad for parameter in trained)])
    if not losses.isfinite().all():
        i = losses.isfinite().logical_not().nonzero()[0].item()
        raise FloatingPointError(f"the loss of batch {i + 1} of {len(batches)} is {losses[i]:g}")
    scaler.unscale_(optimizer)
    if grad_clip:
        nn.utils.clip_grad_norm_(trained, grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # in place: new ones would lie scattered in memory
    return losses.sum().item()


@torch.no_grad()
def validation_loss(model: GPT, batches: list[Batch], dtype: torch.dtype) -> float:
    """Return the mean loss in nats over the supervised tokens of fixed batches, on all ranks."""
    model.eval()
    total = torch.zeros((), device=model.device)
    with autocast(model.device, dtype):
        past = model.prefill(batches[0].prefix.to(model.device))
        for batch in own_share(batches):
            batch = batch.to(model.device)
            _, loss = model(batch.inputs, batch.targets, past)
            total += loss * batch.supervised_tokens
    sum_over_ranks([total])
    model.train()
    return total.item() / sum(batch.supervised_tokens for batch in batches)


class Run:
    """A model in training: where it stands, and the folder that holds what it made.

    The folder gets `config.json`, `metrics.jsonl`, `loss.png`, the checkpoints `best/` (lowest
    validation loss) and `last/`, and `trainer_state.pt`, which alone is enough to go on from.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        if config.gradient_accumulation_steps % world_size():
            raise ValueError(f"gradient_accumulation_steps={config.gradient_accumulation_steps} "
                             f"must be a multiple of the {world_size()} processes that share them")
        self.config, self.folder = config, Path(config.out_dir)
        settings = asdict(config)
        if not resume:
            refuse_loss(settings)
        self.device = start_processes(config.device, config.backend)
        if config.compile and self.device.type == "cpu":
            raise ValueError("compile=True makes training on a CPU slower; it is for GPUs")
        saved = read_run(config.out_dir) if resume else None
        self.dtype = of_rank_zero(run_dtype(saved, config.dtype, self.device))
        torch.manual_seed(config.seed)
        self.model = build_model(config.init_from, settings, self.device, self.dtype)
        torch.manual_seed(config.seed + rank())  # adapters are alike on all ranks, dropout is not
        self.loader = make_loader(settings, self.model)
        self.loader.records("test")  # a missing split is told now, not after the training
        self.validation = self.loader.spread(
            "validation", config.eval_iters * config.eval_batch_size)
        self.validation_batches = self.loader.batches(self.validation, config.eval_batch_size)
        self.optimizer = configure_optimizer(self.model, config)
        # The default scale of 2^16 overflows at first, and a short run has no steps to waste.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**12, enabled=self.dtype == torch.float16)
        self.iteration, self.evaluated = 0, False
        self.checkpoints: dict[str, dict[str, float]] = {}  # iteration and loss of best and last
        self.lock = lock_folder(self.folder) if rank() == 0 else None
        if resume:
            self.load_state(saved.get("processes", 1))
        elif rank() == 0:
            self.start_folder(settings)
        self.metrics = MetricsLog(settings, enabled=rank() == 0)
        if config.compile:
            for block in self.model.transformer.h:
                block.compile(dynamic=True)

    def seed_step(self) -> None:
        """Let the dice of other ranks follow from the step: rank 0's alone are saved."""
        if rank() > 0:
            torch.manual_seed(self.config.seed + rank() + world_size() * self.iteration)

    def start_folder(self, settings: dict[str, Any]) -> None:
        refuse_loss(settings)  # once more, now that nobody else writes there
        start_folder(
            settings, **describe(self.device), processes=world_size(),
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=count_parameters(self.model)._asdict(),
            validation_reviews=len(self.validation),
        )

    def close(self) -> None:
        try:
            self.metrics.close()
        finally:
            if self.lock:
                self.lock.release()

    def evaluate(self) -> None:
        """Validate, log, and save what has earned it."""
        loss = validation_loss(self.model, self.validation_batches, self.dtype)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.iteration}: the validation loss is {loss}")
        task, results = self.loader.task, {"perplexity": math.exp(min(loss, 700.0))}
        told = f"perplexity {results['perplexity']:.2f}"
        if task.quick:
            sampler = ModelSampler(
                self.model, self.loader, self.dtype, self.config.eval_batch_size)
            scores = score(sampler, self.validation)
            results, told = {name: scores[name] for name in task.logged}, task.describe(scores)
        if not self.evaluated:
            self.metrics.log(
                self.iteration, validation_loss=loss,
                **{f"validation_{name}": value for name, value in results.items()},
                memory_mib=peak_memory(self.device) / 2**20,
            )
        self.evaluated = True
        if rank() > 0:
            return
        tqdm.write(f"step {self.iteration}: validation loss {loss:.4f}, {told}")
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
        for pattern in ("results*.json", "predictions*.jsonl"):  # of the weights that go now
            for path in (self.folder / name).glob(pattern):
                path.unlink()
        if self.config.lora_rank:
            save_adapter(self.model, self.folder / name, self.config.init_from)
        else:
            self.model.save_pretrained(self.folder / name)
        self.checkpoints[name] = {"iteration": self.iteration, "loss": loss}

    def trained_weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def save_state(self) -> None:
        """Write all that the next step depends on; the data order follows from the iteration."""
        on_cuda = self.device.type == "cuda"
        state = {
            "settings": asdict(self.config), "iteration": self.iteration,
            "evaluated": self.evaluated, "checkpoints": self.checkpoints,
            "weights": self.trained_weights(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }
        write_state(self.folder / "trainer_state.pt", state)

    def load_state(self, processes: int) -> None:
        """Go on where `save_state` was; later lines of `metrics.jsonl` are dropped.

        `processes` is how many the run had. Raises ValueError if the state is damaged or another
        run's, or if there are more processes now, or fewer: their dice would fall otherwise.
        """
        if processes != world_size():
            raise ValueError(f"a resumed run keeps its processes: {processes}, now {world_size()}")
        path = self.folder / "trainer_state.pt"
        state = read_state(path)
        if missing := STATE_FIELDS - state.keys():
            raise ValueError(f"{path} is damaged or of another version: it lacks "
                             f"{', '.join(sorted(missing))}")
        mine = asdict(self.config)
        same = {name: mine[name] for name in mine.keys() - MAY_DIFFER}
        if changed := changed_settings(state["settings"], same):
            raise ValueError(f"{path} is another run's: {changed}")
        check_state(self.trained_weights(), state["weights"], str(path))
        try:
            self.restore(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def restore(self, state: dict[str, Any]) -> None:
        for name, weight in self.trained_weights().items():
            weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.evaluated = state["iteration"], state["evaluated"]
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the run was not in float16
            self.scaler.load_state_dict(state["scaler"])
        if rank() > 0:  # the rest is rank 0's
            return
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.checkpoints = state["checkpoints"]
        forget_metrics(self.folder, self.iteration, self.evaluated)


def fit(run: Run) -> None:
    """Train until max_iters, validating on the way; a signal saves, then KeyboardInterrupt."""
    config = run.config
    window = config.batch_size * config.gradient_accumulation_steps
    bar = tqdm(total=config.max_iters, initial=run.iteration, disable=rank() > 0, unit="step")
    with stop_on_signal() as stopped, bar:
        while not any_rank(bool(stopped)):
            finished = run.iteration >= config.max_iters
            due = finished or run.iteration % config.eval_interval == 0
            if config.eval_only or (due and not run.evaluated):
                run.evaluate()
            if finished or config.eval_only:
                if any_rank(bool(stopped)):  # in the validation
                    break
                return
            started = time.perf_counter()
            rate = set_learning_rate(run.optimizer, run.iteration, config)
            run.seed_step()
            batches = run.loader.window(run.iteration, window, config.batch_size)
            try:
                loss = train_step(
                    run.model, batches, run.optimizer, run.scaler, config.grad_clip, run.dtype)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {run.iteration}: {error}") from None
            speed = window / (time.perf_counter() - started)
            if run.iteration % config.log_interval == 0:
                run.metrics.log(run.iteration, train_loss=loss, learning_rate=rate,
                                reviews_per_second=speed)
            run.iteration, run.evaluated = run.iteration + 1, False
            told = f"loss {loss:.3f}, {speed:.1f} {run.loader.task.noun}/s"
            bar.set_postfix_str(told, refresh=False)
            bar.update()
        if rank() == 0:
            run.save_state()
            print(f"stopped at step {run.iteration}; go on with init_from=resume "
                  f"out_dir={config.out_dir}", file=sys.stderr)
        raise KeyboardInterrupt


def score_test(run: Run) -> dict[str, dict[str, Any]]:
    """Load the checkpoints as saved, score them on the test split, print a table.

    With `baseline` the model as it was is a third. The processes of a job share the examples;
    rank 0 writes.
    """
    config, scores, rows, task = run.config, {}, [], run.loader.task
    untouched = {"base": {"iteration": 0}} if config.baseline else {}
    checkpoints = of_rank_zero(run.checkpoints)  # when they are written
    for name, saved in (untouched | checkpoints).items():
        if name == "base":
            model = GPT.from_pretrained(config.init_from).to(run.device)
        else:
            model = load_checkpoint(run.folder / name, asdict(config), run.device, run.dtype)
        sampler = ModelSampler(model, run.loader, run.dtype, config.eval_batch_size)
        records = run.loader.spread("test", config.test_size)
        scores[name] = score(sampler, records, run.folder / name)
        del model, sampler  # two models need not be held while the next one loads
        told = {f"test_{task.headline}_{name}": scores[name][task.headline]}
        run.metrics.log(run.iteration, **told)
        loss = f"{saved['loss']:.4f}" if "loss" in saved else ""
        about = {"checkpoint": name, "step": str(saved["iteration"]), "validation loss": loss}
        rows.append(about | task.columns(scores[name]))
    if rank() == 0:
        print("", table(rows), sep="\n")
    return scores


def train(config: TrainConfig, resume: bool = False) -> dict[str, dict[str, Any]]:
    """Run `config` to its end; return the test results of the best and the last checkpoint."""
    config = replace(config, lr_decay_iters=config.lr_decay_iters or config.max_iters,
                     dataset=dataset_of(asdict(config)))
    run = Run(config, resume)
    if rank() == 0:
        count, loader = count_parameters(run.model), run.loader
        print(f"{config.init_from} on {run.device}, {run.dtype}: training {count.trained:,} of "
              f"{count.total:,} parameters ({count.share:.2%}) on "
              f"{len(loader.records('train')):,} {loader.task.noun}")
        if loader.answers_cut:
            print(f"{loader.answers_cut:,} of their answers are cut to fit into "
                  f"{loader.block_size} tokens")
    try:
        fit(run)
        if config.eval_only:
            return {}
        run.model = run.optimizer = None  # make room for the checkpoints
        return score_test(run)
    finally:
        end_processes()
        run.close()


def resumed(config: TrainConfig) -> TrainConfig:
    """Return the settings of the run in `out_dir` with what the command line changes.

    Raises ValueError, naming them, for changes that would make it another run.
    """
    settings = read_run(config.out_dir)["settings"]
    config = configure(TrainConfig, defaults=settings | {"out_dir": config.out_dir})
    config = replace(config, init_from=settings["init_from"])
    free = {name: getattr(config, name) for name in LONGER}
    if changed := changed_settings(settings | free, asdict(config)):
        raise ValueError(f"a resumed run keeps its settings, but {changed}")
    return config


@out_of_memory_told()
def main(config: TrainConfig) -> None:
    set_up_memory()
    resume = config.init_from == "resume"
    train(resumed(config) if resume else config, resume)


if __name__ == "__main__":
    run_script(main, TrainConfig)
