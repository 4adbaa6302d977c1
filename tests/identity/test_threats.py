"""T1 to T3, carried out: other code changes the process's ids, a token thread reaches for more, its user reaches for the process."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiofiles
import pytest

from bits_async.errors import ImpersonationFailed
from bits_async.identity import kernel, posix
from bits_async.identity.threads import TokenExecutor, run_as
from bits_async.identity.tokens import Token
from tests.identity import child
from tests.local_users import LocalUser
from tests.waiting import until

pytestmark = pytest.mark.privileged

# -- T1

SETEUID = """
uid, home = int(sys.argv[1]), sys.argv[2]
name = f"made-{os.getpid()}"

def make(directory):
    inside.set()
    changed.wait()
    return native.create_exclusive(directory, name), "handed out"

async def main():
    token = await Token.for_user(uid)
    files = TokenExecutor(token)
    directory = await files.run(native.open_directory, home)
    running = asyncio.ensure_future(files.run(make, directory))
    while not inside.is_set():
        await asyncio.sleep(0.001)
    os.seteuid(0)
    changed.set()
    for use in (lambda: running, lambda: files.run(os.listdir, home), lambda: asyncio.wrap_future(files.pool.submit(os.getpid))):
        try:
            print("used", await use())
        except ImpersonationFailed as exc:
            print(exc.identity, exc.message)
    assert os.stat(f"{home}/{name}").st_uid == 0  # the attack works; its fruit is not used
    os.unlink(f"{home}/{name}")
    again = TokenExecutor(token)
    print(await again.run(kernel.fsuid) == uid)  # threads born later are the user again
    await again.aclose()

inside, changed = threading.Event(), threading.Event()
asyncio.run(main())
"""


def test_t01_seteuid_in_the_middle_of_a_call_breaks_the_executor(users: Mapping[str, LocalUser], world_dir: Path) -> None:
    alice = users["bitsalice"]
    world_dir.chmod(0o777)
    *errors, again = child.run(SETEUID, alice.uid, world_dir).splitlines()
    found = f"a thread of {alice.name} (uid {alice.uid}, gid {alice.gid}) was found as uid 0, gid {alice.gid}"
    assert errors == [f"{alice.name} {found}"] * 3
    assert again == "True"


SETGROUPS = """
import faulthandler
faulthandler.disable()

async def main():
    files = TokenExecutor(await Token.for_user(int(sys.argv[1])))
    await files.run(os.getpid)
    print("before", flush=True)
    os.setgroups([])
    print("after", flush=True)

asyncio.run(main())
"""


def test_t01_setgroups_while_a_token_thread_lives_ends_the_process(users: Mapping[str, LocalUser]) -> None:
    """glibc wants every thread to change its groups. One without capabilities cannot, and half a change is worse than none."""
    assert child.run(SETGROUPS, users["bitsalice"].uid, signalled=signal.SIGABRT) == "before\n"


OWN_GROUPS = """
async def main():
    files = TokenExecutor(Token.for_process())
    await files.run(os.getpid)
    change()
    print(await outcome(files))
    print(await outcome(TokenExecutor(Token.for_process())))

async def outcome(files):
    try:
        return await files.run(lambda: "works")
    except ImpersonationFailed as exc:
        return "refused" if "was found as" in exc.message else exc.message

def change():
    os.setgroups([4711]) if sys.argv[1] == "groups" else os.setegid(4711) if sys.argv[1] == "gid" else os.seteuid(4711)

asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["groups", "gid", "uid"])
def test_t01_the_processs_own_threads_notice_it_too(what: str) -> None:
    assert child.run(OWN_GROUPS, what).split() == ["refused", "works"]


async def test_t01_raw_calls_in_the_thread_are_caught(users: Mapping[str, LocalUser]) -> None:
    """A C library that changes the thread itself: back to the process's uid, which needs no privilege."""
    files = TokenExecutor(await Token.for_user("bitsalice"))
    with pytest.raises(ImpersonationFailed, match="found as uid 0"):
        await files.run(kernel._libc.setfsuid, 0)
    assert files.broken
    with pytest.raises(ImpersonationFailed):
        await aiofiles.open("/dev/null", executor=files.pool)
    await files.aclose()


async def test_t01_the_check_takes_microseconds(users: Mapping[str, LocalUser]) -> None:
    import timeit

    token = await Token.for_user("bitsalice")
    timer = time.thread_time  # its own: not that of whoever else the processor works for
    seconds = await run_as(token, lambda: min(timeit.repeat(token.local.check, number=1000, repeat=5, timer=timer)))
    assert seconds / 1000 < 50e-6  # 3 on an idle machine


