"""What did LoRA learn? The subspaces of a run's updates, as in sections 7.2 and 7.3 of its paper.

python -m experiments.anatomy out/quickstart
python -m experiments.anatomy out/lora_r16 out/lora_r128 out/lora_r16_seed1   compares them, too
"""

import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.files import local_path
from configurator import Bounds, run_script
from dataloader import make_loader
from experiments.escaping import code, fenced, plain
from experiments.figures import accuracy_by_rank, similarities, spectra
from experiments.page import check_folder, write_page
from experiments.results import Section
from experiments.subspaces import (
    Update,
    amplification,
    similarity,
    singular_values,
    truncate,
    updates,
)
from generate import ModelSampler, ModelSettings
from methods.build import load_checkpoint
from model import Decoder
from models.tokenizer import load_tokenizer
from runtime.device import set_up_memory
from runtime.run_folder import read_run
from tasks.scores import markdown_table

TITLE = "# What LoRA learned"
MOST_RUNS = 4  # six pairs
CPU = torch.device("cpu")


@dataclass(frozen=True)
class AnatomyConfig:
    """Settings of `python -m experiments.anatomy`."""

    runs: Annotated[str, "folders of runs, with commas; or name them before the settings"] = ""
    checkpoint: Annotated[str, "best or last"] = "best"
    report_dir: Annotated[str, "folder of the page", local_path] = "anatomy"
    limit: Annotated[int, "validation examples to score; 0 is all", Bounds(0)] = 0
    seed: Annotated[int, "of the random matrices", Bounds(0, 2**63 - 1)] = 1337


class Learned:
    """A checkpoint of a LoRA run: its unmerged model, its settings, and the updates in it."""

    def __init__(self, folder: str, checkpoint: str) -> None:
        run = read_run(folder)
        self.settings = run.config(ModelSettings)
        if self.settings.trained != "lora":
            raise ValueError(f"{folder} trained method={self.settings.trained}: it has no LoRA")
        self.name = str(Path(folder))
        self.model: Decoder = load_checkpoint(
            Path(folder, checkpoint), self.settings, CPU, torch.float32).train()
        self.updates = list(updates(self.model))

    def by_part(self) -> dict[str, list[Update]]:
        """Return the updates of all layers, by the part of the block they stand in."""
        found: dict[str, list[Update]] = {}
        for update in self.updates:
            found.setdefault(update.part, []).append(update)
        return found


def spectrum_section(run: Learned) -> Section:
    parts = singular_values(run.updates)
    lines = [["", "largest singular value, mean over the layers", "of the sum of squares: first 1",
              "first 4", "first 16"]]
    for part, layers in parts.items():
        energies = [np.cumsum(np.square(values)) / max(np.sum(np.square(values)), 1e-30)
                    for values in layers]
        lines.append([plain(part), f"{statistics.mean(values[0] for values in layers):.3f}", *(
            f"{statistics.mean(energy[min(k, len(energy)) - 1] for energy in energies):.0%}"
            for k in (1, 4, 16))])
    return Section(f"Singular values of ΔW: {plain(run.name)}", "", markdown_table(lines),
                   spectra(parts))


def similarity_section(one: Learned, other: Learned, generator: torch.Generator) -> Section:
    """Compare the right singular vectors of two runs' A, averaged over the layers."""
    maps, lines = {}, [["", "φ(1, 1)", "φ(4, 4)", "φ(16, 16)"]]
    theirs = other.by_part()
    for part, mine in one.by_part().items():
        if len(theirs.get(part, ())) == len(mine):
            pairs = zip(mine, theirs[part], strict=True)
            maps[part] = np.mean([similarity(a.A, b.A).numpy() for a, b in pairs], axis=0)
    if not maps:
        raise ValueError(f"{one.name} and {other.name} adapt no projection alike")
    first, second = one.updates[0].A, other.updates[0].A
    maps["two random matrices"] = similarity(
        torch.randn(first.shape, generator=generator),
        torch.randn(second.shape, generator=generator)).numpy()
    for part, values in maps.items():
        inside = [f"{values[k - 1, k - 1]:.3f}" if k <= min(values.shape) else "–"
                  for k in (1, 4, 16)]
        lines.append([plain(part), *inside])
    text = ["φ(i, j) is 1 where the span of the first i right singular vectors of one A lies in "
            "the span of the first j of the other, or the reverse; mean over the layers.", ""]
    return Section(f"Shared subspaces: {plain(one.name)} and {plain(other.name)}", "",
                   text + markdown_table(lines), similarities(maps))


