"""A child process as a token, with every id and capability set dropped (T5): BITS's notification command line.

The service starts a small interpreter, the launcher (`launcher`, where the order of its steps is argued), which becomes the
token and then the program; the service learns whether it got there. Nothing of the service goes along but what holds the
command down: its resource limits, its control group, its namespaces. What the command prints goes to /dev/null: it is the
user's text, without bound, and a pipe for it would be kept open by whatever the command leaves in the background, or break
under it when the service ends. no_new_privs stays for good: a command cannot use sudo or any other setuid program.

A thread of its own, which is always the process (T2), starts, watches and reaps each command. Whoever gives up on a command
ends its whole process group; the group's number is its own for as long as its leader is not reaped, so nobody else is hit.
This module knows nothing of jobs, nor when a command is due. Other systems than Linux run commands as the process's own
identity only.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from pathlib import PurePath
from typing import Any, Final, TypeVar

from ..errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    ImpersonationFailed,
    InvalidArgument,
    TokenRequired,
    error_from_os,
    make_error,
    scrub,
    show_text,
)
from . import launcher
from .threads import _outcome, wearing
from .tokens import ImpersonationLevel, LocalIdentity, Token

T = TypeVar("T")

MAX_PROGRAM: Final = 260  # MAX_PATH
MAX_PARAMETERS: Final = 4000
GRACE: Final = 5.0  # seconds between SIGTERM and SIGKILL
PATIENCE: Final = 10.0  # and what a killed command may take to be gone

# -- the command line -------------------------------------------------------------------------------------------------


def split_parameters(text: str) -> list[str]:
    r"""Takes BITS's parameter string apart, by the rules of Microsoft's C runtime and without any shell.

    Blanks and tabs separate parameters. Double quotes hold them together, and "" is an empty one. A backslash stands for
    itself, except before a double quote: there \\ is a backslash and \" a double quote. Nothing else means anything: no variable, no
    wildcard, no redirection. `subprocess.list2cmdline` is the inverse.

    Raises:
        InvalidArgument: A double quote is not closed.
    """
    words: list[str] = []
    word: str | None = None  # None: between two words
    quoted = False
    for backslashes, quote, blank, plain in re.findall(r'(\\*)(")|([ \t]+)|(\\+|[^\\" \t]+)', text):
        if blank and not quoted:
            words += [] if word is None else [word]
            word = None
            continue
        word = (word or "") + backslashes[: len(backslashes) // 2] + blank + plain
        if quote and len(backslashes) % 2:
            word += quote
        elif quote:
            quoted = not quoted
    if quoted:
        raise InvalidArgument("a double quote in the command's parameters is not closed")
    return words if word is None else [*words, word]


def command_arguments(program: str, parameters: Sequence[str] | str | None) -> list[str]:
    """What the program gets as argv, checked.

    `parameters` is BITS's string, or the whole argv. Either way its first word must be the program: its full path, or the last
    component of it. What the program gets there is always the full path. None stands for the program alone.

    Raises:
        InvalidArgument: The program is not a full path, the first word is not the program, or there is a NUL. The code is
            BG_E_STRING_TOO_LONG when a limit is passed: 260 characters for the program, 4,000 for the parameters.
    """
    if not isinstance(program, str):
        raise InvalidArgument(f"a program is the text of a path, not {type(program).__name__}")
    _limit("the program's path", program, MAX_PROGRAM)
    if not PurePath(program).is_absolute() or program.endswith(("/", os.sep)):
        raise InvalidArgument(
            f"a program is named by its full path, not {show_text(program, 80)!r}",
            advice="nothing is searched on PATH or expanded: write the whole path",
        )
    if parameters is None:
        return [program]
    if isinstance(parameters, str):
        _limit("the parameters", parameters, MAX_PARAMETERS)
        words = split_parameters(parameters)
    else:
        words = list(parameters)
        if not all(isinstance(word, str) for word in words):
            raise InvalidArgument("a command's parameters are text")
        _limit("the parameters", " ".join(words), MAX_PARAMETERS)
    if not words or os.path.normcase(words[0]) not in _names_of(program):
        raise InvalidArgument(
            f"the first parameter must be the program, {show_text(program, 80)}",
            advice="write the program before its parameters; quote its path if there are blanks in it",
        )
    return [program, *words[1:]]


def _names_of(program: str) -> set[str]:
    path = PurePath(program)
    return {os.path.normcase(name) for name in (program, path.name, *([path.stem] if sys.platform == "win32" else []))}


def _limit(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise InvalidArgument(f"{what}: {len(text)} characters, {most} are allowed", code=ErrorCode.BG_E_STRING_TOO_LONG)
    _encodable(what, text)


def _encodable(what: str, text: str) -> None:
    if "\0" in text:
        raise InvalidArgument(f"{what}: a NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"{what}: a character that this system cannot write") from scrub(exc)


# -- the environment --------------------------------------------------------------------------------------------------

PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_OURS: Final = re.compile(r"BITS_[A-Z0-9_]{1,59}")
_WINDOWS: Final = ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "PATH", "TEMP", "TMP", "USERPROFILE", "USERNAME")


def _checked(environment: Mapping[str, str]) -> dict[str, str]:
    """Only names of ours: no loader, shell or interpreter listens to one, so none can be turned by it."""
    for name, value in environment.items():
        if not isinstance(name, str) or not _OURS.fullmatch(name):
            raise InvalidArgument(f"a command is given variables named BITS_..., not {show_text(str(name), 64)!r}")
        if not isinstance(value, str):
            raise InvalidArgument(f"{name} is not text")
        _encodable(name, value)
    return dict(environment)


def _user_environment(name: str, home: str) -> dict[str, str]:
    return {"PATH": PATH, "HOME": home, "USER": name, "LOGNAME": name, "LANG": "C.UTF-8"}


def _own_environment(local: LocalIdentity) -> dict[str, str]:
    if sys.platform == "win32":  # without these Windows loads no library
        return {name: value for name in _WINDOWS if (value := os.environ.get(name)) is not None}
    return _user_environment(local.name, _home_of(os.geteuid()))


def _home_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_dir or "/"
    except KeyError:
        return "/"  # a container's made-up uid


# -- the launcher -----------------------------------------------------------------------------------------------------

# Its text as it was when this process loaded the package: an upgrade meanwhile does not bring one that asks for something else.
_LAUNCHER: Final = (pkgutil.get_data(__package__, "launcher.py") or b"").decode()


def _raw(text: str) -> str:
    return os.fsencode(text).decode("latin-1")


def _request(local: LocalIdentity, arguments: list[str], environment: Mapping[str, str]) -> launcher.Request:
    """Blocks: asks the user database."""
    from . import posix

    if not isinstance(local, posix.ProcessIdentity | posix.UserIdentity):
        raise ImpersonationFailed(f"{local.name} is not a user of this machine", identity=local.name)
    account = local.account
    variables = _user_environment(account.name, _home_of(account.uid)) | dict(environment)
    return {
        "uid": account.uid,
        "gid": account.gid,
        "groups": list(account.groups),
        "own": local.is_process,
        "program": _raw(arguments[0]),
        "arguments": [_raw(word) for word in arguments],
        "environment": {_raw(name): _raw(value) for name, value in variables.items()},
        "signal": [],
    }


def _start_launcher() -> "subprocess.Popen[bytes]":
    if not sys.executable or not os.path.isabs(sys.executable):
        raise ImpersonationFailed("no command can be run: it is not known where the Python interpreter is")
    libraries = os.environ.get("LD_LIBRARY_PATH")  # some interpreters find their own library by it
    return subprocess.Popen(  # noqa: S603 - the interpreter that runs this, and a text of ours
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # what the interpreter itself has to say, should it not start
        env={} if libraries is None else {"LD_LIBRARY_PATH": libraries},
        cwd="/",
        start_new_session=True,
    )


def _ask(process: "subprocess.Popen[bytes]", request: launcher.Request) -> list[str]:
    """Hands the request over and returns the lines of the report, once the launcher has become the program or has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout as answers:
        with contextlib.suppress(BrokenPipeError), process.stdin as questions:  # it ended before it read: the report says why
            questions.write(json.dumps(request).encode())
        return answers.read().decode(errors="replace").splitlines()


