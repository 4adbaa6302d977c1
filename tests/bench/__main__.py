"""`python -m tests.bench`: the benchmark. It measures and reports; it passes no judgement by its exit code.

--only plain,tls    some rows (plain, disk, tls, small, jobs, memory, queue, line, limit-1, limit-100, kerberos, identities; and
                    plain-peers, tls-peers, small-peers: everybody, with less to do)
--rounds 3          how often (7)
--seconds 500       about how long: the amount of bytes is chosen for it
--full              the whole amounts, however long it takes
--readme            no new measurement: write the last one into README.md and docs/
"""

import argparse
import sys
from pathlib import Path

from tests.bench import plot, report
from tests.bench.machine import describe
from tests.bench.rows import PEERS, ROWS, Row
from tests.bench.runner import Outcome, play
from tests.bench.stage import Stage

ROOT = Path(__file__).parents[2]
RESULT = ROOT / ".make/bench"
PICTURE = "docs/benchmark.svg"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen(only: str | None) -> list[Row]:
    keys = {row.key: row for row in ROWS}
    wanted = list(keys) if only is None else [key.strip() for key in only.split(",")]
    if unknown := [key for key in wanted if key not in keys]:
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(keys)}")
    rows = [keys[key] for key in wanted]
    for row in rows:
        if (why := row.missing()) is not None:
            say(f"{row.key} is left out: {why}")
    return [row for row in rows if row.missing() is None]


def picture(outcomes: list[Outcome], rounds: int, date: str) -> str:
    drawn = [each for each in outcomes if each.row in PEERS]
    return plot.draw(drawn, f"bits_async and others on loopback, medians of {rounds} rounds, {date}")


def measure(options: argparse.Namespace) -> None:
    with Stage() as stage:
        machine = describe(stage.disk)
        outcomes, rounds = play(stage, chosen(options.only), rounds=options.rounds, seconds=options.seconds, full=options.full, say=say)
    date = report.today()
    RESULT.mkdir(parents=True, exist_ok=True)
    written = report.text(outcomes, machine, rounds, date)
    (RESULT / "result.md").write_text(written, encoding="utf-8")
    (RESULT / "result.json").write_text(report.to_json(outcomes, machine, rounds, date), encoding="utf-8")
    (RESULT / "result.svg").write_text(picture(outcomes, rounds, date), encoding="utf-8")
    print(written)
    say(f"result.md, result.json and result.svg are in {RESULT.relative_to(ROOT)}")


def show_in_readme() -> None:
    try:
        written = (RESULT / "result.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit("nothing was measured yet: run `make bench` first") from None
    outcomes, machine, rounds, date = report.of_json(written)
    (ROOT / PICTURE).write_text(picture(outcomes, rounds, date), encoding="utf-8")
    (ROOT / "docs/benchmark.json").write_text(written, encoding="utf-8")
    report.write_readme(ROOT / "README.md", report.readme_part(outcomes, machine, rounds, date, PICTURE))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="The benchmark.")
    parser.add_argument("--only", metavar="ROW,ROW")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    if options.readme:
        show_in_readme()
    else:
        measure(options)


if __name__ == "__main__":
    main()
