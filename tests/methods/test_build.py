"""The model of a run: what is trained, in which precision, from which checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints.peft_format import save_adapter
from lora import lora_layers
from methods.build import MethodConfig, build_model, load_checkpoint
from model import LORA_TARGETS

CPU = torch.device("cpu")
LORA = MethodConfig(lora_rank=2, lora_alpha=4.0)


def trained(config: MethodConfig, checkpoint: str) -> set[str]:
    model = build_model(checkpoint, config, CPU, torch.float32)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_trains_its_matrices_and_nothing_else(checkpoint: str) -> None:
    assert trained(LORA, checkpoint) == {
        f"transformer.h.{layer}.attn.c_attn.lora_{leaf}" for layer in (0, 1) for leaf in "AB"}


def test_targets_may_be_separated_by_commas_or_spaces(checkpoint: str) -> None:
    names = [trained(replace(LORA, lora_targets=text), checkpoint)
             for text in (",".join(LORA_TARGETS), " ".join(LORA_TARGETS), ", ".join(LORA_TARGETS))]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 2 * 2 * len(LORA_TARGETS)


def test_rank_zero_trains_every_weight(checkpoint: str) -> None:
    model = build_model(checkpoint, replace(LORA, lora_rank=0), CPU, torch.bfloat16)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_frozen_projections_are_stored_in_the_compute_dtype(checkpoint: str) -> None:
    model = build_model(checkpoint, LORA, CPU, torch.bfloat16)
    for layer in lora_layers(model).values():
        assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    assert model.transformer.wte.weight.dtype == torch.float32


def test_checkpoint_of_another_rank_is_refused(checkpoint: str, tmp_path: Path) -> None:
    save_adapter(build_model(checkpoint, LORA, CPU, torch.float32), tmp_path, checkpoint)
    other = replace(LORA, init_from=checkpoint, lora_rank=3)
    with pytest.raises(ValueError, match="the model"):
        load_checkpoint(tmp_path, other, CPU, torch.float32)