def _failure(report: list[str], request: launcher.Request, name: str, program: str) -> BitsError | None:
    """The error for a command that was not started; None: it was."""
    if report[-1:] == [launcher.READY]:  # before it an interpreter may have warned of something
        return None
    try:
        found: launcher.Report = json.loads(report[-1])
        step, number, why = found["step"], int(found["errno"]), show_text(found["why"])
    except (LookupError, TypeError, ValueError):
        said = show_text(" ".join(report)[-200:])
        return ImpersonationFailed(f"cannot run {program}: the launcher ended early{': ' if said else ''}{said}", identity=name)
    if step == launcher.LAST and launcher.READY in report:
        return _not_executable(OSError(number, why), name, program)
    return ImpersonationFailed(
        f"cannot run {program}: the launcher could not {step}: {why}",
        identity=name,
        advice="a container's filter may forbid keyctl: allow it" if number == errno.EPERM and "keyctl" in why else None,
    )


_WHY_NOT: Final = {
    errno.ENOENT: (ErrorCode.ERROR_FILE_NOT_FOUND, "there is no such program, or its #! line names none", "check the program's path"),
    errno.EACCES: (ErrorCode.E_ACCESSDENIED, "this identity may not execute it", "check the program's mode and its directories'"),
    errno.ENOEXEC: (ErrorCode.E_INVALIDARG, "it is no program of this system", "a script begins with a #! line"),
}


