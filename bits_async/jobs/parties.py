"""A job's network side: what its requests may show to whom, over which TLS, and which origins its credentials are bound to (T19)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, final

from ..auth.policy import (
    AuthCredentials,
    AuthRules,
    AuthTarget,
    Grant,
    ImplicitCredentials,
    Origin,
    Refusals,
    Seat,
    account_fingerprint,
    choose_offers,
    implied,
)
from ..clock import Clock
from ..errors import ErrorCode, ErrorContext, TokenRequired, make_error
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token
from ..transport.answers import RawHeaders
from ..transport.client_certificates import KeyPair, read_key_pair
from ..transport.lane import Judge, Party
from ..transport.options import TLS_FLAGS, ClientCertificate, SecurityFlags
from ..transport.proxies import route
from ..transport.timeouts import Timeouts
from ..transport.tls import TlsSettings, read_revocation_lists
from .certificates import callback_required
from .engine import Engine
from .model import GrantRecord
from .roster import Entry


def named_origins(entry: Entry, target: AuthTarget) -> frozenset[Origin]:
    """The origins that a job names now: of its files as the application named them, or of the proxies on the way to them."""
    urls = [file.original_url for file in entry.files]
    if target is AuthTarget.SERVER:
        return frozenset(Origin.of(url) for url in urls)
    proxies = [route(entry.job.proxy, url) for url in urls]
    return frozenset(Origin.of(proxy) for proxy in proxies if proxy is not None)


def not_plain(origins: frozenset[Origin]) -> frozenset[Origin]:
    """Those that nobody on the way can read."""
    return frozenset(origin for origin in origins if origin.scheme != "http")


def kept_from_proxies(grant: GrantRecord) -> GrantRecord:
    """Without the origins that a forwarding proxy stands before: it reads what they are shown."""
    if grant.target is AuthTarget.PROXY or grant.origins is None:
        return grant
    return replace(grant, origins=not_plain(grant.origins))


AUTHORITIES_AGAIN: Final = 60.0  # seconds after which the next attempt has the files of the trusted authorities looked at

_SESSIONS: Final = (b"set-cookie", b"set-cookie2")  # whoever has one is the user who logged on, until the server forgets him


def _helps(entry: Entry, token: Token) -> bool:
    """Whether it acts for the owner, and is not the owner's own."""
    return token is entry.helper and token is not entry.owner


