"""A checkpoint that is not a sound GPT-2 ends in one line, before its model is built."""

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDX, close
from made_models import TINY
from torch import Tensor

from checkpoints.files import read_json, read_tensors, write_json, write_tensors
from checkpoints.hub_format import CONFIG, WEIGHTS
from checkpoints.layouts import GPT2_SIZES
from model import GPT

HEAD, TOKENS = "lm_head.weight", "transformer.wte.weight"


def refused(folder: Path, message: str) -> None:
    """Expect one line as an answer to loading `folder`, at once."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as refusal:
        GPT.from_pretrained(folder)
    assert time.perf_counter() - started < 10
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


# ---- config.json ----


@pytest.mark.parametrize("field", GPT2_SIZES)
@pytest.mark.parametrize("value", ["1e9", "2.5", "2.0", "Infinity", "NaN", "true", '"2"', "0", "-1",
                                   "1000000000", "9" * 400, "[2]"])
def test_sizes_are_whole_numbers_in_range(base: Path, field: str, value: str) -> None:
    text = json.dumps(read_json(base / CONFIG) | {field: "HERE"})
    (base / CONFIG).write_text(text.replace('"HERE"', value))
    refused(base, f"base: config.json needs a whole number from 1 to 1,000,000 as {field}, not ")


@pytest.mark.parametrize("value", ["1e999", "NaN", "true", "0", "0.0", "-1e-5", "2", '"1e-5"'])
def test_epsilon_is_a_small_number(base: Path, value: str) -> None:
    text = json.dumps(read_json(base / CONFIG) | {"layer_norm_epsilon": "HERE"})
    (base / CONFIG).write_text(text.replace('"HERE"', value))
    refused(base, "needs a number between 0 and 1 as layer_norm_epsilon, not ")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, '{"n_layer": ' + "9" * 5000 + "}"],
                         ids=["lists", "objects", "digits"])
def test_json_that_exhausts_the_parser_is_refused(base: Path, text: str) -> None:
    (base / CONFIG).write_text(text)
    refused(base, "base/config.json is not JSON: ")


def test_text_without_bound_is_not_read(base: Path) -> None:
    os.truncate(base / CONFIG, 10**8)
    refused(base, "base/config.json has 100,000,000 bytes; at most 67,108,864 are read$")


def test_json_that_is_not_utf_8_is_refused(base: Path) -> None:
    (base / CONFIG).write_bytes(b'{"n_layer": "\xff"}')
    refused(base, "base/config.json is not UTF-8$")


def test_layers_are_compared_before_the_model_is_built(base: Path) -> None:
    write_json(base / CONFIG, read_json(base / CONFIG) | {"n_layer": 10**6})
    refused(base, "base: n_layer=1000000, but the weights have 2 layers")


def test_sizes_that_the_weights_do_not_have_allocate_nothing(base: Path) -> None:
    sizes = {"n_embd": 10**6, "vocab_size": 10**6, "n_positions": 10**6, "n_head": 1}
    write_json(base / CONFIG, read_json(base / CONFIG) | sizes)
    with pytest.raises(ValueError, match=r"wte\.weight is \(101, 32\), not \(1000000, 1000000\)"):
        GPT.from_pretrained(base)


@pytest.mark.parametrize("inner", [None, 4 * TINY.n_embd])
def test_the_default_inner_width_may_be_named(base: Path, inner: int | None) -> None:
    plain = GPT.from_pretrained(base)(IDX)[0]
    write_json(base / CONFIG, read_json(base / CONFIG) | {"n_inner": inner})
    close(GPT.from_pretrained(base)(IDX)[0], plain)


# ---- model.safetensors ----


HEADERS = {
    "longer than the file": (b"{}", 10**8),
    "longer than anything": (b"{}", 2**63),
    "nested": (b'{"a":' + b"[" * 10**5, None),
    "an overflowing shape": (
        b'{"a":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,4]}}', None),
    "an empty shape": (
        b'{"h.0.a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]},'
        b'"h.1.a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', None),
    "a list": (b"[]", None),
}


@pytest.mark.parametrize(("header", "length"), HEADERS.values(), ids=HEADERS)
def test_absurd_header_is_refused(base: Path, header: bytes, length: int | None) -> None:
    (base / WEIGHTS).write_bytes(struct.pack("<Q", length or len(header)) + header)
    refused(base, "base/model.safetensors is not a safetensors file, or damaged: ")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = read_tensors(folder / WEIGHTS)
    change(tensors)
    write_tensors(folder / WEIGHTS, tensors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_name(
    base: Path, value: float, dtype: torch.dtype
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(dtype)
        tensors["transformer.wpe.weight"][3, 5] = value

    rewrite(base, change)
    refused(base, r"base/model.safetensors: transformer.wpe.weight holds NaN or infinite numbers")


def test_numbers_beyond_float32_are_refused(base: Path) -> None:
    rewrite(base, lambda tensors: tensors.update({TOKENS: tensors[TOKENS].double() * 1e300}))
    refused(base, "wte.weight holds NaN or infinite")


def test_large_numbers_whose_sum_is_infinite_load(base: Path) -> None:
    rewrite(base, lambda tensors: tensors[TOKENS].fill_(3e38))
    assert (GPT.from_pretrained(base).transformer.wte.weight == 3e38).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool,
                                   torch.float8_e4m3fn, torch.complex64])
def test_weights_of_another_kind_are_refused_by_name(base: Path, dtype: torch.dtype) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(base, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(base, rf"base/model.safetensors: {name} is {dtype}; weights are one of torch.float32, ")


def test_double_precision_loads(base: Path) -> None:
    plain = GPT.from_pretrained(base)(IDX)[0]
    rewrite(base, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    close(GPT.from_pretrained(base)(IDX)[0], plain)


def test_stored_head_that_is_tied_loads_and_another_is_refused(base: Path) -> None:
    plain = GPT.from_pretrained(base)(IDX)[0]
    rewrite(base, lambda tensors: tensors.update({HEAD: tensors[TOKENS].clone()}))
    close(GPT.from_pretrained(base)(IDX)[0], plain)
    rewrite(base, lambda tensors: tensors[HEAD][0].add_(1))
    refused(base, f"base: {HEAD} differs from {TOKENS}, but they should be tied")


def test_tensor_with_and_without_the_prefix_is_refused(base: Path) -> None:
    rewrite(base, lambda tensors: tensors.update({"wte.weight": tensors[TOKENS] + 1}))
    refused(base, f"model.safetensors: {TOKENS} is there twice")


def test_projection_of_another_rank_is_refused(base: Path) -> None:
    name, tensors = "transformer.h.0.attn.c_attn.weight", read_tensors(base / WEIGHTS)
    write_tensors(base / WEIGHTS, tensors | {name: torch.ones(2, 3, 4)})
    refused(base, re.escape(f"base does not fit the model: {name} is (2, 3, 4), not (96, 32)"))


def test_empty_checkpoint_is_refused(base: Path) -> None:
    write_tensors(base / WEIGHTS, {})
    refused(base, "the weights have 0 layers")


def test_long_value_is_cut_in_the_message(base: Path) -> None:
    write_json(base / CONFIG, read_json(base / CONFIG) | {"activation_function": "x" * 10**5})
    refused(base, re.escape("activation_function='xxx"))
