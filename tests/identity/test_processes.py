"""A command runs as its token and with nothing else of the service (T5); what is asked for is checked, and what runs can be ended."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import BitsError, ErrorCode, ErrorContext, ImpersonationFailed, InvalidArgument, LocalFileError, TokenRequired
from bits_async.identity import launcher, processes
from bits_async.identity.processes import command_arguments, run_command, split_parameters
from bits_async.identity.threads import run_as
from bits_async.identity.tokens import Token
from bits_async.testing import fake_token
from tests.identity import child
from tests.identity.seen import CAPABILITIES, LOOK, Seen
from tests.local_users import LocalUser
from tests.waiting import DEADLINE, until

SH = "/bin/sh"


async def look(token: Token, directory: Path, **options: Any) -> Seen:
    status = await run_command(token, SH, [SH, "-c", LOOK, "look", str(directory)], timeout=DEADLINE, **options)
    assert status == 0
    return Seen(directory)


@pytest.fixture
def own() -> Token:
    return Token.for_process()


@pytest.fixture
def alice(users: Mapping[str, LocalUser]) -> LocalUser:
    return users["bitsalice"]


@pytest.fixture
def hers(alice: LocalUser, world_dir: Path) -> Path:
    """A directory that only alice may enter."""
    directory = world_dir / "hers"
    directory.mkdir(mode=0o700)
    os.chown(directory, alice.uid, alice.gid)
    return directory


def script(path: Path, text: str, mode: int = 0o755) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children() -> set[str]:
    """Of this process, zombies too."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found.update((thread / "children").read_text().split())
    return found


# -- T5: what the command is


@pytest.mark.privileged
async def test_t05_a_command_has_the_ids_of_its_token_and_no_capability(no_leaks: None, alice: LocalUser, hers: Path) -> None:
    seen = await look(await Token.for_user(alice.uid), hers)
    assert seen.owner == alice.uid
    assert seen.status["Uid"] == [str(alice.uid)] * 4
    assert seen.status["Gid"] == [str(alice.gid)] * 4
    assert seen.status["Groups"] == [str(alice.gid)]
    assert seen.capabilities() == dict.fromkeys(CAPABILITIES, 0)
    assert seen.status["NoNewPrivs"] == ["1"]


async def test_t05_the_process_s_own_command_has_no_capability_either(no_leaks: None, own: Token, tmp_path: Path) -> None:
    seen = await look(own, tmp_path)
    assert seen.status["Uid"] == [str(os.geteuid())] * 4
    assert seen.status["Gid"] == [str(os.getegid())] * 4
    assert set(map(int, seen.status["Groups"])) == set(os.getgroups())
    expected = dict.fromkeys(CAPABILITIES, 0)
    if os.geteuid():  # only CAP_SETPCAP empties it; no_new_privs makes it meaningless
        expected["CapBnd"] = seen.capabilities()["CapBnd"]
    assert seen.capabilities() == expected
    assert seen.status["NoNewPrivs"] == ["1"]


async def test_t05_a_command_gets_nothing_of_the_service(own: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        seen = await look(own, tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGTERM, before)
        os.close(read)
        os.close(write)
    assert seen.descriptors == dict.fromkeys((0, 1, 2), "/dev/null")
    (ignored,), (blocked,) = seen.status["SigIgn"], seen.status["SigBlk"]
    of_the_c_library = 0b11 << 31  # signals 32 and 33: nobody else may set them, and who started the tests may have
    assert (int(ignored, 16) & ~of_the_c_library, int(blocked, 16) & ~of_the_c_library) == (0, 0)
    assert (seen.cwd, seen.umask, seen.terminal) == ("/", 0o077, 0)
    assert seen.pid == seen.group == seen.session != os.getsid(0)
    assert set(seen.environment) == {"PATH", "HOME", "USER", "LOGNAME", "LANG"}


@pytest.mark.privileged
async def test_t05_the_environment_is_the_user_s(alice: LocalUser, hers: Path) -> None:
    seen = await look(await Token.for_user(alice.uid), hers, environment={"BITS_JOB_ID": "a=b é\n"})
    assert seen.environment == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(alice.home),
        "USER": alice.name,
        "LOGNAME": alice.name,
        "LANG": "C.UTF-8",
        "BITS_JOB_ID": "a=b é\n",
    }


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PATH", "HOME", "BASH_ENV", "bits_x", "BITS_", "BITS_A=B", "BITS_\0", "", "BITS_X" * 20])
async def test_t05_no_variable_that_a_loader_or_shell_reads_can_be_given(own: Token, name: str) -> None:
    with pytest.raises(InvalidArgument):
        await run_command(own, "/bin/true", None, timeout=DEADLINE, environment={name: "x"})


