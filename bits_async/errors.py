"""What can go wrong: every code of BITS, whose fault it was, and whether waiting may help.

The tables here are the only place where a status, an exception of a socket or an exception of a file becomes one of our errors, and
the only place that says which class a code has. An error that the journal brings back has the class and fields it was stored with.
This module knows nothing of jobs, lanes or files. Text and exceptions that come from elsewhere pass `show_text`, `show_url` and `scrub`
before they are kept, because they may carry a signed query, a header or a terminal's escape codes.
"""

import enum
import errno
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID


class ErrorContext(enum.Enum):
    """Whose fault it was (BG_ERROR_CONTEXT)."""

    NONE = 0
    UNKNOWN = 1
    GENERAL_QUEUE_MANAGER = 2
    QUEUE_MANAGER_NOTIFICATION = 3
    LOCAL_FILE = 4
    REMOTE_FILE = 5
    GENERAL_TRANSPORT = 6
    REMOTE_APPLICATION = 7
    SERVER_CERTIFICATE_CALLBACK = 8


class ErrorCode(enum.IntEnum):
    """HRESULTs of BITS (page "BITS Return Values") and the few of Windows that BITS passes on."""

    S_OK = 0x00000000
    S_FALSE = 0x00000001

    BG_S_ERROR_CONTEXT_NONE = 0x00200006
    BG_S_PARTIAL_COMPLETE = 0x00200017
    BG_S_UNABLE_TO_DELETE_FILES = 0x0020001A
    BG_S_PROXY_CHANGED = 0x0020002A
    BG_S_OVERRIDDEN_BY_POLICY = 0x00200055

    BG_E_NOT_FOUND = 0x80200001
    BG_E_INVALID_STATE = 0x80200002
    BG_E_EMPTY = 0x80200003
    BG_E_FILE_NOT_AVAILABLE = 0x80200004
    BG_E_PROTOCOL_NOT_AVAILABLE = 0x80200005
    BG_E_ERROR_CONTEXT_UNKNOWN = 0x80200007
    BG_E_ERROR_CONTEXT_GENERAL_QUEUE_MANAGER = 0x80200008
    BG_E_ERROR_CONTEXT_LOCAL_FILE = 0x80200009
    BG_E_ERROR_CONTEXT_REMOTE_FILE = 0x8020000A
    BG_E_ERROR_CONTEXT_GENERAL_TRANSPORT = 0x8020000B
    BG_E_ERROR_CONTEXT_QUEUE_MANAGER_NOTIFICATION = 0x8020000C
    BG_E_DESTINATION_LOCKED = 0x8020000D
    BG_E_VOLUME_CHANGED = 0x8020000E
    BG_E_ERROR_INFORMATION_UNAVAILABLE = 0x8020000F
    BG_E_NETWORK_DISCONNECTED = 0x80200010
    BG_E_MISSING_FILE_SIZE = 0x80200011
    BG_E_INSUFFICIENT_HTTP_SUPPORT = 0x80200012
    BG_E_INSUFFICIENT_RANGE_SUPPORT = 0x80200013
    BG_E_REMOTE_NOT_SUPPORTED = 0x80200014
    BG_E_NEW_OWNER_DIFF_MAPPING = 0x80200015
    BG_E_NEW_OWNER_NO_FILE_ACCESS = 0x80200016
    BG_E_PROXY_LIST_TOO_LARGE = 0x80200018
    BG_E_PROXY_BYPASS_LIST_TOO_LARGE = 0x80200019
    BG_E_INVALID_SERVER_RESPONSE = 0x8020001B
    BG_E_TOO_MANY_FILES = 0x8020001C
    BG_E_LOCAL_FILE_CHANGED = 0x8020001D
    BG_E_ERROR_CONTEXT_REMOTE_APPLICATION = 0x8020001E
    BG_E_SESSION_NOT_FOUND = 0x8020001F
    BG_E_TOO_LARGE = 0x80200020
    BG_E_STRING_TOO_LONG = 0x80200021
    BG_E_CLIENT_SERVER_PROTOCOL_MISMATCH = 0x80200022
    BG_E_SERVER_EXECUTE_ENABLE = 0x80200023
    BG_E_NO_PROGRESS = 0x80200024
    BG_E_USERNAME_TOO_LARGE = 0x80200025
    BG_E_PASSWORD_TOO_LARGE = 0x80200026
    BG_E_INVALID_AUTH_TARGET = 0x80200027
    BG_E_INVALID_AUTH_SCHEME = 0x80200028
    BG_E_FILE_NOT_FOUND = 0x80200029
    BG_E_INVALID_RANGE = 0x8020002B
    BG_E_OVERLAPPING_RANGES = 0x8020002C
    BG_E_CONNECT_FAILURE = 0x8020002D
    BG_E_CONNECTION_CLOSED = 0x8020002E
    BG_E_BLOCKED_BY_POLICY = 0x8020003E
    BG_E_INVALID_PROXY_INFO = 0x8020003F
    BG_E_INVALID_CREDENTIALS = 0x80200040
    BG_E_INVALID_HASH_ALGORITHM = 0x80200041
    BG_E_RECORD_DELETED = 0x80200042
    BG_E_UPNP_ERROR = 0x80200045
    BG_E_PEERCACHING_DISABLED = 0x80200047
    BG_E_BUSYCACHERECORD = 0x80200048
    BG_E_TOO_MANY_JOBS_PER_USER = 0x80200049
    BG_E_TOO_MANY_JOBS_PER_MACHINE = 0x80200050
    BG_E_TOO_MANY_FILES_IN_JOB = 0x80200051
    BG_E_TOO_MANY_RANGES_IN_FILE = 0x80200052
    BG_E_VALIDATION_FAILED = 0x80200053
    BG_E_MAXDOWNLOAD_TIMEOUT = 0x80200054
    BG_E_TOKEN_REQUIRED = 0x80200056
    BG_E_UNKNOWN_PROPERTY_ID = 0x80200057
    BG_E_READ_ONLY_PROPERTY = 0x80200058
    BG_E_BLOCKED_BY_COST_TRANSFER_POLICY = 0x80200059
    BG_E_PROPERTY_SUPPORTED_FOR_DOWNLOAD_JOBS_ONLY = 0x80200060
    BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE = 0x80200061
    BG_E_READ_ONLY_PROPERTY_AFTER_RESUME = 0x80200062
    BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE = 0x80200063
    BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED = 0x80200064
    BG_E_STANDBY_MODE = 0x80200065
    BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED = 0x80200066
    BG_E_BLOCKED_BY_BATTERY_POLICY = 0x80200067
    BG_E_BLOCKED_BY_BATTERY_SAVER = 0x80200068
    BG_E_WATCHDOG_TIMEOUT = 0x80200069
    BG_E_DATABASE_CORRUPT = 0x8020006C
    BG_E_RANDOM_ACCESS_NOT_SUPPORTED = 0x8020006D
    BG_E_BLOCKED_BY_BACKGROUND_ACCESS_POLICY = 0x8020006E
    BG_E_BLOCKED_BY_GAME_MODE = 0x8020006F
    BG_E_BLOCKED_BY_SYSTEM_POLICY = 0x80200070
    BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD = 0x80200071
    BG_E_UNSUPPORTED_JOB_CONFIGURATION = 0x80200072
    BG_E_REMOTE_FILE_CHANGED = 0x80200073
    BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED = 0x80200074
    BG_E_READ_ONLY_WHEN_JOB_ACTIVE = 0x80200075
    BG_E_ERROR_CONTEXT_SERVER_CERTIFICATE_CALLBACK = 0x80200076

    E_NOTIMPL = 0x80004001
    E_ABORT = 0x80004004
    E_FAIL = 0x80004005
    E_PENDING = 0x8000000A
    CO_E_FAILEDTOIMPERSONATE = 0x80010123
    E_ACCESSDENIED = 0x80070005
    E_INVALIDARG = 0x80070057
    ERROR_FILE_NOT_FOUND = 0x80070002
    ERROR_PATH_NOT_FOUND = 0x80070003
    ERROR_WRITE_FAULT = 0x8007001D
    ERROR_SHARING_VIOLATION = 0x80070020
    ERROR_FILE_EXISTS = 0x80070050
    ERROR_DISK_FULL = 0x80070070
    ERROR_DIRECTORY = 0x8007010B
    ERROR_FILE_TOO_LARGE = 0x800700DF
    ERROR_FILENAME_EXCED_RANGE = 0x800700CE
    ERROR_SERVICE_NOT_ACTIVE = 0x80070426
    ERROR_NOT_LOGGED_ON = 0x800704DD
    ERROR_NO_LOGON_SERVERS = 0x8007051F
    ERROR_NO_SUCH_USER = 0x80070525
    ERROR_LOGON_FAILURE = 0x8007052E
    ERROR_ACCOUNT_RESTRICTION = 0x8007052F
    ERROR_PASSWORD_EXPIRED = 0x80070532
    ERROR_ACCOUNT_DISABLED = 0x80070533
    ERROR_TIME_SKEW = 0x80070576
    ERROR_TRUSTED_RELATIONSHIP_FAILURE = 0x800706FD
    ERROR_ACCOUNT_EXPIRED = 0x80070701
    ERROR_ACCOUNT_LOCKED_OUT = 0x80070775
    ERROR_WINHTTP_TIMEOUT = 0x80072EE2
    ERROR_WINHTTP_NAME_NOT_RESOLVED = 0x80072EE7
    ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED = 0x80072F0C
    ERROR_WINHTTP_SECURE_CERT_REV_FAILED = 0x80072F19
    ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY = 0x80072F99
    ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY = 0x80072F9A
    ERROR_WINHTTP_SECURE_CERT_REVOKED = 0x80072F8A
    ERROR_WINHTTP_SECURE_FAILURE = 0x80072F8F
    ERROR_WINHTTP_REDIRECT_FAILED = 0x80072F7C
    SEC_E_LOGON_DENIED = 0x8009030C
    SEC_E_WRONG_PRINCIPAL = 0x80090322
    SEC_E_BAD_BINDINGS = 0x80090346
    SEC_E_NO_CREDENTIALS = 0x8009030E
    SEC_E_DELEGATION_POLICY = 0x8009035E
    CRYPT_E_NOT_FOUND = 0x80092004


