"""Run the controlled sentiment experiment of the DPO paper: pairs, training, the frontier.

python train.py config/quickstart.py                 the reward model, two minutes
python -m preferences config/dpo_mini.py             gpt2-mini on a CPU, offline
python -m preferences config/dpo_t4.py               gpt2-large on a T4, as in the paper

The policy continues beginnings of film reviews, the reward model ranks its continuations, DPO
trains on the pairs, and the report shows reward over distance from the policy as it was. Whatever
is finished is kept: repeat the same command after Ctrl-C or a crash.
"""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from checkpoints.files import read_json, write_json
from configurator import run_script
from experiments.jobs import Job, run_jobs
from generate import GenerateConfig, Subject, load_subject
from preferences.evaluation import evaluate, judge_draws
from preferences.pairs import Row, rank, rewarded_samples, write_rows
from preferences.plan import PAIRS, Policy, PreferencesConfig, check, plan
from preferences.prompts import LONGEST, draw_prompts, read_texts
from preferences.report import check_folder, write_report
from preferences.rewards import RewardModel
from runtime.device import dtype_name, set_up_memory
from runtime.processes import treat_as_ctrl_c
from runtime.run_folder import CONFIG_FILE

ABOUT = "experiment.json"  # what the samples and their rewards depend on
EVALUATIONS = "evaluations"  # folder of the measured samples, in out_dir
# Settings that the samples depend on.
DRAWING = ("init_from", "data", "train_prompts", "validation_prompts", "test_prompts", "samples",
           "response_tokens", "best_of", "seed", "eval_batch_size")


class Judges(NamedTuple):
    """The reward model that ranks the pairs, and the one that only judges, if there is one."""

    reward: RewardModel
    held_out: RewardModel | None


def load_judges(config: PreferencesConfig) -> Judges:
    found = [RewardModel(folder, config.device, config.dtype, config.eval_batch_size)
             for folder in (config.reward_model, config.held_out_reward_model) if folder]
    return Judges(found[0], found[1] if len(found) > 1 else None)


def run_digest(folder: str | Path) -> str:
    """Return the SHA-256 of the settings and the best weights of a run."""
    files = [Path(folder, CONFIG_FILE), *sorted(Path(folder, "best").glob("*.safetensors"))]
    return hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()


def keep_apart(
    config: PreferencesConfig, base: Subject, prompts: Mapping[str, list[str]]
) -> None:
    """Note in `out_dir` what the samples depend on; refuse a folder that holds others."""
    about = {name: asdict(config)[name] for name in DRAWING} | base.base | {
        "dtype": dtype_name(base.dtype),
        "beginnings": hashlib.sha256(repr(prompts).encode()).hexdigest()}
    for name in ("reward_model", "held_out_reward_model"):
        if folder := getattr(config, name):
            about[name] = run_digest(folder)
    path = Path(config.out_dir, ABOUT)
    if not path.is_file():
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise ValueError(f"out_dir={config.out_dir!r} holds other files; choose a new folder")
        write_json(path, about)
    kept = read_json(path)
    if changed := [name for name in about.keys() | kept.keys()
                   if about.get(name) != kept.get(name)]:
        raise ValueError(f"out_dir={config.out_dir!r} holds an experiment of another "
                         f"{', '.join(sorted(changed))}; choose another out_dir")


def load_policy(config: PreferencesConfig, job: Job | None = None) -> Subject:
    """Load the policy that a job trained, or the reference model."""
    source = {"out_dir": str(job.folder)} if job else {
        "init_from": config.init_from, "out_dir": config.out_dir}
    return load_subject(GenerateConfig(**source, device=config.device, dtype=config.dtype))


def draw_all_prompts(config: PreferencesConfig, base: Subject) -> dict[str, list[str]]:
    """Return the beginnings of each split; all are different."""
    numbers = {"train": config.train_prompts, "validation": config.validation_prompts,
               "test": config.test_prompts}
    room = min(config.block_size or base.model.config.block_size, base.model.config.block_size)
    if config.response_tokens + LONGEST + 1 > room:
        raise ValueError(f"response_tokens={config.response_tokens}: with a beginning of {LONGEST} "
                         f"tokens and an end-of-text at most {room - LONGEST - 1} fit")
    drawn = iter(draw_prompts(
        read_texts(config.data), base.tokenizer, sum(numbers.values()), config.seed))
    return {split: list(islice(drawn, number)) for split, number in numbers.items()}


def make_pairs(
    config: PreferencesConfig, base: Subject, judges: Judges, prompts: Mapping[str, list[str]]
) -> list[Row]:
    """Write the data set of pairs; return the base's samples of the held-out prompts."""
    folder, rows = Path(config.out_dir), []
    for split, own in prompts.items():
        each = max(config.samples, config.best_of) if split == "test" else config.samples
        rows = rewarded_samples(
            base, judges.reward, own, each, config.response_tokens, config.eval_batch_size,
            config.seed, folder / "samples", split)
        pairs = rank([row for i, row in enumerate(rows) if i % each < config.samples])
        if not pairs:
            raise ValueError(f"no two samples of a {split} prompt have different rewards")
        write_rows(folder / PAIRS / f"{split}.jsonl", pairs)
    return rows


def train_all(jobs: Sequence[Job], at_once: int) -> None:
    """Train what is not finished; raises ValueError with the error of the first run that fails."""
    todo = [job for job in jobs if not job.finished]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run", desc="training")
    with bar, closing(run_jobs(todo, at_once)) as ended:
        for job, error in ended:
            bar.write(f"{job.name}: {error or 'done'}")
            if error:
                raise ValueError(f"{job.name} failed: {error}")
            bar.update()


def judge_all(
    config: PreferencesConfig, base: Subject, judges: Judges, policies: Sequence[Policy],
    prompts: Sequence[str],
) -> dict[str, list[list[Row]]]:
    """Return the measured samples of the base and of each policy's runs, by the policy's label."""
    def judged(subject: Subject, name: str) -> list[Row]:
        path = Path(config.out_dir, EVALUATIONS, f"{name}.jsonl")
        return evaluate(subject, base, prompts, config.response_tokens, config.eval_batch_size,
                        config.seed, judges.reward, judges.held_out, path)

    found = {"base": [judged(base, "base")]}
    for policy in policies:
        found[policy.label] = [
            judged(load_policy(config, job), f"{job.name}-{run_digest(job.folder):.12}")
            for job in policy.jobs]
    return found


def main(config: PreferencesConfig) -> None:
    set_up_memory()
    treat_as_ctrl_c("SIGTERM", "SIGHUP")
    check(config)
    check_folder(Path(config.report_dir))  # now, not after hours
    base, policies = load_policy(config), plan(config)
    prompts = draw_all_prompts(config, base)
    judges = load_judges(config)
    keep_apart(config, base, prompts)
    drawn = make_pairs(config, base, judges, prompts)
    train_all([job for policy in policies for job in policy.jobs], config.jobs)
    judged = judge_all(config, base, judges, policies, prompts["test"])
    drawn = judge_draws(drawn, judges.held_out, Path(config.out_dir, EVALUATIONS, "draws.jsonl"))
    command = shlex.join(["python", "-m", "preferences", *sys.argv[1:]])
    path = write_report(config, policies, judged, drawn, command)
    print(f"written: {path}")


if __name__ == "__main__":
    run_script(main, PreferencesConfig)
