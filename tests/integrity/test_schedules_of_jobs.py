"""The same promise where a job has several files at once, each in several ranges at once, with digests that the caller or the server
gives, behind redirects and TLS: each destination is absent, or byte for byte one version that the server served, and of the digest that
the caller gave; and all of them are there if and only if the job says so."""

import asyncio
import hashlib
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bits_async as bits
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.certificates import Authority, ServerTls
from tests.integrity.schedules import CHANGED, DATED, Content, Row, Schedule, quiet, schedules
from tests.integrity.stage import Outcome, Stage
from tests.integrity.test_schedules import MEMORY, NO_TLS, Crash, small_scale  # noqa: F401 - a fixture of this module too


@dataclass(frozen=True)
class Way:
    """How the client is asked, and how its server is found.

    Attributes:
        segments, files_at_once: the job's settings.
        files: how many it has.
        digest: the caller gives that of this version; None: none.
        told: the field of RFC 9530 that the server tells the truth in.
        redirected, tls: the URL leads to the file by a redirect; the server speaks TLS.
        threads: threads move the bytes.
    """

    segments: int = 1
    files_at_once: int = 1
    files: int = 1
    digest: int | None = None
    told: str | None = None
    redirected: bool = False
    tls: bool = False
    threads: bool = False


ways = st.builds(
    Way,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.none() | st.none() | st.integers(0, 2),
    st.sampled_from([None, None, "Repr-Digest", "Content-Digest"]),
    st.sampled_from([False, False, True]),
    st.sampled_from([False, False, False, True]),
    st.booleans(),
)


@pytest.fixture(autouse=True)
def smaller_scale(small_scale: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811 - the imported fixture
    """Files of 10 kB have ranges, and checkpoints in them."""
    monkeypatch.setattr(transfer, "SEGMENT", 1 << 10)
    monkeypatch.setattr(transfer, "CHECKPOINT_BYTES", 3 << 10)


@pytest.fixture(scope="module")
def tls(authority: Authority) -> tuple[ServerTls, ssl.SSLContext]:
    return authority.server, ssl.create_default_context(cafile=authority.ca_file)


Tls = tuple[ServerTls, ssl.SSLContext]


class Client:
    """One job, fetched by as many managers as the schedule kills."""

    def __init__(self, stage: Stage, way: Way, place: Path, trust: ssl.SSLContext) -> None:
        self._stage, self._way, self._place, self._trust = stage, way, place, trust
        self.destinations = {name: place / "out" / name[1:] for name in stage.paths}
        self.wanted = {name: self._digest(name) for name in stage.paths}

    def _digest(self, name: str) -> str | None:
        if self._way.digest is None:
            return None
        versions = self._stage.bodies[name]
        return hashlib.sha256(versions[min(self._way.digest, len(versions) - 1)].body).hexdigest()

    async def run(self) -> None:
        """Fetch what is not there.

        Raises:
            BitsError: why it is not there now.
        """
        async with bits.BitsManager(store=self._place / "queue" / "jobs.db", ssl=self._trust) as manager:
            job = await anext(aiter(manager.enum_jobs()), None) or await self._new(manager)
            if job.state is not bits.JobState.TRANSFERRED:
                await job.resume()
            await job.wait(transient=True)
            await job.complete()

    async def _new(self, manager: bits.BitsManager) -> bits.Job:
        job = await manager.create_job("random", priority=bits.JobPriority.FOREGROUND)
        await job.set_segments(self._way.segments)
        await job.set_files_at_once(self._way.files_at_once)
        for name, path in self.destinations.items():
            url = self._stage.url(f"/elsewhere{name}" if self._way.redirected else name)
            await job.add_file(url, path, sha256=self.wanted[name])
        return job


async def one_run(stage: Stage, client: Client, place: Path, aside: Path) -> BaseException | None:
    """Start the client; it ends, or is killed where the schedule says. What it raised, None for nothing."""
    call, killing = asyncio.ensure_future(client.run()), asyncio.ensure_future(stage.killing.wait())
    await asyncio.wait({call, killing}, return_when=asyncio.FIRST_COMPLETED)
    crash = None
    if killing.done() and not call.done():
        for _ in range((stage.row.kill or 0) // 20):
            await asyncio.sleep(0)
        crash = Crash(place, aside) if stage.row.crash else None
        call.cancel()
    killing.cancel()
    await asyncio.wait({call, killing})
    stage.killed()
    if crash is not None:
        crash.put_back()
    return asyncio.CancelledError() if call.cancelled() or crash is not None else call.exception()


def check(stage: Stage, client: Client, raised: BaseException | None) -> None:
    assert raised is None or isinstance(raised, bits.BitsError | asyncio.CancelledError), raised
    for name, path in client.destinations.items():
        if raised is not None and not path.exists():
            continue
        assert raised is None or isinstance(raised, asyncio.CancelledError), "killed while the files got their names"
        assert stage.judge(path, claims_success=True, name=name) in (Outcome.RIGHT, Outcome.PAGE)
        assert client.wanted[name] in (None, hashlib.sha256(path.read_bytes()).hexdigest())
    if raised is None:
        there = [path.name for path in client.destinations.values()]
        assert sorted(os.listdir(next(iter(client.destinations.values())).parent)) == sorted(there), "nothing else is left"


async def play(schedule: Schedule, way: Way, tls: Tls) -> None:
    with tempfile.TemporaryDirectory(prefix="bits-test-", dir=MEMORY) as directory:
        place, aside = Path(directory) / "place", Path(directory) / "aside"
        for each in (place / "out", place / "queue", aside):
            each.mkdir(parents=True, mode=0o700)
        async with Stage(schedule, files=way.files, told=way.told, tls=tls[0] if way.tls else None) as stage:
            client = Client(stage, way, place, tls[1] if way.tls else NO_TLS)
            for _ in range(schedule.runs):
                raised = await one_run(stage, client, place, aside)
                check(stage, client, raised)
                if raised is None:
                    break


def run(schedule: Schedule, way: Way, tls: Tls) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if way.threads:
            patch.setattr(lane, "DETACH_FROM", 1)
        asyncio.run(asyncio.wait_for(play(schedule, way, tls), 60))


def _settings(count: int, *, new: bool = False) -> settings:
    """`new`: others at each run."""
    hushed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=not new, suppress_health_check=hushed)


@pytest.mark.parametrize("fault", ["honest", "If-Range ignored", "200 to a range", "no validator, If-Range ignored"])
@pytest.mark.parametrize("versions", [CHANGED, DATED], ids=["ETag", "date"])
@pytest.mark.parametrize("threads", [False, True], ids=["loop", "threads"])
def test_a_version_that_comes_between_two_ranges_is_never_mixed_in(
    tls: Tls, fault: str, versions: tuple[Content, ...], threads: bool
) -> None:
    for at in (1, 2, 3):
        answers = (*[Row(0)] * at, *[Row(1, fault)] * 3, Row(1))
        run(Schedule(versions, answers, runs=3), Way(segments=3, threads=threads), tls)


@pytest.mark.timeout(600)  # a few seconds on an idle machine
@_settings(100)
@given(quiet | schedules, ways)
def test_random_schedules_of_jobs_end_with_one_version_of_each_file_or_none(tls: Tls, schedule: Schedule, way: Way) -> None:
    run(schedule, way, tls)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@_settings(2500, new=True)
@given(quiet | schedules, ways)
def test_thousands_of_random_schedules_of_jobs_end_with_one_version_of_each_file_or_none(tls: Tls, schedule: Schedule, way: Way) -> None:
    run(schedule, way, tls)
