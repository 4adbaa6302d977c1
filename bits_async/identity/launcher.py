"""What stands between a service and a command: a program of its own that gives up everything, then becomes the command (T5).

`processes` hands this file's text to `python -I -S -c`, so nothing of the package is imported here, and the request comes
through standard input: neither a parameter nor a variable is ever an argument of the interpreter. All modules are loaded
while the interpreter is still the service, because the token need not be able to read it. It is alone in its process and has
one thread; that is why it may call what is forbidden to the rest of the package.

The order of `STEPS`, each of which must work or the command is not run:

1. Descriptors first, so that nothing that follows can fall into the service's files. What /proc lists is all there is: there is
   no other thread that could open one more.
2. Signals, directory, umask and session need no privilege and give none up.
3. no_new_privs while everything else is still there: from here on no exec gives anything, whatever fails later.
4. Groups, gid, bounding set, uid: each while the capability that it needs is still held. From root, taking the uid empties
   the effective and permitted sets; the ambient set is emptied before, because from any other uid it would be kept, and exec
   would make it effective again.
5. The remaining sets explicitly: for a service that is not root, or that set securebits, no change of uid has emptied them.
6. The session keyring after the ids, so that it belongs to the token and is counted against its quota.
7. All of it is read back from the kernel, then the program is started.

Without CAP_SETPCAP the bounding set cannot be emptied. The command is run all the same: under no_new_privs an exec gives no
capability that was not permitted before it, and nothing is; to its descendants too.
"""

import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypedDict

READY: Final = "ready"
UNSTARTED: Final = 127  # the launcher's own exit status


class Request(TypedDict):
    """What `processes` asks for. Text that is not ours is bytes written as latin-1, so that no codec has a say."""

    uid: int
    gid: int
    groups: list[int]
    own: bool  # the process's own identity: its groups are there already
    program: str
    arguments: list[str]
    environment: dict[str, str]
    signal: list[int]  # a process group and a signal: sent instead of starting the program


class Report(TypedDict):
    """What went wrong."""

    step: str
    errno: int
    why: str


_REPORT: Final = 3
_libc: Any = None  # loaded by main(): on Windows this module is only looked at


def _read_request() -> Request:
    text = b""
    while more := os.read(0, 1 << 16):
        text += more
    request: Request = json.loads(text)
    return request


def _failed(call: str) -> OSError:
    return OSError(ctypes.get_errno(), call)


def _prctl(option: int, argument: int = 0, third: int = 0) -> int:
    return int(_libc.prctl(option, argument, third, 0, 0))


# -- the steps --------------------------------------------------------------------------------------------------------


def _descriptors() -> list[int]:
    return sorted(map(int, os.listdir("/proc/self/fd")))


