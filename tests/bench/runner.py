"""Runs rows: round after round, in each round every contender of every row once, in another order each time."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.contenders import Contender, missing
from tests.bench.machine import MIB, clients_cores
from tests.bench.rows import Row, Sample, sample_of
from tests.bench.stage import Stage

WARM_UP = 1 / 16
PARTS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the bytes: fewer bytes rather than fewer rounds
PATIENCE = 120.0  # seconds for one run


class RunFailed(Exception):
    """A contender did not do its work."""


@dataclass
class Outcome:
    """The samples of one row: a list per contender, a place per round; None where it failed."""

    row: Row
    contenders: list[Contender]
    amount: int = 0
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def whole_rounds(self) -> list[dict[str, Sample]]:
        """The rounds, each with those who finished it."""
        count = max(map(len, self.samples.values()), default=0)
        return [
            {name: sample for name, found in self.samples.items() if number < len(found) and (sample := found[number]) is not None}
            for number in range(count)
        ]


def _environment(stage: Stage, row: Row) -> dict[str, str]:
    """Without proxies and credentials of whoever runs the benchmark; with bytecode, as everything that is installed has it."""
    foreign = {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "krb5ccname", "krb5_config"}
    foreign |= {"requests_ca_bundle", "curl_ca_bundle", "ssl_cert_file", "ssl_cert_dir", "pythonpath", "pythondontwritebytecode"}
    own = {name: value for name, value in os.environ.items() if name.lower() not in foreign}
    return {**own, "XDG_STATE_HOME": str(stage.scratch), **row.environment(stage)}


def run(stage: Stage, row: Row, contender: Contender, amount: int, *, compare: bool = False) -> Sample:
    """One run; `compare`: look at every byte it wrote, else at the lengths only.

    Raises:
        RunFailed: with what it said.
    """
    stage.clear()
    task = row.task(stage, contender, amount)
    report = stage.disk / "report"
    command = [str(stage.tools / "meter"), str(report), clients_cores(), *contender.command(task)]
    try:
        done = subprocess.run(
            command, env=_environment(stage, row), capture_output=True, text=True, check=True, timeout=PATIENCE, cwd=stage.scratch
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"not done after {PATIENCE:g} seconds") from None
    inside = json.loads(done.stdout.splitlines()[-1]) if done.stdout.startswith("{") else None
    sample, status = sample_of(report.read_text(), inside)
    if status:
        raise RunFailed(f"exit code {status}: {done.stderr.strip()[-300:]}")
    for name, (_, path) in zip(task.served, task.files, strict=False):
        _check(stage.www / name, path, compare)
    return sample


def _check(source: Path, path: Path, compare: bool) -> None:
    if not path.exists() or path.stat().st_size != source.stat().st_size:
        raise RunFailed(f"{path.name} is not whole")
    if compare and subprocess.run(["cmp", "-s", str(source), str(path)], check=False).returncode:
        raise RunFailed(f"{path.name} has other bytes than it should")


def play(
    stage: Stage, rows: Sequence[Row], *, rounds: int, seconds: float, full: bool, say: Callable[[str], object]
) -> tuple[list[Outcome], int]:
    """All rows, in about so many seconds: as many bytes as that allows.

    Returns:
        The outcomes, and the rounds that were made: fewer than asked for when the machine became slower on the way.
    """
    end = time.monotonic() + seconds
    outcomes = [Outcome(row, [each for each in row.contenders if not missing(each)]) for row in rows]
    costs = [_warm_up(stage, outcome, say) for outcome in outcomes]
    part = 1.0 if full else _part(costs, rounds, end - time.monotonic())
    for outcome in outcomes:
        outcome.amount = outcome.row.amount(part if outcome.row.scales else 1.0)
    made = 0
    for number in range(rounds):
        begin = time.monotonic()
        for outcome in outcomes:
            if number % outcome.row.every == 0:
                _play_round(stage, outcome, number // outcome.row.every, say)
        made += 1
        took = time.monotonic() - begin
        say(f"round {made} of {rounds}: {took:.0f} s")
        if made < rounds and not full and time.monotonic() + took > end + 60:
            say("the machine has become too slow for the other rounds")
            break
    return outcomes, made


def _warm_up(stage: Stage, outcome: Outcome, say: Callable[[str], object]) -> tuple[float, float]:
    """A first small run of everybody, which also says who cannot take part.

    Returns:
        Seconds of a round that grow with the bytes (of the whole amount), and those that do not; of a row that is not in every
        round its share.
    """
    growing = fixed = 0.0
    row, amount = outcome.row, outcome.row.amount(WARM_UP if outcome.row.scales else 1.0)
    grow = row.full / amount if row.scales else 1.0
    for contender in list(outcome.contenders):
        stage.clear()
        row.task(stage, contender, amount)  # what the stage makes once, for this row or for all, is no part of a round
        row.environment(stage)
        begin = time.monotonic()
        try:
            sample = run(stage, row, contender, amount, compare=True)
        except RunFailed as error:
            say(f"{row.key}: {contender.name} is left out: {error}")
            outcome.failures[contender.name] = str(error)
            outcome.contenders.remove(contender)
            continue
        took = time.monotonic() - begin
        growing += sample.own_wall * grow if row.scales else 0.0
        fixed += took - sample.own_wall if row.scales else took
        outcome.samples[contender.name] = []
    return growing / row.every, fixed / row.every


def _part(costs: Sequence[tuple[float, float]], rounds: int, seconds: float) -> float:
    growing, fixed = (sum(each) * rounds for each in zip(*costs, strict=True))
    return next((part for part in PARTS if growing * part + fixed <= seconds), PARTS[-1])


def _play_round(stage: Stage, outcome: Outcome, number: int, say: Callable[[str], object]) -> None:
    turn = number % max(1, len(outcome.contenders))
    for contender in [*outcome.contenders[turn:], *outcome.contenders[:turn]]:
        try:
            sample = run(stage, outcome.row, contender, outcome.amount)
        except RunFailed as error:
            say(f"{outcome.row.key}: {contender.name} failed: {error}")
            outcome.failures[contender.name] = str(error)
            outcome.samples[contender.name].append(None)
        else:
            outcome.samples[contender.name].append(sample)


def mib_per_second(outcome: Outcome, sample: Sample) -> float:
    return outcome.row.bytes_of(outcome.amount) / MIB / sample.own_wall