HTTP_ERROR = 0x80190000  # BG_E_HTTP_ERROR_nnn = this | nnn


def code_name(code: int) -> str:
    """The name of an HRESULT as BITS's documentation writes it."""
    if code & 0xFFFF0000 == HTTP_ERROR:
        return f"BG_E_HTTP_ERROR_{code & 0xFFFF}"
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"HRESULT 0x{code:08X}"


_ADVICE: Mapping[int, str] = MappingProxyType(
    {
        ErrorCode.BG_E_NOT_FOUND: "check the job's id; finished and cancelled jobs leave the queue",
        ErrorCode.BG_E_INVALID_STATE: "look at the job's state first",
        ErrorCode.BG_E_EMPTY: "add a file before resuming the job",
        ErrorCode.BG_E_DESTINATION_LOCKED: "wait for the other transfer to this path, or cancel it",
        ErrorCode.BG_E_NETWORK_DISCONNECTED: "the job goes on by itself when the network is back",
        ErrorCode.BG_E_BLOCKED_BY_POLICY: "the job goes on by itself when the policy allows it; FOREGROUND jobs are exempt",
        ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY: "the job goes on by itself when the cost is allowed; set_cost_flags allows others",
        ErrorCode.BG_E_MISSING_FILE_SIZE: "the server must announce the size of the file",
        ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT: "the server must support byte ranges, or use a foreground job",
        ErrorCode.BG_E_INVALID_SERVER_RESPONSE: "the server or something between broke the protocol; look at its log",
        ErrorCode.BG_E_TOO_LARGE: "the peer sent more than is allowed",
        ErrorCode.BG_E_STRING_TOO_LONG: "shorten the value",
        ErrorCode.BG_E_NO_PROGRESS: "remove the cause of the last transient error, then resume the job",
        ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT: "raise the job's maximum download time, then resume it",
        ErrorCode.BG_E_USERNAME_TOO_LARGE: "a user name has at most 300 characters",
        ErrorCode.BG_E_PASSWORD_TOO_LARGE: "a password has at most 65535 characters",
        ErrorCode.BG_E_INVALID_AUTH_TARGET: "use AuthTarget.SERVER or AuthTarget.PROXY",
        ErrorCode.BG_E_INVALID_AUTH_SCHEME: "use one of AuthScheme's members",
        ErrorCode.BG_E_CONNECT_FAILURE: "check that the host and its port can be reached from here",
        ErrorCode.BG_E_CONNECTION_CLOSED: "the job goes on from where it stopped",
        ErrorCode.BG_E_INVALID_PROXY_INFO: "check the job's proxy settings",
        ErrorCode.BG_E_INVALID_CREDENTIALS: "set the job's credentials again, then resume it",
        ErrorCode.BG_E_VALIDATION_FAILED: "compare the expected digest with the publisher's; resume downloads the file anew",
        ErrorCode.BG_E_TOKEN_REQUIRED: "set the helper token again, or set the helper flags to NONE, then resume the job",
        ErrorCode.BG_E_DATABASE_CORRUPT: "keep the journal for analysis and start with a new one",
        ErrorCode.BG_E_REMOTE_FILE_CHANGED: "the file keeps changing on the server; resume the job when it has settled",
        ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER: "complete or cancel some of the user's jobs",
        ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE: "complete or cancel some of the queue's jobs",
        ErrorCode.BG_E_PROXY_LIST_TOO_LARGE: "name fewer proxies: the list has at most 32 KiB",
        ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE: "name fewer hosts, or use patterns: the list has at most 32 KiB",
        ErrorCode.BG_E_INVALID_HASH_ALGORITHM: "use an algorithm that this Python's hashlib knows",
        ErrorCode.BG_E_WATCHDOG_TIMEOUT: "give the command more time, or find out what it waits for",
        ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB: "spread the files over several jobs",
        ErrorCode.BG_E_TOO_MANY_RANGES_IN_FILE: "join neighbouring ranges, or spread them over several files",
        ErrorCode.BG_E_INVALID_RANGE: "name ranges that lie within the remote file",
        ErrorCode.BG_E_OVERLAPPING_RANGES: "name each byte of the remote file once",
        ErrorCode.BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED: "use AuthTarget.PROXY; for servers there is set_credentials",
        ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE: "set it before the first file is added",
        ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE: "a maximum download size is a whole number of bytes from 1",
        ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED: "fetch the file in a job that may have more bytes",
        ErrorCode.BG_E_RANDOM_ACCESS_NOT_SUPPORTED: "fetch the file in a job that is not in on-demand mode",
        ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION: "use another job for files that need another configuration",
        ErrorCode.BG_E_LOCAL_FILE_CHANGED: "leave the part file alone until the job is complete; resume downloads the file anew",
        ErrorCode.E_NOTIMPL: "leave out what this version or this system does not support",
        ErrorCode.E_FAIL: "look at the log, and report the defect with it",
        ErrorCode.ERROR_WRITE_FAULT: "check the volume, its mount options and the system's log, then resume the job",
        ErrorCode.ERROR_FILE_TOO_LARGE: "use a volume and limits that allow files of this size, then resume the job",
        ErrorCode.E_PENDING: "wait until the file is transferred",
        ErrorCode.CO_E_FAILEDTOIMPERSONATE: "give the process the privilege, or use a token it may become",
        ErrorCode.E_ACCESSDENIED: "check the permissions of this identity",
        ErrorCode.E_INVALIDARG: "correct the argument",
        ErrorCode.E_ABORT: "create a new job if the file is still wanted",
        ErrorCode.ERROR_FILE_NOT_FOUND: "create what is missing, then resume the job",
        ErrorCode.ERROR_PATH_NOT_FOUND: "create the directory, then resume the job",
        ErrorCode.ERROR_DISK_FULL: "make room on the volume; the job then goes on from where it stopped",
        ErrorCode.ERROR_FILE_EXISTS: "name a file, not a directory or a device, as the destination",
        ErrorCode.ERROR_FILENAME_EXCED_RANGE: "shorten the name of the destination",
        ErrorCode.ERROR_DIRECTORY: "use a directory that this identity owns and that others may not change",
        ErrorCode.ERROR_SHARING_VIOLATION: "end what uses the file, then resume the job",
        ErrorCode.ERROR_SERVICE_NOT_ACTIVE: "open a manager on the journal; the job continues there",
        ErrorCode.ERROR_WINHTTP_TIMEOUT: "the job tries again by itself",
        ErrorCode.ERROR_WINHTTP_NAME_NOT_RESOLVED: "check the host's name and the name servers",
        ErrorCode.ERROR_WINHTTP_SECURE_FAILURE: "check the server's certificate, its name and the trusted authorities",
        ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED: "give the job a client certificate that this server accepts, then resume it",
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY: "put the certificate's key beside it or name its file, then resume the job",
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY: "let the job's owner read the key and its password, then resume the job",
        ErrorCode.CRYPT_E_NOT_FOUND: "put the certificate where the job looks for it, or name another, then resume the job",
        ErrorCode.ERROR_WINHTTP_SECURE_CERT_REVOKED: "do not trust this server; tell its administrator",
        ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED: "give the job current revocation lists with set_crl_source, then resume it",
        ErrorCode.BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED: "call set_server_certificate_validation again, then resume the job",
        ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME: "set it before the job is resumed for the first time",
        ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE: "suspend the job first",
        ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD: "use GET, or leave the job as its method needs it",
        ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED: "use the final address of the file, or ask its publisher",
        ErrorCode.SEC_E_LOGON_DENIED: "set the right credentials, then resume the job",
        ErrorCode.SEC_E_NO_CREDENTIALS: "give the identity a credential for this scheme with set_credentials, then resume the job",
        ErrorCode.SEC_E_WRONG_PRINCIPAL: "check the name of the host in the URL and the realm's service principals",
        ErrorCode.SEC_E_BAD_BINDINGS: "TLS may be intercepted on the way; check who issued the certificate",
        ErrorCode.ERROR_TIME_SKEW: "set this machine's clock; a realm allows five minutes",
        ErrorCode.SEC_E_DELEGATION_POLICY: "the realm's administrator keeps the list of services that an account may delegate to",
        ErrorCode.ERROR_NO_LOGON_SERVERS: "check krb5.conf, the realm's DNS records and the way to its KDC",
        ErrorCode.ERROR_NO_SUCH_USER: "check the user's name and realm",
        ErrorCode.ERROR_LOGON_FAILURE: "check the user's name and the password or key; too many tries may lock the account",
        ErrorCode.ERROR_ACCOUNT_RESTRICTION: "ask the administrator whether the account is disabled, locked or expired",
        ErrorCode.ERROR_PASSWORD_EXPIRED: "change the password, then log on with the new one",
        ErrorCode.ERROR_ACCOUNT_DISABLED: "ask the administrator to enable the account",
        ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE: "check the way to the realm's KDC, and that the keytab is current",
        ErrorCode.ERROR_ACCOUNT_EXPIRED: "ask the administrator to extend the account",
        ErrorCode.ERROR_ACCOUNT_LOCKED_OUT: "wait, or ask the administrator to unlock the account",
        HTTP_ERROR | 401: "set credentials for the server, then resume the job",
        HTTP_ERROR | 403: "ask the server's administrator for access with this identity",
        HTTP_ERROR | 404: "check the URL",
        HTTP_ERROR | 407: "set credentials for the proxy (Job.set_credentials with AuthTarget.PROXY), then resume the job",
        HTTP_ERROR | 410: "ask the publisher where the file is now",
    }
)


