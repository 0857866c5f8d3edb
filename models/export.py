"""Export a model with its tokenizer to a folder that `transformers` loads."""

import tempfile
from pathlib import Path

from model import Decoder
from models.tokenizer import Tokenizer


def export_model(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model` with merged adapters and its tokenizer to a new folder, or nothing at all.

    transformers and the converters that build on it load the folder.
    Raises ValueError if `folder` exists, OSError if it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"export={str(folder)!r} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch, folder.name)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made, model.config.block_size)
        made.rename(folder)
