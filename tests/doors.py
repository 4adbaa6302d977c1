r"""Who may pass a peer's seat: Basic, Digest, NTLM, Negotiate and Kerberos at the origin's 401 and the proxy's 407.

A `Door` says which users and schemes, and by `Misbehaviour` how it goes wrong while it asks. A `Guard` is the door as one connection
meets it. Tokens are decided by real acceptors in a process of their own (`acceptor.py`).
"""

import asyncio
import base64
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from examples.embedded import ORIGIN, Head, Seat
from tests import acceptor

USERS: Final = {r"LAB\alice": "Password-alice", r"LAB\helper": "Password-helper"}


class Hold:
    """A peer waits here: `await hold.reached.wait()`, do something, `hold.release()`.

    `after` counts bytes of the body; None holds the answer before its first byte.
    """

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def here(self) -> None:
        self.reached.set()
        await self._released.wait()


@dataclass
class Door:
    r"""Who may pass a seat, by which schemes, and how it misbehaves while it asks.

    Schemes are "Basic", "Digest", "NTLM", "Negotiate" (NTLM inside) and "Kerberos" (Negotiate on the wire; needs `keytab`).
    With `binding` (`ServerTls.binding`) NTLM, Negotiate and Kerberos must be bound to the channel.
    One Door belongs to one peer; its nonces and its log of logins are shared by the connections.
    """

    schemes: tuple[str, ...]
    users: Mapping[str, str]
    realm: str
    algorithms: tuple[str, ...]
    keytab: Path | None
    binding: bytes | None
    misbehave: "Misbehaviour"
    logins: list[tuple[int, str, str]]  # connection, scheme, user: one entry each time somebody has proved a name
    delegated: list[str]  # whose ticket-granting tickets it was handed

    def __init__(
        self,
        *schemes: str,
        users: Mapping[str, str] = USERS,
        realm: str = "lab",
        algorithms: Sequence[str] = ("SHA-256", "MD5"),
        keytab: Path | None = None,
        binding: bytes | None = None,
        misbehave: "Misbehaviour | None" = None,
    ) -> None:
        self.schemes, self.users, self.realm, self.algorithms = schemes, users, realm, tuple(algorithms)
        self.keytab, self.binding, self.misbehave = keytab, binding, misbehave or Misbehaviour()
        self.logins = []
        self.delegated = []
        self.nonces: dict[str, int] = {}  # nonce: the highest count seen

    def new_nonce(self) -> str:
        nonce = os.urandom(12).hex()
        self.nonces[nonce] = 0
        return nonce


@dataclass(kw_only=True)
class Misbehaviour:
    """What a door does wrong, or only awkwardly, while it asks."""

    one_line: bool = False  # all challenges in one header line
    refusal_body: int = 100  # length of the body of a 401 or 407
    refusal_chunked: bool = False
    refusal_headers: tuple[tuple[str, str], ...] = ()
    close_first: int = 0  # so many refusals without a login in progress end the connection
    close_legs: int = 0  # so many refusals in the middle of a login end the connection
    endless: bool = False  # every leg is answered by a new challenge, for ever
    wrong_final: bool = False  # the token or rspauth that ends a login is false
    no_final: bool = False  # ... or missing
    nonce_uses: int | None = None  # after so many uses a nonce is stale
    hold: Hold | None = None  # the answer to a leg in progress is held here


@dataclass
class Admission:
    """A door's decision: `user` may pass (None: refused), with these header lines in the answer."""

    user: str | None
    headers: list[tuple[str, str]] = field(default_factory=list)
    in_progress: bool = False


