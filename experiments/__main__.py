"""Answer the homework's questions: every run they take, then a report with tables and curves.

python -m experiments config/experiments_mini.py     gpt2-mini on a CPU, an hour and a half
python -m experiments config/experiments_t4.py       gpt2-medium on a T4
python -m experiments config/experiments_codes_mini.py    programming questions
python -m experiments config/experiments_mini.py only=curves,prompts dry_run=True

Finished runs are skipped and interrupted ones resumed: repeat the same command after Ctrl-C or a
crash. The report lists the runs that failed with their errors.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from configurator import run_script
from experiments.jobs import AGAIN, Job, make_job, run_jobs
from experiments.plan import ExperimentsConfig, Variant, plan
from experiments.report import check_folder, write_report
from experiments.results import Row
from experiments.time_estimate import Estimate
from generate import GenerateConfig
from runtime.processes import treat_as_ctrl_c
from tasks.registry import make_task, resolve_dataset
from tasks.scores import table
from train import TrainConfig

PLANNED = (
    "method", "lora_rank", "lora_alpha", "lora_targets", "lora_qkv", "eval_only", "overwrite",
)


def plan_jobs(
    config: ExperimentsConfig, questions: Mapping[str, Sequence[Variant]]
) -> dict[str, list[Job]]:
    """Return the jobs of each variant by its name, one for each seed."""
    jobs: dict[str, list[Job]] = {}
    for variants in questions.values():
        for variant in variants:
            make = train_job if variant.trains else zero_shot_job
            made = [make(config, variant, config.seed + i) for i in range(variant.seeds)]
            jobs[variant.name] = max(made, jobs.get(variant.name, []), key=len)
    return jobs


def train_job(config: ExperimentsConfig, variant: Variant, seed: int) -> Job:
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings |= {**variant.changes, "seed": seed, "overwrite": True}
    job = make_job(
        f"{variant.name}-seed{seed}", "train.py", settings, TrainConfig(), config.out_dir)
    shared = settings["gradient_accumulation_steps"] % config.processes == 0
    return job._replace(processes=config.processes if shared else 1)


def zero_shot_job(config: ExperimentsConfig, variant: Variant, seed: int) -> Job:
    shared = ("init_from", "task", "dataset", "block_size", "device", "dtype")
    settings = {name: getattr(config, name) for name in shared} | {
        **variant.changes, "seed": seed, "batch_size": config.eval_batch_size,
        "limit": config.test_size or GenerateConfig.limit}
    name = variant.name
    if variant.changes.get("shots"):  # the seed draws them
        settings["shots_seed"], name = seed, f"{name}-seed{seed}"
    job = make_job(name, "generate.py", settings, GenerateConfig(), config.out_dir)
    return job._replace(result="zero_shot-*/results*.json")


def jobs_by_question(
    questions: Mapping[str, Sequence[Variant]], jobs: Mapping[str, Sequence[Job]]
) -> dict[str, list[Job]]:
    return {question: [job for variant in variants for job in jobs[variant.name][: variant.seeds]]
            for question, variants in questions.items()}


def select(by_question: Mapping[str, Sequence[Job]], only: str) -> list[Job]:
    """Return the jobs that `only` names, by question or by run; each once."""
    named = {job.name: [job] for jobs in by_question.values() for job in jobs} | dict(by_question)
    names = only.replace(",", " ").split() or list(by_question)
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"only={only!r}: there is no {unknown[0]!r}; there are the questions "
                         f"{', '.join(by_question)}, and the runs that dry_run=True lists")
    return list({job.name: job for name in names for job in named[name]}.values())


def check(config: ExperimentsConfig) -> None:
    """Raise ValueError for settings that the plan sets itself, or that no run can have."""
    make_task(config.task, config.prompt)
    for name in PLANNED:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{name}={getattr(config, name)!r}: the plan sets it for each run")
    for name in ("max_iters", "learning_rate", "full_learning_rate"):
        if not getattr(config, name):
            raise ValueError(f"{name}=0 trains nothing")
    for name in ("out_dir", "report_dir"):
        if not getattr(config, name):
            raise ValueError(f"{name} must name a folder")
    if config.init_from == "resume":
        raise ValueError("init_from=resume: repeat the same command, it resumes by itself")
    check_sharing(config)


def check_sharing(config: ExperimentsConfig) -> None:
    """Raise ValueError where jobs and processes cannot share the machine or a run."""
    if config.jobs > 1 and ":" in config.device:
        raise ValueError(f"device={config.device!r} is one GPU, but jobs={config.jobs} take turns "
                         "on all that CUDA_VISIBLE_DEVICES names")
    if config.processes > 1 and config.jobs > 1:
        raise ValueError(f"processes={config.processes} share a run, jobs={config.jobs} the "
                         "machine: one of them must be 1")
    if config.gradient_accumulation_steps % config.processes:
        raise ValueError(f"gradient_accumulation_steps={config.gradient_accumulation_steps} must "
                         f"be a multiple of processes={config.processes}")


def list_jobs(
    chosen: Sequence[Job], by_question: Mapping[str, Sequence[Job]], estimate: Estimate,
    at_once: int,
) -> str:
    """Return a table of the jobs: their questions, their state, their time."""
    rows, total = [], 0.0
    for job in chosen:
        seconds = 0.0 if job.finished else estimate.seconds(job)
        total += seconds
        asked = [question for question, jobs in by_question.items() if job in jobs]
        rows.append({"run": job.name, "minutes": f"{seconds / 60:.1f}", "state": job.state,
                     "questions": ", ".join(asked)})
    text = table(rows) + "\n" if rows else ""
    return f"{text}{len(rows)} runs, about {total / at_once / 60:.0f} minutes to go"


def execute(
    chosen: Sequence[Job], config: ExperimentsConfig, estimate: Estimate
) -> Iterator[tuple[str, str]]:
    """Run the jobs that are not finished; yield the name and the error of each that fails."""
    for job in chosen:
        job.tidy()  # an earlier call may have stopped before it did
    todo = [job for job in chosen if not job.finished]
    for job in todo:
        if job.standing[0] == AGAIN:  # what it wrote before is replaced
            print(f"{job.name}: {job.state}", file=sys.stderr)
    expected = {job.name: estimate.seconds(job) for job in todo}
    total, done, started = sum(expected.values()), 0.0, time.monotonic()
    trust = 3 * total / max(1, len(todo))  # the estimate counts as much as three measured runs
    bar = tqdm(total=len(chosen), initial=len(chosen) - len(todo), unit="run",
               bar_format="{n_fmt}/{total_fmt} runs |{bar}| {elapsed}{postfix}")
    bar.set_postfix_str(f"about {total / config.jobs / 60:.0f} min left")
    with bar, closing(run_jobs(todo, config.jobs)) as ended:
        for job, error in ended:
            bar.write(f"{job.name}: {error or 'done'}")
            if error:
                yield job.name, error
            done += expected[job.name]
            pace = (config.jobs * (time.monotonic() - started) + trust) / (done + trust)
            left = (total - done) * pace / config.jobs
            bar.set_postfix_str(f"about {left / 60:.0f} min left", refresh=False)
            bar.update()


def report(
    config: ExperimentsConfig, questions: Mapping[str, Sequence[Variant]],
    jobs: Mapping[str, Sequence[Job]], errors: Mapping[str, str],
) -> Path:
    """Write the report of the runs so far; return its path."""
    rows = {question: [Row(variant.label, variant.changes, jobs[variant.name][: variant.seeds],
                           errors) for variant in variants]
            for question, variants in questions.items()}
    command = shlex.join(["python", "-m", "experiments", *sys.argv[1:]])
    names = config.only.replace(",", " ").split() or questions  # of questions or of runs
    asked = [question for question, variants in questions.items() if question in names or any(
             job.name in names for variant in variants for job in jobs[variant.name])]
    path = write_report(rows, config, command, asked)
    print(f"written: {path}")
    return path


def main(config: ExperimentsConfig) -> None:
    check(config)
    config = resolve_dataset(config)
    questions = plan(config)
    jobs = plan_jobs(config, questions)
    by_question = jobs_by_question(questions, jobs)
    chosen = select(by_question, config.only)
    estimate = Estimate(config, config.jobs, chosen)
    if config.dry_run:
        print(list_jobs(chosen, by_question, estimate, config.jobs))
        return
    check_folder(Path(config.report_dir))  # now, not after hours
    treat_as_ctrl_c("SIGTERM", "SIGHUP")
    errors: dict[str, str] = {}
    try:
        for name, error in execute(chosen, config, estimate):
            errors[name] = error
    except KeyboardInterrupt:
        print("stopped; repeat the command to resume", file=sys.stderr)
        report(config, questions, jobs, errors)
        raise
    path = report(config, questions, jobs, errors)
    if errors:
        name, error = next(iter(errors.items()))
        raise ValueError(f"{len(errors)} of {len(chosen)} runs failed, as {name}: {error}; "
                         f"{path} has the rest")


if __name__ == "__main__":
    run_script(main, ExperimentsConfig)
