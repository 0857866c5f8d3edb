"""Save and load the state of a training run between two optimizer steps, in a file without code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import atomic_write, refuse_other_names
from lora import check_state

STATE_FILE = "trainer_state.pt"


class TrainerState:
    """The parts of a run that change with every step: weights, optimizer, scaler, generators.

    `weights` are the trained tensors; `restore` overwrites them in place.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, device: torch.device,
    ) -> None:
        self.weights, self.optimizer, self.scaler = weights, optimizer, scaler
        self.device = device

    def save(self, folder: Path, settings: Mapping[str, Any], **progress: Any) -> None:
        """Write the state with the run's `settings` and `progress` to `folder`."""
        on_cuda = self.device.type == "cuda"
        write_state(folder / STATE_FILE, {
            "settings": dict(settings), **progress, "weights": dict(self.weights),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        })

    def read(self, folder: Path, *progress: str) -> dict[str, Any]:
        """Return the saved state, which must hold each key in `progress`; restore nothing yet.

        Raises ValueError if the file is damaged or lacks a key, OSError if it is missing.
        """
        path = folder / STATE_FILE
        state = read_state(path)
        needed = {"settings", "iteration", "weights", "optimizer", "scaler", *progress}
        if missing := needed - state.keys():
            raise ValueError(f"{path} is damaged or another program's: it lacks "
                             f"{', '.join(sorted(missing))}")
        if not _is_progress(state):
            raise ValueError(f"{path} is damaged: its iteration, settings or checkpoints are odd")
        for name in state.get("checkpoints", {}):
            if not (folder / name).is_dir():
                raise ValueError(f"{folder / name} is gone, to which {path} belongs")
        return state

    def restore(self, state: Mapping[str, Any], folder: Path, generators: bool = True) -> None:
        """Copy a state that `read` returned into the run, the random generators included or not.

        Raises ValueError if a part does not fit the run.
        """
        path = folder / STATE_FILE
        check_state(self.weights, state["weights"], str(path))
        try:
            self._check_moments(state["optimizer"]["state"], path)
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:  # empty if the run was not in float16
                self.scaler.load_state_dict(state["scaler"])
            if generators and "rng" in state:
                torch.set_rng_state(state["rng"])
            if generators and self.device.type == "cuda" and state.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def _check_moments(self, saved: Mapping[int, Mapping[str, Tensor]], path: Path) -> None:
        """Raise ValueError unless AdamW's moments fit the weights: torch does not check them."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters if saved else ()):  # none before a step
            for name in ("exp_avg", "exp_avg_sq"):
                if saved[number][name].shape != parameter.shape:
                    raise ValueError(f"{path} is damaged: the optimizer's {name} {number} is "
                                     f"{tuple(saved[number][name].shape)}")


def _is_progress(state: Mapping[str, Any]) -> bool:
    """Return whether a state says how far its run is, in the types that runs write."""
    checkpoints = state.get("checkpoints", {})
    return (type(state["iteration"]) is int and state["iteration"] >= 0
            and isinstance(state["settings"], dict) and isinstance(checkpoints, dict)
            and all(name in ("best", "last") and isinstance(about, dict)
                    and {"iteration", "loss"} <= about.keys()
                    for name, about in checkpoints.items()))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested containers of tensors, numbers and strings."""
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch reports a full disk this way
            raise OSError(error) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read a file that `write_state` wrote, without running any code in it.

    Raises ValueError if the file holds anything else, OSError if it is missing.
    """
    try:
        refuse_other_names(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise ValueError(f"{path} is damaged or not a trainer's state: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a trainer's state")
    return state
