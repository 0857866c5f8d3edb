"""Compare the speed and memory of this package, a homework solution, and transformers with peft.

python -m bench                                 training, scoring and growth, on GPT-2's 124M shape
python -m bench what=train,score                the comparison, under six minutes on two cores
python -m bench what=generate                   long answers, beside transformers
python -m bench what=growth model=gpt2-mini     how our cost grows; needs no rivals
python -m bench what=memory                     what the homework's presets hold on a T4, estimated
python -m bench what=train,score model=smollm2  the comparison on a checkpoint, of any family

GPT-2's sizes get random weights, but answer as a fine-tuned model does: with a label word, then
end-of-text. Each contender runs in a separate process; the processes take turns.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.comparisons import compare
from bench.costs import compare_methods, compare_shots, growth
from bench.generation import compare_generation
from bench.memory_estimate import estimate_presets
from bench.report import check_folder, markdown, write
from bench.settings import PARTS, BenchConfig, open_checkpoint, require_rivals
from checkpoints.files import writable_folder
from configurator import run_script
from runtime.device import describe, explain_out_of_memory, resolve_device
from runtime.run_folder import git_commit

ON_A_CHECKPOINT: Mapping[str, Callable[[BenchConfig, str], Any]] = {
    "methods": compare_methods, "shots": compare_shots}


def add(report: dict[str, Any], found: dict[str, Any]) -> None:
    """Add what one part has found; several parts may fill one table, such as the ratios."""
    for key, rows in found.items():
        report[key] = report.get(key, {}) | rows


@explain_out_of_memory()
def main(config: BenchConfig) -> None:
    parts = config.what.replace(",", " ").split()
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"what={config.what!r} must list one or more of {', '.join(PARTS)}")
    verbs = [verb for verb in ("train", "score") if verb in parts]
    if verbs or "generate" in parts:  # the others measure only ours
        require_rivals()
    check_folder(writable_folder(Path(config.out_dir)))
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]), "settings": asdict(config),
        "machine": describe(resolve_device(config.device)) | {"commit": str(git_commit())},
    }
    if verbs:
        with open_checkpoint(config) as folder:
            add(report, compare(config, folder, verbs))
    if "generate" in parts:
        with open_checkpoint(config) as folder:
            add(report, compare_generation(config, folder))
    for part in (part for part in ON_A_CHECKPOINT if part in parts):
        with open_checkpoint(config) as folder:
            report[part] = ON_A_CHECKPOINT[part](config, folder)
    if "growth" in parts:
        report["growth"] = growth(config)
    if "memory" in parts:
        report["memory"] = estimate_presets(config.dataset)
    write(report, Path(config.out_dir))
    print(markdown(report))


if __name__ == "__main__":
    run_script(main, BenchConfig)
