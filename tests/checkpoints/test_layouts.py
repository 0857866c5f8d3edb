"""A Llama's config.json is read as transformers reads it; a hostile one ends in one line."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import BLOCK, LAYERS, ROPE, VOCABULARY, ids, make_family
from made_models import close
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints.files import read_json, read_tensors, write_json, write_tensors
from checkpoints.hub_format import CONFIG, INDEX, WEIGHTS
from checkpoints.layouts import LLAMA_SIZES, ROPE_SCALING
from models.families import load_config, load_decoder

HEAD, TOKENS, QUERY = "lm_head.weight", "model.embed_tokens.weight", "self_attn.q_proj.weight"
SCALED = {name: value for name, value in ROPE.items() if name != "rope_theta"}
LENGTH = ROPE_SCALING[-1]
# As they stand in a JSON file; HERE is replaced by the text.
NO_SIZES = ["1e9", "2.5", "2.0", "Infinity", "NaN", "true", '"2"', "0", "-1", "16777217",
            "9" * 400, "[2]", "{}"]
NO_NUMBERS = ["1e999", "-Infinity", "NaN", "true", "0", "-0.0", "-1e-5", '"1e-5"', "[1]", "{}"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an untied Llama, a tied Llama 3 and a Qwen2 that transformers wrote."""
    folder = tmp_path_factory.mktemp("families")
    return {name: make_family(name, folder / name).folder for name in ("llama", "llama3", "qwen2")}