def _not_executable(exc: OSError, name: str, program: str) -> BitsError:
    if exc.errno not in _WHY_NOT:
        return error_from_os(exc, path=program, identity=name, doing="run")
    code, why, advice = _WHY_NOT[exc.errno]
    return make_error(code, ErrorContext.LOCAL_FILE, f"cannot run the program: {why}", path=program, identity=name, advice=advice)


# -- one command ------------------------------------------------------------------------------------------------------


class _Command:
    """A command from its start to its end. `live` is called by one thread; `stop`, at most once, by another."""

    def __init__(self, local: LocalIdentity, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._local = local
        self._arguments = arguments
        self._environment = environment
        self._lock = threading.Lock()  # starting and reaping exclude stopping: a signal meets this command or nobody
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._reaped = False  # the process group's number is no longer ours
        self._ended = threading.Event()  # the leader of the group is a zombie, or was one
        self._stopped = threading.Event()  # stop() sends no more signals

    def live(self) -> int:
        """Starts the command, waits for its end and returns its status."""
        self._local = self._local.fresh()
        error = self._start_as_token() if sys.platform == "linux" else self._start_as_process()
        try:
            status = self._wait()
        except BitsError:
            if error is None:
                raise
        if error is not None:
            raise error
        return status

    def stop(self) -> None:
        """Ends the process group: SIGTERM, and SIGKILL when nothing of it is seen any more or the grace is over."""
        with self._lock:
            self._stopping = True
            process = None if self._reaped else self._process
        try:
            if process is not None:
                self._end_group(process)
        finally:
            self._stopped.set()

    def _start_as_token(self) -> BitsError | None:
        request = _request(self._local, self._arguments, self._environment)
        try:
            process = self._born(_start_launcher)
        except OSError as exc:
            why = exc.strerror or type(exc).__name__
            raise ImpersonationFailed(f"the launcher cannot be started: {why}", identity=self._local.name) from scrub(exc)
        report = _ask(process, request)
        return _failure(report, request, self._local.name, self._arguments[0])

    def _start_as_process(self) -> BitsError | None:
        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(  # noqa: S603 - the caller's program, without a shell
                self._arguments,
                executable=self._arguments[0],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_own_environment(self._local) | dict(self._environment),
                cwd=PurePath(self._arguments[0]).anchor,
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )

        try:
            self._born(start)
        except OSError as exc:
            raise _not_executable(exc, self._local.name, self._arguments[0]) from scrub(exc)
        return None

    def _born(self, start: Callable[[], "subprocess.Popen[bytes]"]) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._stopping:
                raise _gave_up(self._arguments[0])
            self._process = start()
            return self._process

    def _wait(self) -> int:
        process = self._process
        assert process is not None
        left_to_us = _wait_for_end(process)
        with self._lock:
            self._reaped = not (left_to_us and self._stopping)
            if self._reaped:
                process.wait()
        self._ended.set()
        if not self._reaped:
            self._stopped.wait()
            process.wait()
        if not left_to_us and sys.platform == "linux":
            raise BitsError(
                "the command's exit status was lost: something in this process reaps or ignores all its children",
                context=ErrorContext.QUEUE_MANAGER_NOTIFICATION,
                advice="wait for children by their process ids only, and leave SIGCHLD as it was",
            )
        return process.returncode

    # -- ending it

    def _end_group(self, process: "subprocess.Popen[bytes]") -> None:
        if sys.platform == "win32":
            process.terminate()
            return
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, PATIENCE)):
            self._signal(process.pid, number)
            self._await_group(process.pid, patience)

    def _await_group(self, group: int, patience: float) -> None:
        """Waits for the leader's end, then for all others': nobody tells when they are gone, so they are looked for."""
        end, pause = time.monotonic() + patience, 0.002
        self._ended.wait(patience)
        while (left := end - time.monotonic()) > 0 and _lives(group):
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.25)

    def _signal(self, group: int, number: signal.Signals) -> None:
        if self._reaped:
            return  # the number may be somebody else's
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            pass  # all of it is gone, and somebody else has reaped it
        except PermissionError:
            self._signal_as_token(group, number)

    def _signal_as_token(self, group: int, number: signal.Signals) -> None:
        """A service without CAP_KILL may not signal what it has started as somebody else; that somebody may."""
        request: launcher.Request = _request(self._local, self._arguments, {}) | {"signal": [group, int(number)]}
        with contextlib.suppress(ImpersonationFailed, OSError):  # then the command outlives its end, which the caller is told
            process = _start_launcher()
            _ask(process, request)
            process.wait()


