"""The network lost and back, as a job sees it: it waits for the event and not for a while, and goes on at once.

Fake networks for the rules; at the end a real cable, pulled while a real file is on its way.
"""

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

import bits_async as bits
from bits_async import ErrorCode, JobPriority, JobState, WaitingReason
from bits_async.testing import FakeNetwork
from bits_async.transport.network import Connectivity
from tests.waiting import let_things_happen, until

S = JobState
ROOT = Path(__file__).parents[2]
URL, OTHER = "https://h.test/file", "https://other.test/file"
BODY = bytes(range(256)) * 1024
DEADLINE = 10.0


class Reach:
    """A machine whose network is what the test says: which hosts may be reached, and when that is told."""

    def __init__(self) -> None:
        self.connected = True
        self.hosts: set[str] = set()
        self.asked: list[str] = []
        self.slow: asyncio.Event | None = None
        self.news: asyncio.Queue[bool] = asyncio.Queue()

    async def changed(self) -> bool:
        return await self.news.get()

    async def reaches(self, host: str) -> bool:
        self.asked.append(host)
        if self.slow is not None:
            await self.slow.wait()
        return self.connected or host in self.hosts

    def lose(self) -> None:
        self.connected = False
        self.news.put_nowait(False)

    def find(self) -> None:
        self.connected = True
        self.news.put_nowait(True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        pass


class Servers(FakeNetwork):
    """Servers that answer whatever the machine believes of its network."""

    def __init__(self) -> None:
        super().__init__()
        self.reach: Reach | None = None

    def _watch(self) -> Connectivity:
        return self.reach or super()._watch()


@pytest.fixture
def network() -> Iterator[Servers]:
    with Servers() as fake:
        fake.clock.freeze()
        for url in (URL, OTHER):
            fake.serve(url, BODY)
        yield fake


@pytest.fixture
async def manager(network: Servers, tmp_path: Path) -> AsyncIterator[bits.BitsManager]:
    async with bits.BitsManager(store=tmp_path / "queue.db") as opened:
        yield opened


@pytest.fixture
def reach(network: Servers) -> Reach:
    """To be asked for before `manager`."""
    network.reach = Reach()
    return network.reach


async def a_job(manager: bits.BitsManager, path: Path, *urls: str, priority: JobPriority = JobPriority.NORMAL) -> bits.Job:
    job = await manager.create_job("a job", priority=priority)
    for url in urls or (URL,):
        await job.add_file(url, path / f"{job.id.hex}-{len(job.files)}")
    return job


def waits_for_the_network(job: bits.Job) -> bool:
    return job.state is S.TRANSIENT_ERROR and job.waiting is not None and job.waiting.reason is WaitingReason.NETWORK


def assert_disconnected(job: bits.Job) -> None:
    assert waits_for_the_network(job), (job, job.waiting)
    assert job.waiting is not None
    assert job.waiting.until is None
    assert str(job.waiting) == "waiting for the network"
    assert job.error is not None
    assert isinstance(job.error, bits.NetworkError)
    assert (job.error.code, job.error.context) == (ErrorCode.BG_E_NETWORK_DISCONNECTED, bits.ErrorContext.GENERAL_TRANSPORT)
    assert job.error.advice == "the job goes on by itself when the network is back"


async def test_every_job_that_needs_the_network_waits_for_it_and_goes_on_at_once(
    network: Servers, manager: bits.BitsManager, tmp_path: Path
) -> None:
    network.pause(after=1000)
    running = await a_job(manager, tmp_path)
    await running.resume()
    await until(lambda: running.state is S.TRANSFERRING)
    network.pause(after=0)
    connecting = await a_job(manager, tmp_path, priority=JobPriority.FOREGROUND)
    await connecting.resume()
    await until(lambda: len(network.requests) == 2)
    queued = await a_job(manager, tmp_path, priority=JobPriority.LOW)
    await queued.resume()
    jobs = [running, connecting, queued]
    assert [job.state for job in jobs] == [S.TRANSFERRING, S.CONNECTING, S.QUEUED]
    network.disconnect()
    await until(lambda: all(waits_for_the_network(job) for job in jobs))
    for job in jobs:
        assert_disconnected(job)
        assert job.error_count == 1
    there = running.progress.bytes_transferred
    network.clock.advance(100_000)
    await let_things_happen()
    assert len(network.requests) == 2, "nobody knocks while there is no network"
    network.resume()
    network.reconnect()
    for job in jobs:
        await job.wait()
    assert network.clock.monotonic() == 100_000, "no moment had to come"
    assert next(request for request in network.requests[2:] if request.start).start == there, "where it was"
    assert all(file.temporary_name and file.temporary_name.read_bytes() == BODY for job in jobs for file in job.files)


async def test_a_network_that_comes_back_ends_every_retry_delay(network: Servers, manager: bits.BitsManager, tmp_path: Path) -> None:
    network.serve(URL, b"", status=503)
    job = await a_job(manager, tmp_path)
    await job.resume()
    await until(lambda: job.state is S.TRANSIENT_ERROR)
    network.serve(URL, BODY)
    network.disconnect()
    await let_things_happen()
    assert job.waiting is not None
    assert job.waiting.reason is WaitingReason.RETRY, "its server had answered: this error is another one"
    network.reconnect()
    await job.wait()
    assert network.clock.monotonic() == 0


async def test_a_network_that_was_lost_and_is_back_before_anybody_looks_ends_them_too(
    network: Servers, manager: bits.BitsManager, tmp_path: Path
) -> None:
    network.serve(URL, b"", status=503)
    job = await a_job(manager, tmp_path)
    await job.resume()
    await until(lambda: job.state is S.TRANSIENT_ERROR)
    network.serve(URL, BODY)
    network.disconnect()
    network.reconnect()
    await job.wait()


async def test_a_job_resumed_without_a_network_waits_for_it(network: Servers, manager: bits.BitsManager, tmp_path: Path) -> None:
    network.disconnect()
    job = await a_job(manager, tmp_path)
    for count in (1, 2):
        await job.resume()
        await until(lambda count=count: job.error_count == count)  # type: ignore[misc]
        assert_disconnected(job)
    assert network.requests == []
    await job.suspend()
    network.reconnect()
    await let_things_happen()
    assert job.state is S.SUSPENDED
    await job.resume()
    await job.wait()


async def test_a_job_does_not_wait_for_the_network_longer_than_its_no_progress_timeout(
    network: Servers, manager: bits.BitsManager, tmp_path: Path
) -> None:
    job = await a_job(manager, tmp_path)
    await job.set_no_progress_timeout(1000)
    network.disconnect()
    await job.resume()
    await until(lambda: waits_for_the_network(job))
    await let_things_happen()
    network.clock.advance(999)
    await let_things_happen()
    assert waits_for_the_network(job)
    network.clock.advance(1)
    await until(lambda: job.state is S.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_NO_PROGRESS
    assert "BG_E_NETWORK_DISCONNECTED" in job.error.message
    network.reconnect()
    await let_things_happen()
    assert job.state is S.ERROR
    await job.resume()
    await job.wait()


async def test_the_longest_timeouts_that_a_job_may_have_end_in_no_other_century(
    network: Servers, manager: bits.BitsManager, tmp_path: Path
) -> None:
    job = await a_job(manager, tmp_path)
    for set_seconds in (job.set_no_progress_timeout, job.set_minimum_retry_delay, job.set_maximum_download_time):
        await set_seconds(2**32 - 1)
    network.disconnect()
    await job.resume()
    await until(lambda: waits_for_the_network(job))
    network.reconnect()
    await job.wait()


async def test_with_no_progress_timeout_0_a_lost_network_is_fatal(network: Servers, manager: bits.BitsManager, tmp_path: Path) -> None:
    job = await a_job(manager, tmp_path)
    await job.set_no_progress_timeout(0)
    network.disconnect()
    await job.resume()
    await until(lambda: job.state is S.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_NETWORK_DISCONNECTED


async def test_a_job_that_waited_for_the_network_looks_for_it_when_the_journal_is_opened(network: Servers, tmp_path: Path) -> None:
    network.disconnect()
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await a_job(manager, tmp_path)
        await job.resume()
        await until(lambda: waits_for_the_network(job))
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.get_job(job.id)
        await until(lambda: waits_for_the_network(job))
    network.reconnect()
    async with bits.BitsManager(store=tmp_path / "queue.db", run=False) as manager:
        job = await manager.get_job(job.id)
        assert_disconnected(job)
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        await (await manager.get_job(job.id)).wait()
    assert network.clock.monotonic() == 0


async def test_a_host_that_needs_no_network_is_not_held_up(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    reach.hosts.add("h.test")
    reach.lose()
    near, far = await a_job(manager, tmp_path), await a_job(manager, tmp_path, OTHER)
    await far.resume()
    await near.resume()
    await near.wait()
    await until(lambda: waits_for_the_network(far))
    assert_disconnected(far)


async def test_a_host_that_comes_into_reach_before_the_network_is_enough_for_its_jobs(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    reach.lose()
    jobs = [await a_job(manager, tmp_path, url, priority=JobPriority.FOREGROUND) for url in (URL, OTHER)]
    for job in jobs:
        await job.resume()
    await until(lambda: all(waits_for_the_network(job) for job in jobs))
    reach.hosts.add("h.test")
    reach.news.put_nowait(True)
    await jobs[0].wait()
    await let_things_happen()
    assert waits_for_the_network(jobs[1])
    assert jobs[1].error_count == 1, "it has not moved"


async def test_each_host_is_asked_for_once_and_the_rest_of_the_queue_does_not_wait_for_the_answer(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    reach.lose()
    await until(reach.news.empty)
    reach.slow = asyncio.Event()
    network.fail(times=100)
    jobs = [await a_job(manager, tmp_path, priority=JobPriority.LOW) for _ in range(5)]
    for job in jobs:
        await job.resume()
    await let_things_happen()
    await jobs.pop().suspend()
    reach.slow.set()
    await until(lambda: all(waits_for_the_network(job) for job in jobs))
    assert len(reach.asked) <= 3, "for the queue, and for the attempts that had failed by then"


async def test_an_attempt_that_fails_because_the_network_went_does_not_wait_for_a_retry(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    network.pause()
    job = await a_job(manager, tmp_path)
    await job.resume()
    await until(lambda: network.requests)
    reach.connected = False  # nobody was told yet
    network.fail(URL)
    network.resume()
    await until(lambda: job.state is S.TRANSIENT_ERROR)
    assert_disconnected(job)
    reach.find()
    await job.wait()
    assert network.clock.monotonic() == 0


async def test_a_network_that_returns_while_its_loss_is_written_down_is_not_missed(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await a_job(manager, tmp_path)
    save = manager._store.save

    async def meanwhile(*changes: object) -> None:
        if job.state is S.CONNECTING and not reach.connected:
            reach.find()
            await let_things_happen()
        await save(*changes)

    network.pause()
    await job.resume()
    await until(lambda: network.requests)
    monkeypatch.setattr(manager._store, "save", meanwhile)
    reach.lose()
    await until(lambda: job.error_count == 1)
    network.resume()
    await job.wait()
    assert network.clock.monotonic() == 0


async def test_a_broken_connection_with_the_network_there_is_tried_again_after_the_delay(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    network.fail(URL)
    job = await a_job(manager, tmp_path)
    await job.resume()
    await until(lambda: job.state is S.TRANSIENT_ERROR)
    assert job.waiting is not None
    assert job.waiting.reason is WaitingReason.RETRY
    assert reach.asked == ["h.test"]


async def test_with_a_proxy_it_is_the_proxy_that_must_be_reached(
    network: Servers, reach: Reach, manager: bits.BitsManager, tmp_path: Path
) -> None:
    reach.hosts.add("proxy.test")
    reach.lose()
    job = await a_job(manager, tmp_path)
    await job.set_proxy_settings(bits.ProxySettings.override(["http://proxy.test:3128"]))
    await job.resume()
    await job.wait()
    assert set(reach.asked) <= {"proxy.test"}


# -- a real cable


SERVER = """
import asyncio, hashlib, sys
BODY = bytes(range(256)) * 16384

async def serve(reader, writer):
    request = (await reader.readuntil(b"\\r\\n\\r\\n")).decode()
    start = int(request.partition("bytes=")[2].partition("-")[0] or 0)
    print("asked", start, flush=True)
    part = f"206 Partial Content\\r\\nContent-Range: bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    head = f"HTTP/1.1 {part if start else '200 OK'}\\r\\n"
    writer.write(f'{head}ETag: "v1"\\r\\nContent-Length: {len(BODY) - start}\\r\\n\\r\\n'.encode())
    writer.write(BODY[start:] if start else BODY[:1 << 20])  # the first answer stops in the middle
    await writer.drain()
    await asyncio.sleep(60)

async def main():
    sys.stdin.readline()  # the cable is there
    async with await asyncio.start_server(serve, "192.0.2.1", 8080):
        print("serving", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

asyncio.run(main())
"""

CLIENT = """
import asyncio, hashlib, pathlib, sys
import bits_async

async def main():
    out = pathlib.Path(sys.argv[1])
    sys.stdin.readline()
    async with bits_async.BitsManager(store=out / "queue.db") as manager:
        job = await manager.create_job("over a cable")
        await job.add_file("http://192.0.2.1:8080/file", out / "file")
        await job.resume()
        told = None
        async for event in job.events():
            progress = event.progress.bytes_transferred if isinstance(event, bits_async.JobChanged) else 0
            if isinstance(event, bits_async.Progress) and event.bytes_transferred >= 1 << 20 and told is None:
                told = event.bytes_transferred
                print("arrived", told, flush=True)
            if isinstance(event, bits_async.JobChanged):
                print(event.state.name, event.waiting.reason.name if event.waiting else "-", flush=True)
        await job.complete()
    print("sha256", hashlib.sha256((out / "file").read_bytes()).hexdigest(), flush=True)

asyncio.run(main())
"""


class Machine:
    """A process in a network namespace of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, script: str, *arguments: str) -> AsyncIterator[Self]:
        pipe, env = asyncio.subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}
        command = ("unshare", "--net", sys.executable, "-c", script, *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=env)
        try:
            yield cls(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def ip(self, *commands: str) -> None:
        target = f"--net=/proc/{self.process.pid}/ns/net"
        program = await asyncio.create_subprocess_exec("nsenter", target, "ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
        await program.communicate("".join(f"{command}\n" for command in commands).encode())
        assert program.returncode == 0

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def says(self, word: str) -> list[str]:
        """The next line that begins with this word."""
        assert self.process.stdout is not None
        while line := (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().split():
            if line[0] == word:
                return line
        raise AssertionError(f"it ended before it said {word}")


@pytest.mark.privileged
async def test_a_cable_that_is_pulled_and_put_back_costs_the_time_it_was_out(tmp_path: Path) -> None:
    async with Machine.running(SERVER) as far, Machine.running(CLIENT, str(tmp_path)) as near:
        await asyncio.sleep(0)
        await ready(far, near)
        await near.ip("link set lo up", f"link add near type veth peer name far netns {far.process.pid}")
        await far.ip("addr add 192.0.2.1/24 dev far", "link set far up")
        await near.ip("addr add 192.0.2.2/24 dev near", "link set near up")
        far.go_on()
        await far.says("serving")
        near.go_on()
        await near.says("arrived")
        await far.ip("link set far down")
        assert (await near.says("TRANSIENT_ERROR"))[1] == "NETWORK"
        await far.ip("link set far up")
        assert (await near.says("QUEUED"))[1] == "QUEUE"
        digest = (await near.says("sha256"))[1]
        assert digest == hashlib.sha256(bytes(range(256)) * 16384).hexdigest()
        assert [(await far.says("asked"))[1] for _ in range(2)] == ["0", str(1 << 20)]


async def ready(*machines: Machine) -> None:
    """They have left our own namespace."""
    ours = os.readlink("/proc/self/ns/net")
    await until(lambda: all(os.readlink(f"/proc/{each.process.pid}/ns/net") != ours for each in machines))
