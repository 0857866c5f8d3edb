"""Adapters of PEFT whose mathematics lora.py lacks are refused by name; all others load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDX, close, equal, make_adapted
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from checkpoints import files
from checkpoints.files import read_json, read_tensors, write_json, write_tensors
from checkpoints.peft_format import ADAPTER, ADAPTER_CONFIG, PEFT_EXTRAS, load_adapter, save_adapter
from lora import adapt
from model import GPT

A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def peft_model(base: Path, **changes: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = LoraConfig(**settings | changes, task_type="CAUSAL_LM")
    return get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).eval()


@torch.no_grad()
def train(model: PeftModel) -> PeftModel:
    """Move the adapter, as training does."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def set_config(adapter: Path, **changes: Any) -> None:
    write_json(adapter / ADAPTER_CONFIG, read_json(adapter / ADAPTER_CONFIG) | changes)


def ours(base: Path, adapter: Path, rank: int = 4, alpha: float = 6.0) -> GPT:
    model = GPT.from_pretrained(base, lora_rank=rank, lora_alpha=alpha, lora_qkv="shared")
    load_adapter(model, adapter)
    return model


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_the_base_alone_load(base: Path, tmp_path: Path, start: Any) -> None:
    reference = train(peft_model(base, init_lora_weights=start))
    reference.save_pretrained(tmp_path / "adapter")
    close(ours(base, tmp_path / "adapter")(IDX)[0], reference(IDX).logits)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_are_refused(base: Path, tmp_path: Path, start: str) -> None:
    reference = train(peft_model(base, init_lora_weights=start))
    reference.save_pretrained(tmp_path / "adapter")
    message = (f"adapter has init_lora_weights={start}, with which PEFT changes the weights of "
               r"the base; PEFT's save_pretrained\(..., path_initial_model_for_weight_conversion")
    with pytest.raises(ValueError, match=message):
        ours(base, tmp_path / "adapter")


def test_the_conversion_that_the_message_names_gives_an_adapter_that_loads(
    base: Path, tmp_path: Path
) -> None:
    reference = peft_model(base, init_lora_weights="pissa")
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "untrained")
    reference.peft_config["default"].init_lora_weights = "pissa"
    train(reference).save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "untrained")
    close(ours(base, tmp_path / "adapter", rank=8, alpha=12.0)(IDX)[0], reference(IDX).logits,
          rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "tomorrow's", 3, ["pissa"]])
def test_other_starts_are_refused(base: Path, adapter: Path, start: Any) -> None:
    set_config(adapter, init_lora_weights=start)
    with pytest.raises(ValueError, match=r"init_lora_weights=.* PEFT changes") as refusal:
        load_adapter(make_adapted(base), adapter)
    assert ("path_initial" in str(refusal.value)) == (start in ("corda", "lora_ga"))


@pytest.mark.parametrize("field", PEFT_EXTRAS)
def test_extras_are_refused_by_name_unless_they_are_off(
    base: Path, adapter: Path, field: str
) -> None:
    assert hasattr(LoraConfig(), field)
    for off in (None, False, [], {}):
        set_config(adapter, **{field: off})
        load_adapter(make_adapted(base), adapter)
    set_config(adapter, **{field: ["wte"]})
    with pytest.raises(ValueError, match=rf"adapter has {field}=\['wte'\], which plain LoRA does"):
        load_adapter(make_adapted(base), adapter)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"lora_bias": True}, "lora_bias"), ({"modules_to_save": ["wte"]}, "modules_to_save"),
     ({"trainable_token_indices": {"wte": [0, 1]}}, "trainable_token_indices"),
     ({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapter_that_peft_wrote_with_an_extra_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    peft_model(base, **changes).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter has {field}="):
        ours(base, tmp_path / "adapter")


def test_layers_that_peft_left_out_are_named(base: Path, tmp_path: Path) -> None:
    peft_model(base, layers_to_transform=[1]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"missing {A}"):
        ours(base, tmp_path / "adapter")


def test_missing_field_has_the_default_of_peft(base: Path, adapter: Path) -> None:
    config = read_json(adapter / ADAPTER_CONFIG)
    for field in ("lora_alpha", "r"):
        rest = {name: value for name, value in config.items() if name != field}
        write_json(adapter / ADAPTER_CONFIG, rest)
        with pytest.raises(ValueError, match=f"adapter has {field}=8, the model "):
            load_adapter(make_adapted(base), adapter)
    neutral = ("peft_type", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "bias")
    peft_model(base).save_pretrained(adapter)
    set_config(adapter, **dict.fromkeys(neutral))
    ours(base, adapter)


@pytest.mark.parametrize(
    ("field", "value"), [("peft_type", "ADALORA"), ("r", 10**8), ("r", [4]), ("lora_alpha", "6")])
def test_impossible_fields_are_refused(base: Path, adapter: Path, field: str, value: Any) -> None:
    set_config(adapter, **{field: value})
    with pytest.raises(ValueError, match=f"adapter has {field}=.*, the model "):
        load_adapter(make_adapted(base), adapter)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("leaf", ["A", "B"])
def test_adapter_that_is_not_finite_is_refused_by_name(
    base: Path, adapter: Path, leaf: str, value: float
) -> None:
    tensors, name = read_tensors(adapter / ADAPTER), A.replace("lora_A", f"lora_{leaf}")
    tensors[name][0, 0] = value
    write_tensors(adapter / ADAPTER, tensors)
    model = make_adapted(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"adapter/{ADAPTER}: {name} holds NaN or infinite"):
        load_adapter(model, adapter)
    equal(dict(model.state_dict()), before)


def test_integers_are_no_adapter_and_half_precision_is(base: Path, adapter: Path) -> None:
    tensors = read_tensors(adapter / ADAPTER)
    write_tensors(adapter / ADAPTER, {name: t.half() for name, t in tensors.items()})
    model = make_adapted(base)
    load_adapter(model, adapter)
    equal(model.transformer.h[0].attn.c_attn.lora_A.detach(), tensors[A].half().float())
    write_tensors(adapter / ADAPTER, tensors | {A: tensors[A].to(torch.int8)})
    with pytest.raises(ValueError, match=f"{ADAPTER}: {A} is torch.int8; weights are"):
        load_adapter(model, adapter)


def test_adapters_of_different_settings_are_not_saved_as_one(base: Path, tmp_path: Path) -> None:
    for rank, alpha in ((2, 8.0), (4, 16.0)):
        model = adapt(GPT.from_pretrained(base), ["c_attn"], 4, 8.0)
        adapt(model, ["mlp.c_proj"], rank, alpha)
        with pytest.raises(ValueError, match="the adapters of the model differ in rank or alpha"):
            save_adapter(model, tmp_path, "base")
    assert list(tmp_path.iterdir()) == [base]


def test_adapter_of_other_tensors_is_refused_in_one_short_line_before_it_is_read(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(adapter / ADAPTER, {f"a\n{i}": torch.ones(1) for i in range(1000)})
    monkeypatch.setattr(files, "load_file", None)
    with pytest.raises(ValueError, match=r"^adapter does not fit the model: .* \.\.\.$") as refusal:
        load_adapter(make_adapted(base), adapter)
    assert len(str(refusal.value)) < 400