def take_standard_streams(request: Request) -> None:
    os.dup2(1, _REPORT, inheritable=False)  # closed by the exec: that is how the service learns of it
    for number in _descriptors():
        if number > _REPORT:
            try:
                os.close(number)
            except OSError as exc:
                if exc.errno != errno.EBADF:  # the one that listed them
                    raise
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def reset_signals(request: Request) -> None:
    """What is ignored or blocked would stay so through the exec: a command that cannot be ended, or never gets SIGPIPE."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def leave_the_place(request: Request) -> None:
    os.chdir("/")
    os.umask(0o077)
    if os.getsid(0) != os.getpid():  # the service starts the launcher in a new session
        os.setsid()


def forbid_new_privileges(request: Request) -> None:
    if _prctl(38, 1):  # PR_SET_NO_NEW_PRIVS
        raise _failed("prctl(PR_SET_NO_NEW_PRIVS)")


def take_groups(request: Request) -> None:
    if not request["own"]:
        os.setgroups(request["groups"])
    os.setresgid(*[request["gid"]] * 3)


def _bounding() -> list[int]:
    """The capabilities in the bounding set; those that the kernel does not know end the search."""
    held = []
    for capability in range(64):
        found = _prctl(23, capability)  # PR_CAPBSET_READ
        if found < 0:
            break
        if found:
            held.append(capability)
    return held


def empty_bounding_set(request: Request) -> None:
    for capability in _bounding():
        if _prctl(24, capability):  # PR_CAPBSET_DROP
            if ctypes.get_errno() == errno.EPERM and not _holds_setpcap():
                return
            raise _failed("prctl(PR_CAPBSET_DROP)")
    if _bounding():
        raise OSError(errno.EPERM, "capabilities were left")


def _holds_setpcap() -> bool:
    return bool(int(_status()["CapEff"], 16) >> 8 & 1)


def empty_ambient_set(request: Request) -> None:
    if _prctl(47, 4) and ctypes.get_errno() != errno.EINVAL:  # PR_CAP_AMBIENT_CLEAR_ALL; EINVAL: Linux before 4.3 has none
        raise _failed("prctl(PR_CAP_AMBIENT)")


def take_user(request: Request) -> None:
    os.setresuid(*[request["uid"]] * 3)


def empty_capability_sets(request: Request) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    if _libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise _failed("capset")


_KEYCTL: Final = {
    ("x86_64", True): 250,
    ("x86_64", False): 288,
    ("i686", False): 288,
    ("i586", False): 288,
    ("i386", False): 288,
    ("aarch64", True): 219,
    ("aarch64", False): 311,
    ("armv8l", False): 311,
    ("armv7l", False): 311,
    ("armv6l", False): 311,
    ("riscv64", True): 219,
    ("loongarch64", True): 219,
    ("ppc64le", True): 271,
    ("s390x", True): 280,
}


def join_new_keyring(request: Request) -> None:
    """An anonymous session keyring: the service's holds its tickets, its mounts' keys and what else it was given."""
    number = _KEYCTL.get((os.uname().machine, sys.maxsize > 2**32))
    if number is None:
        raise OSError(errno.ENOSYS, f"the system calls of {os.uname().machine} are not known")
    if _libc.syscall(ctypes.c_long(number), ctypes.c_long(1), None) >= 0:  # KEYCTL_JOIN_SESSION_KEYRING
        return
    refused = ctypes.get_errno()
    if refused == errno.ENOSYS:
        return  # a kernel without keyrings
    if refused == errno.EPERM and request["own"]:
        return  # a container's filter, which the command inherits; and the keyring is that of its own user
    raise _failed("keyctl(KEYCTL_JOIN_SESSION_KEYRING)")


def _status() -> dict[str, str]:
    with open("/proc/self/status", "rb") as file:  # in bytes: a codec would be imported now, which the token may not be able to
        text = file.read().decode("latin-1")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def read_back(request: Request) -> None:
    """Asks the kernel, in its own words, whether this process is what it should be."""
    status = _status()
    found = {
        "Uid": status["Uid"].split() == [str(request["uid"])] * 4,
        "Gid": status["Gid"].split() == [str(request["gid"])] * 4,
        "Groups": set(map(int, status["Groups"].split())) == set(request["groups"]),
        "no_new_privs": _prctl(39) == 1,
        "descriptors": _descriptors() == [0, 1, 2, _REPORT, _REPORT + 1],  # the last one lists them
        "streams": {os.fstat(number).st_rdev for number in (0, 1, 2)} == {os.makedev(1, 3)},  # /dev/null
        "session": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "directory": os.getcwd() == "/",
        "umask": os.umask(0o077) == 0o077,
    }
    found |= {name: int(status.get(name, "0"), 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
    wrong = [name for name, right in found.items() if not right]
    if wrong:
        raise OSError(errno.EPERM, f"{', '.join(wrong)}: not what was asked for")


def start_program(request: Request) -> None:
    if request["signal"]:
        os.killpg(*request["signal"])
        os._exit(0)
    program, *words = (word.encode("latin-1") for word in (request["program"], *request["arguments"]))
    environment = {name.encode("latin-1"): value.encode("latin-1") for name, value in request["environment"].items()}
    os.write(_REPORT, f"{READY}\n".encode())
    os.execve(program, words, environment)  # noqa: S606 - a shell is what it must not have


# What a step could not do, in the words of the error that the service raises.
STEPS: Final[tuple[tuple[str, Callable[[Request], None]], ...]] = (
    ("put /dev/null in place of the descriptors", take_standard_streams),
    ("reset the signals", reset_signals),
    ("leave the working directory, umask and session", leave_the_place),
    ("forbid new privileges", forbid_new_privileges),
    ("take the groups", take_groups),
    ("empty the bounding set", empty_bounding_set),
    ("empty the ambient set", empty_ambient_set),
    ("take the user id", take_user),
    ("empty the capability sets", empty_capability_sets),
    ("join a new session keyring", join_new_keyring),
    ("read back what it had become", read_back),
    ("start the program", start_program),
)
LAST: Final = STEPS[-1][0]


def _report(step: str, exc: BaseException) -> None:
    number = exc.errno if isinstance(exc, OSError) and exc.errno else 0
    why = (exc.strerror or "") if isinstance(exc, OSError) else type(exc).__name__
    if number and why != os.strerror(number):
        why = f"{why}: {os.strerror(number)}"
    report: Report = {"step": step, "errno": number, "why": why}
    text = json.dumps(report).encode() + b"\n"
    try:
        os.write(_REPORT, text)
    except OSError:
        os.write(1, text)  # it was not moved yet


def main() -> NoReturn:
    """Does the steps. Ends as the program, or with `UNSTARTED` and a report."""
    global _libc
    step = "read its request"
    try:
        _libc = ctypes.CDLL(None, use_errno=True)
        _libc.syscall.restype = ctypes.c_long
        _libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        request = _read_request()
        for step, act in STEPS:  # noqa: B007 - named in the report
            act(request)
    except BaseException as exc:
        _report(step, exc)
    finally:
        os._exit(UNSTARTED)


if __name__ == "__main__":
    main()
