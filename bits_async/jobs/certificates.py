"""The application's own say about servers' certificates: its callback, and what it has accepted.

Asked after TLS verified the server and before anything is requested of it (BITS: IBackgroundCopyServerCertificateValidationCallback).
Only True accepts: whatever else a callback returns or raises refuses the server, for now. Knows no connection; a restart forgets it.
"""

import asyncio
import contextvars
import hashlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import BitsError, ErrorCode, ErrorContext, make_error, scrub

Callback = Callable[[Any, Any, bytes], bool | Awaitable[bool]]


class CertificateJudge:
    """One callback, called in the context of the moment it was set, and the certificates it has accepted: (host, port, hash)."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._context = contextvars.copy_context()
        self._accepted: set[tuple[str, int, bytes]] = set()

    async def ask(self, job: object, file: object, host: str, port: int, certificate: bytes) -> None:
        """Let the callback look at a certificate (DER) that it has not accepted for this host and port before.

        Raises:
            BitsError: refused; transient, context SERVER_CERTIFICATE_CALLBACK, with the code of a BitsError that the callback raised.
        """
        shown = host, port, hashlib.sha256(certificate).digest()
        if shown in self._accepted:
            return
        call = self._call(job, file, certificate)
        task = asyncio.get_running_loop().create_task(call, name="bits-certificate", context=self._context.copy())
        try:
            accepted = await task
        except BitsError as error:
            raise _refused(error.code, f"the application refused its certificate: {error.message}") from error
        except Exception as error:  # an application's callback may raise anything
            raise _refused(ErrorCode.E_FAIL, f"the application's look at its certificate failed: {type(error).__name__}") from scrub(error)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise _refused(ErrorCode.E_FAIL, "the application's look at its certificate was cancelled") from None
        if accepted is not True:
            raise _refused(ErrorCode.ERROR_WINHTTP_SECURE_FAILURE, "the application refused its certificate")
        self._accepted.add(shown)

    async def _call(self, job: object, file: object, certificate: bytes) -> Any:
        answer = self._callback(job, file, certificate)
        return await answer if inspect.isawaitable(answer) else answer


def _refused(code: int, why: str) -> BitsError:
    advice = "look at the certificate and at the callback; the job tries again by itself"
    return make_error(code, ErrorContext.SERVER_CERTIFICATE_CALLBACK, f"the server is not trusted: {why}", transient=True, advice=advice)


def callback_required() -> BitsError:
    """The callback did not survive the restart: until it is set again, no server is asked for anything."""
    code = ErrorCode.BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED
    message = "the job validates servers' certificates by a callback, and it has none since the restart"
    return make_error(code, ErrorContext.SERVER_CERTIFICATE_CALLBACK, message, transient=False)
