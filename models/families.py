"""The families of decoders, and which one a checkpoint is of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.pretrained import read_layout, read_shape
from model import GPT, Decoder, DecoderConfig
from models.llama import Llama
from runtime.device import shapes_only

FAMILIES: tuple[type[Decoder], ...] = (GPT, Llama)


def family_of(name_or_dir: str | Path) -> type[Decoder]:
    """Return the class of a checkpoint's model, by its own config; raise as `read_shape` does."""
    layout = read_layout(name_or_dir)
    return next(family for family in FAMILIES if family.layout is layout)


def load_decoder(
    name_or_dir: str | Path, prepare: Callable[[Decoder], Any] = lambda _: None, **changes: Any
) -> Decoder:
    """Load a checkpoint of any family; see `Decoder.from_pretrained`."""
    return family_of(name_or_dir).from_pretrained(name_or_dir, prepare, **changes)


def load_config(name_or_dir: str | Path) -> DecoderConfig:
    """Return the config of a checkpoint without its weights; raise as `read_shape` does."""
    return family_of(name_or_dir).config_class(**read_shape(name_or_dir))


def parameter_names(name: str | Path) -> list[str]:
    """Return the names of the parameters of a checkpoint's model; raise as `load_config` does."""
    with shapes_only():
        return list(family_of(name)(load_config(name)).state_dict())