def _wait_for_end(process: "subprocess.Popen[bytes]") -> bool:
    """Waits without reaping, so that the process group keeps its number. False: it is reaped, by us or somebody else."""
    if sys.platform != "linux":
        process.wait()
        return False
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _lives(group: int) -> bool:
    """Whether a process group has a member that is no zombie. A /proc that hides other users' processes says no."""
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, _, number, *_ = file.read().rpartition(b")")[2].split()
                if int(number) == group and state not in b"ZX":
                    return True
    return False


# -- the asyncio side -------------------------------------------------------------------------------------------------


async def run_command(
    token: Token,
    program: str,
    parameters: Sequence[str] | str | None,
    *,
    timeout: float | None,
    environment: Mapping[str, str] = {},
) -> int:
    """Runs a program as the token and returns its exit status; -n when signal n ended it.

    It runs with all ids and groups of the token and with no capability, in a new session and a new session keyring, in the root
    directory, with umask 077, /dev/null for its three streams, and PATH, HOME, USER, LOGNAME, LANG and `environment` for its
    environment. What it leaves in the background when it ends by itself goes on. At the timeout, and at a cancel, its whole process group
    gets SIGTERM, and SIGKILL 5 seconds later; a descendant that made a session of its own is out of reach. A token without an
    identity of its own on this machine (`Token.for_network`) runs commands as the process; jobs take no command from it.

    Args:
        program: A full path; nothing is searched or expanded. At most 260 characters.
        parameters: BITS's string (see `split_parameters`), or the whole argv; its first word is the program. At most
            4,000 characters. None: no parameters.
        timeout: Seconds from now to its end.
        environment: More variables, named BITS_...

    Raises:
        InvalidArgument: The program, the parameters or a variable's name is not allowed.
        ImpersonationFailed: The token could not be taken in every respect; the message names the step. The command was not run.
        TokenRequired: The token was closed, or its account is gone.
        LocalFileError: There is no such program, or the token may not execute it.
        BitsError: BG_E_WATCHDOG_TIMEOUT: it did not end in time. E_NOTIMPL: only Linux runs commands as another identity.
    """
    arguments = command_arguments(program, parameters)
    variables = _checked(environment)
    _check_token(token)
    command = _Command(token.local, arguments, variables)
    life = _in_thread(command.live, "bits-command")
    try:
        await asyncio.wait({life}, timeout=timeout)
    except asyncio.CancelledError:
        await _end(command, life)
        raise
    if life.done():
        return life.result()
    cancelled, gone = await _end(command, life)
    if cancelled:
        raise asyncio.CancelledError
    raise _gave_up(program, timeout=timeout, identity=token.name, gone=gone)


