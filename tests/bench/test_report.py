"""What the benchmark says of its samples. No clock, no server: the samples are given."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.bench import plot, report
from tests.bench.contenders import CURL, OURS
from tests.bench.machine import GIB, MIB
from tests.bench.rows import ROWS, Sample
from tests.bench.runner import Outcome

PLAIN = next(row for row in ROWS if row.key == "plain")
MACHINE = {"processor": "a <fast> one", "cores": 2, "memory_gib": 4, "kernel": "6.1", "python": "3.11", "disk": "ext4"}
MACHINE |= {"load_at_start": 0.5, "versions": {"curl": "7.88"}}  # type: ignore[dict-item]


def outcome(samples: Mapping[str, list[Sample | None]]) -> Outcome:
    return Outcome(PLAIN, [], GIB, dict(samples))


def sample(whole: float, /, **inside: float) -> Sample:
    return Sample(whole, 1.0, 10 * MIB, {"cpu": 1.0, **inside} if inside else None)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    """A machine that is slow for a round is slow for both sides."""
    found = outcome(
        {OURS.name: [sample(9, wall=5), sample(9, wall=0.6), sample(9, wall=0.5)], CURL.name: [sample(10), sample(1), sample(1)]}
    )
    ours = next(each for each in report.figures(found) if each.name == OURS.name)
    assert ours.wall_ratio == 0.5
    assert (ours.own_wall, ours.wall) == (0.6, 9)


def test_a_goal_is_judged_by_the_transfer_alone_and_says_met_or_missed():
    found = outcome({OURS.name: [sample(9, cpu=0.9, wall=0.7)], CURL.name: [sample(1)]})
    verdicts = {each.goal.what: each.verdict for each in report.judge([found])}
    assert verdicts["wall, to curl"] == "met"
    assert verdicts["CPU, to curl"] == "missed"
    assert verdicts["wall, to the C splice program"] == "not measured"


def test_a_round_in_which_one_failed_says_nothing_of_it_and_the_others_count():
    found = outcome({OURS.name: [None, sample(9, wall=0.5)], CURL.name: [sample(1), sample(1)]})
    assert next(each for each in report.figures(found) if each.name == OURS.name).wall_ratio == 0.5


def test_what_is_written_for_programs_can_be_read_and_reported_again():
    found = outcome({OURS.name: [None, sample(9, wall=0.5)], CURL.name: [sample(1), sample(1)]})
    written = report.to_json([found], MACHINE, 2, "2026-11-22")
    outcomes, machine, rounds, date = report.of_json(written)
    assert report.text(outcomes, machine, rounds, date) == report.text([found], MACHINE, 2, "2026-11-22")


def test_the_readme_changes_between_its_markers_only(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n\n{report.BEGIN}\nold\n{report.END}\n\nbelow\n", encoding="utf-8")
    part = report.readme_part([outcome({CURL.name: [sample(1)]})], MACHINE, 1, "2026-11-22", "docs/benchmark.svg")
    report.write_readme(readme, part)
    assert readme.read_text(encoding="utf-8") == f"above\n\n{part}\n\nbelow\n"
    assert "old" not in part
    report.write_readme(readme, part)  # and again
    with pytest.raises(SystemExit):
        readme.write_text("no place\n", encoding="utf-8")
        report.write_readme(readme, part)


def test_the_readme_of_this_project_has_a_place_for_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert readme.index(report.BEGIN) < readme.index(report.END)


def test_the_picture_is_well_formed_and_names_everybody():
    found = outcome({OURS.name: [sample(9, wall=0.5)], CURL.name: [sample(1)]})
    root = ET.fromstring(plot.draw([found], 'a caption with <&">'))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {OURS.name, CURL.name, PLAIN.title} <= set(words)


def test_every_goal_speaks_of_contenders_that_are_in_its_row():
    everybody = {each.name: sample(1, wall=1, resident=1, rate=1) for row in ROWS for each in row.contenders}
    for row in ROWS:
        own = {each.name: everybody[each.name] for each in row.contenders}
        assert row.baseline in own
        for goal in row.goals:
            goal.figure(own)
