"""`TokenOptions`: who acts for a job."""

from collections.abc import Coroutine
from typing import Any, final

from ..errors import ImpersonationFailed
from ..identity.ambient import impersonation
from ..identity.tokens import HelperTokenFlags, Token
from .arguments import checked_helper_flags
from .consent import impersonated
from .desk import Desk
from .roster import Entry


@final
class TokenOptions:
    """The helper token of a job (IBitsTokenOptions). Works under any ambient identity: the access check was made when it was obtained."""

    def __init__(self, desk: Desk, entry: Entry, caller: Token) -> None:
        self._desk = desk
        self._entry = entry
        self._caller = caller

    @property
    def helper_token_flags(self) -> HelperTokenFlags:
        """Where the helper acts."""
        return self._entry.job.helper_flags

    @property
    def helper_token_sid(self) -> str | None:
        """Whose token it is; None: no helper."""
        return None if self._entry.helper is None else self._entry.helper.sid

    def set_helper_token(self) -> Coroutine[Any, Any, None]:
        """Take the token of the enclosing `impersonate()` as the job's helper, in place of any other.

        An attempt that is running ends first, and begins again with the new token; the connections of the old one are closed. What fails or
        is cancelled before that leaves the old token.

        The token is bound to what the job is now: its files, where they come from and go to, what is sent and shown to servers, the proxy,
        the security flags. Who changes one of them later, and is not the helper itself (`impersonate()`), takes the token from the job,
        which then stops with BG_E_TOKEN_REQUIRED. Where the helper acts is part of it: see `set_helper_token_flags`.

        Raises:
            ImpersonationFailed: there is no enclosing `impersonate()`, or its token's level is below IMPERSONATE.
            AccessDenied: the token is elevated and the caller of `token_options()` was not.
            TokenRequired: the token was closed.
        """
        return self._set_helper(impersonation())

    async def _set_helper(self, token: Token | None) -> None:
        engine = self._desk.ready()
        if token is None:
            message = "set_helper_token() takes the token of an enclosing impersonate(); there is none"
            raise ImpersonationFailed(message, job_id=self._entry.job.id, advice="call it within `with impersonate(helper):`")
        self._desk.door.check_helper(token, self._caller)
        async with engine.command(self._entry):
            await engine.replace_helper(self._entry, token)

    def set_helper_token_flags(self, flags: HelperTokenFlags) -> Coroutine[Any, Any, None]:
        """Where the helper acts, from the next attempt on. Kept on the job, with or without a token; NONE: the owner does everything.

        While there is a helper token, flags are taken back by everybody who has these options, and added by the helper itself only
        (`impersonate()`, as BITS's own programs do), or where the caller of `token_options()` was elevated, was the helper, or was the
        process itself, which made the token. An owner who set them before the helper set its token has shown them to it (T8).

        Raises:
            InvalidArgument: not a HelperTokenFlags.
            AccessDenied: the helper is elevated and the caller of `token_options()` was not; or the helper did not agree to more.
        """
        return self._set_flags(flags, impersonated())

    async def _set_flags(self, flags: HelperTokenFlags, changer: Token | None) -> None:
        engine, entry, door = self._desk.ready(), self._entry, self._desk.door
        checked = checked_helper_flags(flags)
        async with engine.command(entry):
            if entry.helper is not None:
                door.check_helper(entry.helper, self._caller)
                if checked & ~entry.job.helper_flags:
                    door.check_widening(entry.helper, self._caller, changer)
            await engine.change(entry, helper_flags=checked)

    async def clear_helper_token(self) -> None:
        """Drop the helper token; the flags stay. It is not in the journal: that need not be usable for it."""
        engine = self._desk.ready()
        async with engine.command(self._entry, even_paused=True):
            await engine.replace_helper(self._entry, None)
