"""A tiny random checkpoint of each family, as transformers writes it, and models that load it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lora import is_lora_name, lora_layers
from model import GPT, IGNORE, Decoder, Step
from models.families import load_decoder
from models.llama import Llama
from runtime.batching import pad

VOCABULARY, BLOCK, LAYERS = 101, 32, 2
NEVER = -1  # a token that ends no answer, so that generation takes all its steps
SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": BLOCK, "hidden_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "eos_token_id": [7, 9],
    "bos_token_id": 1,
}
ROPE = {  # the original length is so short that it changes most of the frequencies
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=BLOCK, n_layer=LAYERS, n_head=4, n_embd=32,
        layer_norm_epsilon=1e-3),
    "llama": LlamaConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, rms_norm_eps=1e-3),
    "llama3": LlamaConfig(
        **SIZES, intermediate_size=40, num_key_value_heads=1, head_dim=12, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True, rope_parameters=ROPE),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=4),
}


@dataclass(frozen=True)
class Family:
    """A checkpoint in `folder`, and the model of transformers that wrote it."""

    name: str
    folder: Path
    reference: PreTrainedModel

    @property
    def decoder(self) -> type[Decoder]:
        return GPT if self.name == "gpt2" else Llama

    @property
    def one_pair(self) -> dict[str, str]:
        """The settings with which each projection has one pair A and B, as PEFT has it."""
        return {"lora_qkv": "shared"} if self.name == "gpt2" else {}

    def load(self, **changes: Any) -> Decoder:
        """Load the checkpoint; no token ends an answer."""
        model = load_decoder(self.folder, **changes)
        model.config = replace(model.config, end_of_text=(NEVER,))
        return model

    def adapted(self, *targets: str, **changes: Any) -> Decoder:
        """Load the checkpoint with adapters on `targets`, or on all, whose B is not zero."""
        settings = {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": targets or ("all",)}
        model = self.load(**settings | changes)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        return model


def make_family(name: str, folder: Path) -> Family:
    """Write a random checkpoint in which every parameter, biases too, changes the output."""
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    reference.generation_config.eos_token_id = None
    return Family(name, folder, reference)


def own_tensors(reference: PreTrainedModel, model: Decoder) -> dict[str, Tensor]:
    """Return the tensors of a model of transformers by our names, untransposed."""
    layout = model.layout
    tensors = {layout.own_name(name): tensor.t() if name.endswith(layout.transposed) else tensor
               for name, tensor in reference.state_dict().items()}
    return {name: tensors[name] for name in model.state_dict() if not is_lora_name(name)}


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape)


def pick_targets(idx: Tensor, supervised: Tensor) -> Tensor:
    """Return the next token where `supervised`, -100 elsewhere."""
    return F.pad(idx[:, 1:], (0, 1), value=0).masked_fill(~supervised, IGNORE)


def join_tokens(steps: list[Step]) -> Tensor:
    """Return what each prompt was continued with, padded with -1."""
    new: dict[int, list[int]] = {}
    for step in steps:
        for row, token in zip(step.rows, step.tokens.tolist(), strict=True):
            new.setdefault(row, []).extend(token)
    return pad([new[row] for row in sorted(new)], -1)


def join_logits(steps: list[Step], row: int) -> Tensor:
    """Return the logits of each step that continued this prompt: (steps, V)."""
    return torch.stack([step.logits[step.rows.index(row)] for step in steps if row in step.rows])


@torch.no_grad()
def recompute_greedily(model: Decoder, idx: Tensor, steps: int) -> Tensor:
    """Decode greedily without a cache, over the last block_size tokens."""
    for _ in range(steps):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def supervise_some(idx: Tensor) -> Tensor:
    """Return targets at other positions, and at another number of them, in each row."""
    supervised = torch.rand(idx.shape) < 0.4
    supervised[:, -1], supervised[0, :3] = False, True
    return pick_targets(idx, supervised)