@final
class Parties:
    """The network sides of all jobs of one manager.

    Args:
        tls: the manager's; a job's security flags are applied to it.
        rules: what may be shown to whom, whatever a job says.
        timeouts: of the connections.
        executors: the threads that read certificates, as the tokens.
        refusals: what was refused is not offered again.
        handles: the handles on a job and one of its files, for the application's certificate callback.
        clock: when the trusted authorities are looked at again.
    """

    def __init__(
        self,
        tls: TlsSettings,
        rules: AuthRules,
        timeouts: Timeouts,
        executors: TokenExecutors,
        refusals: Refusals,
        handles: Callable[[Entry, int], tuple[Any, Any]],
        clock: Clock,
    ) -> None:
        self._tls = tls
        self._rules = rules
        self._timeouts = timeouts
        self._executors = executors
        self._refusals = refusals
        self._handles = handles
        self._clock = clock
        self._refreshed = clock.monotonic()

    async def party(self, entry: Entry, token: Token, security: TokenExecutor, file: int) -> Party:
        """The network side of one file, for the token that acts there and its security threads."""
        http = entry.job.http
        if http.headers is None:
            message = "the journal's key file was lost or replaced, and the custom headers cannot be read: set them again"
            code = ErrorCode.BG_E_INVALID_CREDENTIALS
            raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=entry.job.id)
        return Party(
            options=http,
            judge=Judge(entry.judge or entry, partial(self._judge, entry, file)) if http.validates_certificates else None,
            heard=partial(self._heard, entry, file, _helps(entry, token)),
            token=token,
            grants=self._grants(entry),
            proxy=entry.job.proxy,
            tls=await self._tls_of(entry, token),
            rules=self._rules,
            timeouts=self._timeouts,
            security=security,
        )

    def _grants(self, entry: Entry) -> tuple[Grant, ...]:
        given = tuple(grant.grant() for grant in entry.grants)
        if self._rules.implicit is ImplicitCredentials.WHEN_SET:
            return given  # asked for each file: nothing here may look at all files of the job
        return (*given, *implied(self._rules, given, {target: named_origins(entry, target) for target in AuthTarget}))

    async def _tls_of(self, entry: Entry, acting: Token) -> TlsSettings:
        """The manager's TLS as the job's security flags want it; read and made off the loop."""
        http, revoked, pair = entry.job.http, None, None
        await self._refresh()
        if not http.flags & TLS_FLAGS and http.client_certificate is None:
            return self._tls
        if http.client_certificate is not None:
            pair = await self._key_pair(entry, http.client_certificate, acting)
        if SecurityFlags.SSL_ENABLE_CRL_CHECK in http.flags:
            if http.crl_source is None:
                code = ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED
                raise make_error(code, ErrorContext.GENERAL_TRANSPORT, "the job has no revocation lists", job_id=entry.job.id)
            if entry.owner is None:
                raise TokenRequired("the revocation lists are read as the job's owner", job_id=entry.job.id)
            with self._executors.lease(entry.owner, "files") as files:
                revoked = await files.run(read_revocation_lists, http.crl_source, entry.owner.name)
        with self._executors.lease(Token.for_process(), "files") as files:
            if pair is not None:
                return await files.run(self._tls.presenting, pair, http.certificate_origins or frozenset(), http.flags, revoked)
            return await files.run(self._tls.under, http.flags, revoked)

    async def _refresh(self) -> None:
        """A service that runs for months meets certificates of authorities that were made while it ran."""
        now = self._clock.monotonic()
        if now - self._refreshed >= AUTHORITIES_AGAIN:
            self._refreshed = now
            with self._executors.lease(Token.for_process(), "files") as files:
                await files.run(self._tls.refresh)

    async def _key_pair(self, entry: Entry, wanted: ClientCertificate, acting: Token) -> KeyPair:
        """The job's client certificate, read by its owner's threads, whoever acts on the network. Nobody else shows it: a connection would
        be one identity's by its certificate and another's by its logins. BITS lets jobs of LocalSystem do so, and no others."""
        if entry.owner is None:
            raise TokenRequired("the client certificate is read as the job's owner", job_id=entry.job.id)
        helped = HelperTokenFlags.NETWORK in entry.job.helper_flags or _helps(entry, acting)  # the flags of today, and of the attempt
        if helped and not entry.owner.elevated:
            code = ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY
            message = "the helper acts on the network, and the client certificate's key is the owner's"
            advice = "remove the client certificate, or let the owner act on the network, then resume the job"
            raise make_error(code, ErrorContext.GENERAL_TRANSPORT, message, job_id=entry.job.id, identity=entry.owner.name, advice=advice)
        with self._executors.lease(entry.owner, "files") as files:
            return await files.run(read_key_pair, wanted, entry.owner.name)

    def check_presentable(self) -> None:
        """Raises E_NOTIMPL when the manager's jobs cannot show a client certificate."""
        self._tls.check_presentable()

    async def check_derivable(self, flags: SecurityFlags) -> None:
        """Raises E_NOTIMPL when the flags cannot be applied to the manager's context."""
        with self._executors.lease(Token.for_process(), "files") as files:
            await files.run(self._tls.under, flags & ~SecurityFlags.SSL_ENABLE_CRL_CHECK)
            if SecurityFlags.SSL_ENABLE_CRL_CHECK in flags:
                await files.run(self._tls.check_revocable)

    async def _judge(self, entry: Entry, file: int, host: str, port: int, certificate: bytes) -> None:
        if entry.judge is None:
            raise callback_required()
        await entry.judge.ask(*self._handles(entry, file), host, port, certificate)

    def _heard(self, entry: Entry, file: int, helped: bool, headers: RawHeaders) -> None:
        entry.answers[file] = tuple(header for header in headers if header[0].lower() not in _SESSIONS) if helped else headers

    def bind(self, entry: Entry) -> Sequence[GrantRecord]:
        """Grants without origins get those that the job names now (T19)."""
        return [
            grant if grant.origins is not None else replace(grant, origins=named_origins(entry, grant.target)) for grant in entry.grants
        ]

    def grant_of(self, entry: Entry, given: AuthCredentials) -> GrantRecord:
        """What the journal keeps of credentials that are set on the job now."""
        return GrantRecord(
            job_id=entry.job.id,
            target=given.target,
            scheme=given.scheme,
            user_name=given.user_name,
            password=given.password,
            origins=named_origins(entry, given.target) if entry.job.resumed else None,
        )

    async def save_grants(self, engine: Engine, entry: Entry, credentials: Iterable[AuthCredentials]) -> None:
        """Journal credentials of a job, in place of those for the same target and scheme."""
        records = [self.grant_of(entry, given) for given in credentials]
        fresh = {(record.target, record.scheme) for record in records}
        replaced = fresh & {(grant.target, grant.scheme) for grant in entry.grants}
        if replaced:  # a credential that is only added has no connections yet; other jobs of the token keep theirs
            await self.forget_network(engine, entry)
            self._forgive(entry, [record for record in records if (record.target, record.scheme) in replaced])
        grants = [grant for grant in entry.grants if (grant.target, grant.scheme) not in fresh] + records
        await engine.save(*records, then=partial(entry.grants.__setitem__, slice(None), grants))

    def _forgive(self, entry: Entry, records: Iterable[GrantRecord]) -> None:
        """A job's credentials that were replaced may be offered again where they were refused, even the same ones: somebody asked for
        it. Another job that merely brings a refused password may not (T26)."""
        token = entry.helper if HelperTokenFlags.NETWORK in entry.job.helper_flags else entry.owner
        if token is None:
            return
        for record in records:
            if record.user_name is not None and record.password is not None:
                self._refusals.forget(account_fingerprint(record.user_name, record.password))
            seat = Seat.PROXY if record.target is AuthTarget.PROXY else Seat.ORIGIN
            origins = record.origins or named_origins(entry, record.target)
            for origin in origins:
                for offer in choose_offers(seat, origin, [replace(record, origins=origins).grant()], token, self._rules):
                    self._refusals.forget(offer.fingerprint)

    async def forget_network(self, engine: Engine, entry: Entry) -> None:
        """A credential was replaced or removed: connections that used the old one are closed at once (T25)."""
        await engine.drop_lanes(entry, entry.owner, entry.helper)
