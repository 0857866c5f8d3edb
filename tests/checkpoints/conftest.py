"""A tiny GPT-2 that transformers wrote, and an adapter of ours for it."""

from pathlib import Path

import pytest
from made_checkpoints import make_adapted, make_reference

from checkpoints.peft_format import save_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_reference(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 over split q, k and v that fits `base`."""
    save_adapter(make_adapted(base), tmp_path / "adapter", "base")
    return tmp_path / "adapter"