# -- T2


async def test_t02_a_token_thread_has_no_capability(users: Mapping[str, LocalUser]) -> None:
    status = await run_as(await Token.for_user("bitsalice"), kernel.status)
    for name in (b"CapEff", b"CapPrm", b"CapInh", b"CapAmb"):
        assert int(status[name], 16) == 0
    assert status[b"NoNewPrivs"] == b"1"
    assert kernel.capabilities()[0]  # the process keeps its own


async def test_t02_another_processs_directory_does_not_lead_around_a_closed_door(users: Mapping[str, LocalUser], world_dir: Path) -> None:
    (world_dir / "closed" / "open").mkdir(parents=True)
    (world_dir / "closed" / "open" / "secret").write_text("secret")
    (world_dir / "closed").chmod(0o700)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=world_dir / "closed" / "open") as other:
        try:
            path = f"/proc/{other.pid}/cwd/secret"
            assert Path(path).read_text() == "secret"
            with pytest.raises(PermissionError):
                await run_as(await Token.for_user("bitsalice"), Path(path).read_text)
        finally:
            other.kill()


def start_thread() -> None:
    threading.Thread(target=print).start()


def fork_and_exec() -> None:
    """What multiprocessing does: no audit event tells of it on some versions of Python."""
    import multiprocessing.util

    multiprocessing.util.spawnv_passfds(b"/usr/bin/id", [b"id"], [])


def call_from_c() -> None:
    if kernel._libc.system(b"exit 0") != 0:
        raise PermissionError("system() failed")


BIRTHS: list[Callable[[], Any]] = [
    lambda: subprocess.run(["id"], check=False),
    lambda: os.system("id"),
    lambda: os.popen("id"),
    os.fork,
    os.forkpty,
    lambda: os.posix_spawn("/usr/bin/id", ["id"], {}),
    lambda: os.spawnv(os.P_WAIT, "/usr/bin/id", ["id"]),
    lambda: os.execv("/usr/bin/id", ["id"]),
    start_thread,
    fork_and_exec,
    call_from_c,
]
NAMES = ["run", "system", "popen", "fork", "forkpty", "posix_spawn", "spawn", "exec", "thread", "fork_exec", "c"]


@pytest.mark.parametrize("birth", BIRTHS, ids=NAMES)
async def test_t02_a_token_thread_starts_no_process_and_no_thread(users: Mapping[str, LocalUser], birth: Callable[[], Any]) -> None:
    token = await Token.for_user("bitsalice")
    threads = set(threading.enumerate())
    with pytest.raises((ImpersonationFailed, RuntimeError, OSError)) as caught:
        await run_as(token, birth)
    if isinstance(caught.value, ImpersonationFailed):
        assert "bitsalice may start no process and no thread" in str(caught.value)
    await until(lambda: not set(threading.enumerate()) - threads)  # the thread of run_as ends a moment after its outcome came


@pytest.mark.parametrize("birth", BIRTHS[:-3], ids=NAMES[:-3])
async def test_t02_the_audit_hook_alone_refuses_them_too(
    users: Mapping[str, LocalUser], monkeypatch: pytest.MonkeyPatch, birth: Callable[[], Any]
) -> None:
    """Where the kernel has no filters."""
    monkeypatch.setattr(kernel, "forbid_births", lambda: False)
    with pytest.raises(ImpersonationFailed, match="may start no process and no thread"):
        await run_as(await Token.for_user("bitsalice"), birth)


ESCAPED = """
import multiprocessing.util

def escape():
    out, into = os.pipe()
    os.dup2(into, 1)
    pid = multiprocessing.util.spawnv_passfds(b"/bin/cat", [b"cat", b"/proc/self/status"], [])
    os.waitpid(pid, 0)
    return os.read(out, 1 << 16)

async def main():
    kernel.forbid_births = lambda: False
    token = await Token.for_user(int(sys.argv[1]))
    stdout = os.dup(1)
    text = await run_as(token, escape)
    os.dup2(stdout, 1)
    print(*(line.split()[1] for line in text.decode().splitlines() if line.startswith(("CapEff", "CapPrm"))))

asyncio.run(main())
"""


def test_t02_a_program_that_got_started_nevertheless_has_no_capability(users: Mapping[str, LocalUser]) -> None:
    """The last line of defence: without it an exec of uid 0 has them all back."""
    assert child.run(ESCAPED, users["bitsalice"].uid).split() == ["0" * 16] * 2


