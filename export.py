"""A model on its way to other programs: merged weights and tokenizer in the hub's layout."""

import shutil
import tempfile
from pathlib import Path

from checkpoint import write_json
from model import GPT
from tokenizer import vocabulary_files


def export_model(model: GPT, folder: Path) -> None:
    """Write `model`, its adapters merged, and GPT-2's tokenizer to a new folder, or nothing at all.

    transformers loads the folder, and so do the programs that convert from it.
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
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size})
        made.rename(folder)