@pytest.fixture(params=["llama", "llama3", "qwen2"])
def each(request: pytest.FixtureRequest, written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint of each kind, to damage."""
    return Path(shutil.copytree(written[request.param], tmp_path / "base"))


@pytest.fixture
def llama(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["llama"], tmp_path / "base"))


@pytest.fixture
def tied(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["llama3"], tmp_path / "base"))


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; None removes one."""
    config = read_json(folder / CONFIG) | changes
    write_json(folder / CONFIG, {n: value for n, value in config.items() if value is not None})


def set_text(folder: Path, text: str, *fields: str) -> None:
    """Set a field of config.json, or a field of a field, to JSON that Python may not write."""
    config = read_json(folder / CONFIG)
    part = config
    for name in fields[:-1]:
        part = part.setdefault(name, {})
    part[fields[-1]] = "HERE"
    (folder / CONFIG).write_text(json.dumps(config).replace('"HERE"', text))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = read_tensors(folder / WEIGHTS)
    change(tensors)
    write_tensors(folder / WEIGHTS, tensors)


def check_refusal(folder: Path, message: str) -> None:
    """Expect one short line as an answer to loading `folder`, within a second."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as refusal:
        load_decoder(folder)
    assert time.perf_counter() - started < 1
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Return a `check_refusal` that fails if the weights are read: headers are enough."""
    def read_no_weights(path: Path) -> None:
        raise AssertionError(f"the weights in {path} were read")

    monkeypatch.setattr("checkpoints.pretrained.stream_tensors", read_no_weights)
    return check_refusal


def greatest_difference(folder: Path) -> float:
    """Return how far our logits are from those of transformers, which reads the same folder."""
    idx = ids(2, BLOCK)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits
        return (load_decoder(folder).eval()(idx)[0] - expected).abs().max().item()


# ---- sizes ----


def most(field: str) -> str:
    return "16,777,216" if field == "max_position_embeddings" else "1,000,000"


@pytest.mark.parametrize("field", [*LLAMA_SIZES, "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("text", NO_SIZES)
def test_sizes_are_whole_numbers_in_range(
    llama: Path, refused: Callable, field: str, text: str
) -> None:
    set_text(llama, text, field)
    refused(llama, f"base: config.json needs a whole number from 1 to {most(field)} as {field}, ")


@pytest.mark.parametrize("field", LLAMA_SIZES)
def test_missing_sizes_are_refused(each: Path, refused: Callable, field: str) -> None:
    change_config(each, **{field: None})
    refused(each, f"from 1 to {most(field)} as {field}, not None$")


@pytest.mark.parametrize("positions", [131_072, 1_010_000, 1_048_576, 10_485_760, 2**24])
def test_long_context_loads_and_takes_no_memory(llama: Path, positions: int) -> None:
    change_config(llama, max_position_embeddings=positions)
    model = load_decoder(llama).eval()
    assert model.config.block_size == positions
    new = model.generate(ids(1, 3), 5, temperature=0)
    assert new.size(1) <= 8
    assert greatest_difference(llama) < 1e-4


@pytest.mark.parametrize("field", [
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "hidden_act", "eos_token_id", "rope_parameters"])
def test_missing_fields_have_the_defaults_of_transformers(llama: Path, field: str) -> None:
    change_config(llama, **{field: None})
    ours, theirs = load_config(llama), AutoConfig.from_pretrained(llama)
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert (
        ours.n_kv_head, ours.head_size, ours.norm_epsilon, ours.tied, ours.qkv_bias, ours.mlp_bias,
        "silu", list(ours.end_of_text), ours.rope_base,
    ) == (
        theirs.num_key_value_heads, theirs.head_dim, theirs.rms_norm_eps,
        theirs.tie_word_embeddings, theirs.attention_bias, theirs.mlp_bias, theirs.hidden_act, ends,
        theirs.rope_parameters["rope_theta"],
    )


def test_head_counts_and_sizes_may_be_null(llama: Path) -> None:
    for field in ("num_key_value_heads", "head_dim"):
        set_text(llama, "null", field)
    config = load_config(llama)
    assert (config.n_kv_head, config.head_size) == (4, 8)


@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_another_number_of_layers_is_refused_from_the_header(
    each: Path, refused: Callable, size: int
) -> None:
    change_config(each, num_hidden_layers=size)
    refused(each, f"base: n_layer={size}, but the weights have {LAYERS} layers$")


def test_layers_that_are_not_numbered_from_zero_are_refused(
    llama: Path, refused: Callable
) -> None:
    change_tensors(llama, lambda tensors: tensors.update(
        {name.replace("layers.1.", "layers.7."): tensors.pop(name) for name in list(tensors)}))
    refused(llama, r"base does not fit the model: missing model.layers.1.*; .* \.\.\.$")


@pytest.mark.parametrize("kv_heads", [3, 8, 10**6])
def test_heads_that_do_not_share_evenly_are_refused(
    each: Path, refused: Callable, kv_heads: int
) -> None:
    change_config(each, num_key_value_heads=kv_heads)
    refused(each, f"^n_head=4 is not a multiple of n_kv_head={kv_heads}$")


def test_odd_head_size_is_refused(each: Path, refused: Callable) -> None:
    change_config(each, head_dim=7)
    refused(each, "^head_size=7 must be even for rotary positions$")


@pytest.mark.parametrize(("field", "shape"), [
    ("vocab_size", r"\(101, 32\), not \(1000000, 32\)"),
    ("hidden_size", r"\(101, 32\), not \(101, 1000000\)"),
    ("intermediate_size", r"gate_proj.weight is \(48, 32\), not \(1000000, 32\)"),
    ("num_attention_heads", r"q_proj.weight is \(32, 32\), not \(8000000, 32\)"),
    ("head_dim", r"q_proj.weight is \(32, 32\), not \(4000000, 32\)"),
])
def test_sizes_that_the_weights_do_not_have_allocate_nothing(
    llama: Path, refused: Callable, field: str, shape: str
) -> None:
    change_config(llama, **{"head_dim": 8, field: 10**6})
    refused(llama, shape)


def test_all_sizes_at_their_largest_are_refused(llama: Path, refused: Callable) -> None:
    sizes = dict.fromkeys((*LLAMA_SIZES, "head_dim", "num_key_value_heads"), 10**6)
    change_config(llama, **sizes | {"num_hidden_layers": LAYERS})
    refused(llama, r"q_proj.weight is \(32, 32\), not \(1000000000000, ")


# ---- other fields ----


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1", "2"])
def test_epsilon_is_a_small_number(llama: Path, refused: Callable, text: str) -> None:
    set_text(llama, text, "rms_norm_eps")
    refused(llama, "base: config.json needs a number between 0 and 1 as rms_norm_eps, not ")


@pytest.mark.parametrize(("field", "value"), [
    ("hidden_act", "gelu"), ("hidden_act", "relu"), ("hidden_act", ["silu"]), ("hidden_act", 3),
    ("use_sliding_window", True), ("use_sliding_window", "no"), ("hidden_act", "x" * 10**5)])
def test_other_mathematics_is_refused(
    each: Path, refused: Callable, field: str, value: Any
) -> None:
    change_config(each, **{field: value})
    family = "Qwen2" if read_json(each / CONFIG)["model_type"] == "qwen2" else "Llama"
    refused(each, rf"^.*base: {field}=.*, but {family} has ")


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [1, 0, "true", [], {}, float("nan")], ids=str)
def test_flags_are_true_or_false(
    llama: Path, refused: Callable, field: str, value: Any
) -> None:
    change_config(llama, **{field: value})
    refused(llama, f"base: config.json needs true or false as {field}, not ")


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_that_the_config_has_and_the_weights_lack_are_missing(
    llama: Path, refused: Callable, field: str
) -> None:
    change_config(llama, **{field: True})
    refused(llama, r"does not fit the model: missing .*_proj\.bias")


@pytest.mark.parametrize("value", [
    VOCABULARY, -1, 10**9, [], [7, VOCABULARY], [7, -1], "7", ["7"], True, [True], 7.0,
    float("nan"), {"a": 7}, [[7]], [None], [-1] * 10**4], ids=lambda value: str(value)[:20])
def test_end_of_text_is_of_the_vocabulary(each: Path, refused: Callable, value: Any) -> None:
    change_config(each, eos_token_id=value)
    refused(each, "base: config.json needs tokens as eos_token_id, not ")


@pytest.mark.parametrize(("value", "expected"), [
    (5, (5,)), (8, (5, 8)), ([8, 5], (5, 8)), (None, (5,)), (["x"], (5,))])
def test_an_instruct_model_s_other_ends_of_text_end_an_answer(
    llama: Path, value: Any, expected: tuple[int, ...]
) -> None:
    change_config(llama, eos_token_id=5)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load_config(llama).end_of_text == expected


@pytest.mark.parametrize(("value", "expected"), [
    (5, (5,)), ([5], (5,)), ([5, 0, 100], (5, 0, 100)), (None, (2,))])
def test_every_end_of_text_is_read_and_written(
    llama: Path, tmp_path: Path, value: Any, expected: tuple[int, ...]
) -> None:
    change_config(llama, eos_token_id=value)
    (llama / "generation_config.json").unlink()
    model = load_decoder(llama)
    assert model.config.end_of_text == expected
    model.save_pretrained(tmp_path / "saved")
    assert load_config(tmp_path / "saved") == model.config


# ---- rotary positions ----


ROPES = {  # the same in the newer field, in the older ones, and in both
    "scaled": [
        {"rope_parameters": ROPE},
        {"rope_theta": 500.0, "rope_scaling": SCALED},
        {"rope_theta": 500, "rope_scaling": SCALED | {"factor": 8}},
        {"rope_theta": 1e4, "rope_parameters": ROPE},
        {"rope_theta": 500.0, "rope_parameters": SCALED},
        {"rope_theta": 500.0, "rope_scaling": ROPE, "rope_parameters": ROPE},
        {"rope_parameters": ROPE | {LENGTH: 8}, LENGTH: 16},  # the field outside has priority
    ],
    "plain": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_theta": 300.0}},
        {"rope_theta": 300.0},
        {"rope_theta": 300.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 300.0, "rope_scaling": {}, "rope_parameters": {}},
    ],
    "absent": [{}, {"rope_theta": 1e4}],
}


@pytest.mark.parametrize("kind", ROPES)
def test_older_and_newer_fields_of_the_rotary_positions_load_equal(
    llama: Path, kind: str
) -> None:
    configs = []
    for fields in ROPES[kind]:
        absent = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", LENGTH))
        change_config(llama, **absent | fields)
        configs.append(load_config(llama))
        assert greatest_difference(llama) < 1e-4, fields
    assert all(config == configs[0] for config in configs)
    base = {"scaled": 500, "plain": 300, "absent": 1e4}[kind]
    scaling = (8.0, 1.0, 4.0, 16.0) if kind == "scaled" else None
    assert (configs[0].rope_base, configs[0].rope_scaling) == (base, scaling)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("text", ['"llama3"', "7", "true", '["llama3"]', "1.5", "NaN"])
def test_rotary_fields_are_an_object(
    llama: Path, refused: Callable, place: str, text: str
) -> None:
    set_text(llama, text, place)
    refused(llama, "base: config.json needs fields in rope_scaling, not ")


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("text", [
    '"linear"', '"dynamic"', '"yarn"', '"longrope"', '"Llama3"', '""', "null", "3", '["llama3"]',
    '{"llama3": 1}', '"' + "x" * 10**5 + '"'])
def test_other_kinds_of_rotary_positions_are_refused(
    llama: Path, refused: Callable, place: str, name: str, text: str
) -> None:
    change_config(llama, rope_parameters=None)
    set_text(llama, text, place, name)
    refused(llama, "base: rope_type=.*, but allowed are 'default', 'llama3'$")


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1e12"])
@pytest.mark.parametrize("older", [True, False])
def test_base_of_the_rotary_positions_is_a_positive_number(
    llama: Path, refused: Callable, text: str, older: bool
) -> None:
    change_config(llama, rope_parameters=None)
    set_text(llama, text, *(("rope_theta",) if older else ("rope_parameters", "rope_theta")))
    refused(llama, "needs a number between 0 and 1e\\+12 as rope_theta, not ")


@pytest.mark.parametrize("field", ROPE_SCALING)
@pytest.mark.parametrize("text", [None, *NO_NUMBERS, "1e9"])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_scaling_of_the_rotary_positions_is_of_positive_numbers(
    tied: Path, refused: Callable, field: str, text: str | None, place: str
) -> None:
    rope = {name: value for name, value in ROPE.items() if name != field}
    change_config(tied, rope_parameters=None)
    change_config(tied, **{place: rope})
    if text:
        set_text(tied, text, place, field)
    refused(tied, rf"needs a number between 0 and 1e\+09 as {field}, not ")


@pytest.mark.parametrize("older", [SCALED, {"rope_type": "default"}, ROPE | {"factor": 9.0}])
def test_older_and_newer_fields_that_differ_are_refused(
    llama: Path, refused: Callable, older: dict[str, Any]
) -> None:
    change_config(llama, rope_scaling=older, rope_parameters=ROPE)
    refused(llama, "base: rope_scaling and rope_parameters in config.json differ$")


@pytest.mark.parametrize(("low", "high"), [(4.0, 1.0), (2.0, 2.0)])
def test_bounds_of_the_scaling_that_are_not_in_order_are_refused(
    tied: Path, refused: Callable, low: float, high: float
) -> None:
    change_config(
        tied, rope_parameters=ROPE | {"low_freq_factor": low, "high_freq_factor": high})
    refused(tied, f"base: low_freq_factor={low} must be below high_freq_factor={high}$")


# ---- tensors ----


def test_model_saved_without_its_head_loads(tied: Path, tmp_path: Path) -> None:
    reference, idx = AutoModelForCausalLM.from_pretrained(tied).eval(), ids(2, 9)
    reference.model.save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in read_tensors(tmp_path / "bare" / WEIGHTS)
    close(load_decoder(tmp_path / "bare").eval()(idx)[0], reference(idx).logits)


def test_untied_model_saved_without_its_head_is_refused(
    llama: Path, tmp_path: Path, refused: Callable
) -> None:
    AutoModelForCausalLM.from_pretrained(llama).model.save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", f"bare does not fit the model: missing {HEAD}$")


def test_stored_head_that_is_tied_loads_and_another_is_refused(tied: Path) -> None:
    idx = ids(2, 9)
    plain = load_decoder(tied)(idx)[0]
    change_tensors(tied, lambda tensors: tensors.update({HEAD: tensors[TOKENS].clone()}))
    close(load_decoder(tied)(idx)[0], plain)
    change_tensors(tied, lambda tensors: tensors[HEAD][0].add_(1))
    check_refusal(tied, f"base: {HEAD} differs from {TOKENS}, but they should be tied$")
    change_tensors(tied, lambda tensors: tensors.update({HEAD: torch.ones(3, 4)}))
    check_refusal(tied, f"base: {HEAD} differs from {TOKENS}, but they should be tied$")


def test_tensor_with_and_without_the_prefix_is_refused(llama: Path, refused: Callable) -> None:
    name = f"layers.1.{QUERY}"
    change_tensors(llama, lambda tensors: tensors.update({name: tensors[f"model.{name}"] + 1}))
    refused(llama, f"model.safetensors: model.{name} is there twice$")


def test_tensor_that_two_shards_hold_is_refused(
    llama: Path, tmp_path: Path, refused: Callable
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="20KB")
    files = sorted(set(read_json(sharded / INDEX)["weight_map"].values()))
    first, last = (read_tensors(sharded / file) for file in (files[0], files[-1]))
    name = next(iter(first))
    write_tensors(sharded / files[-1], last | {name: first[name] + 1})
    refused(sharded, f"{files[-1]}: {name} is there twice$")


def test_frequencies_that_older_files_store_are_ignored(llama: Path) -> None:
    idx = ids(2, 9)
    plain = load_decoder(llama)(idx)[0]
    change_tensors(llama, lambda tensors: tensors.update(
        {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0)
         for layer in range(LAYERS)}))
    close(load_decoder(llama)(idx)[0], plain)


