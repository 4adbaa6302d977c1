"""Challenge in, header out: Basic, Digest (RFC 7616), NTLM and Negotiate behind one seam, `AuthFlow`.

A flow answers the challenges of one seat on one connection of one identity. It picks the strongest offer that the peer asks
for, keeps the exchange that was begun, checks the peer's own proof where the scheme has one, and knows when to stop: too many
legs, the same challenge after the last leg, connections that keep breaking. Security contexts are built and stepped by the
token's threads alone, through `security`.

Kerberos goes as a raw token under "Negotiate" (the tests show it to mod_auth_gssapi and to Squid), NTLM inside Negotiate as the
raw messages (gss-ntlmssp, pyspnego). So nothing here negotiates mechanisms, and nothing can be talked down to NTLM by the peer.
It knows neither sockets nor requests: whoever owns the connection says when it is lost.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import quote as percent

from ..errors import HTTP_ERROR, AuthFailed, BitsError, ErrorCode, ErrorContext, NetworkError, TokenRequired, show_text
from ..identity.kerberos import explain, is_expired, silent_kdc, translated, unable
from ..identity.win32 import code_of
from . import sspi
from .challenge import Challenge, parse_challenges, parse_params, quote
from .policy import AuthRules, AuthScheme, CredentialKind, Delegation, Offer, Origin, Refusals, Seat, kind_of, mechanisms
from .tickets import Tickets, asks, credential_of, descend, expired, target_of

MAX_LEGS: Final = 6  # answers per request or CONNECT
MAX_RESTARTS: Final = 2  # handshakes begun anew because the connection broke

Security = Callable[..., Awaitable[Any]]
"""`TokenExecutor.run_security` with its deadline: runs a function in a thread of the token."""

BOUND: Final = (AuthScheme.NEGOTIATE, AuthScheme.NTLM)
"""Schemes whose proofs are bound to the connection's certificate."""


