"""One user with two tokens, as an administrator has them under UAC: with his powers and without."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bits_async import BitsManager, impersonate
from bits_async.identity import native
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen

URL, BODY = "https://files.test/f", b"bytes"
LOW, HIGH = fake_token("alice"), fake_token("alice", elevated=True)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNetwork]:
    monkeypatch.setattr(native, "POWERS_ARE_THE_TOKENS", True)
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        yield network


async def test_t10_a_job_and_a_command_of_the_lesser_token_are_not_carried_out_by_the_other(network: FakeNetwork, memory_dir: Path) -> None:
    """After a restart the job has no token until its owner comes; the one who comes first is the same user, with more powers."""
    store = memory_dir / "queue.db"
    async with BitsManager(store=store) as manager:
        with impersonate(LOW):
            made = await manager.create_job("low")
            await made.add_file(URL, memory_dir / "f")
            await made.set_notify_cmd_line("/bin/hers")
            await made.resume()
            await made.suspend()
    network.requests.clear()
    async with BitsManager(store=store) as manager:
        with impersonate(HIGH):
            job = await manager.get_job(made.id)
        await job.resume()
        await let_things_happen()
        assert (network.requests, network.commands) == ([], [])
        with impersonate(LOW):
            await (await manager.get_job(made.id)).wait()
        await let_things_happen()
        assert len(network.requests) == 1, "its own token carries it out"


async def test_t10_a_download_with_the_greater_token_goes_on_with_no_job_of_the_lesser(network: FakeNetwork, memory_dir: Path) -> None:
    async with BitsManager(store=memory_dir / "queue.db") as manager:
        with impersonate(LOW):
            planted = await manager.create_job("download f")
            await planted.add_file(URL, memory_dir / "f")
        with impersonate(HIGH):
            await manager.download(URL, memory_dir / "f")
        assert planted.state.name == "SUSPENDED"
    assert (memory_dir / "f").read_bytes() == BODY
