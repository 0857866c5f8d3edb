"""A job that several readers start and follow, as the visitors of a page do."""

import atexit
import subprocess
import time
from collections.abc import Iterator
from threading import Lock

from experiments.escaping import in_words
from experiments.finished_runs import UNREADABLE
from experiments.jobs import ATTEMPT, Job


class SharedJob:
    """A job that several readers start and follow; its process ends with this one."""

    def __init__(self, job: Job) -> None:
        self.job, self.lock = job, Lock()
        self.process: subprocess.Popen | None = None

    def follow(self) -> Iterator[str]:
        """Start, resume or join it; yield what it has printed, and last how it ended."""
        try:
            if not self.runs():
                yield "The run is finished."
                return
            while self.process.poll() is None:
                yield self.printed()
                time.sleep(0.5)
            error = self.job.failure(self.process.returncode)
            yield f"{self.printed()}\n{f'error: {error}' if error else 'The run is finished.'}"
        except UNREADABLE as error:
            yield f"error: {in_words(error)}"

    def runs(self) -> bool:
        """Start or resume it unless it runs, or is finished: a new start would remove its results.

        Return False if it is finished.
        """
        with self.lock:
            if self.process is not None and self.process.poll() is None:
                return True
            if self.job.finished:
                return False
            self.process = self.job.start({})
            atexit.register(self.process.terminate)  # it saves its state first
            return True

    def printed(self) -> str:
        """Return the last twelve lines of its log, and of a progress bar the last state."""
        text = self.job.log.read_bytes().decode("utf-8", "replace").rpartition(ATTEMPT)[2]
        lines = text.rstrip().split("\n")[-12:]
        return "\n".join(line.rstrip().rpartition("\r")[2] for line in lines)
