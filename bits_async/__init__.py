"""Background HTTP transfers for asyncio programs in enterprise networks: durable, resumable, with two identities per job.

    path = await bits_async.download("https://host/file.iso", "file.iso")

Where to begin:

    download                   one file in one call, which continues where an earlier call was interrupted
    BitsManager, Job           a durable queue; a job goes from create_job() and add_file() over resume() and wait() to complete()
    Token, impersonate         who acts: the owner of a job, and the helper that TokenOptions sets on it
    AuthCredentials, AuthRules what servers and proxies may be shown
    BackgroundCopyCallback     to be told of a job's end, also of one that an earlier process began; BitsManager.events() to watch
    BitsError                  what goes wrong: its code, whose and where, and what to do (advice)
    testing                    how to test your own program without a network

Names are loaded when they are first used; importing the package loads neither aiohttp nor spnego, aiosqlite, cryptography, typer or rich.

The map of the package; imports point from a lower line to a higher one only:

    errors.py           what can go wrong: every BITS code, context, transient or not; one table from status or exception to them
    clock.py            what time it is, and waiting
    limits.py           token buckets: machine > priority > job; safe from threads
    identity/           WHO
      tokens.py         Token, TokenPair, flags, levels
      ambient.py        the identity that surrounds a call: impersonate(), current_token(), revert_to_self(), carry()
      ntstatus.py       why a KDC of Active Directory refuses an account
      kerberos.py       what a realm's KDC is asked, and what its answers mean
      pam.py            the program that asks PAM; handed over as text
      logon.py          how tokens are made: logon_user(), s4u_logon(), Token.for_*
      wts.py            one look at who is logged on to Windows
      sessions.py       who is logged on: the end of logon sessions (logind, Windows)
      trusted.py        files that count only if nobody else may write them
      vault.py          where secrets are kept encrypted: systemd, the keyring
      configured.py     a fixed identity from a configuration file
      threads.py        TokenExecutor: threads born in a token
      processes.py      a child process as a token, every id and capability dropped
      launcher.py       the program that becomes that child; handed over as text
      kernel.py         Linux system calls on the identity of one thread
      posix.py          per-thread identities, and file calls relative to directory descriptors
      win32.py          Windows calls on access tokens; how calls of Windows are declared
      windows.py        the names of posix.py on Windows
      access_tokens.py  how access tokens are got: a handle, a session, a logon
    auth/               PROVE IT
      challenge.py      WWW-/Proxy-Authenticate text <-> values
      policy.py         which credentials may go where
      tickets.py        ticket-granting tickets, one private cache per credential
      renewal.py        tickets renewed before they end
      sspi.py           security contexts of Windows
      schemes.py        Basic, Digest, NTLM, Negotiate: challenge in, header out; channel binding
    transport/          FETCH
      digests.py        what servers and callers say the bytes hash to
      ranges.py         slices, validators, range headers
      answers.py        judging every status and header set
      proxies.py        proxy settings -> route per URL
      timeouts.py       how long the wire may be silent
      options.py        a job's HTTP options: method, custom headers, security flags, client certificate
      client_certificates.py  a job's own certificate and key, from files that its owner's threads open
      certificates.py   a server's own certificate, where nobody verifies who issued it
      tls.py            contexts for security flags, revocation lists, the peer's certificate
      network.py        network lost and back
      exchange.py       one request and the head of its answer: aiohttp's parser without its session
      connector.py      opens a lane's connection: TCP, CONNECT legs, TLS
      lane.py           requests on that connection, auth included; the pool of lanes
    files/              KEEP
      records.py        what the journal keeps of a part file
      directories.py    where a file may go: who could swap it there, whose links lead there
      hashes.py         digests while writing
      reservation.py    space taken ahead of the bytes
      hops.py           one hop to a thread of the file token: its descriptors, its errors, its loss
      names.py          the part file's name: nobody's promise
      intake.py         a socket's bytes into a file, by one thread
      rename.py         the final name: mode, access list, time
      part.py           PartFile: made or reopened, positional writes by the file token's threads, commit
      batches.py        many small files at once
      leftovers.py      part files of the dead: found again, deleted
    jobs/               DECIDE
      model.py          what a job is; the transition table
      secrets.py        secrets at rest
      keys.py           where their key comes from: a file, a keyring, systemd
      schema.py         the journal's tables, version by version
      columns.py        how the journal keeps a value
      statements.py     its SQL: asked of all jobs, by index
      rows.py           records to rows and back, sealed where they must be
      journal_files.py  its files: private, locked, set aside when damaged
      store.py          durable job journal: SQLite; one thread, one transaction for the saves that come together
      policies.py       bandwidth schedules, cost, group policy (TOML)
      scheduler.py      who runs next, and when a failed job tries again
      faults.py         a journal that cannot be used for now
      certificates.py   the application's own say about servers' certificates
      conditions.py     what must be so for a job to run: the network, its price, the administrator
      transfer.py       one attempt at one job: the only place where a lane meets a file
      notify.py         what happened: events and the streams that carry them
      callbacks.py      telling the application: callbacks and notification commands, at least once
      roster.py         which jobs are in memory: those at work, those that are held, the next in line
      part_files.py     a job's part files at its end: named or deleted, as the token that made them
      engine.py         commands on jobs, the loop that starts and ends attempts
      arguments.py      what callers hand in, checked
      door.py           who may: the access check
      parties.py        a job's network side: credentials, TLS, the origins they are bound to
      desk.py           what the handles of one open manager work with; limits on what they may ask for
      consent.py        what a helper saw before it set its token, and what a change of it does
      token_options.py  TokenOptions: who acts for a job
      handles.py        Job, JobFile, and the callback that a job takes
      places.py         where a user's transfers keep their state
      logoff.py         what a log-off does to jobs
      orders.py         one file from create to complete
      manager.py        BitsManager, download(): the API
    testing.py          what applications need to test against us without a network
    cli/                app, download, progress: the command line, over the same API

Two lines run straight through it. A byte: socket -> connector -> lane -> transfer -> files.part. A token: impersonate() ->
TokenOptions.set_helper_token() -> TokenPair.acting_for() -> TokenExecutor -> a security context or a file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .auth.policy import AuthCredentials as AuthCredentials
    from .auth.policy import AuthRules as AuthRules
    from .auth.policy import AuthScheme as AuthScheme
    from .auth.policy import AuthTarget as AuthTarget
    from .auth.policy import AutologonLevel as AutologonLevel
    from .auth.policy import Hosts as Hosts
    from .auth.policy import ImplicitCredentials as ImplicitCredentials
    from .errors import AccessDenied as AccessDenied
    from .errors import AuthFailed as AuthFailed
    from .errors import BitsError as BitsError
    from .errors import ErrorCode as ErrorCode
    from .errors import ErrorContext as ErrorContext
    from .errors import ImpersonationFailed as ImpersonationFailed
    from .errors import InvalidArgument as InvalidArgument
    from .errors import InvalidState as InvalidState
    from .errors import JobCancelled as JobCancelled
    from .errors import LocalFileError as LocalFileError
    from .errors import LogonFailed as LogonFailed
    from .errors import ManagerClosed as ManagerClosed
    from .errors import NetworkError as NetworkError
    from .errors import NotFound as NotFound
    from .errors import RemoteFileError as RemoteFileError
    from .errors import StoreError as StoreError
    from .errors import TokenRequired as TokenRequired
    from .errors import ValidationFailed as ValidationFailed
    from .identity.ambient import TokenFlow as TokenFlow
    from .identity.ambient import carry as carry
    from .identity.ambient import current_token as current_token
    from .identity.ambient import impersonate as impersonate
    from .identity.ambient import revert_to_self as revert_to_self
    from .identity.ambient import set_token_flow as set_token_flow
    from .identity.logon import LogonType as LogonType
    from .identity.logon import logon_user as logon_user
    from .identity.logon import s4u_logon as s4u_logon
    from .identity.threads import run_as as run_as
    from .identity.tokens import DelegationTarget as DelegationTarget
    from .identity.tokens import HelperTokenFlags as HelperTokenFlags
    from .identity.tokens import ImpersonationLevel as ImpersonationLevel
    from .identity.tokens import LocalUser as LocalUser
    from .identity.tokens import Token as Token
    from .jobs.arguments import FileInfo as FileInfo
    from .jobs.handles import BackgroundCopyCallback as BackgroundCopyCallback
    from .jobs.handles import Job as Job
    from .jobs.handles import JobFile as JobFile
    from .jobs.keys import KeySource as KeySource
    from .jobs.manager import BitsManager as BitsManager
    from .jobs.manager import download as download
    from .jobs.model import Cancellation as Cancellation
    from .jobs.model import Completion as Completion
    from .jobs.model import CostFlags as CostFlags
    from .jobs.model import FileProgress as FileProgress
    from .jobs.model import JobPriority as JobPriority
    from .jobs.model import JobProgress as JobProgress
    from .jobs.model import JobState as JobState
    from .jobs.model import JobTimes as JobTimes
    from .jobs.model import NotifyCmdLine as NotifyCmdLine
    from .jobs.model import NotifyFlags as NotifyFlags
    from .jobs.model import Waiting as Waiting
    from .jobs.model import WaitingReason as WaitingReason
    from .jobs.notify import Event as Event
    from .jobs.notify import EventsLost as EventsLost
    from .jobs.notify import EventStream as EventStream
    from .jobs.notify import FileRestarted as FileRestarted
    from .jobs.notify import FileTransferred as FileTransferred
    from .jobs.notify import JobChanged as JobChanged
    from .jobs.notify import Progress as Progress
    from .jobs.notify import Retrying as Retrying
    from .jobs.policies import CostSource as CostSource
    from .jobs.policies import GroupPolicy as GroupPolicy
    from .jobs.scheduler import Limits as Limits
    from .jobs.token_options import TokenOptions as TokenOptions
    from .transport.options import ClientCertificate as ClientCertificate
    from .transport.options import SecurityFlags as SecurityFlags
    from .transport.proxies import ProxySettings as ProxySettings
    from .transport.proxies import ProxyUsage as ProxyUsage
    from .transport.ranges import FileRange as FileRange
    from .transport.timeouts import Timeouts as Timeouts

_HOMES: Final = {
    "auth.policy": ("AuthCredentials", "AuthRules", "AuthScheme", "AuthTarget", "AutologonLevel", "Hosts", "ImplicitCredentials"),
    "errors": (
        "AccessDenied",
        "AuthFailed",
        "BitsError",
        "ErrorCode",
        "ErrorContext",
        "ImpersonationFailed",
        "InvalidArgument",
        "InvalidState",
        "JobCancelled",
        "LocalFileError",
        "LogonFailed",
        "ManagerClosed",
        "NetworkError",
        "NotFound",
        "RemoteFileError",
        "StoreError",
        "TokenRequired",
        "ValidationFailed",
    ),
    "identity.ambient": ("TokenFlow", "carry", "current_token", "impersonate", "revert_to_self", "set_token_flow"),
    "identity.logon": ("LogonType", "logon_user", "s4u_logon"),
    "identity.threads": ("run_as",),
    "identity.tokens": ("DelegationTarget", "LocalUser", "HelperTokenFlags", "ImpersonationLevel", "Token"),
    "jobs.arguments": ("FileInfo",),
    "jobs.handles": ("BackgroundCopyCallback", "Job", "JobFile"),
    "jobs.manager": ("BitsManager", "download"),
    "jobs.keys": ("KeySource",),
    "jobs.model": (
        "Cancellation",
        "Completion",
        "CostFlags",
        "FileProgress",
        "JobPriority",
        "JobProgress",
        "JobState",
        "JobTimes",
        "NotifyCmdLine",
        "NotifyFlags",
        "Waiting",
        "WaitingReason",
    ),
    "jobs.notify": (
        "Event",
        "EventStream",
        "EventsLost",
        "FileRestarted",
        "FileTransferred",
        "JobChanged",
        "Progress",
        "Retrying",
    ),
    "jobs.policies": ("CostSource", "GroupPolicy"),
    "jobs.scheduler": ("Limits",),
    "jobs.token_options": ("TokenOptions",),
    "transport.options": ("ClientCertificate", "SecurityFlags"),
    "transport.proxies": ("ProxySettings", "ProxyUsage"),
    "transport.ranges": ("FileRange",),
    "transport.timeouts": ("Timeouts",),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
