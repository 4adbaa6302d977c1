"""A token's user need not be able to read the interpreter: what its threads may need is loaded before they are born."""

import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

from bits_async.errors import ImpersonationFailed
from bits_async.identity.threads import run_as
from bits_async.identity.tokens import Token
from tests.identity import child
from tests.local_users import LocalUser
from tests.realms import MitKdc

MAIN_PATH = """
import aiofiles, aiofiles.os, bits_async.files.part, bits_async.auth.schemes, bits_async.auth.tickets
import spnego

user, home, cache, private = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
imported = []

def watch(event, arguments):
    if event == "import" and threading.current_thread().name.startswith(("bits-files", "bits-security")):
        imported.append(arguments[0])

sys.addaudithook(watch)

def closed():
    return [type(failure(os.listdir, path)).__name__ for path in private]

def ntlm():
    client = spnego.client(spnego.Password("DOM\\\\alice", "Passw0rd!"), hostname="localhost", service="HTTP", protocol="ntlm")
    server = spnego.server(protocol="ntlm")
    token = client.step()
    token = client.step(server.step(token))
    server.step(token)
    return server.complete, server.client_principal

def kerberos():
    credential = spnego.KerberosCCache(cache)
    try:
        for protocol in ("kerberos", "negotiate"):
            token = spnego.client(credential, hostname="localhost", service="HTTP", protocol=protocol).step()
        return len(token) > 100
    except Exception as exc:  # no ticket: then its error can be shown
        return type(exc).__name__, bool(str(exc))

def errors():
    import traceback
    try:
        open("/root/x")
    except OSError as exc:
        return "PermissionError" in "".join(traceback.format_exception(exc)) and str(exc)

async def main():
    token = await Token.for_user(user)
    files, security = TokenExecutor(token), TokenExecutor(token, name="security")
    print("closed", await files.run(closed))
    directory = await files.run(native.open_directory, home)
    part = await files.run(native.create_exclusive, directory, "part")
    await files.run(native.pwrite_all, part, [b"data"], 0)
    await files.run(native.preallocate, part, 0, 1 << 16)
    await files.run(native.datasync, part)
    await files.run(native.set_times, part, 10**18)
    await files.run(native.set_mode, part, 0o644 & ~await files.run(native.process_umask))
    await files.run(native.rename_at, directory, "part", "file")
    await files.run(native.sync_directory, directory)
    file = await aiofiles.open(home + "/file", encoding="utf-16-le", executor=files.pool)
    print("file", await file.read(), (await aiofiles.os.stat(home + "/file", executor=files.pool)).st_uid == user)
    await file.close()
    await files.run(native.unlink_at, directory, "file")
    print("idna", await files.run("bücher.example".encode, "idna"))
    print("ntlm", await security.run_security(ntlm, deadline=40))
    print("kerberos", await security.run_security(kerberos, deadline=40))
    print("errors", await files.run(errors))
    print("imported", [name for name in imported if name not in sys.modules])

asyncio.run(main())
"""


def without_tests(directory: str, names: list[str]) -> set[str]:
    return {"test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "__pycache__"} & set(names)


@pytest.fixture(scope="module")
def closed_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library, the installed packages and ours in a directory that only root may enter."""
    home = tmp_path_factory.mktemp("interpreter")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(sysconfig.get_path("stdlib"), home / "lib" / version, ignore=without_tests, symlinks=True)
    packages = home / "packages"
    for name in ("spnego", "gssapi", "krb5", "aiofiles", "cryptography", "cffi", "_cffi_backend*", "decorator*", "*.libs"):
        for found in Path(sysconfig.get_path("platlib")).glob(name):
            if found.is_dir():
                shutil.copytree(found, packages / found.name, ignore=without_tests)
            else:
                packages.mkdir(exist_ok=True)
                shutil.copy(found, packages)
    shutil.copytree(child.ROOT / "bits_async", packages / "bits_async")
    home.chmod(0o700)
    return home


def run_closed(home: Path, arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONHOME", str(home))
    monkeypatch.setattr(child, "PATHS", [home / "packages"])
    return child.run(MAIN_PATH, *arguments, home, home / "packages").splitlines()


@pytest.fixture
def ntlm_users(world_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world_dir / "users").write_text("DOM:alice:Passw0rd!\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(world_dir / "users"))


@pytest.fixture
def hers(users: Mapping[str, LocalUser], world_dir: Path) -> Path:
    """A directory of alice's, for this test alone: her home is that of other runs, too."""
    directory = world_dir / "hers"
    directory.mkdir(mode=0o700)
    shutil.chown(directory, users["bitsalice"].uid, users["bitsalice"].gid)
    return directory


@pytest.mark.privileged
def test_the_main_path_works_where_the_interpreter_cannot_be_read(
    users: Mapping[str, LocalUser], hers: Path, closed_interpreter: Path, ntlm_users: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run_closed(closed_interpreter, [users["bitsalice"].uid, hers, f"FILE:{hers}/none"], monkeypatch)
    assert lines == [
        "closed ['PermissionError', 'PermissionError']",
        "file 慤慴 True",
        "idna b'xn--bcher-kva.example'",
        "ntlm (True, 'DOM\\\\alice')",
        "kerberos ('NoCredentialError', True)",
        "errors [Errno 13] Permission denied: '/root/x'",
        "imported []",
    ]


@pytest.mark.privileged
@pytest.mark.realm
def test_kerberos_works_where_the_interpreter_cannot_be_read(
    users: Mapping[str, LocalUser],
    kdc: MitKdc,
    world_dir: Path,
    hers: Path,
    closed_interpreter: Path,
    ntlm_users: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alice = users["bitsalice"]
    cache = kdc.ccache("alice", directory=world_dir, owner=alice.uid)
    lines = run_closed(closed_interpreter, [alice.uid, hers, cache], monkeypatch)
    assert lines[4] == "kerberos True"
    assert lines[-1] == "imported []"


@pytest.mark.privileged
async def test_what_cannot_be_loaded_in_a_token_thread_is_an_error_and_not_a_switch(users: Mapping[str, LocalUser]) -> None:
    with pytest.raises((ImpersonationFailed, ModuleNotFoundError)):
        await run_as(await Token.for_user("bitsalice"), __import__, "no_such_module_of_bits_async")