@pytest.mark.parametrize("extra", [
    "model.layers.0.self_attn.q_norm.weight", "model.lm_head.weight", "transformer.wte.weight",
    "score.weight"])
def test_tensors_that_no_llama_has_are_refused(
    llama: Path, refused: Callable, extra: str
) -> None:
    change_tensors(llama, lambda tensors: tensors.update({extra: torch.ones(2)}))
    refused(llama, f"base does not fit the model: unexpected .*{extra}$")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(each: Path, value: float) -> None:
    name = f"model.layers.1.{QUERY}"
    change_tensors(each, lambda tensors: tensors[name][0].fill_(value))
    check_refusal(each, f"model.safetensors: {name} holds NaN or infinite numbers$")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_load(each: Path, dtype: torch.dtype) -> None:
    change_tensors(each, lambda tensors: tensors.update(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}))
    stored = read_tensors(each / WEIGHTS)
    for name, tensor in load_decoder(each).state_dict().items():
        torch.testing.assert_close(tensor, stored[name].float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a\nb", "\r\n", "x" * 10**5, "\x1b[2J"])
def test_odd_name_of_a_tensor_stays_on_one_short_line(
    llama: Path, refused: Callable, name: str
) -> None:
    change_tensors(llama, lambda tensors: tensors.update({name: torch.ones(2)}))
    refused(llama, "base does not fit the model: unexpected ")
