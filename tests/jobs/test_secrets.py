import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import ErrorCode, InvalidArgument, StoreError
from bits_async.jobs.secrets import (
    FORMAT,
    Place,
    SecretBox,
    check_private,
    guard_directory,
    load_key,
    make_private,
    release_lock,
    take_lock,
)

KEY = bytes(range(32))
JOB = UUID(int=7)
PLACE = Place(JOB, "uid:1000", "grants.password", "SERVER", "NTLM")
SOMEBODY = 54321  # a uid that nobody has


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(params=[0o000, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest, directory: Path) -> Iterator[None]:  # which is made before
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- the box


@given(st.text(st.characters(codec=None)))
def test_a_secret_opens_with_its_key_at_its_place(secret: str) -> None:
    box = SecretBox(KEY)
    sealed = box.seal(secret, PLACE)
    assert box.open(sealed, PLACE) == secret
    assert SecretBox(KEY).open(sealed, PLACE) == secret


@pytest.mark.parametrize(
    "elsewhere",
    [
        Place(UUID(int=8), "uid:1000", "grants.password", "SERVER", "NTLM"),
        Place(JOB, "uid:1001", "grants.password", "SERVER", "NTLM"),
        Place(JOB, "uid:1000", "grants.user", "SERVER", "NTLM"),
        Place(JOB, "uid:1000", "grants.password", "PROXY", "NTLM"),
        Place(JOB, "uid:1000", "grants.password", "SERVER", "BASIC"),
    ],
    ids=["job", "owner", "column", "target", "scheme"],
)
def test_t13_a_secret_that_was_moved_does_not_open(elsewhere: Place) -> None:
    box = SecretBox(KEY)
    assert box.open(box.seal("hunter2", PLACE), elsewhere) is None


@given(st.tuples(*[st.text()] * 4), st.tuples(*[st.text()] * 4))
def test_t13_no_two_places_are_encoded_alike(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (Place(JOB, *one).encoded() == Place(JOB, *other).encoded()) == (one == other)


def test_t13_an_altered_secret_does_not_open() -> None:
    box = SecretBox(KEY)
    sealed = box.seal("hunter2", PLACE)
    for at in range(len(sealed)):
        assert box.open(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], PLACE) is None
        assert box.open(sealed[:at], PLACE) is None


def test_a_secret_sealed_with_another_key_does_not_open() -> None:
    assert SecretBox(bytes(32)).open(SecretBox(KEY).seal("hunter2", PLACE), PLACE) is None


def test_one_secret_is_sealed_differently_each_time() -> None:
    box = SecretBox(KEY)
    assert len({box.seal("hunter2", PLACE) for _ in range(100)}) == 100
    assert box.seal("hunter2", PLACE).startswith(FORMAT)


def test_t14_the_box_shows_no_key() -> None:
    box = SecretBox(KEY)
    assert repr(box) == "<SecretBox>"
    with pytest.raises(InvalidArgument) as caught:
        SecretBox(b"short-secret")
    assert "short-secret" not in repr(caught.value)


def test_keys_are_those_of_rfc_5869() -> None:
    """As the `cryptography` library derives them, which journals in the field rely on."""
    sealing, fingerprints = (
        HKDF(SHA256(), 32, salt=None, info=purpose).derive(KEY)
        for purpose in (b"bits_async journal: secrets", b"bits_async journal: fingerprints")
    )
    box = SecretBox(KEY)
    assert box.fingerprint_key == fingerprints
    key = HKDFExpand(SHA256(), 32, b"job " + JOB.bytes).derive(sealing)
    nonce = bytes(12)
    assert box.open(FORMAT + nonce + AESGCM(key).encrypt(nonce, b"hunter2", PLACE.encoded()), PLACE) == "hunter2"


def test_the_key_for_fingerprints_is_neither_the_key_nor_another_journals() -> None:
    assert SecretBox(KEY).fingerprint_key == SecretBox(KEY).fingerprint_key
    assert len({KEY, SecretBox(KEY).fingerprint_key, SecretBox(bytes(32)).fingerprint_key}) == 3


# -- the key file


@pytest.mark.usefixtures("umask")
def test_t13_a_new_key_is_for_its_owner_only_whatever_the_umask(directory: Path) -> None:
    path = directory / "jobs.db.key"
    key = load_key(path)
    assert (len(key), mode(path)) == (32, 0o600)
    assert os.listdir(directory) == [path.name]
    assert load_key(path) == key


def test_a_key_that_was_never_finished_is_made_anew(directory: Path) -> None:
    (directory / "jobs.db.key.new").write_bytes(b"half")
    assert len(load_key(directory / "jobs.db.key")) == 32
    assert os.listdir(directory) == ["jobs.db.key"]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_file_that_is_no_key_is_refused_and_kept(directory: Path, content: bytes) -> None:
    path = directory / "jobs.db.key"
    make_private(path)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="does not hold a key") as caught:
        load_key(path)
    assert caught.value.path == path
    assert "restore it" in caught.value.advice
    assert path.read_bytes() == content


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_t13_a_key_that_others_may_read_is_refused(directory: Path, bits: int) -> None:
    path = directory / "jobs.db.key"
    load_key(path)
    path.chmod(bits)
    with pytest.raises(StoreError, match="by others") as caught:
        load_key(path)
    assert (caught.value.path, caught.value.code) == (path, ErrorCode.ERROR_DIRECTORY)
    assert "chmod go-rwx" in caught.value.advice