class BitsError(Exception):
    """Something went wrong with a transfer.

    Attributes:
        code: the HRESULT (`ErrorCode`, or `BG_E_HTTP_ERROR_nnn` = 0x80190000 | status).
        context: whose fault it was.
        transient: whether the job goes on by itself.
        job_id, url, path, identity, http_status: where it happened, as far as known. `url` never carries a query or user information.
        advice: what to do, one sentence.
        retry_after: seconds the server asked to wait, else None.
    """

    default_code: int = ErrorCode.E_FAIL
    default_context: ErrorContext = ErrorContext.UNKNOWN

    code: int
    context: ErrorContext
    transient: bool
    job_id: UUID | None
    url: str | None
    path: Path | None
    identity: str | None
    http_status: int | None
    advice: str
    retry_after: float | None

    def __init__(
        self,
        message: str | None = None,
        *,
        code: int | None = None,
        context: ErrorContext | None = None,
        transient: bool | None = None,
        job_id: UUID | None = None,
        url: str | None = None,
        path: Path | str | None = None,
        identity: str | None = None,
        http_status: int | None = None,
        advice: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = int(self.default_code if code is None else code)
        self.context = self.default_context if context is None else context
        self.transient = self.code in TRANSIENT_CODES if transient is None else transient
        self.job_id = job_id
        self.url = None if url is None else show_url(url)
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.http_status = http_status
        self.advice = advice or _ADVICE.get(self.code, "")
        self.retry_after = retry_after
        self.message = message or (type(self).__doc__ or type(self).__name__).partition("\n")[0].removesuffix(".")
        super().__init__(self.message)

    def fields(self) -> dict[str, Any]:
        """All that `make_error` needs to make an equal error; what the journal and a pickle keep."""
        return {
            "code": self.code,
            "context": self.context,
            "message": self.message,
            "transient": self.transient,
            "job_id": self.job_id,
            "url": self.url,
            "path": self.path,
            "identity": self.identity,
            "http_status": self.http_status,
            "advice": self.advice,
            "retry_after": self.retry_after,
        }

    def located(self, **where: Any) -> "BitsError":
        """A new error of the same class with missing places filled in (`job_id=`, `url=`, `path=`, `identity=`)."""
        fields = self.fields()
        for name, value in where.items():
            if fields[name] is None:
                fields[name] = value
        error = _rebuild(type(self), fields)
        error.__cause__ = self.__cause__
        error.__suppress_context__ = True
        return error

    def __str__(self) -> str:
        where = [
            f"{label} {show_text(str(value))}"
            for label, value in (("identity", self.identity), ("file", self.path), ("URL", self.url), ("job", self.job_id))
            if value is not None
        ]
        parts = [f"{code_name(self.code)} (0x{self.code:08X}, {self.context.name}): {show_text(self.message, 500)}", *where]
        if self.advice:
            parts.append(self.advice)
        return "; ".join(parts)

    def __reduce__(self) -> tuple[Callable[..., "BitsError"], tuple[type["BitsError"], dict[str, Any]]]:
        return _rebuild, (type(self), self.fields())


def _rebuild(kind: type[BitsError], fields: dict[str, Any]) -> BitsError:
    fields = dict(fields)
    return kind(fields.pop("message"), **fields)


class InvalidArgument(BitsError, ValueError):
    """An argument has a value that is not allowed."""

    default_code = ErrorCode.E_INVALIDARG
    default_context = ErrorContext.NONE


class InvalidState(BitsError):
    """The job's state does not allow this."""

    default_code = ErrorCode.BG_E_INVALID_STATE
    default_context = ErrorContext.NONE


class NotFound(BitsError):
    """There is no such job, or it has left the queue."""

    default_code = ErrorCode.BG_E_NOT_FOUND
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class AccessDenied(BitsError):
    """This identity may not open the job."""

    default_code = ErrorCode.E_ACCESSDENIED
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class JobCancelled(BitsError):
    """The job was cancelled."""

    default_code = ErrorCode.E_ABORT
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class ManagerClosed(BitsError):
    """The manager was closed."""

    default_code = ErrorCode.ERROR_SERVICE_NOT_ACTIVE
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class StoreError(BitsError):
    """The journal of jobs cannot be used."""

    default_code = ErrorCode.BG_E_DATABASE_CORRUPT
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class ImpersonationFailed(BitsError):
    """The process could not take, or keep, the identity."""

    default_code = ErrorCode.CO_E_FAILEDTOIMPERSONATE
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class LogonFailed(BitsError):
    """The user could not be logged on."""

    default_code = ErrorCode.ERROR_LOGON_FAILURE
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class TokenRequired(BitsError):
    """The job acts as an identity whose token is gone."""

    default_code = ErrorCode.BG_E_TOKEN_REQUIRED
    default_context = ErrorContext.GENERAL_QUEUE_MANAGER


class AuthFailed(BitsError):
    """The server or the proxy did not accept the identity, or nothing may be shown to it."""

    default_code = ErrorCode.SEC_E_LOGON_DENIED
    default_context = ErrorContext.GENERAL_TRANSPORT


class LocalFileError(BitsError):
    """The local file cannot be made, written or replaced."""

    default_code = ErrorCode.ERROR_WRITE_FAULT
    default_context = ErrorContext.LOCAL_FILE


class RemoteFileError(BitsError):
    """The server does not deliver the file."""

    default_code = ErrorCode.BG_E_INVALID_SERVER_RESPONSE
    default_context = ErrorContext.REMOTE_FILE


class NetworkError(BitsError):
    """The connection failed."""

    default_code = ErrorCode.BG_E_CONNECT_FAILURE
    default_context = ErrorContext.GENERAL_TRANSPORT


class ValidationFailed(BitsError):
    """The bytes are not the bytes that were expected."""

    default_code = ErrorCode.BG_E_VALIDATION_FAILED
    default_context = ErrorContext.REMOTE_FILE


TRANSIENT_CODES: frozenset[int] = frozenset(
    {
        ErrorCode.BG_E_NETWORK_DISCONNECTED,
        ErrorCode.BG_E_CONNECT_FAILURE,
        ErrorCode.BG_E_CONNECTION_CLOSED,
        ErrorCode.BG_E_BLOCKED_BY_POLICY,
        ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY,
        ErrorCode.ERROR_WINHTTP_TIMEOUT,
        ErrorCode.ERROR_WINHTTP_NAME_NOT_RESOLVED,
        ErrorCode.ERROR_DISK_FULL,
    }
)

_CLASS_OF_CODE: Mapping[int, type[BitsError]] = MappingProxyType(
    {
        ErrorCode.E_INVALIDARG: InvalidArgument,
        ErrorCode.BG_E_STRING_TOO_LONG: InvalidArgument,
        ErrorCode.BG_E_USERNAME_TOO_LARGE: InvalidArgument,
        ErrorCode.BG_E_PASSWORD_TOO_LARGE: InvalidArgument,
        ErrorCode.BG_E_INVALID_AUTH_TARGET: InvalidArgument,
        ErrorCode.BG_E_INVALID_AUTH_SCHEME: InvalidArgument,
        ErrorCode.BG_E_PROXY_LIST_TOO_LARGE: InvalidArgument,
        ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE: InvalidArgument,
        ErrorCode.BG_E_OVERLAPPING_RANGES: InvalidArgument,
        ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE: InvalidArgument,
        ErrorCode.BG_E_INVALID_STATE: InvalidState,
        ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE: InvalidState,
        ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION: InvalidState,
        ErrorCode.E_PENDING: InvalidState,
        ErrorCode.BG_E_EMPTY: InvalidState,
        ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME: InvalidState,
        ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE: InvalidState,
        ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD: InvalidState,
        ErrorCode.BG_E_NOT_FOUND: NotFound,
        ErrorCode.E_ABORT: JobCancelled,
        ErrorCode.ERROR_SERVICE_NOT_ACTIVE: ManagerClosed,
        ErrorCode.ERROR_NO_LOGON_SERVERS: LogonFailed,
        ErrorCode.ERROR_NO_SUCH_USER: LogonFailed,
        ErrorCode.ERROR_LOGON_FAILURE: LogonFailed,
        ErrorCode.ERROR_ACCOUNT_RESTRICTION: LogonFailed,
        ErrorCode.ERROR_PASSWORD_EXPIRED: LogonFailed,
        ErrorCode.ERROR_ACCOUNT_DISABLED: LogonFailed,
        ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE: LogonFailed,
        ErrorCode.ERROR_ACCOUNT_EXPIRED: LogonFailed,
        ErrorCode.ERROR_ACCOUNT_LOCKED_OUT: LogonFailed,
        ErrorCode.ERROR_TIME_SKEW: LogonFailed,
        ErrorCode.BG_E_DATABASE_CORRUPT: StoreError,
        ErrorCode.CO_E_FAILEDTOIMPERSONATE: ImpersonationFailed,
        ErrorCode.BG_E_TOKEN_REQUIRED: TokenRequired,
        ErrorCode.SEC_E_LOGON_DENIED: AuthFailed,
        ErrorCode.SEC_E_NO_CREDENTIALS: AuthFailed,
        ErrorCode.SEC_E_WRONG_PRINCIPAL: AuthFailed,
        ErrorCode.SEC_E_BAD_BINDINGS: AuthFailed,
        ErrorCode.SEC_E_DELEGATION_POLICY: AuthFailed,
        HTTP_ERROR | 401: AuthFailed,
        HTTP_ERROR | 407: AuthFailed,
        ErrorCode.BG_E_INVALID_CREDENTIALS: AuthFailed,
        ErrorCode.BG_E_VALIDATION_FAILED: ValidationFailed,
        ErrorCode.BG_E_DESTINATION_LOCKED: LocalFileError,
        ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER: AccessDenied,
        ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE: AccessDenied,
        ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB: AccessDenied,
        ErrorCode.BG_E_TOO_MANY_RANGES_IN_FILE: AccessDenied,
        ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT: NetworkError,
        ErrorCode.BG_E_BLOCKED_BY_POLICY: BitsError,
        ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY: BitsError,
    }
)

_CLASS_OF_CONTEXT: Mapping[ErrorContext, type[BitsError]] = MappingProxyType(
    {
        ErrorContext.NONE: BitsError,
        ErrorContext.UNKNOWN: BitsError,
        ErrorContext.GENERAL_QUEUE_MANAGER: StoreError,
        ErrorContext.QUEUE_MANAGER_NOTIFICATION: BitsError,
        ErrorContext.LOCAL_FILE: LocalFileError,
        ErrorContext.REMOTE_FILE: RemoteFileError,
        ErrorContext.GENERAL_TRANSPORT: NetworkError,
        ErrorContext.REMOTE_APPLICATION: RemoteFileError,
        ErrorContext.SERVER_CERTIFICATE_CALLBACK: NetworkError,
    }
)

_CLASS_OF_PAIR: Mapping[tuple[int, ErrorContext], type[BitsError]] = MappingProxyType(
    {
        (ErrorCode.E_ACCESSDENIED, ErrorContext.GENERAL_QUEUE_MANAGER): AccessDenied,
        (ErrorCode.E_ACCESSDENIED, ErrorContext.NONE): AccessDenied,
        (ErrorCode.BG_E_INVALID_RANGE, ErrorContext.NONE): InvalidArgument,
        (ErrorCode.E_INVALIDARG, ErrorContext.LOCAL_FILE): LocalFileError,
        (ErrorCode.E_INVALIDARG, ErrorContext.REMOTE_FILE): RemoteFileError,
    }
)


def class_of(code: int, context: ErrorContext) -> type[BitsError]:
    """The class an error has: by the pair, else by the code, else by the context."""
    return _CLASS_OF_PAIR.get((code, context)) or _CLASS_OF_CODE.get(code) or _CLASS_OF_CONTEXT[context]


def make_error(code: int, context: ErrorContext, message: str | None = None, **where: Any) -> BitsError:
    """An error of the class that (code, context) have. `where` are the keyword arguments of `BitsError`."""
    return class_of(code, context)(message, code=code, context=context, **where)


# -- from an answer ---------------------------------------------------------------------------------------------------------------------


def status_is_transient(status: int) -> bool:
    """BITS's table ("Handling Server Application Errors"), with one deviation of ours: 429 is transient."""
    if status in (408, 409, 429):
        return True
    if status in (501, 505) or 400 <= status < 500:
        return False
    if 300 <= status < 400:
        return status not in (300, 301, 302, 303, 304, 305, 307)
    return True


def error_from_status(
    status: int, *, url: str, reason: str = "", identity: str | None = None, retry_after: float | None = None
) -> BitsError:
    """The error for an answer that is not the file. 407 is the proxy's (GENERAL_TRANSPORT), all else the server's (REMOTE_FILE)."""
    context = ErrorContext.GENERAL_TRANSPORT if status == 407 else ErrorContext.REMOTE_FILE
    who = "the proxy" if status == 407 else "the server"
    return make_error(
        HTTP_ERROR | status,
        context,
        f"{who} answered HTTP {status} {show_text(reason, 60)}".rstrip(),
        transient=status_is_transient(status),
        url=url,
        identity=identity,
        http_status=status,
        retry_after=retry_after if status in (429, 503) else None,
        advice=_ADVICE.get(HTTP_ERROR | status) or _advice_for(status),
    )


def _advice_for(status: int) -> str:
    if status_is_transient(status):
        return "the job tries again by itself; if it lasts, ask the server's administrator"
    if 300 <= status < 400:
        return "use the address that the server points to"
    return "check the URL, or ask the server's administrator"


# -- from an exception ------------------------------------------------------------------------------------------------------------------

_CODE_OF_ERRNO: Mapping[int, int] = MappingProxyType(
    {
        errno.ENOENT: ErrorCode.ERROR_PATH_NOT_FOUND,
        errno.ENOTDIR: ErrorCode.ERROR_PATH_NOT_FOUND,
        errno.ELOOP: ErrorCode.ERROR_PATH_NOT_FOUND,
        errno.EACCES: ErrorCode.E_ACCESSDENIED,
        errno.EPERM: ErrorCode.E_ACCESSDENIED,
        errno.EROFS: ErrorCode.E_ACCESSDENIED,
        errno.ENOSPC: ErrorCode.ERROR_DISK_FULL,
        getattr(errno, "EDQUOT", -1): ErrorCode.ERROR_DISK_FULL,
        errno.EISDIR: ErrorCode.ERROR_FILE_EXISTS,
        errno.EEXIST: ErrorCode.ERROR_FILE_EXISTS,
        errno.ENOTEMPTY: ErrorCode.ERROR_FILE_EXISTS,
        errno.EBUSY: ErrorCode.ERROR_SHARING_VIOLATION,
        errno.ETXTBSY: ErrorCode.ERROR_SHARING_VIOLATION,
        errno.EFBIG: ErrorCode.ERROR_FILE_TOO_LARGE,
        errno.ENAMETOOLONG: ErrorCode.ERROR_FILENAME_EXCED_RANGE,
    }
)


_ADVICE_OF_ERRNO: Mapping[int, str] = MappingProxyType(  # where the code's own would lead astray
    {
        errno.EROFS: "make its file system writable (a fault of the disk makes some read-only: see the system's log), then resume the job",
        getattr(errno, "EDQUOT", -1): "make room within the user's quota; the job then goes on from where it stopped",
    }
)


def error_from_os(exc: OSError, *, path: Path | str, identity: str | None, doing: str = "use") -> BitsError:
    """The LOCAL_FILE error for a failed file call. `doing` is the verb of its sentence: "cannot <doing> <path>"."""
    code = _CODE_OF_ERRNO.get(exc.errno or 0, ErrorCode.ERROR_WRITE_FAULT)
    if getattr(exc, "winerror", None) in (32, 33):  # another program has it open, or a part of it locked: to Python no permission
        code = ErrorCode.ERROR_SHARING_VIOLATION
    message = f"cannot {doing} the file: {exc.strerror or type(exc).__name__}"
    return make_error(code, ErrorContext.LOCAL_FILE, message, path=path, identity=identity, advice=_ADVICE_OF_ERRNO.get(exc.errno or 0))


_REVOCATION: Mapping[int, int] = MappingProxyType(  # by OpenSSL's X509_V_ERR_*
    {
        23: ErrorCode.ERROR_WINHTTP_SECURE_CERT_REVOKED,
        **dict.fromkeys((3, 5, 8, 11, 12, 15, 16, 33, 35, 36, 44, 54), ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED),
    }
)


_CERTIFICATE_ALERTS: Mapping[str, str] = MappingProxyType(  # by OpenSSL's name of what the server sent (RFC 8446, 6.2)
    {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the job showed none",
        "SSLV3_ALERT_BAD_CERTIFICATE": "refuses the job's",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "refuses the kind of the job's",
        "SSLV3_ALERT_CERTIFICATE_REVOKED": "says that the job's is revoked",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED": "says that the job's has expired",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "refuses the job's",
        "TLSV1_ALERT_UNKNOWN_CA": "does not know who issued the job's",
    }
)


def error_from_network(exc: BaseException, *, url: str, doing: str = "reach the server") -> BitsError:
    """The error for a failed call on a socket: names, connections, TLS, deadlines."""
    code, why, transient = _network_code(exc)
    advice = "check the port, and whether the address should begin with https" if _is_no_tls(exc) else None
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, f"cannot {doing}: {why}", transient=transient, url=url, advice=advice)