async def test_a_variable_is_text_without_nul(own: Token) -> None:
    for value in ("a\0b", 1, "\ud800"):
        with pytest.raises(InvalidArgument):
            await run_command(own, "/bin/true", None, timeout=DEADLINE, environment={"BITS_X": value})  # type: ignore[dict-item]


async def test_a_variable_may_be_longer_than_a_pipe(own: Token) -> None:
    command = [SH, "-c", 'test "${#BITS_X}" = 100000']
    assert await run_command(own, SH, command, timeout=DEADLINE, environment={"BITS_X": "x" * 100000}) == 0


@pytest.mark.privileged
async def test_t05_a_setuid_program_gives_a_command_nothing(alice: LocalUser, hers: Path, world_dir: Path) -> None:
    program = world_dir / "cat"
    shutil.copy("/bin/cat", program)
    program.chmod(0o4755)
    words = [SH, "-c", f"{program} /proc/self/status > {hers}/status"]
    assert await run_command(await Token.for_user(alice.uid), SH, words, timeout=DEADLINE) == 0
    assert f"Uid:\t{alice.uid}\t{alice.uid}\t{alice.uid}\t{alice.uid}\n" in (hers / "status").read_text()


KEYRING = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def keyctl(*arguments):
    result = libc.syscall(ctypes.c_long(int(sys.argv[1])), *arguments)
    return result if result >= 0 else -ctypes.get_errno()
text = ctypes.create_string_buffer(200)
keyctl(ctypes.c_long(6), ctypes.c_long(-3), text, ctypes.c_long(200))  # KEYCTL_DESCRIBE the session keyring
session = keyctl(ctypes.c_long(0), ctypes.c_long(-3), ctypes.c_long(0))
found = keyctl(ctypes.c_long(10), ctypes.c_long(-3), b"user", b"bits-secret", ctypes.c_long(0))  # KEYCTL_SEARCH
with open(sys.argv[2], "w") as file:
    json.dump([text.value.decode(), session, found], file)
"""

KEYRING_SERVICE = """
import json, traceback
from bits_async.identity.processes import run_command
uid, directory, number, add_key, look = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
session = libc.syscall(ctypes.c_long(number), ctypes.c_long(1), b"bits-service")
key = libc.syscall(ctypes.c_long(add_key), b"user", b"bits-secret", b"secret", ctypes.c_long(6), ctypes.c_long(-3))
assert session > 0 and key > 0, (session, key)

async def main():
    program = os.path.realpath(sys.executable)
    words = [program, "-I", "-S", "-c", look, str(number)]
    subprocess.run([*words, directory + "/left"], user=uid, group=uid, extra_groups=[], check=True)
    assert await run_command(await Token.for_user(uid), program, [*words, directory + "/ours"], timeout=30) == 0
    assert await run_command(Token.for_process(), program, [*words, directory + "/own"], timeout=30) == 0
    for name in ("left", "ours", "own"):
        with open(directory + "/" + name) as file:
            text, found_session, found = json.load(file)
        print(name, text.split(";")[1], text.rpartition(";")[2], found_session == session, found == key, -found == errno.ENOKEY)

