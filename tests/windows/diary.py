"""What a run of tests wrote down as it went, so that nothing of it is lost when its process is: written by `witness`, read by `rounds`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Diary:
    """A file that grows by a line at each event. One writer; it may be read at any time, also after a writer that was ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begun(self, test: str) -> None:
        self._write(begun=test)

    def ended(self, test: str, failure: str | None) -> None:
        """The test's fixtures are torn down too. `failure`: what pytest says of it; None: it passed."""
        self._write(ended=test, failure=failure)

    def stood_still(self, test: str, told: str) -> None:
        """The last line but one: the process is ended for it."""
        self._write(stood_still=test, told=told)

    def over(self, code: int) -> None:
        """All tests have ended, and their summary was printed. `code` is pytest's."""
        self._write(over=code)

    def _write(self, **event: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def size(self) -> int:
        """Grows with each event; 0 before the first."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def stacks(self) -> Path:
        """Where the interpreter writes, from outside of Python, if Python itself stands still."""
        return self.path.with_suffix(".stacks")

    def read(self) -> "Told":
        """What it says so far; nothing if it was never begun."""
        told = Told()
        for event in self._events():
            if "begun" in event:
                told.running = event["begun"]
            elif "ended" in event:
                told.running = None
                told.ended[event["ended"]] = event["failure"]
            elif "stood_still" in event:
                told.stood_still, told.stacks = event["stood_still"], event["told"]
            elif "over" in event:
                told.code = event["over"]
        if told.stood_still is None and self.stacks.exists():
            told.stacks = self.stacks.read_text(encoding="utf-8", errors="replace")
        return told

    def _events(self) -> Iterator[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return
        for line in lines:
            if line.endswith("\n"):  # else the writer was ended in the middle of it
                yield json.loads(line)


@dataclass
class Told:
    """A diary as it was read."""

    ended: dict[str, str | None] = field(default_factory=dict)  # the test, and its failure
    running: str | None = None
    stood_still: str | None = None
    stacks: str = ""  # not empty: it stood still
    code: int | None = None
