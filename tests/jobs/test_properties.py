"""The properties of a job that BITS has (`docs/bits-properties.md`): each is refused with BITS's code where it cannot be meant."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode
from bits_async.testing import FakeNetwork, fake_token

PAGE = Path(__file__).parents[2] / "docs" / "bits-properties.md"
# BITS's own lists; those that are missing here say why
OF_A_JOB = """
Id Type DisplayName Description Priority State MinimumRetryDelay NoProgressTimeout MaximumDownloadTime NotifyFlags NotifyInterface
NotifyCmdLine ProxySettings Owner OwnerElevationState OwnerIntegrityLevel Error ErrorCount Times Progress HelperTokenFlags HelperTokenSid
FileACLFlags PeerCachingFlags ReplyFileName COST_FLAGS NOTIFICATION_CLSID DYNAMIC_CONTENT HIGH_PERFORMANCE MAX_DOWNLOAD_SIZE
USE_STORED_CREDENTIALS MINIMUM_NOTIFICATION_INTERVAL_MS ON_DEMAND_MODE HTTP_RESPONSE_HEADERS
"""
SET: dict[str, tuple[Any, Any]] = {
    "display_name": ("another", "set_display_name"),
    "description": ("what for", "set_description"),
    "priority": (bits.JobPriority.LOW, "set_priority"),
    "use_stored_credentials": (AuthTarget.PROXY, "set_use_stored_credentials"),
    "notify_flags": (bits.NotifyFlags.DISABLE, "set_notify_flags"),
    "minimum_notification_interval": (7.5, "set_minimum_notification_interval"),
    "minimum_retry_delay": (9.0, "set_minimum_retry_delay"),
    "no_progress_timeout": (0.0, "set_no_progress_timeout"),
    "maximum_download_time": (1.0, "set_maximum_download_time"),
    "cost_flags": (bits.CostFlags.TRANSFER_STANDARD, "set_cost_flags"),
    "maximum_bandwidth": (1e6, "set_maximum_bandwidth"),
    "maximum_download_size": (10, "set_maximum_download_size"),
    "dynamic_content": (True, "set_dynamic_content"),
    "on_demand_mode": (True, "set_on_demand_mode"),
    "high_performance": (True, "set_high_performance"),
    "segments": (4, "set_segments"),
    "files_at_once": (8, "set_files_at_once"),
}


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[bits.BitsManager]:
    with FakeNetwork():
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            yield manager


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| BITS |")]


def test_every_name_on_the_page_of_properties_exists_and_every_property_is_on_it() -> None:
    named = {name for row in rows() for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", " ".join(row[1:]))}
    assert len(named) > 60
    for name in named - {"BitsError"}:
        owner, _, attribute = name.partition(".")
        value = getattr(bits, owner)
        assert not attribute or hasattr(value, attribute), name
    public = [name for name, value in vars(bits.Job).items() if isinstance(value, property) or name.startswith("set_")]
    assert {f"Job.{name}" for name in public} - named == {"Job.files"}


def test_every_property_of_bits_is_on_the_page_and_one_that_is_missing_says_why() -> None:
    listed = {name for row in rows() for name in row[0].split(", ")}
    assert set(OF_A_JOB.split()) <= listed
    for name, here, why in rows():
        assert "`" in here or (here == "none" and why), name


@pytest.mark.parametrize("name", SET)
async def test_a_property_is_kept_by_the_journal(tmp_path: Path, manager: bits.BitsManager, name: str) -> None:
    job = await manager.create_job("kept")
    value, setter = SET[name]
    await getattr(job, setter)(value)
    await manager.aclose()
    with FakeNetwork():
        async with bits.BitsManager(store=tmp_path / "queue.db") as again:
            assert getattr(await again.get_job(job.id), name) == value


@pytest.mark.parametrize(
    ("setter", "value", "code"),
    [
        ("set_display_name", "", ErrorCode.E_INVALIDARG),
        ("set_display_name", None, ErrorCode.E_INVALIDARG),
        ("set_display_name", "x" * 257, ErrorCode.BG_E_STRING_TOO_LONG),
        ("set_description", None, ErrorCode.E_INVALIDARG),
        ("set_description", "x" * 1025, ErrorCode.BG_E_STRING_TOO_LONG),
        ("set_priority", 2, ErrorCode.E_NOTIMPL),
        ("set_priority", "x", ErrorCode.E_INVALIDARG),
        ("set_use_stored_credentials", AuthTarget.SERVER, ErrorCode.BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED),
        ("set_maximum_download_size", 0, ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE),
        ("set_minimum_retry_delay", -1, ErrorCode.E_INVALIDARG),
        ("set_no_progress_timeout", float("inf"), ErrorCode.E_INVALIDARG),
        ("set_no_progress_timeout", 2**32, ErrorCode.E_INVALIDARG),
        ("set_no_progress_timeout", 10**400, ErrorCode.E_INVALIDARG),
        ("set_minimum_retry_delay", 1e12, ErrorCode.E_INVALIDARG),
        ("set_maximum_download_time", "90", ErrorCode.E_INVALIDARG),
        ("set_maximum_bandwidth", 10**400, ErrorCode.E_INVALIDARG),
        ("add_file_set", bits.FileInfo("https://h.test/a", "/tmp/a"), ErrorCode.E_INVALIDARG),
        ("set_crl_source", 5, ErrorCode.E_INVALIDARG),
    ],
)
async def test_a_value_that_cannot_be_meant_is_refused_with_bits_s_code(
    manager: bits.BitsManager, setter: str, value: Any, code: ErrorCode
) -> None:
    job = await manager.create_job("refused")
    with pytest.raises(bits.InvalidArgument) as caught:
        await getattr(job, setter)(value)
    assert caught.value.code == code


async def test_what_ends_a_job_or_its_logins_takes_nothing_that_is_merely_like_it(manager: bits.BitsManager) -> None:
    job = await manager.create_job("refused")
    with pytest.raises(bits.InvalidArgument, match="partial takes True or False"):
        await job.complete(partial="no")  # type: ignore[arg-type]
    assert job.state is bits.JobState.SUSPENDED
    for target, scheme, code in (
        ("proxy", AuthScheme.BASIC, ErrorCode.BG_E_INVALID_AUTH_TARGET),
        (AuthTarget.PROXY, "basic", ErrorCode.BG_E_INVALID_AUTH_SCHEME),
    ):
        with pytest.raises(bits.InvalidArgument) as caught:
            await job.remove_credentials(target, scheme)  # type: ignore[arg-type]
        assert caught.value.code == code


@pytest.mark.parametrize("path", [None, b"/tmp/file", 5])
async def test_a_destination_that_is_no_path_is_refused(manager: bits.BitsManager, path: Any) -> None:
    job = await manager.create_job("refused")
    with pytest.raises(bits.InvalidArgument, match=type(path).__name__):
        await job.add_file("https://h.test/a", path)
    assert job.files == ()


async def test_stored_credentials_are_the_acting_token_s_own_for_the_proxy(manager: bits.BitsManager) -> None:
    job = await manager.create_job("proxy")
    assert job.use_stored_credentials is None
    await job.set_credentials(AuthTarget.PROXY, AuthScheme.NEGOTIATE, "alice", "password")
    assert job.use_stored_credentials is None
    await job.set_use_stored_credentials(AuthTarget.PROXY)
    (grant,) = job._entry.grants
    assert (grant.target, grant.scheme, grant.user_name, grant.password) == (AuthTarget.PROXY, AuthScheme.NEGOTIATE, None, None)
    await job.set_use_stored_credentials(None)
    assert job.use_stored_credentials is None
    assert job._entry.grants == []
    await job.set_credentials(AuthTarget.PROXY, AuthScheme.NEGOTIATE, "alice", "password")
    await job.set_use_stored_credentials(None)  # nothing of the kind is set: what is stays
    assert len(job._entry.grants) == 1


async def test_a_job_made_by_an_administrator_is_not_opened_by_the_same_user_without_his_powers(manager: bits.BitsManager) -> None:
    with bits.impersonate(fake_token("alice", elevated=True)):
        high = await manager.create_job("as an administrator")
    with bits.impersonate(fake_token("alice")):
        low = await manager.create_job("as herself")
        with pytest.raises(bits.AccessDenied, match="administrator") as caught:
            await manager.get_job(high.id)
        assert caught.value.code == ErrorCode.E_ACCESSDENIED
        with pytest.raises(bits.AccessDenied):
            await high.token_options()
        await manager.get_job(low.id)
        assert [job async for job in manager.enum_jobs()] == [low]
    assert (high.owner_elevation_state, high.owner_integrity_level) == (True, 0x3000)
    assert (low.owner_elevation_state, low.owner_integrity_level) == (False, 0x2000)
    with bits.impersonate(fake_token("alice", elevated=True)):
        assert {await manager.get_job(low.id), await manager.get_job(high.id)} == {low, high}
        assert [job async for job in manager.enum_jobs()] == [high, low]