def amplification_section(run: Learned, generator: torch.Generator) -> Section:
    lines = [["", "‖ΔW‖", "‖U'W₀V‖, U and V of ΔW", "of W₀", "random", "amplification"]]
    for part, each in run.by_part().items():
        found = [amplification(update, generator) for update in each]
        means = [statistics.mean(row[i] for row in found) for i in range(4)]
        factor = statistics.mean(row.factor for row in found)
        lines.append([plain(part), *map("{:.3f}".format, means), f"{factor:.2f}"])
    text = ["Frobenius norms, mean over the layers. The amplification is ‖ΔW‖ over the norm of "
            "what W₀ does in ΔW's directions: far above 1, if LoRA strengthens directions that W₀ "
            "holds but hardly uses; `of W₀` is the most that W₀ does in as many directions.", ""]
    return Section(f"Amplification: {plain(run.name)}", "", text + markdown_table(lines))


def accuracies(run: Learned, limit: int) -> tuple[list[int], list[float], int]:
    """Return how many directions are kept, the accuracy with each, and the number of examples."""
    loader = make_loader(
        run.settings, run.model.config, load_tokenizer(run.settings.init_from))
    if not loader.task.choices:
        raise ValueError(f"task={loader.task.name} has no labels to count")
    records, found = loader.spread("validation", limit), []
    rank = max(update.A.size(0) for update in run.updates)
    kept = sorted({0, rank, *(2**i for i in range(rank.bit_length()) if 2**i < rank)})
    for directions in tqdm(kept, run.name, leave=False):
        model = copy.deepcopy(run.model)
        truncate(model, directions)
        predictions = ModelSampler(model, loader).predict(records)
        found.append(loader.task.summarize(records, predictions)["accuracy"])
    return kept, found, len(records)


def direction_section(runs: Sequence[Learned], limit: int) -> Section:
    measured = {run.name: accuracies(run, limit) for run in runs}
    n = min(each[2] for each in measured.values())
    everywhere = sorted({k for kept, *_ in measured.values() for k in kept})
    lines = [["directions kept", *map(str, everywhere)]]
    for name, (kept, found, _) in measured.items():
        values = dict(zip(kept, found, strict=True))
        cells = [f"{values[k]:.3f}" if k in values else "" for k in everywhere]
        lines.append([plain(name), *cells])
    curves = {name: (kept, found) for name, (kept, found, _) in measured.items()}
    return Section("How many directions does it need?", f"n = {n:,} validation examples.",
                   ["Every ΔW is cut to its first singular directions; 0 is the base model.", "",
                    *markdown_table(lines)], accuracy_by_rank(curves, n))


def dissect(runs: Sequence[Learned], config: AnatomyConfig) -> dict[str, Section]:
    """Return the sections of the page by the names of their pictures."""
    generator = torch.Generator().manual_seed(config.seed)
    found = {}
    for i, run in enumerate(runs, 1):
        found[f"spectra{i}"] = spectrum_section(run)
        found[f"amplification{i}"] = amplification_section(run, generator)
    for i, (one, other) in enumerate(combinations(runs, 2), 1):
        found[f"similarity{i}"] = similarity_section(one, other, generator)
    return found | {"directions": direction_section(runs, config.limit)}


def head(runs: Sequence[Learned], folders: Sequence[str], config: AnatomyConfig) -> list[str]:
    command = " ".join(["python -m experiments.anatomy", *folders, f"limit={config.limit}",
                        f"seed={config.seed}"])
    model = runs[0].settings
    return [f"{TITLE}: {plain(Path(model.init_from).name)}", "",
            f"Base model {code(model.init_from)}, the {config.checkpoint} checkpoints of "
            f"{', '.join(code(folder) for folder in folders)}.", "", *fenced([command])]


def main(config: AnatomyConfig) -> None:
    set_up_memory()
    folders = [name for name in config.runs.split(",") if name]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"runs: name 1 to {MOST_RUNS} folders of LoRA runs")
    pictures = {"directions", *(f"{name}{i}" for name in ("spectra", "similarity")
                                for i in range(1, 7))}
    check_folder(Path(config.report_dir), TITLE, pictures)
    runs = [Learned(folder, config.checkpoint) for folder in folders]
    if len({run.settings.init_from for run in runs}) > 1:
        raise ValueError("the runs must have one base model")
    path = write_page(Path(config.report_dir), TITLE, head(runs, folders, config),
                      dissect(runs, config), pictures)
    print(f"written: {path}")


def named(arguments: Sequence[str]) -> list[str]:
    """Turn folders among the command line's arguments into the setting `runs`."""
    folders = [argument for argument in arguments if Path(argument).is_dir()]
    rest = [argument for argument in arguments if argument not in folders]
    return rest + ([f"runs={','.join(folders)}"] if folders else [])


if __name__ == "__main__":
    sys.argv[1:] = named(sys.argv[1:])
    run_script(main, AnatomyConfig)
