import asyncio
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from bits_async.errors import ManagerClosed
from bits_async.jobs.model import JobProgress, JobState
from bits_async.jobs.notify import UNREAD_EVENTS, EventsLost, EventStream, JobChanged, Progress, Retrying

JOB = uuid4()
NOW = datetime(2030, 1, 1, tzinfo=UTC)
CLOSED = ManagerClosed()


def changed(state=JobState.TRANSFERRING):
    return JobChanged(time=NOW, job_id=JOB, state=state, waiting=None, error=None, progress=JobProgress(None, 0, 1, 0))


def progress(n):
    return Progress(
        time=NOW, job_id=JOB, state=JobState.TRANSFERRING, bytes_total=9, bytes_transferred=n, files_total=1, files_transferred=0
    )


def retrying(n):
    return Retrying(time=NOW, job_id=JOB, number=n, delay=0.2, error=CLOSED)


def stream(**over):
    async def snapshot(_):
        return changed()

    options = {"wants": lambda _: True, "snapshot": snapshot, "ends": lambda s: s.is_settled, "closed": lambda _: None}
    return EventStream(**{**options, **over})


async def test_unread_progress_is_merged_and_keeps_its_place():
    s = stream()
    for event in (changed(), progress(1), progress(2), retrying(1), progress(3), progress(4), changed(JobState.TRANSFERRED)):
        s.publish(event)
    assert [e async for e in s] == [changed(), progress(2), retrying(1), progress(4), changed(JobState.TRANSFERRED)]


async def test_a_slow_reader_learns_how_many_events_it_lost_and_how_the_job_stands():
    s = stream()
    for n in range(UNREAD_EVENTS + 5):
        s.publish(retrying(n))
    first, second = await anext(s), await anext(s)
    assert isinstance(first, EventsLost)
    assert first.count == UNREAD_EVENTS + 5
    assert second == changed()
    s.publish(retrying(7))
    assert await anext(s) == retrying(7)


async def test_a_stream_ends_after_a_settled_state_and_tells_who_made_it():
    gone = []
    s = stream(closed=gone.append)
    s.publish(changed(JobState.ERROR))
    s.publish(progress(1))
    assert [e async for e in s] == [changed(JobState.ERROR)]
    assert gone == [s]


async def test_closing_wakes_a_waiting_reader():
    s = stream()
    reader = asyncio.ensure_future(anext(s, None))
    await asyncio.sleep(0)
    await s.aclose()
    assert await reader is None


async def test_a_failure_of_the_engine_reaches_the_reader_once():
    s = stream()
    s.publish(changed())
    s.finish(ManagerClosed())
    assert await anext(s) == changed()
    with pytest.raises(ManagerClosed):
        await anext(s)
    with pytest.raises(StopAsyncIteration):
        await anext(s)


def test_events_become_plain_values_for_json():
    import json

    text = json.dumps([e.as_dict() for e in (changed(), progress(1), retrying(1), EventsLost(time=NOW, job_id=JOB, count=3))])
    assert '"event": "JobChanged"' in text
    assert str(JOB) in text
