"""The model of a run: what is trained, in which precision, from which checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import LORA_TARGETS

import checkpoints.hub_format as hub_format
from checkpoints.peft_format import save_adapter
from checkpoints.pretrained import read_weights as real
from configurator import configure
from lora import lora_layers
from methods.build import MethodConfig, build_model, load_checkpoint
from models.families import load_decoder

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


def test_frozen_projections_never_exist_in_float32(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, read = load_decoder(checkpoint).state_dict(), {}
    monkeypatch.setattr("model.read_weights", lambda *given: read.update(real(*given)) or read)
    build_model(checkpoint, LORA, CPU, torch.bfloat16)
    assert {name for name, tensor in read.items() if tensor.dtype == torch.bfloat16} == {
        name for name in exact if name.endswith("weight") and ("attn." in name or "mlp." in name)}
    assert all(torch.equal(read[name], exact[name].to(read[name].dtype)) for name in read)


def test_checkpoint_of_another_rank_is_refused(checkpoint: str, tmp_path: Path) -> None:
    save_adapter(build_model(checkpoint, LORA, CPU, torch.float32), tmp_path, checkpoint)
    other = replace(LORA, init_from=checkpoint, lora_rank=3)
    with pytest.raises(ValueError, match="the model"):
        load_checkpoint(tmp_path, other, CPU, torch.float32)


def test_full_checkpoint_that_is_gone_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub_format, "try_to_load_from_cache", asked)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder out/best$"):
        load_checkpoint(Path("out/best"), replace(LORA, lora_rank=0), CPU, torch.float32)
    with pytest.raises(AssertionError, match="the hub was asked"):  # as for a model's name
        build_model("out/best", LORA, CPU, torch.float32)


def test_adapter_that_is_gone_is_named(checkpoint: str, tmp_path: Path) -> None:
    config = replace(LORA, init_from=checkpoint)
    with pytest.raises(FileNotFoundError, match=r"best/adapter_config\.json"):
        load_checkpoint(tmp_path / "best", config, CPU, torch.float32)


def test_checkpoint_in_a_folder_named_like_the_packaged_one_is_the_folders(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = replace(LORA, lora_rank=0)
    build_model(checkpoint, full, CPU, torch.float32).save_pretrained(tmp_path / "gpt2-mini")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint(Path("gpt2-mini"), full, CPU, torch.float32).config.n_embd == 16


def test_rank_beyond_reason_is_refused_as_a_setting() -> None:
    assert configure(MethodConfig, ["lora_rank=10000"]).lora_rank == 10_000
    with pytest.raises(ValueError, match="lora_rank='100000000' must be at most 10000"):
        configure(MethodConfig, ["lora_rank=100000000"])
