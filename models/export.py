"""Export a model with its tokenizer to a folder that `transformers` loads."""

import shutil
import tempfile
from pathlib import Path

from checkpoints.files import write_json
from model import GPT
from models.tokenizer import vocabulary_files


def export_model(model: GPT, folder: Path) -> None:
    """Write `model` with merged adapters and GPT-2's tokenizer to a new folder, or nothing at all.

    transformers and the converters that build on it load the folder.
    Raises ValueError if `folder` exists, OSError if it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"export={str(folder)!r} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch, folder.name)
        model.save_pretrained(made)
        for source, name in zip(vocabulary_files(), ("merges.txt", "vocab.json"), strict=True):
            shutil.copyfile(source, made / name)
        write_json(made / "tokenizer_config.json", {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size,
            "pad_token": "<|endoftext|>"})
        made.rename(folder)
