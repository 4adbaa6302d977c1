"""The command line with Kerberos: whom the servers' own logs name."""

import hashlib
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.realms import Apache, MitKdc, Squid

pytestmark = pytest.mark.realm


async def test_the_owners_keytab_is_shown_to_the_server(apache: Apache, kdc: MitKdc, command: Command, tmp_path: Path) -> None:
    keytab = kdc.keytab("alice", directory=tmp_path)
    done = await command(
        *("download", apache.url("/neg/big"), "file", "--keytab", keytab.name, "--principal", kdc.principal("alice")),
        *("--sha256", apache.sha256, "--no-proxy"),
    )
    assert (done.code, done.err) == (0, "")
    assert apache.hits(expect=1, status=200, user=kdc.principal("alice"))
    assert {hit.user for hit in apache.hits() if hit.status < 400} == {kdc.principal("alice")}


async def test_a_helper_for_the_network_is_all_that_the_servers_see(
    apache: Apache, kdc: MitKdc, squid_negotiate: Squid, command: Command, tmp_path: Path
) -> None:
    done = await command(
        *("download", apache.url("/neg/big"), "file", "--proxy", squid_negotiate.url),
        *("--keytab", kdc.keytab("alice"), "--principal", kdc.principal("alice")),
        *("--helper-ccache", kdc.ccache("helper"), "--helper-for", "network"),
    )
    assert (done.code, done.err) == (0, "")
    assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == apache.sha256
    for server in (apache, squid_negotiate):
        assert server.hits(expect=1, status=200, user=kdc.principal("helper"))
        assert not server.hits(user=kdc.principal("alice"))


async def test_a_refused_identity_is_named(apache: Apache, kdc: MitKdc, command: Command, tmp_path: Path) -> None:
    wrong = kdc.keytab("bob", directory=tmp_path)
    failed = await command(
        *("download", apache.url("/neg/big"), "file", "--keytab", wrong, "--principal", kdc.principal("alice"), "--no-proxy")
    )
    assert failed.code == 1
    for part in ("SEC_E_NO_CREDENTIALS", f"identity {kdc.principal('alice')}", apache.url("/neg/big"), "keytab"):
        assert part in failed.complaint
    assert not (tmp_path / "file").exists()