def _is_no_tls(exc: BaseException) -> bool:
    """Whether what answered speaks something else than TLS; HTTP, most often."""
    return isinstance(exc, ssl.SSLError) and getattr(exc, "reason", None) in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")


def _network_code(exc: BaseException) -> tuple[int, str, bool]:
    if isinstance(exc, ssl.SSLCertVerificationError) and getattr(exc, "verify_code", 0) in _REVOCATION:
        return _REVOCATION[exc.verify_code], f"certificate refused: {show_text(exc.verify_message or '')}", False
    if isinstance(exc, ssl.SSLCertVerificationError):
        return ErrorCode.ERROR_WINHTTP_SECURE_FAILURE, f"certificate refused: {show_text(exc.verify_message or '')}", False
    if isinstance(exc, ssl.SSLError) and exc.reason in _CERTIFICATE_ALERTS:
        why = f"the server wants a client certificate, and {_CERTIFICATE_ALERTS[exc.reason]}"
        return ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED, why, False
    if _is_no_tls(exc):
        return ErrorCode.ERROR_WINHTTP_SECURE_FAILURE, "what answers there does not speak TLS", True
    if isinstance(exc, ssl.SSLError):
        return ErrorCode.ERROR_WINHTTP_SECURE_FAILURE, f"TLS failed: {show_text(exc.reason or type(exc).__name__)}", True
    if isinstance(exc, socket.gaierror):
        again = exc.errno == socket.EAI_AGAIN
        return (
            ErrorCode.ERROR_WINHTTP_NAME_NOT_RESOLVED,
            "the name servers do not answer" if again else "the host's name is not known",
            True,
        )
    if isinstance(exc, TimeoutError):
        return ErrorCode.ERROR_WINHTTP_TIMEOUT, "no answer in time", True
    if isinstance(exc, OSError) and exc.errno in (errno.ENETUNREACH, errno.ENETDOWN, getattr(errno, "EHOSTUNREACH", -1)):
        return ErrorCode.BG_E_NETWORK_DISCONNECTED, "no way to the host", True
    if isinstance(exc, ConnectionResetError | BrokenPipeError | ConnectionAbortedError | EOFError):
        return ErrorCode.BG_E_CONNECTION_CLOSED, "the connection was cut", True
    if isinstance(exc, ConnectionRefusedError):  # asyncio's own text does not say it
        return ErrorCode.BG_E_CONNECT_FAILURE, "the connection was refused", True
    if isinstance(exc, OSError):
        return ErrorCode.BG_E_CONNECT_FAILURE, show_text(exc.strerror or type(exc).__name__), True
    return ErrorCode.BG_E_CONNECTION_CLOSED, type(exc).__name__, True


