"""Who may: the access check, which happens once, when a handle is obtained, as BITS does since Windows 7.

The door knows tokens and owner keys, and nothing of what a job does.
"""

from collections.abc import Callable
from typing import final

from ..auth.policy import credential_fingerprint
from ..errors import AccessDenied, ImpersonationFailed, InvalidArgument, TokenRequired
from ..identity import native
from ..identity.ambient import current_token, impersonation
from ..identity.logon import NetworkOnly
from ..identity.tokens import ImpersonationLevel, Token
from .model import JobRecord, OwnerKey

PROVED = "proved"  # no fingerprint, which is hexadecimal
Identity = tuple[str, str | None, str | None]  # local user, principal, the proof of that


def identity_of(key: OwnerKey) -> Identity:
    """Of an owner, as `Door.identity` is of a token."""
    return key.local, key.principal, key.proof


def _may_act(token: Token) -> bool:
    return token.level.value >= ImpersonationLevel.IMPERSONATE.value and not token.closed


def calling(*, impersonated: bool) -> Token:
    """The identity that makes a call: the ambient one.

    Args:
        impersonated: it must be that of an enclosing `impersonate()`; a service whose code forgot one does not act as itself (T10).

    Raises:
        AccessDenied: there is none.
    """
    if impersonated and impersonation() is None:
        message = "this manager is called under impersonate() only (require_impersonation)"
        raise AccessDenied(message, identity=current_token().name, advice="call it as whoever asks: with impersonate(token)")
    return current_token()


