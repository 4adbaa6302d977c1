import itertools

import pytest

from bits_async.errors import InvalidState
from bits_async.jobs.model import NEXT, Command, JobState, Outcome, advance, mermaid

S = JobState

# BITS's own words ("Life Cycle of a BITS Job"), independent of the table
COMMANDS = {
    (Command.RESUME, S.SUSPENDED): S.QUEUED,
    (Command.RESUME, S.ERROR): S.QUEUED,
    (Command.RESUME, S.TRANSIENT_ERROR): S.QUEUED,
    (Command.RESUME, S.QUEUED): S.QUEUED,
    (Command.RESUME, S.CONNECTING): S.CONNECTING,
    (Command.RESUME, S.TRANSFERRING): S.TRANSFERRING,
    (Command.RESUME, S.TRANSFERRED): S.TRANSFERRED,
    **{(Command.SUSPEND, s): S.SUSPENDED for s in S if not s.is_final and s is not S.TRANSFERRED},
    **{(Command.CANCEL, s): S.CANCELLED for s in S if not s.is_final},
    **{(Command.COMPLETE, s): S.ACKNOWLEDGED for s in S if not s.is_final},
}


@pytest.mark.parametrize(("command", "state"), [p for p in itertools.product(Command, S) if p[0] is not Command.RESUME_UNFINISHED])
def test_every_command_in_every_state_does_what_bits_says_or_is_refused(command, state):
    expected = COMMANDS.get((command, state))
    if expected is None:
        with pytest.raises(InvalidState, match=state.name):
            advance(state, command)
    else:
        assert advance(state, command) is expected


@pytest.mark.parametrize("event", [*Command, *Outcome])
@pytest.mark.parametrize("state", [S.ACKNOWLEDGED, S.CANCELLED])
def test_a_final_state_is_never_left(state, event):
    with pytest.raises(InvalidState):
        advance(state, event)


def test_a_transferred_job_with_a_new_file_goes_back_to_the_queue():
    assert advance(S.TRANSFERRED, Command.RESUME_UNFINISHED) is S.QUEUED


def test_every_state_can_be_reached_and_every_unfinished_one_left():
    assert set(NEXT.values()) == set(S)
    assert {before for before, _ in NEXT} == {s for s in S if not s.is_final}


def test_only_active_jobs_yield_and_only_waiting_ones_retry():
    assert {s for (s, e) in NEXT if e is Outcome.YIELDED} == {S.CONNECTING, S.TRANSFERRING}
    assert {s for (s, e) in NEXT if e is Outcome.RETRY_DUE} == {S.TRANSIENT_ERROR}


def test_the_diagram_has_one_line_for_each_row_that_changes_the_state():
    lines = mermaid().splitlines()
    rows = {(a, e): b for (a, e), b in NEXT.items() if a is not b and e is not Command.RESUME_UNFINISHED}
    assert len(lines) == len(rows) + 5  # that one is drawn where it leads elsewhere than RESUME
    assert "    TRANSFERRED --> QUEUED: RESUME_UNFINISHED" in lines
    assert "    TRANSFERRED --> ACKNOWLEDGED: COMPLETE" in lines
