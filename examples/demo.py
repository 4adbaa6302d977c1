r"""The whole story in one run: two identities, a proxy and a server that want a login, a cut connection, each claim checked.

An origin and a proxy are started on loopback. Both want NTLM, and the origin cuts the connection once in the middle of the
file. The download has two identities, its owner and its helper. Afterwards the servers' own logs and the file itself are asked
who did what; the exit code is 0 only when all is as claimed.

With root's privileges the owner is a local user, who writes the file into a directory that is closed to others, and the helper
is the one whom the servers see. Without them both are network identities: the owner is shown to the origin, the helper to the
proxy.

    make demo           (or: python examples/demo.py [--network-identities])
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spnego
from embedded import EmbeddedServers

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, HelperTokenFlags, Token

# The servers of this example speak NTLM without TLS. On a network that is for listed servers only: it can be relayed.
RULES = bits.AuthRules(ntlm_over_http=bits.Hosts(["localhost"]))

MIB = 1024 * 1024
SIZE, CUT_AFTER = 48 * MIB, 30 * MIB
ALICE, HELPER = r"DEMO\alice", r"DEMO\helper"
PASSWORDS = {ALICE: "the demo's password of alice", HELPER: "the demo's password of helper"}
LOCAL_USER = "nobody"


@dataclass(frozen=True)
class Cast:
    """Who plays, and what the audience will find when it asks the servers and the file."""

    owner: Token
    helper: Token
    credentials: list[AuthCredentials]
    seen_by_proxy: str
    seen_by_origin: str
    writes_file: Token
    roles: list[tuple[str, str]]


async def choose_cast(network_only: bool) -> Cast:
    """A local user and a network identity; two network identities where the process cannot become another user."""
    helper = Token.for_network(spnego.Password(HELPER, PASSWORDS[HELPER]))
    why = "as asked"
    if not network_only:
        try:
            owner = await Token.for_user(LOCAL_USER)
            if owner.sid != Token.for_process().sid:
                return local_and_network(owner, helper)
            why = f"this process is {LOCAL_USER} itself"
        except bits.ImpersonationFailed as error:
            why = error.message
    print(f"Both identities are network identities, without root's privileges: {why}.\n")
    return two_on_the_network(Token.for_network(spnego.Password(ALICE, PASSWORDS[ALICE])), helper)


def local_and_network(owner: Token, helper: Token) -> Cast:
    # None, None: the credentials of the token that acts on the network, which is the helper's
    credentials = [AuthCredentials(target, AuthScheme.NTLM, None, None) for target in AuthTarget]
    roles = [
        ("owner", f"{owner.name} ({owner.sid}), a local user: writes the file, unknown to the servers"),
        ("helper", f"{helper.name}, a network identity: shown to the proxy and the origin, may not touch the file"),
    ]
    return Cast(owner, helper, credentials, HELPER, HELPER, owner, roles)


def two_on_the_network(owner: Token, helper: Token) -> Cast:
    credentials = [
        AuthCredentials(AuthTarget.PROXY, AuthScheme.NTLM, None, None),
        AuthCredentials(AuthTarget.SERVER, AuthScheme.NTLM, ALICE, PASSWORDS[ALICE]),
    ]
    roles = [
        ("owner", f"{owner.name}, a network identity: shown to the origin; locally this process, which writes the file"),
        ("helper", f"{helper.name}, a network identity: shown to the proxy"),
    ]
    return Cast(owner, helper, credentials, HELPER, ALICE, Token.for_process(), roles)


@contextlib.contextmanager
def stage() -> Iterator[Path]:
    """A directory that every user may enter, and only we may change."""
    directory = Path(tempfile.mkdtemp(prefix="bits-demo-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def private_directory(path: Path, token: Token) -> Path:
    """A directory for one local user alone."""
    path.mkdir(mode=0o700)
    if token.sid != Token.for_process().sid:
        shutil.chown(path, user=token.name)
    return path


async def play(servers: EmbeddedServers, cast: Cast, store: Path, destination: Path) -> Path:
    """The download itself. All that is special about it stands in its arguments."""
    started = time.monotonic()

    async def tell(stream: bits.EventStream) -> None:
        async for event in stream:
            if not isinstance(event, bits.Progress):
                print(f"  {time.monotonic() - started:5.2f} s  {sentence(event)}")

    async with bits.BitsManager(store=store, auth_rules=RULES) as manager:
        with bits.impersonate(cast.owner):
            telling = asyncio.create_task(tell(manager.events()))
        path = await manager.download(
            servers.origin_url,
            destination,
            proxy=servers.proxy_url,
            owner=cast.owner,
            helper=cast.helper,
            helper_flags=HelperTokenFlags.NETWORK,
            credentials=cast.credentials,
        )
    await telling  # the stream ended with the manager
    return path


def sentence(event: bits.Event) -> str:
    match event:
        case bits.Retrying():
            return f"connection lost ({event.error.message}); opened again in {event.delay:.1f} s"
        case bits.FileTransferred():
            return f"{event.size / MIB:.0f} MiB are on the disk"
        case bits.JobChanged():
            return event.state.name
    return type(event).__name__


def examine(servers: EmbeddedServers, cast: Cast, path: Path) -> list[tuple[bool, str]]:
    """Each claim, and whether the servers' logs and the file bear it out."""
    log = servers.log()
    bodies = [entry for entry in log if entry["server"] == "origin" and entry["status"] in (200, 206)]
    proxy, origin = let_in(log, "proxy"), let_in(log, "origin")
    found, expected = path.stat(), int(cast.writes_file.sid.split(":")[1]) if os.name == "posix" else 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asked = bodies[-1]["range"] if len(bodies) == 2 else None
    return [
        (proxy == {cast.seen_by_proxy}, f"the proxy let in {' and '.join(sorted(proxy))}, says its log"),
        (origin == {cast.seen_by_origin}, f"the origin let in {' and '.join(sorted(origin))}, says its log"),
        (found.st_uid == expected, f"the file belongs to {cast.writes_file.name} (uid {found.st_uid}), says the file system"),
        (
            asked == f"bytes={CUT_AFTER}-" and bodies[-1]["status"] == 206,
            f"cut after {CUT_AFTER} bytes, the download was resumed: the origin was then asked for {asked!r}, nothing twice",
        ),
        (
            digest == servers.sha256 and found.st_size == SIZE,
            f"the bytes are right: SHA-256 {digest[:16]}… of the file is that of the origin's copy",
        ),
    ]


