"""The state of a run between two optimizer steps, as a file that holds no code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import atomic_write


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a trainer's state: tensors, numbers and texts in nested containers."""
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(error) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; no code in the file is run.

    Raises ValueError if the file holds anything else, OSError if it is not there.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of any bytes makes torch raise nearly anything
        raise ValueError(f"{path} is damaged or not a trainer's state: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a trainer's state")
    return state
