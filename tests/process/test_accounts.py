"""T12: what the machine says of a user is read again at each attempt."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import ErrorCode, Job, JobState, Token
from tests.local_users import LocalUser, change_account, own_user, remove_account
from tests.peers import Origin

pytestmark = pytest.mark.privileged
BODY = b"account" * 1000


@pytest.fixture
def user() -> Iterator[LocalUser]:
    with own_user() as user:
        yield user


async def fetch(manager: bits.BitsManager, url: str, path: Path, owner: Token) -> Job:
    job = await manager.create_job(path.name, owner=owner, priority=bits.JobPriority.FOREGROUND)
    await job.add_file(url, path)
    await job.resume()
    return job


async def test_t12_a_group_that_the_user_joined_counts_at_the_next_attempt(user: LocalUser, world_dir: Path, tmp_path: Path) -> None:
    shared = world_dir / "shared"
    shared.mkdir()
    shutil.chown(shared, "root", "games")
    shared.chmod(0o770)
    async with Origin() as origin, bits.BitsManager(store=tmp_path / "queue.db") as manager:
        url, owner = origin.serve("/f", BODY), await Token.for_user(user.uid)
        job = await fetch(manager, url, shared / "f", owner)
        with pytest.raises(bits.LocalFileError) as caught:
            await job.wait()
        assert caught.value.code == ErrorCode.E_ACCESSDENIED
        change_account(user.name, "--append", "--groups", "games")
        await job.resume()
        await job.wait()
        change_account(user.name, "--groups", "")
        again = await fetch(manager, url, shared / "g", owner)
        with pytest.raises(bits.LocalFileError):
            await again.wait()


@pytest.mark.parametrize(
    ("options", "why"), [(("--expiredate", "2020-01-01"), "expired"), (("--password", "!$6$salt$hash"), "locked"), ((), "gone")]
)
async def test_t12_a_locked_expired_or_deleted_account_writes_nothing_more(
    user: LocalUser, world_dir: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    theirs = world_dir / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    async with Origin() as origin, bits.BitsManager(store=tmp_path / "queue.db") as manager:
        url, owner = origin.serve("/f", BODY), await Token.for_user(user.uid)
        first = await fetch(manager, url, theirs / "f", owner)
        await first.wait()
        if options:
            change_account(user.name, *options)
        else:
            remove_account(user.name)
        job = await fetch(manager, url, theirs / "g", owner)
        with pytest.raises(bits.TokenRequired, match=why):
            await job.wait()
        assert job.state is JobState.ERROR
        assert [path.name for path in theirs.iterdir() if path.name.startswith(".g")] == []