class Guard:
    """The door as one connection meets it: NTLM authenticates the connection, the other schemes each request."""

    def __init__(self, door: Door, seat: Seat, connection: int) -> None:
        self._door, self._seat, self._connection = door, seat, connection
        self._context: acceptor.Context | None = None
        self._bound_user: str | None = None

    async def admit(self, head: Head) -> Admission:
        scheme, _, text = (head.get(self._seat.answer) or "").partition(" ")
        name = next((known for known in self._door.schemes if self._wire_name(known).lower() == scheme.lower()), None)
        if not scheme and self._bound_user:
            return Admission(self._bound_user)
        if name is None:
            return self._refuse()
        if name == "Basic":
            return self._basic(text)
        if name == "Digest":
            return self._digest(head, text)
        return await self._token(name, text.strip())

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    @staticmethod
    def _wire_name(scheme: str) -> str:
        return "Negotiate" if scheme == "Kerberos" else scheme

    def _refuse(self, *, stale: bool = False) -> Admission:
        """All the schemes, from the start."""
        self.close()
        self._bound_user = None
        challenges: list[str] = []
        for scheme in self._door.schemes:
            if scheme == "Basic":
                challenges.append(f'Basic realm="{self._door.realm}", charset="UTF-8"')
            elif scheme == "Digest":
                challenges += [self._digest_challenge(algorithm, stale) for algorithm in self._door.algorithms]
            else:
                challenges.append(self._wire_name(scheme))
        if self._door.misbehave.one_line:
            challenges = [", ".join(challenges)]
        return Admission(None, [(self._seat.challenge, challenge) for challenge in challenges])

    def _pass(self, scheme: str, user: str, headers: list[tuple[str, str]]) -> Admission:
        self._door.logins.append((self._connection, scheme, user))
        return Admission(user, [] if self._door.misbehave.no_final else headers)

    def _basic(self, text: str) -> Admission:
        try:
            user, _, password = base64.b64decode(text, validate=True).decode().partition(":")
        except ValueError:
            return self._refuse()
        if self._door.users.get(user) != password or self._door.misbehave.endless:
            return self._refuse()
        return self._pass("Basic", user, [])

    # Digest (RFC 7616, qop=auth)

    def _digest_challenge(self, algorithm: str, stale: bool) -> str:
        text = f'Digest realm="{self._door.realm}", nonce="{self._door.new_nonce()}", qop="auth", algorithm={algorithm}'
        return text + (", stale=true" if stale else "")

    def _digest(self, head: Head, text: str) -> Admission:
        given = dict(_parameters(text))
        nonce, count = given.get("nonce", ""), int(given.get("nc", "0"), 16)
        password = self._door.users.get(given.get("username", ""))
        algorithm = given.get("algorithm", "MD5").upper()
        known = nonce in self._door.nonces and algorithm in self._door.algorithms and given.get("realm") == self._door.realm
        if password is None or not known or given.get("uri") != head.target or given.get("qop") != "auth":
            return self._refuse()
        right, final = _digest_answers(given, password, head.method, algorithm)
        if given.get("response") != right or self._door.misbehave.endless:
            return self._refuse()
        limit = self._door.misbehave.nonce_uses
        if count <= self._door.nonces[nonce] or (limit is not None and count > limit):
            return self._refuse(stale=True)
        self._door.nonces[nonce] = count
        if self._door.misbehave.wrong_final:
            final = "0" * len(final)
        info = f'qop=auth, rspauth="{final}", cnonce="{given["cnonce"]}", nc={given["nc"]}'
        name = "Authentication-Info" if self._seat is ORIGIN else "Proxy-Authentication-Info"
        return self._pass("Digest", given["username"], [(name, info)])

    # NTLM, Negotiate, Kerberos

    async def _token(self, scheme: str, text: str) -> Admission:
        if self._bound_user:
            self.close()
            self._bound_user = None
        if self._context is None:
            door = self._door
            self._context = await acceptor.Context.open(scheme.lower(), users=door.users, keytab=door.keytab, binding=door.binding)
        try:
            verdict = await self._context.step(base64.b64decode(text))
        except ValueError:
            return self._refuse()
        if self._door.misbehave.hold is not None:
            await self._door.misbehave.hold.here()
        if verdict.error:
            return self._refuse()
        if verdict.user is None:
            return self._next_leg(scheme, verdict.token)
        if self._door.misbehave.endless:
            return self._next_leg(scheme, os.urandom(64))
        if verdict.delegated is not None:
            self._door.delegated.append(verdict.delegated)
        self.close()
        if scheme != "Kerberos":
            self._bound_user = verdict.user
        token = _damaged(verdict.token) if self._door.misbehave.wrong_final else verdict.token
        headers = [(self._seat.challenge, f"{self._wire_name(scheme)} {_b64(token)}")] if token else []
        return self._pass(scheme, verdict.user, headers)

    def _next_leg(self, scheme: str, token: bytes) -> Admission:
        return Admission(None, [(self._seat.challenge, f"{self._wire_name(scheme)} {_b64(token)}")], in_progress=True)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _damaged(token: bytes) -> bytes:
    return token[:-1] + bytes([token[-1] ^ 0x55]) if token else b""


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    for name, quoted, plain in re.findall(r'([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))', text):
        yield name.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted else plain


def _digest_answers(given: Mapping[str, str], password: str, method: str, algorithm: str) -> tuple[str, str]:
    """The right `response`, and the `rspauth` that proves the server."""

    def digest(*parts: str) -> str:
        return hashlib.new("sha256" if algorithm == "SHA-256" else "md5", ":".join(parts).encode()).hexdigest()

    secret = digest(given["username"], given["realm"], password)
    middle = (given["nonce"], given["nc"], given.get("cnonce", ""), given["qop"])
    return digest(secret, *middle, digest(method, given["uri"])), digest(secret, *middle, digest("", given["uri"]))
