"""Draws the life of a job into README.md, from the table of `bits_async.jobs.model`: `make diagram`."""

import re
from pathlib import Path

from bits_async.jobs.model import mermaid

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- drawn from the table of states by `make diagram` -->", "<!-- end of the diagram -->"


def with_diagram(text: str) -> str:
    """The text, with the diagram as it should be between its two markers."""
    drawn, count = re.subn(f"(?s)(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", lambda _: f"\n```mermaid\n{mermaid()}\n```\n\n", text)
    if count != 1:
        raise ValueError(f"{README.name} has no place for the diagram: {BEGIN} and {END}, each on its own line")
    return drawn


if __name__ == "__main__":
    README.write_text(with_diagram(README.read_text("utf-8")), "utf-8")