def _check_token(token: Token) -> None:
    if not isinstance(token, Token):
        raise InvalidArgument(f"a command runs as a Token, not as {type(token).__name__}")
    if token.closed:
        raise TokenRequired(f"the token of {token.name} is gone", identity=token.name)
    if token.fake or token.level.value < ImpersonationLevel.IMPERSONATE.value:
        kind = "a fake token" if token.fake else f"a token of level {token.level.name}"
        raise ImpersonationFailed(f"{kind} cannot run a command", identity=token.name)
    if sys.platform != "linux" and not token.local.is_process:
        raise make_error(
            ErrorCode.E_NOTIMPL,
            ErrorContext.QUEUE_MANAGER_NOTIFICATION,
            "commands of other identities than the process's own run on Linux only",
            identity=token.name,
        )
    if (identity := wearing()) is not None:
        raise ImpersonationFailed(f"a thread that acts as {identity} may start no process")


def _gave_up(program: str, *, timeout: float | None = None, identity: str | None = None, gone: bool = True) -> BitsError:
    after = "" if timeout is None else f" within {timeout:g} s"
    return make_error(
        ErrorCode.BG_E_WATCHDOG_TIMEOUT,
        ErrorContext.QUEUE_MANAGER_NOTIFICATION,
        f"{program} did not end{after} and {'was ended' if gone else 'could not be ended: it may still run'}",
        identity=identity,
        advice="make the command quicker, or let it start its work in the background",
    )


def _in_thread(func: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """A bare future, not a task: whoever cancels all tasks of a loop does not make it forget a process."""
    source: concurrent.futures.Future[T] = concurrent.futures.Future()

    def live() -> None:
        try:
            source.set_result(Context().run(func))
        except BaseException as exc:
            source.set_exception(exc)

    outcome = _outcome(source)
    threading.Thread(target=live, name=name, daemon=True).start()
    return outcome


async def _end(command: _Command, life: "asyncio.Future[int]") -> tuple[bool, bool]:
    """Ends the command whatever happens: whether a cancel came meanwhile, and whether the command is gone.

    The wait is bounded: what is stuck in the kernel cannot be killed.
    """
    both: list[asyncio.Future[Any]] = [life, _in_thread(command.stop, "bits-command-end")]
    for future in both:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # its outcome no longer matters
    loop = asyncio.get_running_loop()
    end, cancelled = loop.time() + GRACE + PATIENCE, False
    while not all(future.done() for future in both) and (left := end - loop.time()) > 0:
        try:
            await asyncio.wait(both, timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    return cancelled, life.done()
