"""A fixed identity from a file: who, and where the secret is; never the secret itself."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import spnego

from bits_async.errors import AccessDenied, BitsError, ErrorCode, InvalidArgument, LocalFileError
from bits_async.identity.ambient import impersonate
from bits_async.identity.tokens import Token

if TYPE_CHECKING:
    from tests.local_users import LocalUser

SECRET = "hunter2-configured"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "identity.toml"


async def test_a_keytab_is_named_and_not_opened_yet(file: Path) -> None:
    write(file, '[identity]\nuser = "svc@CORP.EXAMPLE"\nkeytab = "/etc/svc.keytab"\n', 0o644)
    token = await Token.from_configuration(file)
    assert token.principal == "svc@CORP.EXAMPLE"
    assert isinstance(token.network, spnego.KerberosKeytab)
    assert token.local.is_process


async def test_a_secret_that_systemd_decrypted_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "fetch", SECRET + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    write(file, '[identity]\nuser = "CORP\\\\svc"\npassword = { systemd_credential = "fetch" }\n')
    token = await Token.from_configuration(file)
    assert isinstance(token.network, spnego.Password)
    assert token.network.password == SECRET
    assert SECRET not in repr(token)


async def test_a_secret_of_the_keyring_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = ModuleType("keyring")
    keyring.get_password = lambda service, user: SECRET if (service, user) == ("fetcher", r"CORP\svc") else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", keyring)
    write(file, '[identity]\nuser = "CORP\\\\svc"\npassword = { keyring = "fetcher" }\n')
    token = await Token.from_configuration(file)
    assert isinstance(token.network, spnego.Password)
    assert token.network.password == SECRET
    write(file, '[identity]\nuser = "CORP\\\\other"\npassword = { keyring = "fetcher" }\n')
    with pytest.raises(BitsError, match="no entry") as caught:
        await Token.from_configuration(file)
    assert caught.value.code == ErrorCode.BG_E_INVALID_CREDENTIALS


async def test_a_password_in_the_file_is_refused_and_not_repeated(file: Path) -> None:
    write(file, f'[identity]\nuser = "svc@CORP.EXAMPLE"\npassword = "{SECRET}"\n')
    with pytest.raises(InvalidArgument, match="does not stand in a configuration file") as caught:
        await Token.from_configuration(file)
    assert "systemd-creds" in str(caught.value.advice)
    assert SECRET not in str(caught.value)
    write(file, f'[identity\npassword = "{SECRET}"\n')
    with pytest.raises(InvalidArgument, match="TOML") as caught:
        await Token.from_configuration(file)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "table"),
        ('[identity]\nuser = "a@B"\n', "either a keytab or a password"),
        ('[identity]\nkeytab = "/k"\n', "has a user"),
        ('[identity]\nuser = "a@B"\nkeytab = "k"\n', "absolute"),
        ('[identity]\nuser = 7\nkeytab = "/k"\n', "text"),
        ('[identity]\nuser = "a@B"\nkeytab = "/k"\ntypo = 1\n', "typo"),
        ('[identity]\nuser = "a@B"\nkeytab = "/k"\npassword = { keyring = "x" }\n', "either"),
        ('[identity]\nuser = "a@B"\npassword = { file = "/x" }\n', "cannot be kept by file"),
        ('[identity]\nuser = "a@B"\npassword = { systemd_credential = "../x" }\n', "plain name"),
        ('[identity]\nuser = "a@B"\npassword = { keyring = "x", systemd_credential = "y" }\n', "one place"),
    ],
)
async def test_what_cannot_be_meant_is_said(file: Path, text: str, why: str) -> None:
    write(file, text)
    with pytest.raises(InvalidArgument, match=why):
        await Token.from_configuration(file)


async def test_a_secret_that_is_not_there_is_said(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, '[identity]\nuser = "a@B"\npassword = { systemd_credential = "none" }\n')
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(BitsError, match="not given any by systemd"):
        await Token.from_configuration(file)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(BitsError, match="gave this process no credential none"):
        await Token.from_configuration(file)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
async def test_t27_a_credential_that_another_user_may_read_is_not_used(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    write(tmp_path / "fetch", SECRET, mode)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    write(file, '[identity]\nuser = "a@B"\npassword = { systemd_credential = "fetch" }\n')
    with pytest.raises(BitsError, match="another user may read or write it"):
        await Token.from_configuration(file)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
async def test_t27_a_file_that_others_may_write_is_nobodys_identity(file: Path, mode: int) -> None:
    write(file, '[identity]\nuser = "a@B"\nkeytab = "/k"\n', mode)
    with pytest.raises(AccessDenied, match="may be written"):
        await Token.from_configuration(file)


async def test_a_file_that_is_not_there_or_none_is_an_error_of_files(tmp_path: Path) -> None:
    with pytest.raises(LocalFileError):
        await Token.from_configuration(tmp_path / "none.toml")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgument):
        await Token.from_configuration(tmp_path / "fifo")


@pytest.mark.privileged
async def test_t27_it_is_opened_as_whoever_asks(users: Mapping[str, "LocalUser"], world_dir: Path) -> None:
    alice = users["bitsalice"]
    text = f'[identity]\nuser = "a@B"\nkeytab = "/k"\nlocal_user = "{alice.name}"\n'
    hidden = write(world_dir / "roots.toml", text)
    token = await Token.from_configuration(hidden)
    assert token.local.key == f"uid:{alice.uid}"
    with impersonate(await Token.for_user(alice.uid)), pytest.raises(LocalFileError):
        await Token.from_configuration(hidden)
    hers = write(world_dir / "hers.toml", text)
    os.chown(hers, alice.uid, alice.gid)
    with pytest.raises(AccessDenied):
        await Token.from_configuration(hers)
    with impersonate(await Token.for_user(alice.uid)):
        assert (await Token.from_configuration(hers)).local.key == f"uid:{alice.uid}"


@pytest.mark.privileged
@pytest.mark.parametrize("named", ["root", "another user", "a credential of systemd", "the keyring"])
async def test_t27_a_users_own_file_makes_nobody_but_himself(
    users: Mapping[str, "LocalUser"], world_dir: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """He writes what he likes into it, and the process that reads it as him could be anybody."""
    alice = users["bitsalice"]
    write(world_dir / "fetch", SECRET)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(world_dir))
    rest = {
        "root": 'keytab = "/etc/krb5.keytab"\nlocal_user = "root"',
        "another user": 'keytab = "/k"\nlocal_user = "bitsbob"',
        "a credential of systemd": 'password = { systemd_credential = "fetch" }',
        "the keyring": 'password = { keyring = "fetcher" }\nlocal_user = "bitsalice"',
    }
    hers = write(world_dir / "hers.toml", f'[identity]\nuser = "a@B"\n{rest[named]}\n')
    os.chown(hers, alice.uid, alice.gid)
    with impersonate(await Token.for_user(alice.uid)), pytest.raises(AccessDenied) as caught:
        await Token.from_configuration(hers)
    assert caught.value.identity == alice.name


@pytest.mark.privileged
async def test_t27_a_keytab_that_a_user_names_is_opened_as_him(users: Mapping[str, "LocalUser"], world_dir: Path) -> None:
    alice = users["bitsalice"]
    hers = write(world_dir / "hers.toml", '[identity]\nuser = "a@B"\nkeytab = "/etc/krb5.keytab"\n')
    os.chown(hers, alice.uid, alice.gid)
    with impersonate(await Token.for_user(alice.uid)):
        token = await Token.from_configuration(hers)
    assert token.local.key == token.security.key == f"uid:{alice.uid}"
    assert not token.elevated
