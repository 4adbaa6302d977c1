"""What a user leaves in the queue for somebody else's `download()` to find."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import BitsManager, FileRange, HelperTokenFlags, Job, SecurityFlags, impersonate
from bits_async.jobs import orders
from bits_async.testing import FakeNetwork, fake_token

URL, BODY = "https://files.test/f", bytes(range(256)) * 100


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        yield network


@pytest.fixture
async def manager(network: FakeNetwork, memory_dir: Path) -> AsyncIterator[BitsManager]:
    async with BitsManager(store=memory_dir / "queue.db") as manager:
        yield manager


PLANTED: dict[str, Callable[[Job], Awaitable[object]]] = {
    "headers": lambda job: job.set_custom_headers([("X-HTTP-Method-Override", "DELETE")]),
    "method": lambda job: job.set_http_method("POST"),
    "flags": lambda job: job.set_security_flags(SecurityFlags.SSL_IGNORE_UNKNOWN_CA),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
async def test_t08_a_job_that_the_owner_prepared_does_not_drive_the_helper_of_a_download(
    manager: BitsManager, network: FakeNetwork, memory_dir: Path, planted: Callable[[Job], Awaitable[object]]
) -> None:
    """The owner knows the name that download() gives its jobs, and makes one of his own that it would go on with."""
    alice, bob, path = fake_token("alice"), fake_token("bob"), memory_dir / "f"
    with impersonate(alice):
        job = await manager.create_job("download f")
        await job.add_file(URL, path)
        await planted(job)
    await manager.download(URL, path, owner=alice, helper=bob, helper_flags=HelperTokenFlags.NETWORK)
    assert path.read_bytes() == BODY
    assert {(each.identity, each.method, each.headers) for each in network.requests} == {("bob", "GET", ())}
    assert job.state is bits.JobState.SUSPENDED, "it is the owner's, and none of ours"


async def test_t08_a_job_of_ranges_is_not_gone_on_with_as_if_it_were_the_file(manager: BitsManager, memory_dir: Path) -> None:
    alice, path = fake_token("alice"), memory_dir / "f"
    job = await manager.create_job("download f", owner=alice)
    await job.add_file_with_ranges(URL, path, [FileRange(0, 5)])
    await manager.download(URL, path, owner=alice)
    assert path.read_bytes() == BODY


async def test_t08_a_job_that_is_changed_while_a_download_takes_it_up_does_not_get_the_helper(
    manager: BitsManager, network: FakeNetwork, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, path = fake_token("alice"), fake_token("bob"), memory_dir / "f"
    job = await manager.create_job("download f", owner=alice)
    await job.add_file(URL, path)
    found = orders._found

    async def slow(desk: orders.Desk, order: orders.Order) -> object:
        entry = await found(desk, order)
        await job.set_custom_headers([("X-Do", "what the owner says")])
        return entry

    monkeypatch.setattr(orders, "_found", slow)
    with pytest.raises(bits.InvalidState, match="changed"):
        await manager.download(URL, path, owner=alice, helper=bob, helper_flags=HelperTokenFlags.NETWORK)
    assert network.requests == []
