"""What the samples say: medians, ratios, goals met and missed; as text, as a file for programs, and in the README."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.machine import GIB, MIB
from tests.bench.rows import PEERS, ROWS, Goal, Row, Sample
from tests.bench.runner import Outcome

FORMAT = 1
BEGIN = "<!-- measured by `make bench`, written here by `make bench-readme` -->"
END = "<!-- end of what was measured -->"


@dataclass(frozen=True)
class Figures:
    """One contender in one row: medians; the ratios are medians of each round's, to the row's baseline."""

    name: str
    wall: float
    own_wall: float
    own_cpu: float
    peak: float
    wall_ratio: float | None
    cpu_ratio: float | None
    inside: bool


@dataclass(frozen=True)
class Judged:
    """A goal and what was found; None: it could not be measured."""

    row: Row
    goal: Goal
    found: float | None

    @property
    def met(self) -> bool:
        return self.found is not None and self.found <= self.goal.most

    @property
    def verdict(self) -> str:
        return "not measured" if self.found is None else "met" if self.met else "missed"

    @property
    def shown(self) -> str:
        return "" if self.found is None else _shown(self.found, self.goal.unit)


def _shown(value: float, unit: str) -> str:
    return f"{round(value)} {unit}" if unit == "MiB" else f"{value:.2f} {unit}".strip()


def figures(outcome: Outcome) -> list[Figures]:
    """Of every contender, the fastest first."""
    rounds = outcome.whole_rounds()
    found = [_figures_of(name, outcome.row.baseline, rounds) for name in outcome.samples if any(name in each for each in rounds)]
    return sorted(found, key=lambda each: each.own_wall)


def _figures_of(name: str, baseline: str, rounds: Sequence[Mapping[str, Sample]]) -> Figures:
    mine = [each[name] for each in rounds if name in each]
    both = [(each[name], each[baseline]) for each in rounds if name in each and baseline in each]
    return Figures(
        name,
        median(each.wall for each in mine),
        median(each.own_wall for each in mine),
        median(each.own_cpu for each in mine),
        median(each.peak for each in mine),
        median(one.own_wall / other.own_wall for one, other in both) if both else None,
        median(one.own_cpu / other.own_cpu for one, other in both) if both and all(other.own_cpu for _, other in both) else None,
        any(each.inside for each in mine),
    )


def judge(outcomes: Sequence[Outcome]) -> list[Judged]:
    """Every goal of the rows that were to be played."""
    judged = []
    for outcome in outcomes:
        for goal in outcome.row.goals:
            values = []
            for each in outcome.whole_rounds():
                try:
                    values.append(goal.figure(each))
                except KeyError:
                    pass  # one of the two failed in this round
            judged.append(Judged(outcome.row, goal, median(values) if values else None))
    return judged


# -- text ------------------------------------------------------------------------------------------------------------------------


def goals_table(judged: Sequence[Judged]) -> str:
    lines = ["| work | figure | goal | found | |", "|---|---|---:|---:|---|"]
    for each in judged:
        goal = each.goal
        lines.append(f"| {each.row.title} | {goal.what} | ≤ {_most(goal)} | {each.shown} | {each.verdict} |")
    return "\n".join(lines)


def _most(goal: Goal) -> str:
    return f"{goal.most:g} {goal.unit}".strip()


def row_table(outcome: Outcome) -> str:
    """All contenders of one row."""
    data = outcome.row.bytes_of(outcome.amount)
    base = outcome.row.baseline
    head = f"| {outcome.row.said(outcome.amount)} | wall s | to {base} | CPU s | to {base} | whole process, wall s | peak MiB |"
    lines = [head + (" MiB/s | CPU s/GiB |" if data else ""), "|---" + "|---:" * (8 if data else 6) + "|"]
    for each in figures(outcome):
        ratio, cpu_ratio = ("" if value is None else f"{value:.2f}" for value in (each.wall_ratio, each.cpu_ratio))
        name = f"**{each.name}**" if each.name.startswith("bits") else each.name
        inside = " (in-proc)" if each.inside else ""
        line = f"| {name}{inside} | {each.own_wall:.2f} | {ratio} | {each.own_cpu:.2f} | {cpu_ratio} | {each.wall:.2f} |"
        line += f" {each.peak / MIB:.0f} |"
        if data:
            line += f" {data / MIB / each.own_wall:.0f} | {each.own_cpu * GIB / data:.2f} |"
        lines.append(line)
    return "\n".join(lines)


def machine_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}, {machine['disk']}; load before it began: {machine['load_at_start']}. {versions}."
    )


def _amounts(outcomes: Sequence[Outcome], rounds: int) -> str:
    """How much each row had, and in how many rounds where it was not in all."""
    found = [(each, len(each.whole_rounds())) for each in outcomes]
    return "; ".join(
        f"{each.row.key}: {each.row.said(each.amount)}" + (f" in {played} rounds" if played != rounds else "") for each, played in found
    )


def text(outcomes: Sequence[Outcome], machine: Mapping[str, Any], rounds: int, date: str) -> str:
    """The whole report, as Markdown."""
    parts = [
        f"Measured {date}, medians of {rounds} interleaved rounds ({_amounts(outcomes, rounds)}). {machine_line(machine)}",
        goals_table(judge(outcomes)),
    ]
    for outcome in outcomes:
        parts += [f"### {outcome.row.key}: {outcome.row.title}", row_table(outcome)]
        parts += [f"{name}: {why}" for name, why in outcome.failures.items()]
    return "\n\n".join(parts) + "\n"


# -- for programs ----------------------------------------------------------------------------------------------------------------


def to_json(outcomes: Sequence[Outcome], machine: Mapping[str, Any], rounds: int, date: str) -> str:
    """Everything that was measured, raw."""
    rows = {
        each.row.key: {
            "title": each.row.title,
            "amount": each.amount,
            "bytes": each.row.bytes_of(each.amount),
            "baseline": each.row.baseline,
            "failures": each.failures,
            "samples": {name: [None if one is None else _plain(one) for one in found] for name, found in each.samples.items()},
        }
        for each in outcomes
    }
    goals = [
        {"row": each.row.key, "what": each.goal.what, "at_most": each.goal.most, "found": each.found, "verdict": each.verdict}
        for each in judge(outcomes)
    ]
    return json.dumps({"format": FORMAT, "date": date, "machine": machine, "rounds": rounds, "goals": goals, "rows": rows}, indent=1) + "\n"


def _plain(sample: Sample) -> dict[str, Any]:
    return {"wall": sample.wall, "cpu": sample.cpu, "peak": sample.peak, "inside": sample.inside}


def of_json(written: str) -> tuple[list[Outcome], dict[str, Any], int, str]:
    """What `to_json` wrote."""
    found = json.loads(written)
    rows = {row.key: row for row in ROWS}
    outcomes = [
        Outcome(
            rows[key],
            [],
            each["amount"],
            {name: [None if one is None else Sample(**one) for one in samples] for name, samples in each["samples"].items()},
            each["failures"],
        )
        for key, each in found["rows"].items()
        if key in rows
    ]
    return outcomes, found["machine"], found["rounds"], found["date"]


# -- the README ------------------------------------------------------------------------------------------------------------------


def readme_part(outcomes: Sequence[Outcome], machine: Mapping[str, Any], rounds: int, date: str, picture: str) -> str:
    shown = [each for each in outcomes if each.row in PEERS]
    parts = [
        BEGIN,
        f"Medians of {rounds} interleaved rounds on {date} ({_amounts(outcomes, rounds)}). {machine_line(machine)}",
        '"In-proc" is the transfer alone, in a program that is running already; of programs it is the whole process.',
        goals_table(judge(outcomes)),
        f"![Throughput, processor time and memory]({picture})",
    ]
    for outcome in shown:
        parts += [f"{outcome.row.title[0].upper()}{outcome.row.title[1:]}:", row_table(outcome)]
    return "\n\n".join([*parts, END])


def write_readme(readme: Path, part: str) -> None:
    """Replace what is between the markers."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} has no place for the table: {BEGIN} ... {END}")
    readme.write_text(before + part + after, encoding="utf-8")


def today() -> str:
    return datetime.now(UTC).date().isoformat()
