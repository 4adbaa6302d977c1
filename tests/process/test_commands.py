"""Notification commands as programs that run: as whoever set them and with nothing of the service (T5), and in spite of kill -9."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

import bits_async as bits
from tests.identity import child
from tests.identity.seen import CAPABILITIES, LOOK, Seen
from tests.local_users import LocalUser
from tests.peers import Origin
from tests.waiting import until

SH = "/bin/sh"


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        yield origin


@pytest.fixture
def alice(users: Mapping[str, LocalUser]) -> LocalUser:
    return users["bitsalice"]


@pytest.fixture
def hers(alice: LocalUser, world_dir: Path) -> Path:
    """A directory that only alice may enter."""
    directory = world_dir / "hers"
    directory.mkdir(mode=0o700)
    os.chown(directory, alice.uid, alice.gid)
    return directory


def check(seen: Seen, alice: LocalUser, job_id: str) -> None:
    """All that a command has is alice's, and nothing else is there."""
    assert seen.owner == alice.uid
    assert (seen.status["Uid"], seen.status["Gid"]) == ([str(alice.uid)] * 4, [str(alice.gid)] * 4)
    assert seen.status["Groups"] == [str(alice.gid)]
    bounds = seen.capabilities()["CapBnd"]  # only CAP_SETPCAP empties it
    assert seen.capabilities() == dict.fromkeys(CAPABILITIES, 0) | {"CapBnd": bounds}
    assert seen.status["NoNewPrivs"] == ["1"]
    assert set(seen.environment) == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "BITS_JOB_ID", "BITS_JOB_STATE", "BITS_JOB_ERROR"}
    assert (seen.environment["USER"], seen.environment["BITS_JOB_ID"]) == (alice.name, job_id)
    assert (seen.environment["BITS_JOB_STATE"], seen.environment["BITS_JOB_ERROR"]) == ("TRANSFERRED", "0x00000000")
    assert seen.descriptors == dict.fromkeys(range(3), "/dev/null")


@pytest.mark.privileged
async def test_t05_a_job_s_command_runs_as_its_setter_under_a_root_service(
    origin: Origin, alice: LocalUser, hers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "s3cret")
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("root's, and told to alice")
        await job.add_file(origin.serve("/f", b"body"), tmp_path / "f")
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "root", "s3cret")
        with bits.impersonate(await bits.Token.for_user(alice.uid)):
            await job.set_notify_cmd_line(SH, [SH, "-c", LOOK, "look", str(hers)])
        await job.resume()
        await until(lambda: Seen.is_whole(hers))
        seen = Seen(hers)
        check(seen, alice, str(job.id))
        assert seen.capabilities()["CapBnd"] == 0
        assert seen.arguments == [SH, "-c", LOOK, "look", str(hers)]
        assert "s3cret" not in str(seen.environment)
        await until(lambda: manager_is_quiet(manager))
        assert job.waiting is None


def manager_is_quiet(manager: bits.BitsManager) -> bool:
    return not [task for task in asyncio.all_tasks() if task.get_name().startswith("bits-notify-")]


SERVICE = """
import aiosqlite
import bits_async as bits
bits.BitsManager, bits.impersonate
url, directory, hers, look, uid = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])
drop_to(65534, [6, 7])  # CAP_SETGID and CAP_SETUID, ambient: a child would have them too

async def main():
    async with bits.BitsManager(store=directory + "/queue.db") as manager:
        alice = await Token.for_user(uid)
        with bits.impersonate(alice):
            job = await manager.create_job("alice's")
            await job.add_file(url, hers + "/file")
            await job.set_notify_cmd_line("/bin/sh", ["/bin/sh", "-c", look, "look", hers])
        await job.resume()
        await job.wait()
        while any(task.get_name().startswith("bits-notify-") for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)
        print(job.id, job.waiting)

asyncio.run(main())
"""


@pytest.mark.privileged
async def test_t05_a_job_s_command_runs_as_its_setter_under_a_service_with_ambient_capabilities(
    origin: Origin, alice: LocalUser, hers: Path, world_dir: Path
) -> None:
    ours = world_dir / "ours"
    ours.mkdir(mode=0o700)
    os.chown(ours, 65534, 65534)
    url = origin.serve("/f", b"body")
    out = await asyncio.to_thread(child.run, SERVICE, url, ours, hers, LOOK, alice.uid)
    job_id, waiting = out.split()
    assert waiting == "None"
    check(Seen(hers), alice, job_id)


KILLED = """
import sys, asyncio
import bits_async as bits

async def main(url, directory, script):
    async with bits.BitsManager(store=directory + "/queue.db") as manager:
        job = await manager.create_job("killed")
        await job.add_file(url, directory + "/file")
        await job.set_notify_cmd_line("/bin/sh", ["sh", "-c", script, "told", directory])
        await job.resume()
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
# The first run hangs; the second one says what it was told.
TELL = 'cd "$1"; [ -e pid ] && { echo "$BITS_JOB_ID $BITS_JOB_STATE" > new; mv new told; exit 0; }; echo $$ > new; mv new pid; sleep 1000'


async def test_a_command_that_is_owed_when_the_manager_is_killed_runs_after_the_restart(origin: Origin, tmp_path: Path) -> None:
    process = child.start(KILLED, origin.serve("/f", b"body"), tmp_path, TELL)
    try:
        await until(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
    finally:
        process.kill()
        _, err = process.communicate()
    assert (tmp_path / "pid").exists(), err
    with contextlib.suppress(ProcessLookupError):  # what it ran goes on without it
        os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        assert job.state is bits.JobState.TRANSFERRED
        await until(lambda: (tmp_path / "told").exists())
        assert (tmp_path / "told").read_text().split() == [str(job.id), "TRANSFERRED"]
        await until(lambda: manager_is_quiet(manager))
    (tmp_path / "told").unlink()
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        assert manager_is_quiet(manager)  # it was told


async def test_a_command_at_work_when_the_manager_closes_is_ended_after_the_grace(no_leaks: None, origin: Origin, tmp_path: Path) -> None:
    manager = bits.BitsManager(store=tmp_path / "queue.db")
    async with manager:
        job = await manager.create_job("closing")
        await job.add_file(origin.serve("/f", b"body"), tmp_path / "f")
        await job.set_notify_cmd_line(SH, [SH, "-c", 'echo $$ > "$1/new"; mv "$1/new" "$1/pid"; sleep 1000', "sh", str(tmp_path)])
        await job.resume()
        await until(lambda: (tmp_path / "pid").exists())
        await manager.aclose(grace=0.05)
    pid = int((tmp_path / "pid").read_text())
    assert subprocess.run(["kill", "-0", str(pid)], capture_output=True, check=False).returncode != 0