# -- private files


def test_t13_a_missing_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    guard_directory(tmp_path / "state")
    assert mode(tmp_path / "state") == 0o700


@pytest.mark.usefixtures("umask")
def test_t13_the_modes_do_not_depend_on_the_umask(directory: Path) -> None:
    guard_directory(directory / "inner")
    make_private(directory / "file")
    assert (mode(directory / "inner"), mode(directory / "file")) == (0o700, 0o600)


def test_a_mistyped_path_makes_no_directories(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        guard_directory(tmp_path / "missing" / "state")
    assert (caught.value.path, caught.value.code) == (tmp_path / "missing", ErrorCode.ERROR_PATH_NOT_FOUND)
    assert not (tmp_path / "missing").exists()


def test_the_packages_own_places_are_made_whole(tmp_path: Path) -> None:
    guard_directory(tmp_path / "a" / "b" / "c", make_parents=True)
    assert [mode(tmp_path / part) for part in ("a", "a/b", "a/b/c")] == [0o700] * 3


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o1777, 0o1770])
def test_t13_a_directory_that_others_may_write_is_refused_also_if_sticky(directory: Path, bits: int) -> None:
    directory.chmod(bits)
    with pytest.raises(StoreError, match="by others") as caught:
        guard_directory(directory)
    assert caught.value.path == directory
    assert ("chmod" in caught.value.advice) is (bits < 0o1000), "nobody is told to close /tmp to others"


@pytest.mark.parametrize(("bits", "fine"), [(0o770, False), (0o707, False), (0o755, True), (0o1777, True)])
def test_t13_above_it_others_may_write_only_where_it_is_sticky(directory: Path, bits: int, fine: bool) -> None:
    inner = directory / "inner"
    inner.mkdir(mode=0o700)
    directory.chmod(bits)
    if fine:
        guard_directory(inner)
        return
    with pytest.raises(StoreError) as caught:
        guard_directory(inner)
    assert caught.value.path == directory


@pytest.mark.parametrize("place", ["last", "above"])
def test_t13_a_symbolic_link_in_the_path_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True, mode=0o700)
    (tmp_path / "real").chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="symbolic link") as caught:
        guard_directory(link if place == "last" else link / "inner")
    assert caught.value.path == link
    assert str(tmp_path / "real") in caught.value.advice


def test_t13_a_file_in_the_place_of_a_directory_is_refused(directory: Path) -> None:
    make_private(directory / "file")
    with pytest.raises(StoreError):
        guard_directory(directory / "file")