asyncio.run(main())
"""


@pytest.mark.privileged
def test_t05_a_command_does_not_possess_the_service_s_keys(alice: LocalUser, world_dir: Path) -> None:
    world_dir.chmod(0o777)
    number = launcher._KEYCTL[os.uname().machine, sys.maxsize > 2**32]
    add_key = {250: 248, 288: 286, 219: 217, 311: 309, 271: 269, 280: 278}[number]
    lines = child.run(KEYRING_SERVICE, alice.uid, world_dir, number, add_key, KEYRING).splitlines()
    assert lines == [
        "left 0 bits-service True True False",  # what subprocess(user=) leaves: the attack
        f"ours {alice.uid} _ses False False True",
        "own 0 _ses False False True",
    ]


# -- T5: from a service that is not root

SERVICE = """
import json
from bits_async.identity.processes import run_command
uid, gid, directory, look, held = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
drop_to(65534, held)

def run(where):
    return ["/bin/sh", "-c", look, "look", directory + "/" + where]

async def main():
    subprocess.run(run("left"), user=uid, group=gid, extra_groups=[], check=True)
    assert await run_command(await Token.for_user(uid), "/bin/sh", run("ours"), timeout=30) == 0
    assert await run_command(Token.for_process(), "/bin/sh", run("own"), timeout=30) == 0

asyncio.run(main())
"""


@pytest.mark.privileged
@pytest.mark.parametrize("held", [[6, 7], [6, 7, 8], [1, 3, 6, 7, 8, 21]], ids=["setuid+setgid", "and setpcap", "and more"])
def test_t05_a_service_with_ambient_capabilities_gives_a_command_none(alice: LocalUser, world_dir: Path, held: list[int]) -> None:
    for name in ("left", "ours", "own"):
        (world_dir / name).mkdir()
        (world_dir / name).chmod(0o777)
    child.run(SERVICE, alice.uid, alice.gid, world_dir, LOOK, json.dumps(held))
    left, ours, mine = (Seen(world_dir / name) for name in ("left", "ours", "own"))
    expected = dict.fromkeys(CAPABILITIES, 0)
    if 8 not in held:
        expected["CapBnd"] = left.capabilities()["CapBnd"]
    assert left.capabilities()["CapEff"] == left.capabilities()["CapAmb"] == sum(1 << bit for bit in held)  # the attack
    for seen, uid, gid in ((ours, alice.uid, alice.gid), (mine, 65534, 65534)):
        assert seen.owner == uid
        assert seen.capabilities() == expected
        assert seen.status["NoNewPrivs"] == ["1"]
        assert (seen.status["Uid"], seen.status["Gid"]) == ([str(uid)] * 4, [str(gid)] * 4)
    assert ours.status["Groups"] == [str(alice.gid)]
    assert mine.status["Groups"] == []


ENDING_SERVICE = """
from bits_async.identity.processes import run_command
uid, pids = int(sys.argv[1]), sys.argv[2]
drop_to(65534, [6, 7])  # not CAP_KILL

async def wait_until_it_runs(futures, *, timeout, wait=asyncio.wait):
    if timeout == 2:
        while not os.path.exists(pids) or len(open(pids).readlines()) != 2:
            await asyncio.sleep(0.01)
        timeout = 0
    return await wait(futures, timeout=timeout)

async def main():
    token = await Token.for_user(uid)
    line = 'umask 022; trap "" TERM; echo $$ > "$1"; sleep 1000 & echo $! >> "$1"; wait; wait; sleep 1000'
    words = ["/bin/sh", "-c", line, "sh", pids]
    asyncio.wait = wait_until_it_runs
    try:
        await run_command(token, "/bin/sh", words, timeout=2)
    except BitsError as exc:
        print(hex(exc.code), exc.message)