def let_in(log: list[dict[str, Any]], server: str) -> set[str]:
    return {str(entry["user"]) for entry in log if entry["server"] == server and entry["status"] < 400}


def main() -> int:
    parser = argparse.ArgumentParser(description="bits_async, shown on this machine alone")
    parser.add_argument("--network-identities", action="store_true", help="do not become a local user, even as root")
    options = parser.parse_args()
    with stage() as directory, EmbeddedServers(PASSWORDS, size=SIZE, cut_after=CUT_AFTER) as servers:
        print(f"One download of {SIZE // MIB} MiB: two identities, a proxy and an origin with NTLM, a cut connection.\n")
        cast = asyncio.run(choose_cast(options.network_identities))
        store = private_directory(directory / "journal", Token.for_process()) / "queue.db"
        destination = private_directory(directory / "inbox", cast.writes_file) / "file.bin"
        facts = [("origin", servers.origin_url), ("proxy", servers.proxy_url), *cast.roles]
        for label, text in [*facts, ("file", str(destination)), ("journal", f"{store} (SQLite)")]:
            print(f"  {label:8}{text}")
        print("\nThe download")
        try:
            path = asyncio.run(play(servers, cast, store, destination))
        except bits.BitsError as error:
            print(f"\nThe download failed: {error}", file=sys.stderr)
            return 1
        claims = examine(servers, cast, path)
    print("\nWho reached what")
    for holds, claim in claims:
        print(f"  {'yes' if holds else 'NO':5}{claim}")
    return 0 if all(holds for holds, _ in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