@final
class Door:
    """The access check of one open journal.

    Args:
        fingerprint_key: the journal's, for what proves a principal (threat model, T7).
        fakes: tokens of `bits_async.testing` may be used.
        note: hears of each token that jobs may carry.
    """

    def __init__(self, fingerprint_key: bytes, *, fakes: bool, note: Callable[[Token], None] = lambda _: None) -> None:
        self._fingerprint_key = fingerprint_key
        self._fakes = fakes
        self._note = note

    def refuse_fake(self, token: Token) -> None:
        """A token of `bits_async.testing` is nobody's on a real network.

        Raises:
            ImpersonationFailed: it is one.
        """
        if token.fake and not self._fakes:
            raise ImpersonationFailed("a fake_token works with bits_async.testing.FakeNetwork only", identity=token.name)

    def usable(self, token: Token) -> Token:
        """A token that jobs may carry.

        Raises:
            InvalidArgument: no token. ImpersonationFailed: one that cannot act. TokenRequired: it was closed.
        """
        if not isinstance(token, Token):
            raise InvalidArgument(f"a token is a Token, not {type(token).__name__}")
        self.refuse_fake(token)
        if token.level.value < ImpersonationLevel.IMPERSONATE.value:
            raise ImpersonationFailed(f"a token of level {token.level.name} cannot act", identity=token.name)
        if token.closed:
            raise TokenRequired("the token was closed", identity=token.name)
        self._note(token)
        return token

    def check_helper(self, token: Token, caller: Token) -> None:
        """Whether that caller may make this token a helper.

        Raises:
            AccessDenied: it is elevated, and the caller is not. Otherwise as `usable`.
        """
        self.usable(token)
        if token.elevated and not caller.elevated:
            raise AccessDenied("an elevated helper token may be set by an elevated caller only", identity=token.name)

    def check_widening(self, helper: Token, caller: Token, changer: Token | None) -> None:
        """Whether a helper that has set its token may be made to act where it did not (T8: an owner who may not write in the helper's
        directories would have the helper do it).

        Args:
            caller: who passed the access check.
            changer: the identity that the call is made under, by an `impersonate()`; None: under none.

        Raises:
            AccessDenied: it is neither the helper's own doing, nor that of an administrator, nor of the process, which made the token.
        """
        itself = self.is_same(caller, helper) or (changer is not None and self.is_same(changer, helper))
        if itself or self.is_elevated(caller) or self.owner_key(caller).process:
            return
        message = f"the helper token was set by {helper.name}, for less than that"
        advice = "set the flags under the helper's own impersonate(), or before the helper sets its token"
        raise AccessDenied(message, identity=caller.name, advice=advice)

    def check_commander(self, token: Token) -> None:
        """Whether a job's notification command may run as this token.

        A token that is somebody on the network only has no user of this machine whom a program could run as; it would be the process's
        own, who has shown nobody that he is the one whom the token names.

        Raises:
            AccessDenied: it has no local user of its own. Otherwise as `usable`.
        """
        self.usable(token)
        if isinstance(token.local, NetworkOnly) or (token.local.is_process and token.has_credentials):
            message = f"the token of {token.name} has no user of this machine whom a command could run as"
            raise AccessDenied(message, identity=token.name, advice="set the command as a local user, or outside impersonate()")

    def owner_key(self, token: Token) -> OwnerKey:
        """What the journal keeps of an owner."""
        return OwnerKey(
            sid=token.sid,
            name=token.name,
            local=token.local.key,
            principal=token.principal,
            proof=self._proof(token),
            process=token.local.is_process and not token.has_credentials and not token.fake,
            elevated=token.elevated,
            session=token.session,
        )

    def _proof(self, token: Token) -> str | None:
        """That the principal was proved, else the keyed fingerprint of the secret behind it: nobody else checked that name (T7)."""
        if token.proved:
            return PROVED
        if not token.has_credentials or token.network is None:
            return None
        return credential_fingerprint(token.network, self._fingerprint_key)

    def identity(self, token: Token) -> Identity | None:
        """What must be the same in an owner key; None: nobody's (a token below IMPERSONATE, or a closed one, opens nothing)."""
        return (token.local.key, token.principal, self._proof(token)) if _may_act(token) else None

    def is_owner(self, token: Token, key: OwnerKey) -> bool:
        """Exactly the identity that made the job: the same local user, the same principal, proved by the same secret."""
        return self.identity(token) == identity_of(key)

    def may_stand_for(self, token: Token, key: OwnerKey) -> bool:
        """The owner himself, with no powers that he did not make the job with: where a user has tokens with and without them (UAC), whoever
        has the lesser one opens the job, and would have it carried out by the other (T10)."""
        more = native.POWERS_ARE_THE_TOKENS and token.elevated and not key.elevated
        return self.is_owner(token, key) and not more

    def is_same(self, token: Token, other: Token) -> bool:
        """One identity: the same local user, the same principal, proved by the same secret."""
        return token is other or (self.identity(token) is not None and self.identity(token) == self.identity(other))

    def is_elevated(self, token: Token) -> bool:
        """Whether it opens every door. Not with a principal that nobody proved: the powers beside it are those of the process, which
        whoever merely names a principal has not shown to be his (T7)."""
        return token.elevated and token.principal is None and _may_act(token)

    def high_enough(self, caller: Token, job: JobRecord) -> bool:
        """Whether the caller has the powers that the owner had when he made the job; who makes one as an administrator opens it as one."""
        return caller.elevated or not job.owner.elevated

    def admit(self, caller: Token, job: JobRecord) -> None:
        """The access check.

        Raises:
            AccessDenied: the caller is neither the owner nor elevated, or is the owner, who was elevated when he made the job and is no
                longer. TokenRequired: his token was closed, because he has logged off, say.
        """
        self.refuse_fake(caller)
        if caller.closed:
            raise TokenRequired("the token was closed", identity=caller.name)
        if not (self.is_owner(caller, job.owner) or self.is_elevated(caller)):
            raise AccessDenied(f"the job belongs to {job.owner.name}", job_id=job.id, identity=caller.name)
        if not self.high_enough(caller, job):
            message = f"the job was made by {job.owner.name} as an administrator"
            raise AccessDenied(message, job_id=job.id, identity=caller.name, advice="open it with an elevated identity")