async def test_t02_run_as_from_a_token_thread_is_refused(users: Mapping[str, LocalUser]) -> None:
    alice, bob = await Token.for_user("bitsalice"), await Token.for_user("bitsbob")

    def nested() -> None:
        asyncio.run(run_as(bob, os.getpid))

    with pytest.raises(ImpersonationFailed, match="may start no thread"):
        await run_as(alice, nested)


async def test_t02_a_token_thread_makes_no_tokens(users: Mapping[str, LocalUser]) -> None:
    def make() -> None:
        asyncio.run(Token.for_user("bitsbob"))

    Token.for_process()
    alice = await Token.for_user("bitsalice")
    with pytest.raises(ImpersonationFailed, match="may start no thread"):
        await run_as(alice, make)
    assert await run_as(alice, Token.for_process) is Token.for_process()


async def test_t02_an_executor_does_not_grow_from_a_token_thread(users: Mapping[str, LocalUser]) -> None:
    alice, bob = await Token.for_user("bitsalice"), await Token.for_user("bitsbob")
    theirs = TokenExecutor(bob)
    with pytest.raises(ImpersonationFailed, match="may start no thread"):
        await run_as(alice, lambda: theirs.pool.submit(os.getpid))
    await theirs.run(os.getpid)
    future = await run_as(alice, lambda: theirs.pool.submit(kernel.fsuid))
    assert await asyncio.wrap_future(future) == users["bitsbob"].uid  # by a thread that is bob, wherever it was asked from
    await theirs.aclose()


async def test_t02_the_processs_own_threads_are_free() -> None:
    done = await run_as(Token.for_process(), lambda: subprocess.run(["true"], check=False))
    assert done.returncode == 0


VETOED = """
def veto(event, arguments):
    if event == "sys.addaudithook":
        raise RuntimeError("no hooks here")

sys.addaudithook(veto)

async def main():
    try:
        await Token.for_user(int(sys.argv[1]))
    except ImpersonationFailed as exc:
        print(exc)

asyncio.run(main())
"""


def test_t02_where_the_audit_hook_is_forbidden_no_identity_is_taken(users: Mapping[str, LocalUser]) -> None:
    assert "audit hook" in child.run(VETOED, users["bitsalice"].uid)


# -- T3

SERVICE = """
async def main():
    files = TokenExecutor(await Token.for_user(int(sys.argv[1])))
    tid = await files.run(threading.get_native_id)
    libc = ctypes.CDLL(None)
    print(os.getpid(), tid, libc.prctl(3, 0, 0, 0, 0), flush=True)  # PR_GET_DUMPABLE
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print("alive", await files.run(kernel.fsuid))
    await files.aclose()

asyncio.run(main())
"""

ATTACKER = """
drop_to(int(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
for target in map(int, sys.argv[2:]):
    print(type(failure(os.kill, target, 9)).__name__)
    print(libc.syscall(234, int(sys.argv[2]), target, 9), errno.errorcode[ctypes.get_errno()])  # tgkill
    for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
        print(libc.ptrace(request, target, None, None), errno.errorcode[ctypes.get_errno()])
    for name in ("mem", "fd", "environ", "cwd", "maps"):
        path = f"/proc/{target}/{name}"
        print(type(failure(os.readlink if name == "cwd" else os.listdir if name == "fd" else lambda p: open(p).read(), path)).__name__)
"""


@contextmanager
def service(user: LocalUser) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", child.PRELUDE + SERVICE, str(user.uid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(child.ROOT)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_t03_the_user_of_a_token_can_neither_signal_nor_trace_the_process(users: Mapping[str, LocalUser]) -> None:
    alice = users["bitsalice"]
    with service(alice) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid, tid, dumpable = process.stdout.readline().split()
        assert dumpable != "1"
        attacked = child.run(ATTACKER, alice.uid, pid, tid).splitlines()
        assert attacked == ["PermissionError", *["-1 EPERM"] * 3, *["PermissionError"] * 5] * 2
        assert process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"alive {alice.uid}\n"
        assert process.wait(30) == 0


async def test_t03_only_the_ids_of_file_access_change(users: Mapping[str, LocalUser]) -> None:
    alice = users["bitsalice"]
    status = await run_as(await Token.for_user("bitsalice"), kernel.status)
    assert status[b"Uid"].split() == [b"0", b"0", b"0", b"%d" % alice.uid]
    assert status[b"Gid"].split() == [b"0", b"0", b"0", b"%d" % alice.gid]


def test_t03_nothing_makes_the_process_dumpable() -> None:
    for module in (kernel, posix):
        source = Path(str(module.__file__)).read_text()
        assert "setresuid(" not in source
        assert "DUMPABLE" not in source
