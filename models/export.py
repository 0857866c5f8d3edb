"""Export a model with its tokenizer to a folder that `transformers` loads."""

import tempfile
from pathlib import Path

from model import Decoder
from models.tokenizer import Tokenizer
from runtime.device import shapes_only


def export_model(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model` with merged adapters and its tokenizer to a new folder, or nothing at all.

    transformers and the converters that build on it load the folder.
    Raises ValueError if `folder` exists or if the model has parts that transformers' has not,
    OSError if it cannot be written.
    """
    with shapes_only():
        plain = type(model)(model.config).state_dict()
    if extra := next((name for name in model.state_dict() if name not in plain), ""):
        raise ValueError(f"export: transformers' model has no {extra}, and it cannot be merged")
    if folder.exists():
        raise ValueError(f"export={str(folder)!r} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch, folder.name)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made, model.config.block_size)
        made.rename(folder)