from bits_async.identity import processes
processes.GRACE, processes.PATIENCE = 0.3, 30
asyncio.run(main())
"""


@pytest.mark.privileged
def test_t05_a_service_that_may_not_signal_a_command_ends_it_as_its_user(alice: LocalUser, world_dir: Path) -> None:
    world_dir.chmod(0o777)
    out = child.run(ENDING_SERVICE, alice.uid, world_dir / "pids")
    assert out == "0x80200069 /bin/sh did not end within 2 s and was ended\n"
    pids = pids_in(world_dir / "pids")
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


LOSING_SERVICE = """
from bits_async.identity.processes import run_command
uid, lost, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
drop_to(65534, [6, 7])
token = asyncio.run(Token.for_user(uid))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(47, 4, 0, 0, 0) == 0  # PR_CAP_AMBIENT_CLEAR_ALL
bit = 1 << 13 - lost  # the other one stays
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(bit, bit, bit)) == 0
assert libc.prctl(47, 2, 13 - lost, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE
print(failure(lambda: asyncio.run(run_command(token, program, None, timeout=30))).message)
"""


@pytest.mark.privileged
@pytest.mark.parametrize(("lost", "step"), [(6, "take the groups"), (7, "take the user id")])
def test_t05_without_the_privilege_nothing_is_run(alice: LocalUser, hers: Path, world_dir: Path, lost: int, step: str) -> None:
    program = script(world_dir / "ran", f"#!/bin/sh\necho > {hers}/ran\n")
    out = child.run(LOSING_SERVICE, alice.uid, lost, program)
    assert f"the launcher could not {step}: Operation not permitted" in out
    assert not (hers / "ran").exists()


# -- T5: failures of the launcher


def replaced(name: str, body: str) -> str:
    """The launcher with another body for one of its steps."""
    head = f"def {name}(request: Request) -> None:\n"
    assert head in processes._LAUNCHER
    return processes._LAUNCHER.replace(head, f"{head}    {body}\n")


@pytest.mark.parametrize(("step", "name"), [(step, act.__name__) for step, act in launcher.STEPS])
async def test_t05_when_a_step_fails_nothing_is_run_and_the_step_is_named(
    no_leaks: None, own: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    monkeypatch.setattr(processes, "_LAUNCHER", replaced(name, 'raise OSError(5, "some call")'))
    with pytest.raises(ImpersonationFailed) as caught:
        await run_command(own, "/bin/touch", ["touch", str(tmp_path / "ran")], timeout=DEADLINE)
    assert f"the launcher could not {step}: some call: Input/output error" in caught.value.message
    assert caught.value.identity == own.name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("take_standard_streams", "descriptors, streams"),
        ("leave_the_place", "umask"),
        ("forbid_new_privileges", "no_new_privs"),
        ("take_groups", "Gid, Groups"),
        ("take_user", "Uid"),
    ],
)
async def test_t05_a_step_that_only_seemed_to_work_is_noticed(
    alice: LocalUser, hers: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    leak = "os.dup2(1, _REPORT, inheritable=False); os.dup(0); "
    monkeypatch.setattr(processes, "_LAUNCHER", replaced(name, f"{leak if name == 'take_standard_streams' else ''}return"))
    with pytest.raises(ImpersonationFailed, match=f"could not read back what it had become: {found}: not what was asked for"):
        await run_command(await Token.for_user(alice.uid), "/bin/touch", ["touch", str(hers / "ran")], timeout=DEADLINE)
    assert list(hers.iterdir()) == []


@pytest.mark.privileged
async def test_t05_capabilities_that_were_kept_are_noticed(own: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LAUNCHER", replaced("empty_capability_sets", "return"))
    with pytest.raises(ImpersonationFailed, match="CapPrm, CapEff: not what"):
        await run_command(own, "/bin/touch", ["touch", str(tmp_path / "ran")], timeout=DEADLINE)
    assert list(tmp_path.iterdir()) == []


async def test_a_launcher_that_ends_early_is_an_error(own: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in (("", "ended early"), ("import os; os.kill(os.getpid(), 9)", "ended early"), ("1/0", "ZeroDivisionError")):
        monkeypatch.setattr(processes, "_LAUNCHER", text)
        with pytest.raises(ImpersonationFailed, match=message):
            await run_command(own, "/bin/true", None, timeout=DEADLINE)


@pytest.mark.parametrize("interpreter", ["/no/such/python", "", "python3"])
async def test_without_an_interpreter_nothing_is_run(own: Token, monkeypatch: pytest.MonkeyPatch, interpreter: str) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)
    with pytest.raises(ImpersonationFailed, match=r"interpreter|cannot be started"):
        await run_command(own, "/bin/true", None, timeout=DEADLINE)


@pytest.fixture
def closed_interpreter(tmp_path: Path) -> Iterator[str]:
    """An interpreter, with its library, in a directory that only root may enter."""
    home = tmp_path / "python"
    stdlib = Path(sysconfig.get_path("stdlib"))
    unwanted = shutil.ignore_patterns("test*", "idlelib", "ensurepip", "lib2to3", "*-packages", "config-*", "__pycache__")
    shutil.copytree(stdlib, home / "lib" / stdlib.name, ignore=unwanted)
    shared = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("INSTSONAME")))
    if shared.suffix != ".a" and shared.is_file():
        shutil.copy(shared, home / "lib")
    (home / "bin").mkdir()
    program = home / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(os.path.realpath(sys.executable), program)
    home.chmod(0o700)
    yield str(program)
    shutil.rmtree(home)


@pytest.mark.privileged
async def test_t05_the_token_need_not_be_able_to_read_the_interpreter(
    alice: LocalUser, hers: Path, closed_interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [closed_interpreter, "-I", "-S", "-c", "import ctypes; print(ctypes.__file__)"]
    used = subprocess.run(words, text=True, capture_output=True, check=True).stdout
    assert used.startswith(str(Path(closed_interpreter).parents[1]))
    monkeypatch.setattr(sys, "executable", closed_interpreter)
    token = await Token.for_user(alice.uid)
    assert (await look(token, hers)).owner == alice.uid
    with pytest.raises(LocalFileError):
        await run_command(token, closed_interpreter, None, timeout=DEADLINE)


# -- who may


@pytest.mark.privileged
async def test_t02_no_command_is_started_from_a_token_s_thread(alice: LocalUser, own: Token) -> None:
    def start() -> int:
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            return loop.run_until_complete(run_command(own, "/bin/true", None, timeout=DEADLINE))

    with pytest.raises(ImpersonationFailed, match="may start no process"):
        await run_as(await Token.for_user(alice.uid), start)


@pytest.mark.privileged
async def test_t05_without_a_living_token_nothing_is_run(alice: LocalUser, hers: Path) -> None:
    token = await Token.for_user(alice.uid)
    token.close()
    with pytest.raises(TokenRequired):
        await run_command(token, "/bin/touch", ["touch", str(hers / "ran")], timeout=DEADLINE)
    assert list(hers.iterdir()) == []


async def test_a_fake_token_runs_nothing() -> None:
    with pytest.raises(ImpersonationFailed):
        await run_command(fake_token("alice"), "/bin/true", None, timeout=DEADLINE)
    with pytest.raises(InvalidArgument):
        await run_command("alice", "/bin/true", None, timeout=DEADLINE)  # type: ignore[arg-type]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """To this module the system is not Linux."""
    monkeypatch.setattr(processes, "sys", types.SimpleNamespace(platform="darwin"))


@pytest.mark.privileged
async def test_on_other_systems_no_other_identity_runs_a_command(alice: LocalUser, elsewhere: None) -> None:
    with pytest.raises(BitsError, match="run on Linux only") as caught:
        await run_command(await Token.for_user(alice.uid), "/bin/true", None, timeout=DEADLINE)
    assert caught.value.code == ErrorCode.E_NOTIMPL


async def test_on_other_systems_the_process_s_own_commands_run(no_leaks: None, own: Token, tmp_path: Path, elsewhere: None) -> None:
    seen = await look(own, tmp_path, environment={"BITS_X": "y"})
    assert seen.descriptors == dict.fromkeys((0, 1, 2), "/dev/null")
    assert (seen.cwd, seen.session) == ("/", seen.pid)
    assert set(seen.environment) == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "BITS_X"}
    with pytest.raises(LocalFileError, match="there is no such program"):
        await run_command(own, "/no/such/program", None, timeout=DEADLINE)
    with pytest.raises(BitsError, match="did not end within"):
        await run_command(own, "/bin/sleep", "sleep 1000", timeout=0.2)


# -- the program


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, ErrorCode.ERROR_FILE_NOT_FOUND),
        (lambda path: script(path, "#!/no/such/shell\n"), ErrorCode.ERROR_FILE_NOT_FOUND),
        (lambda path: script(path, "#!/bin/sh\n", 0o644), ErrorCode.E_ACCESSDENIED),
        (lambda path: path.mkdir(), ErrorCode.E_ACCESSDENIED),
        (lambda path: script(path, "true\n"), ErrorCode.E_INVALIDARG),
        (lambda path: path.symlink_to(path), ErrorCode.ERROR_PATH_NOT_FOUND),
    ],
    ids=["missing", "without its shell", "not executable", "a directory", "without #!", "a circle of links"],
)
async def test_a_program_that_cannot_be_run_is_an_error(
    no_leaks: None, own: Token, tmp_path: Path, make: Callable[[Path], object], code: ErrorCode
) -> None:
    program = tmp_path / "program"
    make(program)
    with pytest.raises(LocalFileError) as caught:
        await run_command(own, str(program), None, timeout=DEADLINE)
    assert (caught.value.code, caught.value.path, caught.value.identity) == (code, program, own.name)
    assert caught.value.advice


@pytest.mark.privileged
async def test_t05_a_program_that_the_token_may_not_reach_is_not_run(alice: LocalUser, world_dir: Path) -> None:
    token = await Token.for_user(alice.uid)
    (world_dir / "private").mkdir(mode=0o700)
    hidden = script(world_dir / "private" / "program", "#!/bin/sh\n")
    closed = script(world_dir / "closed", "#!/bin/sh\n", 0o700)
    for program in (hidden, closed):
        assert await run_command(Token.for_process(), program, None, timeout=DEADLINE) == 0
        with pytest.raises(LocalFileError, match="this identity may not execute it") as caught:
            await run_command(token, program, None, timeout=DEADLINE)
        assert (caught.value.code, caught.value.identity) == (ErrorCode.E_ACCESSDENIED, alice.name)


async def test_a_command_line_that_is_too_long_for_the_system_is_an_error(own: Token) -> None:
    with pytest.raises(LocalFileError, match="Argument list too long"):
        await run_command(own, "/bin/true", None, timeout=DEADLINE, environment={"BITS_X": "x" * (1 << 20)})


# -- parameters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/bin/x", ["/bin/x"]),
        ("  /bin/x \t a  b ", ["/bin/x", "a", "b"]),
        ('"/a b/x" "c d"e', ["/a b/x", "c de"]),
        ('x "" a""b', ["x", "", "ab"]),
        (r"x \"a\" a\b\\c \\", ["x", '"a"', r"a\b\\c", "\\\\"]),
        (r'x "a\\" b\\\"c', ["x", "a\\", 'b\\"c']),
        ("x $HOME %TEMP% * ~ ; | > 'a b' `id` \\n #", ["x", "$HOME", "%TEMP%", "*", "~", ";", "|", ">", "'a", "b'", "`id`", "\\n", "#"]),
        ("x a\nb", ["x", "a\nb"]),
        ("", []),
    ],
)
def test_parameters_are_split_by_quotes_and_blanks_alone(text: str, words: list[str]) -> None:
    assert split_parameters(text) == words


def test_a_quote_is_closed() -> None:
    with pytest.raises(InvalidArgument):
        split_parameters('x "a')


@given(st.lists(st.text()))
def test_what_is_joined_by_the_same_rules_is_split_into_the_same_words(words: list[str]) -> None:
    assert split_parameters(subprocess.list2cmdline(words)) == words


@given(st.text(alphabet='a" \\\t'))
def test_whatever_is_split_is_split_again_the_same(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        words = split_parameters(text)
        assert split_parameters(subprocess.list2cmdline(words)) == words


@pytest.mark.parametrize(
    ("program", "parameters"),
    [
        ("sh", None),
        ("bin/sh", None),
        ("./sh", None),
        ("~/sh", None),
        ("$HOME/sh", None),
        ("", None),
        ("/", None),
        ("/bin/", None),
        ("/bin/s\0h", None),
        ("/bin/\ud800", None),
        (SH, ""),
        (SH, []),
        (SH, "-x"),
        (SH, ["-x"]),
        (SH, "-c true"),
        (SH, "-sh"),
        (SH, "/usr/sh"),
        (SH, ["sh", "a\0"]),
        (SH, "sh a\0"),
        (SH, 'sh "a'),
        (SH, ["sh", 1]),
        (None, "sh"),
        (b"/bin/sh", None),
    ],
)
async def test_a_command_line_that_is_no_full_path_and_its_parameters_is_refused(own: Token, program: Any, parameters: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await run_command(own, program, parameters, timeout=DEADLINE)
    assert caught.value.code == ErrorCode.E_INVALIDARG


def test_long_strings_are_refused_by_their_code() -> None:
    program = "/" + "p" * 259
    assert command_arguments(program, None) == [program]
    assert command_arguments(SH, "sh " + "x" * 3997) == [SH, "x" * 3997]
    assert command_arguments(SH, ["sh", "x" * 3997]) == [SH, "x" * 3997]
    parameters: list[Any] = [("/" + "p" * 260, None), (SH, "sh " + "x" * 3998), (SH, ["sh", "x" * 3998]), (SH, ["sh"] + ["x"] * 2000)]
    for arguments in parameters:
        with pytest.raises(InvalidArgument) as caught:
            command_arguments(*arguments)
        assert caught.value.code == ErrorCode.BG_E_STRING_TOO_LONG


@pytest.mark.parametrize("first", [SH, "sh"])
def test_the_program_is_always_told_its_full_path(first: str) -> None:
    assert command_arguments(SH, f"{first} -c true") == command_arguments(SH, [first, "-c", "true"]) == [SH, "-c", "true"]


@pytest.mark.parametrize("as_text", [False, True])
async def test_t05_a_parameter_stays_a_parameter(own: Token, tmp_path: Path, as_text: bool) -> None:
    program = script(tmp_path / "program", f'#!/bin/sh\nprintf "%s\\0" "$0" "$@" > {tmp_path}/seen\n')
    words = ["-x", "--", "-c", "$(id)", "; id", "*", "a b", "", '"', "\\", "é", "\ud8ff".encode("utf-8", "replace").decode(), "\udcff"]
    words = [program, *words]
    parameters = subprocess.list2cmdline(words) if as_text else words
    assert await run_command(own, program, parameters, timeout=DEADLINE) == 0
    assert (tmp_path / "seen").read_bytes() == b"".join(os.fsencode(word) + b"\0" for word in words)


# -- its end


@pytest.mark.parametrize(
    ("line", "status"), [("exit 0", 0), ("exit 255", 255), ("exit 127", 127), ("kill -9 $$", -9), ("kill -15 $$", -15)]
)
async def test_the_exit_status_is_told(no_leaks: None, own: Token, line: str, status: int) -> None:
    assert await run_command(own, SH, [SH, "-c", line], timeout=None) == status


STUBBORN = 'trap "" TERM; echo $$ > "$1"; sleep 1000 & echo $! >> "$1"; while :; do sleep 1000; done'
OBEDIENT = 'echo $$ > "$1"; sleep 1000 & echo $! >> "$1"; wait'
LEADING = """
echo $$ > "$1"; (trap "echo cleaned >> $1.log; exit" TERM; echo trapped > $1.trap; while :; do sleep 0.01; done) &
until [ -e "$1.trap" ]; do sleep 0.01; done; echo $! >> "$1"; wait
"""


def pids_in(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("line", [STUBBORN, OBEDIENT, LEADING], ids=["stubborn", "obedient", "leading"])
async def test_a_timeout_ends_the_whole_process_group(
    no_leaks: None, own: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    wait = asyncio.wait

    async def wait_until_it_runs(futures: Any, *, timeout: float | None) -> Any:
        if timeout != 2:
            return await wait(futures, timeout=timeout)
        await runs
        return await wait(futures, timeout=0)

    runs = asyncio.create_task(until(lambda: len(pids_in(tmp_path / "pids")) == 2))
    monkeypatch.setattr(asyncio, "wait", wait_until_it_runs)
    monkeypatch.setattr(processes, "GRACE", 0.5 if line == STUBBORN else 20)
    with pytest.raises(BitsError) as caught:
        await run_command(own, SH, [SH, "-c", line, "sh", str(tmp_path / "pids")], timeout=2)
    assert (caught.value.code, caught.value.context) == (ErrorCode.BG_E_WATCHDOG_TIMEOUT, ErrorContext.QUEUE_MANAGER_NOTIFICATION)
    assert "did not end within 2 s and was ended" in caught.value.message
    pids = pids_in(tmp_path / "pids")
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]
    assert (tmp_path / "pids.log").exists() == (line == LEADING)  # it had its time though its leader was gone at once


async def test_a_cancel_ends_the_command(no_leaks: None, own: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.3)
    pids = tmp_path / "pids"
    task = asyncio.create_task(run_command(own, SH, [SH, "-c", STUBBORN, "sh", str(pids)], timeout=None))
    await until(lambda: len(pids_in(pids)) == 2)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # an impatient caller changes nothing
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [pid for pid in pids_in(pids) if alive(pid)]


@pytest.mark.parametrize("after", range(6))
async def test_a_cancel_at_any_moment_leaves_no_process(no_leaks: None, own: Token, tmp_path: Path, after: int) -> None:
    before = children()
    task = asyncio.create_task(run_command(own, "/bin/sleep", ["sleep", "1000"], timeout=None))
    await asyncio.sleep(0.012 * after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


def test_the_end_of_the_loop_ends_the_command(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def main() -> None:
        background = asyncio.create_task(run_command(Token.for_process(), SH, [SH, "-c", OBEDIENT, "sh", str(pids)], timeout=None))
        await until(lambda: len(pids_in(pids)) == 2)
        assert not background.done()

    asyncio.run(main())
    assert not [pid for pid in pids_in(pids) if alive(pid)]


async def test_what_a_command_leaves_in_the_background_goes_on(no_leaks: None, own: Token, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    line = 'sleep 1000 & echo $! > "$1"'
    assert await run_command(own, SH, [SH, "-c", line, "sh", str(pids)], timeout=DEADLINE) == 0
    (pid,) = pids_in(pids)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


async def test_many_commands_run_at_once(no_leaks: None, own: Token) -> None:
    commands = (run_command(own, SH, [SH, "-c", f"exit {number}"], timeout=40) for number in range(20))
    assert await asyncio.gather(*commands) == list(range(20))


IGNORING = """
import signal
from bits_async.identity.processes import run_command
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(failure(lambda: asyncio.run(run_command(Token.for_process(), "/bin/true", None, timeout=30))).message)
"""


def test_a_lost_exit_status_is_not_taken_for_a_good_one() -> None:
    assert "exit status was lost" in child.run(IGNORING)
