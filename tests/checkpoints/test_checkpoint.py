"""Checkpoints load in transformers and PEFT, and theirs load here; what does not fit is refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDX, close, equal, hub_tensors, make_adapted, make_reference
from made_models import LORA_TARGETS, TINY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from checkpoints.files import atomic_write, read_json, read_tensors, write_json, write_tensors
from checkpoints.hub_format import CONFIG, WEIGHTS
from checkpoints.layouts import GPT2_SIZES
from checkpoints.peft_format import ADAPTER, ADAPTER_CONFIG, load_adapter, save_adapter
from checkpoints.trainer_state import read_state, write_state
from lora import adapt, lora_layers
from model import GPT

ROOT = Path(__file__).parents[2]


# ---- the layout of the hub ----


def test_weights_of_transformers_load_bit_equal(tmp_path: Path) -> None:
    reference = make_reference(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    equal(dict(model.state_dict()), hub_tensors(reference))
    assert model.config.layer_norm_epsilon == 1e-3
    close(model(IDX)[0], reference(IDX).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unprefixed_keys_masks_and_half_precision_load(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = make_reference(tmp_path).to(dtype)
    tensors = reference.transformer.state_dict()
    for layer in range(TINY.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / WEIGHTS)
    expected = {name: t.float() for name, t in hub_tensors(reference).items()}
    equal(dict(GPT.from_pretrained(str(tmp_path)).state_dict()), expected)


def test_saved_weights_load_in_transformers_bit_equal(base: Path, tmp_path: Path) -> None:
    model = GPT.from_pretrained(str(base), dropout=0.3).eval()
    model.save_pretrained(tmp_path / "ours")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    equal(hub_tensors(reference), dict(model.state_dict()))
    close(reference(IDX).logits, model(IDX)[0])
    config = reference.config
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.3
    equal(dict(GPT.from_pretrained(str(tmp_path / "ours")).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("training", [True, False])
def test_saved_lora_model_is_merged(base: Path, tmp_path: Path, training: bool) -> None:
    model = make_adapted(base, lora_targets=LORA_TARGETS).train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    close(reference(IDX).logits, model(IDX)[0])
    equal(dict(model.state_dict()), before)
    for name, layer in lora_layers(model).items():
        equal(hub_tensors(reference)[f"{name}.weight"], layer.merged_weight())


def test_packaged_checkpoint_loads_by_name_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(ROOT / "assets" / "gpt2-mini").float().eval()
    with torch.no_grad():
        close(GPT.from_pretrained("gpt2-mini").eval()(IDX)[0], reference(IDX).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation_function", "relu"), ("tie_word_embeddings", False),
     ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 64)],
)
def test_other_architectures_are_refused(base: Path, field: str, value: Any) -> None:
    write_json(base / CONFIG, read_json(base / CONFIG) | {field: value})
    with pytest.raises(ValueError, match=f"base: {field}={value!r}, but GPT-2 has"):
        GPT.from_pretrained(str(base))


@pytest.mark.parametrize("field", [*GPT2_SIZES, "layer_norm_epsilon"])
def test_config_without_a_shape_field_is_refused(base: Path, field: str) -> None:
    config = read_json(base / CONFIG)
    del config[field]
    write_json(base / CONFIG, config)
    message = f"config.json needs a (whole )?number .* as {field}, not None$"
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(base))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 100, r"transformer\.wte\.weight is \(101, 32\), not \(100, 32\)"),
        ("n_positions", 65, r"transformer\.wpe\.weight is \(64, 32\), not \(65, 32\)"),
        ("n_layer", 3, r"base: n_layer=3, but the weights have 2 layers"),
        ("n_layer", 1, r"base: n_layer=1, but the weights have 2 layers"),
    ],
)
def test_weights_of_another_shape_are_refused(
    base: Path, field: str, value: int, message: str
) -> None:
    write_json(base / CONFIG, read_json(base / CONFIG) | {field: value})
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(base))


DAMAGES = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-10]), ValueError),
    "a pickle": (lambda path: torch.save({"extra": torch.ones(9)}, path), ValueError),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 5000), ValueError),
    "empty": (lambda path: path.write_bytes(b""), ValueError),
    "missing": (Path.unlink, FileNotFoundError),
}


@pytest.mark.parametrize(("damage", "error"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, ADAPTER, ADAPTER_CONFIG])
def test_damaged_and_missing_files_are_refused_by_name(
    base: Path, adapter: Path, file: str, damage: Callable[[Path], Any], error: type[Exception]
) -> None:
    model, folder = make_adapted(base), adapter if file.startswith("adapter") else base
    damage(folder / file)
    with pytest.raises(error, match=rf"{folder.name}.*{file}"):
        load_adapter(model, adapter) if folder == adapter else GPT.from_pretrained(str(base))


def test_config_that_is_no_object_is_refused(base: Path) -> None:
    write_json(base / CONFIG, ["gpt2"])
    with pytest.raises(ValueError, match=r"base/config.json must hold a JSON object"):
        GPT.from_pretrained(str(base))


# ---- adapters in PEFT's layout ----


@pytest.mark.filterwarnings("error:.*fan_in_fan_out")
@pytest.mark.parametrize("qkv", ["split", "shared"])
@pytest.mark.parametrize(
    "targets", [("c_attn",), ("mlp.c_proj",), ("attn.c_proj", "mlp.c_fc"), LORA_TARGETS]
)
def test_saved_adapter_loads_in_peft(
    base: Path, tmp_path: Path, targets: tuple[str, ...], qkv: str
) -> None:
    model = make_adapted(base, lora_targets=targets, lora_qkv=qkv)
    save_adapter(model, tmp_path / "adapter", str(base))
    reference = GPT2LMHeadModel.from_pretrained(base)
    plain = reference(IDX).logits
    adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()(IDX).logits
    assert (adapted - plain).abs().max() > 0.1
    close(model(IDX)[0], adapted)
    close(model.eval()(IDX)[0], adapted)


@pytest.mark.parametrize("groups", [1, 3])
def test_rank_stabilized_adapter_loads_in_peft(base: Path, tmp_path: Path, groups: int) -> None:
    model = GPT.from_pretrained(str(base))
    adapt(model, ["c_attn"], rank=4, alpha=6.0, groups=groups, rank_stabilized=True)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    save_adapter(model, tmp_path / "adapter", str(base))
    reference = GPT2LMHeadModel.from_pretrained(base)
    close(PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()(IDX).logits,
          model(IDX)[0])


@pytest.mark.parametrize("qkv", ["split", "shared"])
@pytest.mark.parametrize("merged", [True, False])
def test_adapter_round_trip_is_bit_equal(
    base: Path, tmp_path: Path, qkv: str, merged: bool
) -> None:
    settings = {"lora_qkv": qkv, "lora_targets": LORA_TARGETS}
    model = make_adapted(base, **settings).train(not merged)
    save_adapter(model, tmp_path / "adapter", "base")
    for mode in (True, False):
        other = make_adapted(base, **settings).train(mode)
        load_adapter(other, tmp_path / "adapter")
        equal(dict(other.state_dict()), dict(model.state_dict()))
        close(other.eval()(IDX)[0], model(IDX)[0])


@pytest.mark.parametrize(
    ("targets", "rank", "alpha"),
    [(("c_attn",), 4, 8), (("c_attn",), 7, 29), (LORA_TARGETS, 3, 16)],
)
def test_adapter_of_peft_loads(
    base: Path, tmp_path: Path, targets: tuple[str, ...], rank: int, alpha: int
) -> None:
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=True,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )
    reference = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).eval()
    reference.save_pretrained(tmp_path)
    settings = {"lora_rank": rank, "lora_alpha": float(alpha), "lora_targets": targets}
    model = GPT.from_pretrained(str(base), **settings, lora_qkv="shared")
    load_adapter(model, tmp_path)
    close(model(IDX)[0], reference(IDX).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 5}, "r=4, the model 5"),
        ({"lora_alpha": 7.0}, "lora_alpha=6.0, the model 7.0"),
        ({"lora_qkv": "shared"}, "rank_pattern={.*12}, the model {}"),
        ({"lora_targets": LORA_TARGETS}, r"missing base_model.*h\.0\.mlp\.c_fc\.lora_A\.weight"),
        ({"lora_rank": 0}, r"the model has no adapters \(lora_rank=0\)"),
    ],
)
def test_adapter_of_another_model_is_refused(
    base: Path, adapter: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_adapter(make_adapted(base, **changes), adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_rslora", True), ("use_dora", True), ("bias", "all"), ("alpha_pattern", {"c_attn": 1})],
)
def test_adapter_with_other_mathematics_is_refused(
    base: Path, adapter: Path, field: str, value: Any
) -> None:
    config = read_json(adapter / ADAPTER_CONFIG)
    write_json(adapter / ADAPTER_CONFIG, config | {field: value})
    with pytest.raises(ValueError, match=f"adapter has {field}={value}, the model"):
        load_adapter(make_adapted(base), adapter)


A, B = (f"base_model.model.transformer.h.0.attn.c_attn.lora_{leaf}.weight" for leaf in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(A), f"missing {A}"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda tensors: tensors.update({B: torch.ones(96, 4)}), rf"{B} is \(96, 4\), not \(96, "),
        (lambda tensors: tensors[B].add_(1), "one A over q, k and v; it needs lora_qkv=shared"),
    ],
    ids=["missing", "unexpected", "misshapen", "dense"],
)
def test_adapter_with_wrong_tensors_is_refused_and_leaves_the_model_unchanged(
    base: Path, adapter: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tensors = read_tensors(adapter / ADAPTER)
    change(tensors)
    write_tensors(adapter / ADAPTER, tensors)
    model = make_adapted(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, adapter)
    equal(dict(model.state_dict()), before)


# ---- safe writes ----


def write_half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half of it")
        raise KeyboardInterrupt


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("kept", "old")]


def test_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / WEIGHTS, resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(path, {"old": torch.ones(2)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: .*too large"):
            write_tensors(path, {"new": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    equal(read_tensors(path), {"old": torch.ones(2)})


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_any_new_file(base: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_adapted(base).save_pretrained(tmp_path / "new")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys((WEIGHTS, CONFIG), (tmp_path / "plain").stat().st_mode)


def test_state_of_other_things_than_tensors_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "state.pt", {"sound": [torch.ones(2), 1, "a"]})
    assert read_state(tmp_path / "state.pt")["sound"][1:] == [1, "a"]
    write_state(tmp_path / "state.pt", {"odd": bytearray(3)})  # torch would make it of any size
    with pytest.raises(ValueError, match="not a trainer's state: it names '__builtin__ bytearray'"):
        read_state(tmp_path / "state.pt")
