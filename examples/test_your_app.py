"""Testing an application that uses bits_async: a real manager and real files; the network, the identities and the time are fake.

    python -m pytest examples/test_your_app.py          (needs pytest, nothing else; or run it as a program)

The application is `mirror`, below. Each test is a plain function that runs its own event loop, so no plug-in of pytest is needed.
"""

import asyncio
import hashlib
import sys
from pathlib import Path

import pytest

import bits_async as bits
from bits_async.testing import FakeNetwork, fake_token

URL = "https://updates.example.test/app-2.0.bin"
BODY = bytes(range(256)) * 1024


# -- the application


async def mirror(url: str, directory: Path, helper: bits.Token) -> str:
    """Fetch a file as ourselves on the disk and as `helper` on the network; returns its SHA-256, or a sentence for the user."""
    try:
        path = await bits.download(
            url,
            directory / url.rpartition("/")[2],
            helper=helper,
            helper_flags=bits.HelperTokenFlags.NETWORK,
            store=directory / "queue.db",
            retry_for=300,
        )
    except bits.AuthFailed as error:
        return f"{error.identity} may not fetch it"
    except bits.NetworkError:
        return "the network was away for five minutes"
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Publish(bits.BackgroundCopyCallback):
    """What the application does with a job that goes on while nobody waits for it: put the file in its place, or write down why not."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.told = asyncio.Event()

    async def job_transferred(self, job: bits.Job) -> None:
        (path,) = await job.complete()
        self.log.append(f"{path.name} is there")
        self.told.set()

    def job_error(self, job: bits.Job, error: bits.BitsError) -> None:
        self.log.append(f"{job.display_name}: {error.advice}")
        self.told.set()


async def fetch_later(manager: bits.BitsManager, url: str, directory: Path, publish: Publish) -> None:
    """Fetch a file in the background; a program of the administrator's hears of it where the callback is gone or fails."""
    job = await manager.create_job("nightly")
    await job.add_file(url, directory / url.rpartition("/")[2])
    await job.set_notify_interface(publish)  # sync or async methods; told again until they return
    await job.set_notify_cmd_line("/usr/local/sbin/nightly-done", ["nightly-done", "--quiet"])
    await job.resume()


# -- its tests


def test_a_cut_connection_is_resumed_where_it_broke(tmp_path: Path) -> None:
    with FakeNetwork() as network:
        network.serve(URL, BODY, cut_after=100_000)
        digest = asyncio.run(mirror(URL, tmp_path, fake_token("low-rights")))
    assert digest == hashlib.sha256(BODY).hexdigest()
    assert [request.start for request in network.requests] == [0, 100_000]


def test_the_server_sees_the_helper_and_nobody_else(tmp_path: Path) -> None:
    with FakeNetwork() as network:
        network.serve(URL, BODY, require="low-rights")
        asyncio.run(mirror(URL, tmp_path, fake_token("low-rights")))
    assert {request.identity for request in network.requests} == {"low-rights"}


def test_a_refused_helper_is_named_to_the_user(tmp_path: Path) -> None:
    with FakeNetwork() as network:
        network.serve(URL, BODY, require="somebody-else")
        assert asyncio.run(mirror(URL, tmp_path, fake_token("low-rights"))) == "low-rights may not fetch it"


def test_five_minutes_without_a_network_take_seconds_to_test(tmp_path: Path) -> None:
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        network.disconnect()
        assert asyncio.run(mirror(URL, tmp_path, fake_token("low-rights"))) == "the network was away for five minutes"
    assert not (tmp_path / "app-2.0.bin").exists()


def test_the_callback_publishes_the_file_and_the_command_is_not_needed(tmp_path: Path) -> None:
    async def night() -> list[str]:
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            await fetch_later(manager, URL, tmp_path, publish := Publish())
            await publish.told.wait()
        return publish.log

    with FakeNetwork() as network:
        network.serve(URL, BODY)
        assert asyncio.run(night()) == ["app-2.0.bin is there"]
    assert network.commands == []


def test_where_the_callback_fails_the_command_runs_instead(tmp_path: Path) -> None:
    class Full(Publish):
        async def job_transferred(self, job: bits.Job) -> None:
            raise OSError("no space left")

    async def night(network: FakeNetwork) -> None:
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            await fetch_later(manager, URL, tmp_path, Full())
            while not network.commands:  # noqa: ASYNC110 - nothing tells that a program was started
                await asyncio.sleep(0.01)

    with FakeNetwork() as network:
        network.serve(URL, BODY)
        asyncio.run(night(network))
    (command,) = network.commands  # no program was run: it is what would have been
    assert command.parameters == ("/usr/local/sbin/nightly-done", "--quiet")
    assert command.environment["BITS_JOB_STATE"] == "TRANSFERRED"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
