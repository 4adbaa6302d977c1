"""Where the journal's key comes from, and that it comes from nowhere else."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import fail, null
from keyring.errors import KeyringLocked
from keyrings.alt.file import PlaintextKeyring

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, JobState, KeySource
from bits_async.testing import FakeNetwork

KEY = bytes(range(32))


class MemoryKeyring(KeyringBackend):
    priority = 1

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("the secret word is hunter2")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture(autouse=True)
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def backend() -> Iterator[MemoryKeyring]:
    yield from installed(MemoryKeyring())


def installed(backend: KeyringBackend) -> Iterator[KeyringBackend]:
    before = keyring.get_keyring()
    keyring.set_keyring(backend)
    yield backend
    keyring.set_keyring(before)


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As systemd makes it for a service."""
    directory = tmp_path / "credentials"
    directory.mkdir(mode=0o700)
    give(directory, KEY)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    return directory


def give(directory: Path, content: bytes) -> None:
    path = directory / "queue-key"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o400)


async def leave_a_secret(store: Path, key: KeySource) -> None:
    async with bits.BitsManager(store=store, key=key, run=False) as manager:
        job = await manager.create_job("secret")
        await job.set_credentials(AuthTarget.SERVER, AuthScheme.BASIC, "alice", "hunter2")


async def state_of_the_job(store: Path, key: KeySource) -> JobState:
    async with bits.BitsManager(store=store, key=key, run=False) as manager:
        (job,) = [job async for job in manager.enum_jobs()]
        assert job.error is None or "key" in job.error.message
        return job.state


async def refused(store: Path, key: KeySource) -> bits.StoreError:
    with pytest.raises(bits.StoreError) as caught:
        async with bits.BitsManager(store=store, key=key, run=False):
            pass
    assert "hunter2" not in str(caught.value)
    assert caught.value.advice
    return caught.value


# -- the keyring


async def test_the_keyring_keeps_the_key_and_no_file_does(store, backend):
    await leave_a_secret(store, KeySource.keyring("bits"))
    assert [service for service, _ in backend.kept] == ["bits"]
    assert not store.with_name("queue.db.key").exists()
    assert await state_of_the_job(store, KeySource.keyring("bits")) is JobState.SUSPENDED
    assert len(backend.kept) == 1


async def test_a_real_keyring_in_a_file_keeps_it_too(store, tmp_path):
    real = PlaintextKeyring()
    real.file_path = str(tmp_path / "keyring.cfg")
    for _ in installed(real):
        await leave_a_secret(store, KeySource.keyring())
        assert "bits_5Fasync" in Path(real.file_path).read_text()
        assert await state_of_the_job(store, KeySource.keyring()) is JobState.SUSPENDED


async def test_two_journals_have_two_entries_and_a_journal_may_be_moved(store, tmp_path, backend):
    await leave_a_secret(store, KeySource.keyring())
    await leave_a_secret(tmp_path / "other.db", KeySource.keyring())
    assert len(set(backend.kept.values())) == 2
    store.rename(tmp_path / "moved.db")
    assert await state_of_the_job(tmp_path / "moved.db", KeySource.keyring()) is JobState.SUSPENDED


async def test_an_entry_that_is_gone_leaves_a_job_that_says_so(store, backend):
    await leave_a_secret(store, KeySource.keyring())
    backend.kept.clear()
    assert await state_of_the_job(store, KeySource.keyring()) is JobState.ERROR
    assert len(backend.kept) == 1


async def test_a_locked_keyring_is_an_error_and_its_key_is_not_taken_for_lost(store, backend):
    await leave_a_secret(store, KeySource.keyring())
    backend.locked = True
    error = await refused(store, KeySource.keyring())
    assert (error.code, "KeyringLocked" in error.message) == (ErrorCode.E_ACCESSDENIED, True)
    backend.locked = False
    assert await state_of_the_job(store, KeySource.keyring()) is JobState.SUSPENDED