def channel_binding(certificate: bytes) -> bytes:
    """The tls-server-end-point binding (RFC 5929) of the peer's certificate in DER, prefix included.

    MD5 and SHA-1 count as SHA-256; so do signatures without a hash of their own (Ed25519), where the RFC is silent and peers
    agree.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        algorithm = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
    except UnsupportedAlgorithm:
        algorithm = None
    name = algorithm.name.replace("-", "_") if algorithm else "sha256"
    return b"tls-server-end-point:" + hashlib.new("sha256" if name in ("md5", "sha1") else name, certificate).digest()


# -- what an exchange is ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ask:
    """The request that the header is for."""

    method: str
    target: str


class _Refused(Exception):
    """The peer did not take what it was shown, or cannot be answered further. Caught by `AuthFlow`, never seen outside."""

    def __init__(self, reason: str, *, blame: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.blame = blame  # the credential was refused (T26), not merely the exchange broken


class _Exchange(Protocol):
    """One scheme with one offer: from the first challenge to the peer's own proof."""

    bound: bool
    """What was shown belongs to the connection."""

    async def first(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        """The header that answers the first challenge."""

    async def further(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        """The header that answers a challenge to our last header; raises _Refused."""

    async def unasked(self, ask: _Ask) -> str | None:
        """The header to send before being asked."""

    async def conclude(self, challenges: Sequence[Challenge], info: Mapping[str, str]) -> bool:
        """The peer let us pass: check its proof (raises _Refused). False: the handshake was not at its end."""

    def is_judged(self, challenges: Sequence[Challenge]) -> bool:
        """Whether a challenge to our last header says what the peer thinks of it, rather than going on with the handshake."""


@dataclass(frozen=True, slots=True)
class _Peer:
    """Whom an exchange talks to, and how it may compute."""

    origin: Origin
    binding: bytes | None
    tickets: Tickets
    secure: Security


# -- Basic -----------------------------------------------------------------------------------------------------------------------


class _Basic:
    """RFC 7617. User name and password go in UTF-8, which is what servers that care ask for and what browsers send."""

    bound = False

    def __init__(self, offer: Offer) -> None:
        self._header = "Basic " + _b64(f"{offer.user_name}:{offer.password}".encode("utf-8", "surrogatepass"))

    async def first(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        return self._header

    async def further(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        raise _Refused("the user name or the password is wrong, or this user has no access")

    async def unasked(self, ask: _Ask) -> str | None:
        return self._header

    async def conclude(self, challenges: Sequence[Challenge], info: Mapping[str, str]) -> bool:
        return True

    def is_judged(self, challenges: Sequence[Challenge]) -> bool:
        return True


# -- Digest ----------------------------------------------------------------------------------------------------------------------

_HASHES: Final = {"SHA-512-256": "sha512_256", "SHA-256": "sha256", "MD5": "md5"}  # the strongest first


@dataclass(frozen=True, slots=True)
class _Nonce:
    """What one challenge fixes for all requests answered with its nonce."""

    realm: str
    value: str
    opaque: str | None
    algorithm: str | None  # as the peer wrote it
    hash: str
    session: bool
    userhash: bool

    @classmethod
    def of(cls, challenge: Challenge) -> "_Nonce | None":
        """None: this challenge cannot be answered (no qop=auth, unknown hash, text that no header can echo)."""
        params = challenge.params
        written = params.get("algorithm")
        name, dash, rest = (written or "MD5").upper().rpartition("-")
        session = bool(dash) and rest == "SESS"
        hash_name = _HASHES.get(name if session else (written or "MD5").upper())
        options = [option.strip().lower() for option in params.get("qop", "").split(",")]
        if hash_name is None or hash_name not in hashlib.algorithms_available or "auth" not in options:
            return None
        if "nonce" not in params or not _echoes(params["nonce"], params.get("opaque", ""), challenge.realm):
            return None
        userhash = params.get("userhash", "").lower() == "true"
        return cls(challenge.realm, params["nonce"], params.get("opaque"), written, hash_name, session, userhash)

    @property
    def strength(self) -> int:
        return -list(_HASHES.values()).index(self.hash)

    def digest(self, *parts: str) -> str:
        """H(a:b:c) in hexadecimal."""
        return hashlib.new(self.hash, ":".join(parts).encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


class _Digest:
    """RFC 7616 with qop=auth; the count of requests is kept per nonce, and a nonce is used until the peer gives another."""

    bound = False

    def __init__(self, offer: Offer) -> None:
        self._user = offer.user_name or ""
        self._password = offer.password or ""
        self._nonce: _Nonce | None = None
        self._cnonce = ""
        self._secret = ""  # H(A1)
        self._count = 0
        self._uri = ""

    async def first(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        nonce = self._best(challenges)
        if nonce is None:
            raise unable("its Digest challenge has no qop=auth, or a hash that is unknown here")
        self._adopt(nonce)
        return self._header(ask)

    async def further(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        stale = [challenge for challenge in challenges if challenge.params.get("stale", "").lower() == "true"]
        nonce = self._best(stale)
        if nonce is None or self._nonce is None or nonce.realm != self._nonce.realm or nonce.value == self._nonce.value:
            raise _Refused("the user name or the password is wrong, or this user has no access")
        self._adopt(nonce)
        return self._header(ask)

    async def unasked(self, ask: _Ask) -> str | None:
        return self._header(ask)

    async def conclude(self, challenges: Sequence[Challenge], info: Mapping[str, str]) -> bool:
        proof = info.get("rspauth")
        if proof is not None and not self._proves(proof, info):
            raise _Refused("it could not prove that it knows the password (rspauth)", blame=False)
        if (following := info.get("nextnonce")) and self._nonce and _echoes(following):
            self._nonce = _replaced(self._nonce, following)
            self._cnonce, self._count = new_cnonce(), 0
        return True

    def is_judged(self, challenges: Sequence[Challenge]) -> bool:
        return True

    @staticmethod
    def _best(challenges: Sequence[Challenge]) -> _Nonce | None:
        nonces = [nonce for challenge in challenges if (nonce := _Nonce.of(challenge))]
        return max(nonces, key=lambda nonce: nonce.strength, default=None)

    def _adopt(self, nonce: _Nonce) -> None:
        self._nonce, self._cnonce, self._count = nonce, new_cnonce(), 0
        self._secret = nonce.digest(self._user, nonce.realm, self._password)
        if nonce.session:  # made once per challenge: a nonce that follows (nextnonce) keeps it
            self._secret = nonce.digest(self._secret, nonce.value, self._cnonce)

    def _header(self, ask: _Ask) -> str:
        nonce = self._nonce
        assert nonce is not None
        self._count += 1
        self._uri = ask.target
        response = self._response(ask.method)
        fields = [
            *self._name(nonce),
            f"realm={quote(nonce.realm)}",
            f"uri={quote(ask.target)}",
            *([f"algorithm={nonce.algorithm}"] if nonce.algorithm else []),
            f"nonce={quote(nonce.value)}",
            f"nc={self._count:08x}",
            f"cnonce={quote(self._cnonce)}",
            "qop=auth",
            f"response={quote(response)}",
            *([f"opaque={quote(nonce.opaque)}"] if nonce.opaque is not None else []),
            *(["userhash=true"] if nonce.userhash else []),
        ]
        return "Digest " + ", ".join(fields)

    def _name(self, nonce: _Nonce) -> list[str]:
        if nonce.userhash:
            return [f"username={quote(nonce.digest(self._user, nonce.realm))}"]
        if self._user.isascii():
            return [f"username={quote(self._user)}"]
        return [f"username*=UTF-8''{percent(self._user, safe='', errors='surrogatepass')}"]

    def _response(self, method: str) -> str:
        """For a method; for "" the peer's own proof (rspauth)."""
        nonce = self._nonce
        assert nonce is not None
        request = nonce.digest(method, self._uri)
        return nonce.digest(self._secret, nonce.value, f"{self._count:08x}", self._cnonce, "auth", request)

    def _proves(self, proof: str, info: Mapping[str, str]) -> bool:
        echoed = info.get("cnonce", self._cnonce) == self._cnonce and info.get("qop", "auth").lower() == "auth"
        return echoed and hmac.compare_digest(proof.lower().encode("utf-8", "surrogatepass"), self._response("").encode())


def new_cnonce() -> str:
    """Our half of what makes a digest fresh."""
    return secrets.token_hex(16)


def _replaced(nonce: _Nonce, value: str) -> _Nonce:
    return _Nonce(nonce.realm, value, nonce.opaque, nonce.algorithm, nonce.hash, nonce.session, nonce.userhash)


def _echoes(*texts: str) -> bool:
    """Whether the texts can stand in a header of ours as they came."""
    return all(text.isprintable() or not text for text in texts)


# -- NTLM ------------------------------------------------------------------------------------------------------------------------


class _Ntlm:
    """MS-NLMP's three messages, under "NTLM" or "Negotiate". What they prove, they prove of the connection."""

    bound = True

    def __init__(self, peer: _Peer, offer: Offer) -> None:
        self._peer = peer
        self._offer = offer
        self._word = "NTLM" if offer.scheme is AuthScheme.NTLM else "Negotiate"
        self._context: Any = None
        self._complete = False

    async def first(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        self._context, token = await self._peer.secure(_begin_ntlm, self._offer, self._peer.origin.host, self._peer.binding)
        return f"{self._word} {_b64(token)}"

    async def further(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        if self._complete:
            raise _Refused("the user name or the password is wrong, or this user has no access")
        told = _token(challenges)
        if told is None:
            raise _Refused("it began the login anew in the middle; a proxy on the way may not keep connections", blame=False)
        token = await self._peer.secure(_step_ntlm, self._context, told)
        self._complete = True
        return f"{self._word} {_b64(token)}"

    async def unasked(self, ask: _Ask) -> str | None:
        return None  # the connection is logged in

    async def conclude(self, challenges: Sequence[Challenge], info: Mapping[str, str]) -> bool:
        self._context = None
        return self._complete

    def is_judged(self, challenges: Sequence[Challenge]) -> bool:
        return self._complete


def _begin_ntlm(offer: Offer, host: str, binding: bytes | None) -> tuple[Any, bytes]:
    """In a thread of the token. Never by way of GSSAPI, whose NTLM module is the machine's and knows no identity of ours.

    A user name and a password need nothing of the system's, on Windows neither; there the thread itself may be logged on.
    """

    def begin() -> tuple[Any, bytes]:
        import spnego

        credential = credential_of(offer)
        if sys.platform == "win32" and kind_of(credential) is CredentialKind.AMBIENT:
            context: Any = sspi.context_for("NTLM", f"HTTP/{host}", credential, binding=binding)
            return context, context.step()
        options = spnego.NegotiateOptions.use_ntlm
        with _quietly():
            context = spnego.client(
                credential, hostname=host, service="HTTP", protocol="ntlm", channel_bindings=_bindings(binding), options=options
            )
            return context, context.step() or b""

    return translated(_explain_ntlm, begin)


def _step_ntlm(context: Any, token: bytes) -> bytes:
    def step() -> bytes:
        with _quietly():
            return context.step(token) or b""

    return _never_ntlm_v1(translated(_explain_ntlm, step))


def _never_ntlm_v1(token: bytes) -> bytes:
    """The AUTHENTICATE message, unless what it answers the challenge with has the 24 bytes of NTLMv1 (MS-NLMP 2.2.1.3, 3.3.1).

    Raises:
        AuthFailed: it has; the machine's settings ask for it (LM_COMPAT_LEVEL, LmCompatibilityLevel).
    """
    if int.from_bytes(token[20:22], "little") == 24:
        advice = "set LM_COMPAT_LEVEL (on Windows LmCompatibilityLevel) to 3 or more"
        raise AuthFailed("the machine's settings ask for NTLMv1, which is never spoken", advice=advice)
    return token


def _explain_ntlm(exc: Exception) -> BitsError:
    if isinstance(exc, OSError) and code_of(exc):
        return sspi.explain(exc)
    name = type(exc).__name__
    if name == "OperationNotAvailableError":
        return unable("NTLM is not possible: this identity has no user name and password to show")
    return unable(f"NTLM is not possible: {name}")


# -- Kerberos --------------------------------------------------------------------------------------------------------------------


class _Kerberos:
    """A ticket per request; the peer proves itself with its last token, when it sends one (Squid does not)."""

    bound = False

    def __init__(self, peer: _Peer, offer: Offer) -> None:
        self._peer = peer
        self._offer = offer
        self._context: Any = None

    async def first(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        return await self._fresh()

    async def further(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        told = _token(challenges)
        if told is None:
            raise _Refused("it does not accept the ticket, or this principal has no access")
        if self._context is None:
            raise _Refused("it goes on with a login that is over", blame=False)
        try:
            token = await self._peer.secure(_step_kerberos, self._context, told)
        except AuthFailed as failed:
            raise _Refused(f"it does not accept the ticket ({failed.message})") from None
        if not token:
            raise _Refused("this principal has no access")
        return f"Negotiate {_b64(token)}"

    async def unasked(self, ask: _Ask) -> str | None:
        return await self._fresh()

    async def conclude(self, challenges: Sequence[Challenge], info: Mapping[str, str]) -> bool:
        context, self._context = self._context, None
        told = _token(challenges)
        if told is None or context is None:
            return True
        try:
            await self._peer.secure(_step_kerberos, context, told)
        except AuthFailed as failed:
            host = self._peer.origin.host
            raise _Refused(f"it could not prove that it is HTTP/{host} ({failed.message})", blame=False) from None
        return True

    def is_judged(self, challenges: Sequence[Challenge]) -> bool:
        return not any(challenge.token68 for challenge in challenges)

    async def _fresh(self) -> str:
        peer = self._peer
        self._context, token = await peer.secure(_begin_kerberos, peer.tickets, self._offer, peer.origin.host, peer.binding)
        return f"Negotiate {_b64(token)}"


def _begin_kerberos(tickets: Tickets, offer: Offer, host: str, binding: bytes | None) -> tuple[Any, bytes]:
    """In a thread of the token.

    Raises:
        TokenRequired: the tickets are over, and nothing is there to get others with.
    """
    try:
        return _first_kerberos_token(tickets, offer, host, binding)
    except TokenRequired:
        if not asks(offer):
            raise
    tickets.drop(offer)  # the realm's clock is ahead of ours: they ended before we noticed
    return _first_kerberos_token(tickets, offer, host, binding)


def _first_kerberos_token(tickets: Tickets, offer: Offer, host: str, binding: bytes | None) -> tuple[Any, bytes]:
    credential = tickets.ready(offer)

    def begin() -> tuple[Any, bytes]:
        if sys.platform == "win32":
            delegate = offer.delegation is not Delegation.NEVER
            theirs = sspi.context_for("Kerberos", f"HTTP/{host}", credential, binding=binding, delegate=delegate)
            return theirs, theirs.step()
        import spnego

        wanted = spnego.ContextReq.default
        if offer.delegation is Delegation.ALWAYS:
            wanted |= spnego.ContextReq.delegate
        elif offer.delegation is Delegation.IF_TRUSTED:
            wanted |= spnego.ContextReq.delegate_policy
        with _quietly():
            context = spnego.client(
                credential, hostname=host, service="HTTP", protocol="kerberos", channel_bindings=_bindings(binding), context_req=wanted
            )
            return context, context.step() or b""

    context, token = translated(partial(_explain_kerberos, host, getattr(credential, "principal", None)), begin)
    _check_target(token, host)
    return context, token


def _explain_kerberos(host: str, principal: str | None, exc: Exception) -> BitsError:
    if is_expired(exc):
        return expired(principal)
    failure = _explain_step(exc)
    if failure.code == ErrorCode.SEC_E_DELEGATION_POLICY:
        return AuthFailed(f"the realm does not let this account act for others with HTTP/{host}", code=failure.code)
    return failure


def _explain_step(exc: Exception) -> BitsError:
    return sspi.explain(exc) if isinstance(exc, OSError) and code_of(exc) else explain(exc)


def _check_target(token: bytes, host: str) -> None:
    """T21: the library may have asked the DNS for another name, and got a ticket for whoever owns that."""
    try:
        target = target_of(token)
    except ValueError:
        target = ()
    if len(target) != 2 or target[0] != "HTTP" or target[1].rstrip(".").lower() != host:
        named = "/".join(target) or "nobody that can be read"
        raise AuthFailed(
            f"the ticket is for {show_text(named)}, but the URL names {host}; it was not sent",
            code=ErrorCode.SEC_E_WRONG_PRINCIPAL,
            advice="write the host's canonical name into the URL, or set dns_canonicalize_hostname = false in krb5.conf",
        )


def _step_kerberos(context: Any, token: bytes) -> bytes:
    def step() -> bytes:
        inner = _unwrapped(token)
        with _quietly():
            if context.complete:
                raise unable("a token after the end of the login")
            return context.step(inner) or b""

    return translated(_explain_step, step)


def _unwrapped(token: bytes) -> bytes:
    """Some acceptors answer a raw token with one in SPNEGO's clothes (RFC 4178, NegTokenResp)."""
    if token[:1] != b"\xa1":
        return token
    try:
        inner = descend(token, 0xA1, 0x30, 0xA2, 0x04)
    except ValueError:
        inner = b""
    if not inner:
        raise unable("the peer rejected the login (SPNEGO)")
    return inner


# -- tokens ----------------------------------------------------------------------------------------------------------------------


def _token(challenges: Sequence[Challenge]) -> bytes | None:
    """The token of the first challenge that brings one.

    Raises:
        _Refused: it is not base64.
    """
    text = next((challenge.token68 for challenge in challenges if challenge.token68), None)
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise _Refused("its token is not base64", blame=False)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bindings(binding: bytes | None) -> Any:
    from spnego.channel_bindings import GssChannelBindings

    return GssChannelBindings(application_data=binding) if binding else None


# pyspnego writes every token to its loggers at DEBUG. Others who use it keep their records; ours are dropped (T14).
_muted = threading.local()
_TOKEN_LOGGERS: Final = ("spnego._gss", "spnego._ntlm", "spnego._sspi", "spnego._negotiate")


def _keep_record(record: logging.LogRecord) -> bool:
    return not getattr(_muted, "on", False)


def _mute_tokens() -> None:
    for name in _TOKEN_LOGGERS:
        logging.getLogger(name).addFilter(_keep_record)  # adding it twice does nothing


@contextmanager
def _quietly() -> Iterator[None]:
    _mute_tokens()
    _muted.on = True
    try:
        yield
    finally:
        _muted.on = False


# -- the flow --------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Current:
    """The exchange under way or done, and which offer and realm it is about."""

    offer: Offer
    exchange: _Exchange
    realm: str


class AuthFlow:
    """The challenges of one seat on one connection of one identity.

    Args:
        offers: what the peer may see, strongest first (`choose_offers`).
        security: runs a function in a thread of the token, with a deadline (TimeoutError).
        encrypted: TLS protects the hop to this peer (for a proxy: the connection to the proxy itself).
        binding: `channel_binding()` of this connection's certificate, when there is TLS; None will do if no offer is of `BOUND`.

    Attributes:
        connection_bound: the login under way, or done, belongs to the connection (NTLM).
        authenticated: the peer let us pass after a whole login.
        user: who the peer was shown, where that is known beforehand.
    """

    def __init__(
        self,
        seat: Seat,
        origin: Origin,
        offers: Sequence[Offer],
        *,
        security: Security,
        rules: AuthRules,
        refusals: Refusals,
        encrypted: bool,
        binding: bytes | None = None,
        identity: str,
        tickets: Tickets,
    ) -> None:
        self.authenticated = False
        self._seat = seat
        self._origin = origin
        self._offers = offers
        self._security = security
        self._rules = rules
        self._refusals = refusals
        self._encrypted = encrypted
        self._identity = identity
        self._peer = _Peer(origin, binding, tickets, self._secure)
        self._current: _Current | None = None
        self._answered = False  # the header under way answers a challenge of this request
        self._shown = False  # a header of ours is under way at all
        self._told: tuple[str, ...] = ()  # the challenge to it
        self._again = False  # it was lost with its connection: the next one answers the same challenge
        self._legs = 0
        self._restarts = 0

    def __repr__(self) -> str:
        return f"<AuthFlow {self._seat.name} {self._origin} as {show_text(self._identity)}>"

    @property
    def connection_bound(self) -> bool:
        return self._current is not None and self._current.exchange.bound

    @property
    def user(self) -> str | None:
        return self._current.offer.user if self._current else None

    async def answer(self, lines: Sequence[str], *, method: str, target: str) -> str:
        """The value of the answer header for these challenge lines.

        Raises:
            AuthFailed: nothing may be answered: nothing permitted, refused, or too many legs. Not transient.
            NetworkError: the realm's KDC does not answer, and nothing else is permitted. Transient.
            TokenRequired: the identity's tickets have expired, and nothing else is permitted.
        """
        challenges = parse_challenges(lines)
        self._told, self._again = (), False
        self._legs += 1
        if self._legs > MAX_LEGS:
            raise self._failure(challenges, f"it asked for more than {MAX_LEGS} answers")
        ask = _Ask(method, target)
        current = self._current
        if current is not None and self._answered:
            header = await self._go_on(current, challenges, ask)
        else:
            if current is not None and self._shown and isinstance(current.exchange, _Basic):
                await self._check_again(current, challenges)
            header = await self._begin(challenges, ask)
        self._answered = self._shown = True
        return header

    async def unasked(self, *, method: str, target: str) -> str | None:
        """The header to send without being asked, after a login on this origin; None: send nothing and wait for the challenge."""
        again, self._again = self._again, False
        self._answered, self._shown, self._told = False, False, ()
        if self._current is None:
            return None
        try:
            header = await self._current.exchange.unasked(_Ask(method, target))
        except (AuthFailed, NetworkError, TokenRequired):
            self._current = None  # the challenge will come, and its answer says what is wrong or finds another way
            return None
        self._shown = header is not None
        self._answered = self._shown and again
        return header

    async def conclude(self, status: int, challenge_lines: Sequence[str], info_lines: Sequence[str]) -> None:
        """The answer is no challenge of this seat: what was shown is accepted, and the peer's own proof is checked when it sent
        one.

        Raises:
            AuthFailed: the proof is wrong: this is not the peer it says it is.
        """
        if status == self._seat.status or (self._seat is Seat.ORIGIN and status == Seat.PROXY.status):
            return  # still asking; or the proxy stopped the request on its way
        current, shown = self._current, self._shown
        self._legs = self._restarts = 0
        self._answered, self._shown, self._told = False, False, ()
        if current is None or not shown:
            return
        challenges = [challenge for challenge in parse_challenges(challenge_lines) if challenge.scheme == current.offer.scheme.word]
        try:
            complete = await current.exchange.conclude(challenges, parse_params(info_lines))
        except _Refused as refused:
            reason = refused.reason
        else:
            self.authenticated = complete
            self._current = current if complete else None
            return
        self._current, self.authenticated = None, False
        raise self._failure(
            challenges,
            reason,
            code=ErrorCode.SEC_E_WRONG_PRINCIPAL,
            advice="somebody on the way may pose as this host; check the address, and TLS, before trying again",
        )

    def challenged(self, lines: Sequence[str]) -> None:
        """The answer to the request that left last is a challenge of this seat; `answer` may come over another connection."""
        self._told = tuple(lines)

    @property
    def judged(self) -> bool:
        """The peer has said what it thinks of what it was shown. To close the connection then unsays nothing: else a peer that closes it
        after each answer would get a refused password again and again, until the account is locked (T26)."""
        current = self._current
        if current is None or not self._shown or not self._told:
            return False
        return current.exchange.is_judged([each for each in parse_challenges(self._told) if each.scheme == current.offer.scheme.word])

    def new_connection(self) -> None:
        """The connection was lost or closed: contexts that belong to it begin anew, a bounded number of times in one request.

        Raises:
            AuthFailed: it keeps being closed in the middle of the login.
        """
        if self.judged:
            return
        if self.connection_bound:
            if not self.authenticated:
                self._restarts += 1
            self._current = None
            self.authenticated = False
        self._again = self._answered and not self._told
        self._answered = self._shown = False
        if self._restarts > MAX_RESTARTS:
            raise self._failure((), "it keeps closing the connection in the middle of the login")

    # -- choosing

    async def _begin(self, challenges: Sequence[Challenge], ask: _Ask) -> str:
        """The first header of the strongest offer that the peer asks for and that can be made."""
        self._current, self.authenticated = None, False
        why: list[str] = list(getattr(self._offers, "withheld", ()))
        failures: list[BitsError] = []
        for offer in self._offers:
            asked = [challenge for challenge in challenges if challenge.scheme == offer.scheme.word]
            if reason := await self._obstacle(offer, asked):
                why.append(f"{offer.scheme.name} as {offer.who}: {reason}")
                continue
            for exchange in self._exchanges(offer):
                try:
                    header = await exchange.first(asked, ask)
                except (AuthFailed, NetworkError, TokenRequired) as failed:
                    if isinstance(failed, AuthFailed) and failed.code != ErrorCode.SEC_E_NO_CREDENTIALS:
                        raise self._located(failed, challenges) from failed.__cause__
                    failures.append(failed)
                    continue
                self._current = _Current(offer, exchange, self._realm(asked))
                return header
        if failures:
            raise self._located(failures[0], challenges, [*[other.message for other in failures[1:]], *why]) from failures[0].__cause__
        raise self._failure(challenges, "; ".join(why) or "no credentials were given for it", advice=self._consent(challenges))

    async def _obstacle(self, offer: Offer, asked: Sequence[Challenge]) -> str:
        """Why an offer is not used now; "": it is."""
        if not asked:
            return f"not asked for by {self._seat.noun}"
        if offer.scheme is AuthScheme.BASIC and not self._may_send_basic:
            return f"not over a connection without TLS (the rule basic_over_http does not list {self._seat.target.name})"
        realm = self._realm(asked)
        refused = self._refusals.revision(offer.fingerprint, realm, self._seat)
        if refused is not None and refused == await self._revision(offer):
            return "refused before; not tried again until it is replaced, lest the account be locked"
        return ""

    @property
    def _may_send_basic(self) -> bool:
        return self._encrypted or self._seat.target in self._rules.basic_over_http

    def _consent(self, challenges: Sequence[Challenge]) -> str | None:
        """What to do where only the consent to show a password to everybody on the way is missing."""
        word = AuthScheme.BASIC.word
        asked = any(each.scheme == word for each in challenges) and any(offer.scheme is AuthScheme.BASIC for offer in self._offers)
        if not asked or self._may_send_basic:
            return None
        rule = f"AuthRules(basic_over_http=frozenset({{AuthTarget.{self._seat.target.name}}}))"
        return f"permit BASIC over plain HTTP with {rule} if it must be, then resume the job"

    def _exchanges(self, offer: Offer) -> Iterator[_Exchange]:
        if offer.scheme is AuthScheme.BASIC:
            yield _Basic(offer)
        elif offer.scheme is AuthScheme.DIGEST:
            yield _Digest(offer)
        else:
            for mechanism in mechanisms(offer, self._rules):
                yield _Kerberos(self._peer, offer) if mechanism == "kerberos" else _Ntlm(self._peer, offer)

    # -- going on

    async def _go_on(self, current: _Current, challenges: Sequence[Challenge], ask: _Ask) -> str:
        mine = [challenge for challenge in challenges if challenge.scheme == current.offer.scheme.word]
        try:
            return await current.exchange.further(mine, ask)
        except _Refused as refused:
            reason, blame = refused.reason, refused.blame
        except (AuthFailed, NetworkError) as failed:
            self._current = None
            raise self._located(failed, challenges) from failed.__cause__
        await self._give_up(current, blame)
        raise self._failure(challenges, f"{current.offer.scheme.name} as {current.offer.who}: {reason}", advice=self._suspicion(current))

    async def _check_again(self, current: _Current, challenges: Sequence[Challenge]) -> None:
        """Basic went unasked and is asked for again: for another realm that is a first challenge, for the same it is a no."""
        asked = [challenge for challenge in challenges if challenge.scheme == current.offer.scheme.word]
        if asked and self._realm(asked) == current.realm:
            await self._give_up(current, True)
            raise self._failure(challenges, f"BASIC as {current.offer.who}: the user name or the password is no longer right")

    async def _give_up(self, current: _Current, blame: bool) -> None:
        self._current, self.authenticated, self._answered = None, False, False
        if blame:
            revision = await self._revision(current.offer)
            self._refusals.add(current.offer.fingerprint, current.realm, self._seat, revision)

    def _suspicion(self, current: _Current) -> str | None:
        """T24: there is no second try without the binding; the one who reads the error should know what a refusal may mean."""
        if self._peer.binding is None or current.offer.scheme not in BOUND:
            return None
        return "check the credentials; if they are right, TLS may be intercepted on the way: look at who issued the certificate"

    # -- small things

    def _realm(self, asked: Sequence[Challenge]) -> str:
        """What a refusal is about: a realm's name means nothing on another host."""
        return f"{self._origin} {asked[0].realm if asked else ''}".rstrip()

    async def _revision(self, offer: Offer) -> str:
        if offer.user_name is not None:
            return ""
        revision: str = await self._secure(self._peer.tickets.revision, offer)
        return revision

    async def _secure(self, function: Callable[..., Any], /, *args: Any) -> Any:
        try:
            return await self._security(function, *args)
        except TimeoutError:
            pass
        raise silent_kdc()

    def _failure(self, challenges: Sequence[Challenge], reason: str, *, code: int | None = None, advice: str | None = None) -> AuthFailed:
        """The error of this seat: what was asked for, what was permitted, as whom, and what to do."""
        return AuthFailed(
            self._sentence(challenges, reason),
            code=HTTP_ERROR | self._seat.status if code is None else code,
            context=self._context,
            transient=False,
            http_status=self._seat.status,
            identity=self._identity,
            advice=advice,
        )

    def _located(self, error: BitsError, challenges: Sequence[Challenge], also: Sequence[str] = ()) -> BitsError:
        """An error of tickets or mechanisms, told with this seat's names."""
        reason = "; ".join([error.message, *also])
        fields = error.fields()
        fields |= {
            "message": self._sentence(challenges, reason),
            "identity": self._identity,
        }
        if isinstance(error, AuthFailed):
            fields |= {"context": self._context, "http_status": self._seat.status}
        return type(error)(**fields)

    @property
    def _context(self) -> ErrorContext:
        return ErrorContext.REMOTE_FILE if self._seat is Seat.ORIGIN else ErrorContext.GENERAL_TRANSPORT

    def _sentence(self, challenges: Sequence[Challenge], reason: str) -> str:
        permitted = ", ".join(f"{offer.scheme.name} as {show_text(offer.who, 80)}" for offer in self._offers) or "nothing"
        return f"{self._seat.noun} {self._origin} asks for {_listed(challenges)}; permitted: {permitted}; {reason}"


def _listed(challenges: Sequence[Challenge]) -> str:
    """The schemes of a challenge list, for a message."""
    names = dict.fromkeys(
        challenge.scheme.upper() + (f" (realm {show_text(challenge.realm, 40)})" if challenge.realm else "") for challenge in challenges
    )
    return show_text(", ".join(names), 200) or "a login without naming a scheme that can be read"
