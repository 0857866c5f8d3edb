"""The contenders: our fine-tuning and scoring, and two other ways to do the same.

`HandoutStyle` is the usual homework solution: padded batches, logits at every position, a dense
`B @ A` in every forward, a float32 model that never merges, and scoring of one review at a time
without a cache. `PeftStyle` is `transformers` with `peft`, as their documentation uses them. The
tests check that both compute the same losses, gradients and answers as ours, for every family.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloader import CustomDataLoader, DataConfig, make_loader
from generate import ModelSampler
from lora import LoRALinear
from methods.build import build_model, save_checkpoint
from model import IGNORE
from models.families import family_of, load_config
from models.tokenizer import load_tokenizer
from runtime.batching import pad
from runtime.device import resolve_dtype
from runtime.optimizer import configure_optimizer
from tasks.demonstrations import ShotsConfig
from tasks.sources import Record
from train import TrainConfig, train_step

NEW_TOKENS = 5  # that every contender generates per review, unless it stops at end-of-text


def folder_loader(folder: str, config: DataConfig) -> CustomDataLoader:
    """Return the loader of `config`'s data for the model and the tokenizer in `folder`."""
    return make_loader(config, load_config(folder), load_tokenizer(folder))


class Ours:
    """This package, with any method."""

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        self.config = replace(config, init_from=folder)
        self.dtype = resolve_dtype(config.dtype, device)
        self.model = build_model(folder, config, device, self.dtype)
        self.loader = folder_loader(folder, config)
        self.batch_size, self.eval_batch_size = config.batch_size, config.eval_batch_size
        self.optimizer = configure_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**12, enabled=self.dtype == torch.float16)  # as in train.py

    def train(self, records: Sequence[Record]) -> float:
        """Take one optimizer step on `records`; return its loss in nats a supervised token."""
        return train_step(self.model.train(), self.loader.batches(records, self.batch_size),
                          self.optimizer, self.scaler, 1.0, self.dtype)["loss"]

    def score(self, records: Sequence[Record]) -> list[str]:
        """Return the generated answer to each record."""
        sampler = ModelSampler(
            self.model, self.loader, self.dtype, self.eval_batch_size, NEW_TOKENS)
        return [prediction.generated for prediction in sampler.predict(records)]

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.config, self.model, self.loader.tokenizer)


class Shown(Ours):
    """This package with `shots` examples before every question it scores."""

    def __init__(
        self, shots: int, folder: str, config: TrainConfig, device: torch.device
    ) -> None:
        super().__init__(folder, config, device)
        questions = self.loader.records("test")
        self.loader.show(ShotsConfig(shots, config.seed), questions, self.loader.answer_room)


class DenseLoRALinear(LoRALinear):
    """The layer as many solutions write it: each forward builds the update as a dense matrix."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        if not self.is_lora():
            return h
        lora_A, lora_B = (matrix.unflatten(0, (self.lora_groups, -1))
                          for matrix in (self.lora_A, self.lora_B))
        delta = (lora_B @ lora_A).flatten(0, 1) * self.lora_scaling  # (out, in)
        return h + F.linear(self.lora_dropout(x), delta)

    def train(self, mode: bool = True) -> "DenseLoRALinear":
        return nn.Linear.train(self, mode)  # those solutions never merge


def padded(loader: CustomDataLoader, records: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts with answers, targets and mask, each (B, T) and padded on the right."""
    examples = [loader.encode(record) for record in records]
    rows = [example.prompt + example.answer for example in examples]
    targets = [[IGNORE] * len(example.prompt) + example.answer for example in examples]
    idx = pad(rows, loader.tokenizer.eot_token)
    mask = pad([[1] * len(row) for row in rows], 0)
    return idx, pad(targets, IGNORE), mask


class Baseline:
    """The training step that the baselines share, given `model` and `loss`."""

    model: nn.Module

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.micro_batch = 4 if device.type == "cpu" else 32  # 16 is slower on a CPU
        self.loader = folder_loader(folder, config)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2.5e-4, weight_decay=0.1)

    def loss(self, records: Sequence[Record]) -> Tensor:
        raise NotImplementedError

    def train(self, records: Sequence[Record]) -> None:
        """Take one optimizer step on `records`, micro-batch by micro-batch."""
        self.model.train()
        starts = range(0, len(records), self.micro_batch)
        for start in starts:
            loss = self.loss(records[start : start + self.micro_batch])
            (loss / len(starts)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class HandoutStyle(Baseline):
    """The usual homework solution; weights in float32."""

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        self.model = build_model(folder, config, device, torch.float32)
        for layer in self.model.modules():
            if isinstance(layer, LoRALinear):
                layer.__class__ = DenseLoRALinear
        super().__init__(folder, config, device)

    def save(self, folder: Path) -> None:
        """Save the whole model, frozen weights included, and the optimizer, as such code does."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "ckpt.pt")

    def loss(self, records: Sequence[Record]) -> Tensor:
        """Return the mean loss in nats of the supervised tokens, over logits (B, T, V)."""
        idx, targets, _ = (tensor.to(self.device) for tensor in padded(self.loader, records))
        logits = self.logits(self.model._run_blocks(idx[:, :-1])[0])
        return F.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.head)  # (..., C) x (C, V) -> (..., V)

    @torch.no_grad()
    def score(self, records: Sequence[Record]) -> list[str]:
        """Generate one review at a time, running the whole sequence for every new token."""
        self.model.eval()
        return [self._answer(self.loader.encode_prompt(record)) for record in records]

    def _answer(self, prompt: list[int]) -> str:
        idx = torch.tensor([prompt], device=self.device)
        for _ in range(NEW_TOKENS):
            hidden, _ = self.model._run_blocks(idx)  # (1, T, C)
            token = self.logits(hidden[:, -1]).argmax(dim=-1, keepdim=True)
            idx = torch.cat((idx, token), dim=1)
        return self.loader.tokenizer.decode(idx[0, len(prompt) :].tolist())


class PeftStyle(Baseline):
    """`transformers` with `peft`'s adapters on q, k and v, weights in float32."""

    score_batch = 16

    def __init__(self, folder: str, config: TrainConfig, device: torch.device) -> None:
        from peft import LoraConfig, get_peft_model  # slow to import; needed only here
        from transformers import AutoModelForCausalLM

        family = family_of(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapter = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=list(family.config_class.groups["qkv"]),
            fan_in_fan_out=family.fan_in_fan_out, task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, adapter).to(device)
        super().__init__(folder, config, device)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def loss(self, records: Sequence[Record]) -> Tensor:
        """Return the mean loss in nats of the supervised tokens, as `transformers` computes it."""
        idx, targets, mask = (tensor.to(self.device) for tensor in padded(self.loader, records))
        return self.model(input_ids=idx, attention_mask=mask, labels=targets).loss

    @torch.no_grad()
    def score(self, records: Sequence[Record]) -> list[str]:
        """Generate in batches padded on the left, with the library's cache."""
        self.model.eval()
        texts = []
        for start in range(0, len(records), self.score_batch):
            texts += self._answer(records[start : start + self.score_batch])
        return texts

    def _answer(self, records: Sequence[Record]) -> list[str]:
        end = self.loader.tokenizer.eot_token
        prompts = [self.loader.encode_prompt(record) for record in records]
        width = max(map(len, prompts))
        idx = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = self.model.generate(
            input_ids=idx.to(self.device), attention_mask=mask.to(self.device), do_sample=False,
            max_new_tokens=NEW_TOKENS, pad_token_id=end)
        return self.loader.tokenizer.decode_batch(output[:, width:].tolist())
