"""What the user sees of a transfer."""

import io
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from bits_async import ErrorCode, JobState, LocalFileError, Progress
from bits_async.cli.progress import Bar, JsonLines, Reporter, error_as_dict, reporter


def event(state: JobState, done: int, total: int | None = 100) -> Progress:
    return Progress(
        time=datetime.now(UTC),
        job_id=uuid4(),
        state=state,
        bytes_total=total,
        bytes_transferred=done,
        files_total=1,
        files_transferred=0,
    )


def test_json_lines_end_with_the_outcome() -> None:
    written = io.StringIO()
    lines = JsonLines(written)
    lines.progress(event(JobState.TRANSFERRING, 5))
    lines.done(Path("/some/file"))
    first, last = map(json.loads, written.getvalue().splitlines())
    assert (first["event"], first["state"], first["bytes_transferred"]) == ("Progress", "TRANSFERRING", 5)
    assert (last["event"], last["path"]) == ("Done", "/some/file")


def test_an_error_has_all_its_fields_in_json() -> None:
    error = LocalFileError("no room", code=ErrorCode.ERROR_DISK_FULL, path="/full/file", identity="alice", job_id=uuid4())
    written = error_as_dict(error)
    assert written["code"] == "0x80070070"
    assert written["name"] == "ERROR_DISK_FULL"
    assert (written["context"], written["identity"], written["path"]) == ("LOCAL_FILE", "alice", "/full/file")
    assert written["advice"]
    json.dumps(written)


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter("file", as_json=False) as report:
        assert type(report) is Reporter
        report.progress(event(JobState.TRANSFERRING, 5))
        report.done(Path("file"))
    assert capsys.readouterr() == ("", "")


def test_t14_the_bar_shows_a_name_as_text(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with Bar("[red]name\x1b]0;title\x07") as bar:
        bar.progress(event(JobState.CONNECTING, 0, None))
        bar.progress(event(JobState.TRANSFERRING, 50, 200))
        bar.progress(event(JobState.TRANSFERRED, 200, 200))
        bar.done(Path("file"))
    shown = capfd.readouterr().err
    assert "\x1b]0" not in shown
    assert "[red]name\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "200/200 bytes" in shown


def test_a_size_that_is_not_known_is_not_made_up(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bar("file") as bar:
        bar.progress(event(JobState.CONNECTING, 0, None))
    assert "0/? bytes" in capfd.readouterr().err


def test_what_an_earlier_run_fetched_does_not_count_for_the_speed() -> None:
    with Bar("file") as bar:
        bar.progress(event(JobState.QUEUED, 10**9, 2 * 10**9))
        bar.progress(event(JobState.TRANSFERRING, 10**9, 2 * 10**9))
        (task,) = bar._bar.tasks
        assert task.completed == 10**9
        assert not task.speed


def test_a_waiting_transfer_says_that_it_will_try_again(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Bar("file") as bar:
        bar.progress(event(JobState.TRANSIENT_ERROR, 10))
        bar.stopping()
    assert "try again" in capfd.readouterr().err


def test_json_is_flushed_line_by_line() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "w", encoding="utf-8") as sink:
        JsonLines(sink).interrupted("SIGTERM")
        assert json.loads(source.readline())["signal"] == "SIGTERM"