# -- text that others wrote ---------------------------------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")
_BEGINNING = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#\\]*)")
_AUTHORITY = re.compile(r"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?")


def show_text(text: str, limit: int = 200) -> str:
    """Text of a peer, fit for one line of a terminal: no control characters, direction marks or surrogates (bytes that were not UTF-8, and
    that no stream takes), bounded (T14)."""
    if not (text.isascii() and text.isprintable()):
        text = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show_url(url: str) -> str:
    """A URL fit for logs and messages: without user information, with its query shown as `?…` and its fragment left out (T14)."""
    url = _without_user(str(url)) if "@" in str(url) else str(url)
    base, question, _ = show_text(url, 2300).partition("#")[0].partition("?")
    return base + ("?…" if question else "")


def _without_user(url: str) -> str:
    """The text without what may be a name and a password, also of what is no URL: where no host and port stand before the `@`, nobody can
    tell a password with a slash in it from a path, so all that stands before it goes."""
    match = _BEGINNING.match(url)
    if match is None:
        return url.rpartition("@")[2]
    scheme, authority, rest = match[1], match[2], url[match.end() :]
    if "@" in authority:
        return scheme + authority.rpartition("@")[2] + rest
    return url if _AUTHORITY.fullmatch(authority) else scheme + rest.rpartition("@")[2]


class ForeignError(Exception):
    """What is left of another library's exception after scrubbing: the name of its class."""


def scrub(exc: BaseException) -> BaseException:
    """The exception to chain ours to: itself where it can hold no secret, else a stand-in that names its class only (T14).

    An `OSError` keeps its number and text; exceptions of other libraries may hold headers, URLs and tokens in their arguments, their
    attributes, their causes and the frames of their traceback, so only the class's name survives.
    """
    if isinstance(exc, BitsError):
        return exc
    if type(exc) in (ConnectionResetError, ConnectionRefusedError, BrokenPipeError, ConnectionAbortedError, TimeoutError, EOFError):
        return type(exc)(*(show_text(a) if isinstance(a, str) else a for a in exc.args[:2]))
    if isinstance(exc, OSError) and type(exc).__module__ == "builtins" and exc.errno is not None:
        return OSError(exc.errno, show_text(exc.strerror or ""))
    return ForeignError(f"{type(exc).__module__}.{type(exc).__qualname__}")
