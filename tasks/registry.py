"""The tasks by name, and the settings that choose one."""

from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from checkpoints.files import local_path
from tasks.arithmetic import ArithmeticTask
from tasks.base import Task, line_ends
from tasks.preferences import PreferencesTask
from tasks.python_code import PythonCodesTask
from tasks.sentiment import SentimentTask

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (SentimentTask, PythonCodesTask, ArithmeticTask, PreferencesTask)}


def find_task(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"task={name!r} must be one of {', '.join(TASKS)}")
    return TASKS[name]


def make_task(name: str, prompt: str = "default") -> Task:
    """Return the task called `name`; raises ValueError if there is none, or no such prompt."""
    return find_task(name)(prompt)


@dataclass(frozen=True)
class TaskConfig:
    """Settings of the task: its data set and its prompt."""

    task: Annotated[str, f"the task: {', '.join(TASKS)}"] = "sentiment"
    dataset: Annotated[str, "a name or a path; auto is the task's default", local_path] = "auto"
    prompt: Annotated[str, "a template's name, or a text with {text} in it", line_ends] = "default"


Data = TypeVar("Data", bound=TaskConfig)


def resolve_dataset(config: Data) -> Data:
    """Replace dataset="auto" by the default data set of the task."""
    auto = config.dataset == "auto"
    return replace(config, dataset=find_task(config.task).dataset) if auto else config
