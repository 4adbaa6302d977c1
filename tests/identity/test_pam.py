"""Accounts of the machine log on by PAM, in a process of its own, with real users and Debian's own modules."""

import contextlib
import os
import pwd
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode, LogonFailed, Token, logon_user
from bits_async.identity import logon
from tests.left_out import find_program
from tests.local_users import MARK, changing_accounts
from tests.realms import poll

PASSWORD = "local-battery-staple"
RULES = Path("/etc/pam.d/bits-async")
QUICK = f"""# {MARK}: a wrong password costs no two seconds
auth required pam_unix.so nodelay
account required pam_unix.so
"""


def tool(*command: str, text: str | None = None) -> str:
    program = find_program(command[0]) or command[0]
    with changing_accounts():
        return subprocess.run([program, *command[1:]], input=text, text=True, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def rules() -> Iterator[None]:
    try:
        file = os.open(RULES, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:  # an administrator's, or of another run: as good, perhaps slower
        yield
        return
    with os.fdopen(file, "w") as opened:
        opened.write(QUICK)
    yield
    RULES.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def user(rules: None) -> Iterator[str]:
    """A user of this run's own, with a password: its account is spoilt in many ways."""
    for entry in pwd.getpwall():
        if entry.pw_gecos == MARK and entry.pw_name.startswith("bitspam") and not Path("/proc", entry.pw_name[7:]).exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # another process was quicker
                tool("userdel", "--force", entry.pw_name)  # a run that was killed left it
    name = f"bitspam{os.getpid()}"
    hashed = tool("openssl", "passwd", "-6", "-stdin", text=PASSWORD).strip()
    tool("useradd", "--no-create-home", "--shell", "/usr/sbin/nologin", "--comment", MARK, "--password", hashed, name)
    yield name
    tool("userdel", "--force", name)


@pytest.fixture
def spoil(user: str) -> Iterator[Callable[..., None]]:
    """Changes the account, and puts it back."""
    back: list[tuple[str, ...]] = []

    def change(*options: str, undo: tuple[str, ...]) -> None:
        tool("usermod", *options, user) if options[0] != "-d" else tool("chage", *options, user)
        back.append(undo)

    yield change
    for command in back:
        tool(*command, user)


@pytest.mark.privileged
async def test_the_right_password_makes_a_token_of_the_account_without_network_credentials(user: str) -> None:
    token = await logon_user(user, PASSWORD)
    entry = pwd.getpwnam(user)
    assert (token.name, token.sid, token.principal, token.network) == (user, f"uid:{entry.pw_uid}", None, None)
    status = await bits.run_as(token, Path("/proc/thread-self/status").read_text)
    assert re.search(r"^Uid:(?:\t\d+){3}\t(\d+)$", status, re.MULTILINE)[1] == str(entry.pw_uid)
    assert (await logon_user(user, PASSWORD, domain=".")).sid == token.sid


@pytest.mark.privileged
async def test_a_wrong_password_and_an_unknown_user_are_told_apart(user: str) -> None:
    for name, password, code in (
        (user, "a wrong one", ErrorCode.ERROR_LOGON_FAILURE),
        ("no-such-user", PASSWORD, ErrorCode.ERROR_NO_SUCH_USER),
    ):
        with pytest.raises(LogonFailed) as caught:
            await logon_user(name, password)
        assert (caught.value.code, caught.value.identity) == (code, name)
        assert password not in str(caught.value)


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("options", "undo", "code"),
    [
        (("--expiredate", "1"), ("usermod", "--expiredate", ""), ErrorCode.ERROR_ACCOUNT_EXPIRED),
        (("-d", "0"), ("chage", "-d", "-1"), ErrorCode.ERROR_PASSWORD_EXPIRED),
        (("--lock",), ("usermod", "--unlock"), ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
    ],
    ids=["expired", "password-expired", "locked"],
)
async def test_an_account_that_may_not_be_used_says_why(
    user: str, spoil: Callable[..., None], options: tuple[str, ...], undo: tuple[str, ...], code: ErrorCode
) -> None:
    spoil(*options, undo=undo)
    with pytest.raises(LogonFailed) as caught:
        await logon_user(user, PASSWORD)
    assert (caught.value.code, caught.value.identity) == (code, user)
    assert caught.value.advice


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel shows to everybody of the processes that ask PAM."""
    seen: list[Any] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            proc = Path(f"/proc/{self.pid}")
            poll(lambda: b"-I" in (proc / "cmdline").read_bytes(), deadline=30, what="the interpreter")
            seen.append(SimpleNamespace(process=self, shown=(proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()))

    monkeypatch.setattr(logon.subprocess, "Popen", Watched)
    return seen


@pytest.mark.privileged
async def test_t06_pam_runs_in_a_process_of_its_own_that_shows_no_password(user: str, children: list[Any]) -> None:
    ids = (os.getresuid(), os.getresgid(), os.getgroups())
    await logon_user(user, PASSWORD)
    (child,) = children
    assert child.process.pid != os.getpid()
    assert PASSWORD.encode() not in child.shown
    assert b"PAM" in child.shown  # it was its command line
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == ids


async def test_pam_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch, children: list[Any]) -> None:
    monkeypatch.setattr(logon, "_PAM", "import time; time.sleep(600)")
    monkeypatch.setattr(logon, "PAM_DEADLINE", 0.2)
    with pytest.raises(LogonFailed, match="did not answer"):
        await logon_user("somebody", PASSWORD)
    assert children[0].process.returncode is not None


async def test_without_python_pam_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logon.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LogonFailed) as caught:
        await logon_user("somebody", PASSWORD)
    assert "bits-async[pam]" in caught.value.advice


@pytest.mark.parametrize(
    "arguments",
    [
        {"user": "alice"},
        {"user": "alice", "keytab": "/etc/krb5.keytab"},
        {"user": "", "password": PASSWORD},
        {"user": "al\nice", "password": PASSWORD},
        {"user": r"CORP\alice", "password": PASSWORD},
        {"user": "alice@CORP", "password": PASSWORD, "domain": "CORP"},
        {"user": "alice", "password": PASSWORD, "logon_type": 2},
        {"user": "alice@CORP", "password": PASSWORD, "delegate_to": ["http://plain.example"]},
    ],
)
async def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(bits.InvalidArgument) as caught:
        await logon_user(**arguments)
    assert PASSWORD not in str(caught.value)


async def test_new_credentials_take_names_of_windows_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    token = await logon_user(r"CORP\alice", PASSWORD, logon_type=bits.LogonType.NEW_CREDENTIALS)
    assert (token.principal, token.local) == (r"CORP\alice", Token.for_process().local)
    assert PASSWORD not in repr(token.network)