@pytest.mark.privileged
@pytest.mark.parametrize("above", [False, True])
def test_t13_a_directory_of_somebody_else_is_refused_for_root_too(directory: Path, above: bool) -> None:
    inner = directory / "inner"
    inner.mkdir(mode=0o700)
    os.chown(directory, SOMEBODY, SOMEBODY)
    with pytest.raises(StoreError, match=f"belongs to uid {SOMEBODY}") as caught:
        guard_directory(inner if above else directory)
    assert caught.value.path == directory


@pytest.mark.privileged
def test_t13_a_file_of_somebody_else_is_refused_for_root_too(directory: Path) -> None:
    path = directory / "file"
    make_private(path)
    os.chown(path, SOMEBODY, SOMEBODY)
    with pytest.raises(StoreError, match=f"belongs to uid {SOMEBODY}") as caught:
        make_private(path)
    assert caught.value.path == path


@pytest.mark.parametrize("bits", [0o660, 0o602, 0o622])
def test_t13_a_file_that_others_may_write_is_refused(directory: Path, bits: int) -> None:
    path = directory / "file"
    make_private(path)
    path.chmod(bits)
    with pytest.raises(StoreError, match="they may write it") as caught:
        make_private(path)
    assert caught.value.path == path


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo", "socket"])
def test_t13_what_is_no_regular_file_is_refused_and_not_followed(directory: Path, kind: str) -> None:
    path, target = directory / "file", directory / "target"
    if "link" in kind:
        path.symlink_to(target)
        if kind == "link":
            make_private(target)
    elif kind == "directory":
        path.mkdir(mode=0o700)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        path.chmod(0o600)
    for check in (make_private, check_private, load_key):
        with pytest.raises(StoreError) as caught:
            check(path)
        assert caught.value.path == path
    assert target.exists() == (kind == "link")


# -- the lock


def test_the_lock_is_held_once_in_a_process(directory: Path) -> None:
    path = directory / "jobs.db.lock"
    fd = take_lock(path, directory / "jobs.db")
    with pytest.raises(StoreError, match=f"process {os.getpid()}") as caught:
        take_lock(path, directory / "jobs.db")
    assert caught.value.path == directory / "jobs.db"
    release_lock(fd, path)
    release_lock(take_lock(path, directory / "jobs.db"), path, remove=True)
    assert os.listdir(directory) == []


def test_the_lock_of_a_process_that_died_is_free(directory: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from bits_async.jobs.secrets import take_lock\n"
        "take_lock(Path(sys.argv[1]), Path('jobs.db')); print('held', flush=True); time.sleep(60)"
    )
    path = directory / "jobs.db.lock"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StoreError, match=f"process {holder.pid}"):
            take_lock(path, directory / "jobs.db")
        holder.kill()
    release_lock(take_lock(path, directory / "jobs.db"), path)


def test_a_lock_that_went_away_with_its_journal_is_taken_anew(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bits_async.jobs import secrets

    path, really, calls = directory / "jobs.db.lock", secrets._lock, []

    def lock_after_removal(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()  # the holder removed the journal between our open and our lock
        return really(fd)

    monkeypatch.setattr(secrets, "_lock", lock_after_removal)
    fd = take_lock(path, directory / "jobs.db")
    assert os.path.samestat(os.fstat(fd), path.stat())
    release_lock(fd, path)


def test_t13_the_lock_file_is_checked_like_the_others(directory: Path) -> None:
    path = directory / "jobs.db.lock"
    path.symlink_to(directory / "elsewhere")
    with pytest.raises(StoreError):
        take_lock(path, directory / "jobs.db")
    assert not (directory / "elsewhere").exists()


def test_two_jobs_never_share_a_key() -> None:
    box = SecretBox(KEY)
    one, other = (Place(uuid4(), "uid:1000", "c") for _ in range(2))
    nonce = bytes(12)
    assert box._cipher(one).encrypt(nonce, b"x", None) != box._cipher(other).encrypt(nonce, b"x", None)
