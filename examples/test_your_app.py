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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