@pytest.mark.parametrize("useless", [fail.Keyring, null.Keyring])
async def test_a_keyring_that_keeps_nothing_is_an_error_and_no_file_is_used_instead(store, useless):
    for _ in installed(useless()):
        error = await refused(store, KeySource.keyring())
    assert "the keyring cannot be used" in error.message
    assert not store.with_name("queue.db.key").exists()


async def test_an_entry_that_is_no_key_is_refused_and_kept(store, backend):
    await leave_a_secret(store, KeySource.keyring())
    ((which, _),) = backend.kept.items()
    backend.kept[which] = "hunter2 is no key"
    assert (await refused(store, KeySource.keyring())).code == ErrorCode.BG_E_INVALID_CREDENTIALS
    assert backend.kept[which] == "hunter2 is no key"


async def test_without_the_extra_the_error_names_it(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "bits-async[keyring]" in (await refused(store, KeySource.keyring())).advice


# -- systemd


async def test_a_credential_of_systemd_is_the_key(store, credentials):
    await leave_a_secret(store, KeySource.systemd("queue-key"))
    assert not store.with_name("queue.db.key").exists()
    assert await state_of_the_job(store, KeySource.systemd("queue-key")) is JobState.SUSPENDED
    give(credentials, KEY[::-1])
    assert await state_of_the_job(store, KeySource.systemd("queue-key")) is JobState.ERROR


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        ("no directory", ErrorCode.ERROR_PATH_NOT_FOUND),
        ("no file", ErrorCode.ERROR_FILE_NOT_FOUND),
        ("short", ErrorCode.BG_E_INVALID_CREDENTIALS),
        ("long", ErrorCode.BG_E_INVALID_CREDENTIALS),
        ("others read it", ErrorCode.ERROR_DIRECTORY),
        ("the group writes it", ErrorCode.ERROR_DIRECTORY),
    ],
)
async def test_t13_a_credential_that_is_not_there_or_not_ours_alone_is_an_error(store, credentials, monkeypatch, trouble, code):
    path = credentials / "queue-key"
    if trouble == "no directory":
        monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    elif trouble == "no file":
        path.unlink()
    elif trouble in ("short", "long"):
        give(credentials, KEY[1:] if trouble == "short" else KEY + b"\n")
    else:
        path.chmod(0o404 if trouble == "others read it" else 0o620)
    error = await refused(store, KeySource.systemd("queue-key"))
    assert error.code == code
    assert "queue-key" in str(error)
    assert not store.with_name("queue.db.key").exists()


@pytest.mark.privileged
async def test_t13_a_credential_of_another_user_is_refused(store, credentials):
    os.chown(credentials / "queue-key", 54321, 54321)
    assert (await refused(store, KeySource.systemd("queue-key"))).code == ErrorCode.ERROR_DIRECTORY


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\0b", None])
def test_a_credential_has_a_plain_name(name):
    with pytest.raises(bits.InvalidArgument):
        KeySource.systemd(name)


# -- and from nowhere else


SOURCES = [KeySource.file(), KeySource.keyring(), KeySource.keyring("another"), KeySource.systemd("queue-key")]


@pytest.mark.parametrize("made", SOURCES, ids=str)
@pytest.mark.parametrize("asked", SOURCES, ids=str)
async def test_a_journal_is_opened_with_the_source_that_it_was_made_with_and_no_other(store, backend, credentials, made, asked):
    await leave_a_secret(store, made)
    if asked != made:
        error = await refused(store, asked)
        assert f"is kept by: {made}; it was asked for from: {asked}" in error.message
    assert await state_of_the_job(store, made) is JobState.SUSPENDED


async def test_a_key_file_that_was_lost_is_not_looked_for_elsewhere(store, backend):
    await leave_a_secret(store, KeySource.file())
    store.with_name("queue.db.key").unlink()
    assert "is kept by: file" in (await refused(store, KeySource.keyring())).message
    assert await state_of_the_job(store, KeySource.file()) is JobState.ERROR
    assert backend.kept == {}


async def test_what_is_no_key_source_is_refused_at_once(store):
    with pytest.raises(bits.InvalidArgument):
        bits.BitsManager(store=store, key=KEY)
