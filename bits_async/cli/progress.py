"""What the user sees of a transfer: a bar on a terminal, JSON lines for programs, or nothing.

A reporter is told what happens and knows neither jobs nor managers. Text that others chose (a name, a message) is shown as text,
never as markup and without control characters (T14).
"""

import json
import sys
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, Self

from ..errors import BitsError, code_name, show_text
from ..jobs.model import JobState

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..jobs.notify import Progress

DOING: Final = {
    JobState.QUEUED: "waiting",
    JobState.CONNECTING: "connecting",
    JobState.SUSPENDED: "suspended",
    JobState.TRANSIENT_ERROR: "failed for now, will try again",
    JobState.ERROR: "failed",
}
NAME_WIDTH: Final = 40


class Reporter(AbstractContextManager["Reporter"]):
    """Says nothing: the exit code, and the line on standard error when it failed, say all.

    It is told any number of `progress`, perhaps `stopping`, then exactly one of the others.
    """

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        return

    def progress(self, event: "Progress") -> None:
        """Bytes have arrived, or the state has changed."""

    def stopping(self) -> None:
        """A signal came; the transfer is about to be suspended."""

    def done(self, path: Path) -> None:
        """The destination holds the whole file."""

    def failed(self, error: BitsError) -> None:
        """It does not."""

    def interrupted(self, signal_name: str) -> None:
        """The transfer is suspended; it can be continued."""


def reporter(name: str, *, as_json: bool) -> Reporter:
    """The one that fits the options and the terminal. `name` is the file's, for the bar."""
    if as_json:
        return JsonLines(sys.stdout)
    if sys.stderr.isatty():
        return Bar(name)
    return Reporter()


class JsonLines(Reporter):
    """One JSON object a line, flushed at once."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def _end(self, event: str, **values: Any) -> None:
        self._write({"event": event, "time": datetime.now(UTC).isoformat(), **values})

    def progress(self, event: "Progress") -> None:
        self._write(event.as_dict())

    def done(self, path: Path) -> None:
        self._end("Done", path=str(path))

    def failed(self, error: BitsError) -> None:
        self._end("Failed", **error_as_dict(error))

    def interrupted(self, signal_name: str) -> None:
        self._end("Interrupted", signal=signal_name)


def error_as_dict(error: BitsError) -> dict[str, Any]:
    """An error as JSON-ready values, named as in the events of the API."""
    return {
        "code": f"0x{error.code:08X}",
        "name": code_name(error.code),
        "context": error.context.name,
        "message": error.message,
        "transient": error.transient,
        "job_id": None if error.job_id is None else str(error.job_id),
        "url": error.url,
        "path": None if error.path is None else str(error.path),
        "identity": error.identity,
        "http_status": error.http_status,
        "advice": error.advice,
    }


class Bar(Reporter):
    """A progress bar on standard error."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self._name = show_text(name, NAME_WIDTH)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[doing]}", markup=False),
            console=Console(stderr=True, markup=False, highlight=False, emoji=False),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def progress(self, event: "Progress") -> None:
        if self._task is None:
            # made here and not before: what an earlier run fetched must not count for the speed of this one
            self._task = self._bar.add_task(self._name, total=None, completed=event.bytes_transferred, doing="")
        doing = DOING.get(event.state, "")
        self._bar.update(self._task, total=event.bytes_total, completed=event.bytes_transferred, doing=doing)

    def stopping(self) -> None:
        self._bar.stop()  # gives the terminal its cursor back, should a second Ctrl-C end the process at once

    def failed(self, error: BitsError) -> None:
        self._bar.stop()  # the error's line stands below the bar, not above it

    def interrupted(self, signal_name: str) -> None:
        self._bar.stop()
