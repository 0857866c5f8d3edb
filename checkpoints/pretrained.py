"""Read and write pretrained weights: hub layout or GGUF, of any family in `layouts.py`."""

from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import (
    check_fit,
    files_sha256,
    finite_float32,
    meta_tensors,
    read_json,
    read_pickled,
    stream_tensors,
    write_json,
    write_tensors,
)
from checkpoints.gguf_format import (
    gguf_path,
    gguf_tensor_shapes,
    read_gguf_config,
    stream_gguf_tensors,
)
from checkpoints.hub_format import CONFIG, WEIGHTS, find_file, find_weights
from checkpoints.layouts import Layout, find_layout

GENERATION_CONFIG = "generation_config.json"
PACKAGED = ("gpt2-mini", "smollm2")  # names of models that are no paths
Name = str | Path  # gpt2-mini, smollm2, a folder, a GGUF file or, as a str, a hub id


def read_config(name: Name) -> dict[str, Any]:
    """Return what a checkpoint's `config.json` says, or would say of a GGUF file.

    Raises ValueError if it is damaged, OSError if it is missing or out of reach.
    """
    if gguf := gguf_path(name):
        return read_gguf_config(gguf)
    config = read_json(find_file(name, CONFIG))
    ends = _as_list(config.get("eos_token_id", []))
    if ends and config.get("model_type", "gpt2") != "gpt2":
        config["eos_token_id"] = ends + [end for end in _more_ends(name) if end not in ends]
    return config


def _more_ends(name: Name) -> list[int]:
    """Return the tokens that end an answer by the file in which instruct models list them all."""
    try:
        found = read_json(find_file(name, GENERATION_CONFIG)).get("eos_token_id")
    except OSError:  # many checkpoints have no such file
        return []
    return [end for end in _as_list(found) if type(end) is int]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_layout(name: Name) -> Layout:
    """Return the layout of a checkpoint's family; raise as `read_shape` does."""
    return find_layout(read_config(name), str(name))


def read_shape(name: Name, layout: Layout | None = None) -> dict[str, Any]:
    """Return the fields of the family's config that a checkpoint fixes.

    Raises ValueError for an architecture that is not `layout`'s, or of none that we know, and if
    the weights have another number of layers; OSError if a file is missing or out of reach.
    """
    config = read_config(name)
    found = find_layout(config, str(name))
    if layout and found is not layout:
        raise ValueError(f"{name}: model_type={config.get('model_type')!r:.80}, but this model is "
                         f"one of {', '.join(layout.model_types)}")
    shape = found.read_shape(config, str(name))
    if layout:
        _check_layers(name, layout, shape["n_layer"])
    return shape


def read_weights(name: Name, layout: Layout, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, by the names, shapes and dtypes of `expected`.

    Raises ValueError, before anything is allocated, for other names or shapes, and for a damaged
    file or weights that are not finite floating-point numbers.
    """
    files = _files(name)
    _check_header(str(name), files, layout, expected)
    weights: dict[str, Tensor] = {}
    for path in files:
        for stored, tensor in _stream(path):
            ours = layout.own_name(stored)
            if ours:
                tensor = _transposed(layout, stored, finite_float32(tensor, f"{path}: {stored}"))
                dtype = expected[ours].dtype if ours in expected else tensor.dtype
                weights[ours] = tensor.to(
                    dtype, copy=True, memory_format=torch.contiguous_format)
    head = weights.get(layout.head)
    if head is not None and layout.head not in expected:  # the shape says that it is tied
        if not torch.equal(head, weights[layout.embedding]):
            raise ValueError(f"{name}: {layout.head} differs from {layout.embedding}, but they "
                             "should be tied")
        del weights[layout.head]
    return weights


def _check_header(
    name: str, files: list[Path], layout: Layout, expected: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes in the headers of `files` with a model's."""
    found: dict[str, Tensor] = {}
    for path in files:
        for stored, tensor in _header(path).items():
            ours = layout.own_name(stored)
            if ours in found:
                raise ValueError(f"{path}: {ours} is there twice")
            if ours and (ours in expected or ours != layout.head):
                found[ours] = _transposed(layout, stored, tensor)
    check_fit(expected, found, name)


def write_pretrained(
    folder: Path | str, layout: Layout, shape: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write `config.json` and `model.safetensors` so that `transformers` loads the folder."""
    write_json(Path(folder) / CONFIG, layout.describe(shape))
    tensors = {name: _transposed(layout, name, tensor) for name, tensor in weights.items()}
    write_tensors(Path(folder) / WEIGHTS, tensors)


def checkpoint_digest(name: Name) -> str:
    """Return the SHA-256 of a checkpoint's shape and of its weight files, in hexadecimal.

    Raises as `read_weights` does. Files that have not changed are read once per process.
    """
    stats = [(path, path.stat()) for path in _files(name)]
    return _digest(str(read_shape(name)), tuple(
        (path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@cache
def _digest(shape: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    return files_sha256((path for path, *_ in files), shape)


def _check_layers(name: Name, layout: Layout, n_layer: int) -> None:
    """Compare the layers in a checkpoint's headers before a model of `n_layer` layers is built."""
    names = [stored for path in _files(name) for stored in _header(path)]
    count = layout.count_layers([layout.own_name(stored) or "" for stored in names])
    if count != n_layer:
        raise ValueError(f"{name}: n_layer={n_layer}, but the weights have {count} layers")


def _files(name: Name) -> list[Path]:
    gguf = gguf_path(name)
    return [gguf] if gguf else find_weights(name)


def _header(path: Path) -> dict[str, Tensor]:
    """Return tensors of the right shapes, without reading those of the file."""
    if path.suffix == ".gguf":
        return {name: torch.empty(shape, device="meta")
                for name, shape in gguf_tensor_shapes(path).items()}
    if path.suffix != ".bin":
        return meta_tensors(path)
    stat = path.stat()
    return _pickled_header(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)  # shards; the older format can be read only as a whole
def _pickled_header(path: Path, size: int, modified: int) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta")
            for name, tensor in read_pickled(path).items()}


def _stream(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with their names, holding as few as possible in memory."""
    if path.suffix == ".gguf":
        return stream_gguf_tensors(path)
    return iter(read_pickled(path).items()) if path.suffix == ".bin" else stream_tensors(path)


def _transposed(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(layout.transposed) and tensor.ndim == 2 else tensor
