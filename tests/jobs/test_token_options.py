"""The helper token of a job (IBitsTokenOptions), whole: who may do what, what is refused, and what a change does to a job at work.

The rules are those of BITS since Windows 10 1607 (Helper Tokens for BITS Transfer Jobs, and the pages of IBitsTokenOptions), as our
inventory of BITS states them; each row says by which sentence it is so.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import BitsManager, ErrorCode, HelperTokenFlags, ImpersonationLevel, Job, JobState, Token, TokenOptions, impersonate
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen, until

URL, BODY = "https://files.test/f", bytes(range(256)) * 1000
NONE, LOCAL, NETWORK = HelperTokenFlags.NONE, HelperTokenFlags.LOCAL_FILE, HelperTokenFlags.NETWORK
S_OK, DENIED, NO_LEVEL = ErrorCode.S_OK, ErrorCode.E_ACCESSDENIED, ErrorCode.CO_E_FAILEDTOIMPERSONATE
CAN_ACT = (ImpersonationLevel.IMPERSONATE, ImpersonationLevel.DELEGATE)


@pytest.fixture
def tmp_path(memory_dir: Path) -> Path:
    """No disk: nothing here has to survive."""
    return memory_dir


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        yield network


@pytest.fixture
async def manager(network: FakeNetwork, tmp_path: Path) -> AsyncIterator[BitsManager]:
    async with BitsManager(store=tmp_path / "queue.db") as manager:
        yield manager


async def options_of(job: Job, caller: Token) -> TokenOptions:
    with impersonate(caller):
        return await job.token_options()


async def set_by(helper: Token, options: TokenOptions, flags: HelperTokenFlags | None = None) -> None:
    with impersonate(helper):
        await options.set_helper_token()
        if flags is not None:
            await options.set_helper_token_flags(flags)


async def job_with(
    manager: BitsManager, path: Path, helper: Token | None = None, flags: HelperTokenFlags = NONE, *, owner: Token | None = None
) -> tuple[Job, TokenOptions]:
    """Alice's, with the options that she asked for."""
    owner = owner or fake_token("alice")
    job = await manager.create_job("alice's", owner=owner)
    await job.add_file(URL, path)
    options = await options_of(job, owner)
    await options.set_helper_token_flags(flags)
    if helper is not None:
        await set_by(helper, options)
    return job, options


# -- who may ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A caller of `token_options()`, and a method called on what it got, under the helper's identity."""

    method: str
    caller_elevated: bool
    caller_is_owner: bool
    helper_elevated: bool
    level: ImpersonationLevel


METHODS: dict[str, Callable[[TokenOptions], Awaitable[object]]] = {
    "set_helper_token": lambda options: options.set_helper_token(),
    "clear_helper_token": lambda options: options.clear_helper_token(),
    "set_helper_token_flags": lambda options: options.set_helper_token_flags(NONE),
    "helper_token_flags": lambda options: asyncio.sleep(0, options.helper_token_flags),
    "helper_token_sid": lambda options: asyncio.sleep(0, options.helper_token_sid),
}

# The first one that applies decides.
RULES: list[tuple[str, Callable[[Case], bool], ErrorCode]] = [
    (
        "Non-admin allowed for all five methods iff at QI time the thread-token SID == job-owner SID.",
        lambda case: not case.caller_elevated and not case.caller_is_owner,
        DENIED,
    ),
    (
        "CO_E_FAILEDTOIMPERSONATE = client's COM settings don't permit impersonate-level access",
        lambda case: case.method == "set_helper_token" and case.level not in CAN_ACT,
        NO_LEVEL,
    ),
    (
        "SetHelperToken: the token being set must not have DOMAIN_ALIAS_RID_ADMINS enabled",
        lambda case: case.method == "set_helper_token" and case.helper_elevated and not case.caller_elevated,
        DENIED,
    ),
    (
        "SetHelperTokenFlags: the token currently set (if any) must not have it enabled.",
        lambda case: case.method == "set_helper_token_flags" and case.helper_elevated and not case.caller_elevated,
        DENIED,
    ),
    ("Get*/Clear: only condition 2.", lambda case: case.method not in ("set_helper_token", "set_helper_token_flags"), S_OK),
    ("Admin owners may set admin helper tokens.", lambda case: case.caller_elevated, S_OK),
    ("Token need not be an administrator.", lambda case: not case.helper_elevated, S_OK),
]


def decided(case: Case) -> tuple[str, ErrorCode]:
    return next((sentence, outcome) for sentence, applies, outcome in RULES if applies(case))


async def outcome(manager: BitsManager, case: Case, path: Path) -> ErrorCode:
    caller = fake_token("caller", elevated=case.caller_elevated)
    owner = caller if case.caller_is_owner else fake_token("owner")
    job = await manager.create_job("job", owner=owner)
    if case.method != "set_helper_token":  # the token that is set already
        current = fake_token("helper", elevated=case.helper_elevated, level=max(case.level, CAN_ACT[0], key=lambda level: level.value))
        await set_by(current, await options_of(job, fake_token("admin", elevated=True)))
    try:
        options = await options_of(job, caller)
        with impersonate(fake_token("helper", elevated=case.helper_elevated, level=case.level)):
            await METHODS[case.method](options)
    except bits.BitsError as error:
        return ErrorCode(error.code)
    return S_OK


@pytest.mark.parametrize("method", METHODS)
async def test_who_may_call_a_method_of_the_helper_token_is_as_in_windows_10(manager: BitsManager, tmp_path: Path, method: str) -> None:
    rows = [Case(method, *facts) for facts in itertools.product((False, True), (False, True), (False, True), ImpersonationLevel)]
    wrong = []
    for case in rows:
        (sentence, wanted), got = decided(case), await outcome(manager, case, tmp_path / "f")
        if got is not wanted:
            wrong.append(f"{case}: {got.name} instead of {wanted.name}: {sentence}")
    assert not wrong, "\n".join(wrong)


def test_each_rule_of_windows_10_decides_a_row() -> None:
    cases = [
        Case(m, *facts) for m in METHODS for facts in itertools.product((False, True), (False, True), (False, True), ImpersonationLevel)
    ]
    assert {decided(case)[0] for case in cases} == {sentence for sentence, _, _ in RULES}


@pytest.mark.parametrize("level", ImpersonationLevel)
async def test_a_caller_whose_token_cannot_act_gets_no_options(manager: BitsManager, tmp_path: Path, level: ImpersonationLevel) -> None:
    """bits.md: "Imp level too low -> E_ACCESSDENIED"."""
    job, _ = await job_with(manager, tmp_path / "f")
    for elevated in (False, True):
        with impersonate(fake_token("alice", elevated=elevated, level=level)):
            if level in CAN_ACT:
                await job.token_options()
                continue
            with pytest.raises(bits.AccessDenied) as caught:
                await job.token_options()
            assert caught.value.code == DENIED


async def test_an_owner_who_is_no_longer_elevated_gets_no_options_of_a_job_that_he_made_as_an_administrator(
    manager: BitsManager, tmp_path: Path
) -> None:
    """bits.md: "elevated-created job can be changed only elevated (0x80070005)"."""
    job, _ = await job_with(manager, tmp_path / "f", owner=fake_token("alice", elevated=True))
    with impersonate(fake_token("alice")), pytest.raises(bits.AccessDenied) as caught:
        await job.token_options()
    assert caught.value.code == DENIED


async def test_the_access_check_is_made_once_and_the_options_work_under_any_identity(manager: BitsManager, tmp_path: Path) -> None:
    """bits.md: "Access check happens once, at QueryInterface time (since Win7), not per call"."""
    _, options = await job_with(manager, tmp_path / "f")
    for ambient in (fake_token("mallory"), fake_token("nobody", level=ImpersonationLevel.ANONYMOUS), fake_token("bob"), None):
        with nullcontext() if ambient is None else impersonate(ambient):
            await options.set_helper_token_flags(NETWORK)
            assert options.helper_token_flags is NETWORK
            await options.set_helper_token_flags(NONE)
            await options.clear_helper_token()
    await set_by(fake_token("bob"), options)
    assert options.helper_token_sid == "fake:bob"


# -- the token ----------------------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], Token | None], ErrorCode]] = {
    "no impersonate()": (lambda: None, NO_LEVEL),
    "ANONYMOUS": (lambda: fake_token("carol", level=ImpersonationLevel.ANONYMOUS), NO_LEVEL),
    "IDENTIFY": (lambda: fake_token("carol", level=ImpersonationLevel.IDENTIFY), NO_LEVEL),
    "elevated": (lambda: fake_token("carol", elevated=True), DENIED),
    "closed": (lambda: closed(fake_token("carol")), ErrorCode.BG_E_TOKEN_REQUIRED),
}


def closed(token: Token) -> Token:
    token.close()
    return token


@pytest.mark.parametrize("refused", REFUSED)
async def test_a_token_that_is_refused_leaves_the_old_one_at_work(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, refused: str
) -> None:
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob"), NETWORK)
    await at_work(job, network)
    make, code = REFUSED[refused]
    token = make()
    with nullcontext() if token is None else impersonate(token), pytest.raises(bits.BitsError) as caught:
        await options.set_helper_token()
    assert caught.value.code == code
    assert (options.helper_token_sid, options.helper_token_flags) == ("fake:bob", NETWORK)
    network.resume()
    await job.wait()
    assert [request.identity for request in network.requests] == ["bob"], "it was not even interrupted"


async def at_work(job: Job, network: FakeNetwork) -> None:
    """Some of the file has come."""
    network.clock.freeze()
    network.pause(after=100_000)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred >= 1)


async def test_another_token_takes_the_place_of_the_old_one_while_the_job_is_at_work(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path
) -> None:
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob"), NETWORK)
    await at_work(job, network)
    await set_by(fake_token("carol"), options)
    assert job.state is JobState.QUEUED, "the attempt of the old one has ended"
    assert options.helper_token_sid == "fake:carol"
    before = len(network.requests)
    network.resume()
    await job.wait()
    assert {request.identity for request in network.requests[:before]} == {"bob"}
    assert {request.identity for request in network.requests[before:]} == {"carol"}
    assert network.requests[before].start > 0, "what was fetched is kept"
    await job.complete()
    assert (tmp_path / "f").read_bytes() == BODY


async def test_the_same_token_again_interrupts_nothing(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    bob = fake_token("bob")
    job, options = await job_with(manager, tmp_path / "f", bob, NETWORK)
    await at_work(job, network)
    await set_by(bob, options, NETWORK)
    network.resume()
    await job.wait()
    assert len(network.requests) == 1


@pytest.mark.parametrize("change", ["set", "clear"])
@pytest.mark.parametrize("moment", [0, 1, 2, 4, 8, "its connections are being closed"])
async def test_a_change_of_the_token_that_is_cancelled_has_happened_whole_or_not_at_all(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, change: str, moment: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is cancelled: the token is the old one, or the new one and the old one's connections are closed (T25)."""
    forgetting, go_on, forgotten = asyncio.Event(), asyncio.Event(), list[Token]()

    async def forget(self: FakeNetwork, token: Token) -> None:
        forgetting.set()
        await go_on.wait()
        forgotten.append(token)

    monkeypatch.setattr(FakeNetwork, "forget", forget)
    bob, carol = fake_token("bob"), fake_token("carol")
    job, options = await job_with(manager, tmp_path / "f", bob, NETWORK)
    await at_work(job, network)
    with impersonate(carol):
        call = asyncio.ensure_future(options.set_helper_token() if change == "set" else options.clear_helper_token())
    if isinstance(moment, int):
        for _ in range(moment):
            await asyncio.sleep(0)
    else:
        await forgetting.wait()
    call.cancel()
    go_on.set()
    await asyncio.wait({call})
    old = options.helper_token_sid == bob.sid
    assert old or options.helper_token_sid == (carol.sid if change == "set" else None)
    assert old is (bob not in forgotten)
    if not isinstance(moment, int) or moment == 0:  # how far it comes in so many turns of the loop the threads decide
        assert old is (moment == 0)


async def test_clearing_the_token_keeps_the_flags_and_the_job_waits_for_another_one(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path
) -> None:
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob"), NETWORK | LOCAL)
    await options.clear_helper_token()
    assert (options.helper_token_sid, options.helper_token_flags) == (None, NETWORK | LOCAL)
    await options.clear_helper_token()  # nothing to drop: S_OK
    await job.resume()
    with pytest.raises(bits.TokenRequired) as caught:
        await job.wait()
    assert caught.value.code == ErrorCode.BG_E_TOKEN_REQUIRED
    assert job.state is JobState.ERROR
    assert not network.requests, "nobody else has acted in its place"
    await set_by(fake_token("bob"), options)
    await job.resume()
    await job.wait()
    assert {request.identity for request in network.requests} == {"bob"}


async def test_what_tells_of_the_helper_is_its_sid_and_never_the_token(manager: BitsManager, tmp_path: Path) -> None:
    job, options = await job_with(manager, tmp_path / "f")
    assert options.helper_token_sid is None
    bob = fake_token("bob")
    await set_by(bob, options)
    assert options.helper_token_sid == bob.sid
    assert type(options.helper_token_sid) is str
    reachable = {name: getattr(each, name) for each in (options, job) for name in dir(each) if not name.startswith("_")}
    assert not [name for name, value in reachable.items() if isinstance(value, Token)]


# -- the flags ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [NONE, LOCAL, NETWORK, LOCAL | NETWORK])
@pytest.mark.parametrize("helped", [False, True], ids=["without a token", "with a token"])
async def test_flags_are_kept_with_or_without_a_token(manager: BitsManager, tmp_path: Path, flags: HelperTokenFlags, helped: bool) -> None:
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob") if helped else None)
    with impersonate(fake_token("bob")):
        await options.set_helper_token_flags(flags)
    assert options.helper_token_flags is flags
    assert options.helper_token_sid == ("fake:bob" if helped else None)
    assert (await options_of(job, fake_token("alice"))).helper_token_flags is flags


@pytest.mark.parametrize("wrong", [0, 3, 4, -1, True, None, "NETWORK", 1.0, NETWORK.name, bits.NotifyFlags.JOB_ERROR])
async def test_anything_else_than_flags_is_refused_and_changes_nothing(manager: BitsManager, tmp_path: Path, wrong: Any) -> None:
    _, options = await job_with(manager, tmp_path / "f", None, NETWORK)
    with pytest.raises(bits.InvalidArgument) as caught:
        await options.set_helper_token_flags(wrong)
    assert caught.value.code == ErrorCode.E_INVALIDARG
    assert options.helper_token_flags is NETWORK


def test_there_are_no_other_flags_than_those_two() -> None:
    assert [flag.value for flag in HelperTokenFlags] == [0x1, 0x2]


@pytest.mark.parametrize("flags", [HelperTokenFlags, bits.NotifyFlags, bits.SecurityFlags, bits.CostFlags])
def test_an_unknown_flag_is_refused_by_every_python_and_not_dropped(flags: type[Any]) -> None:
    with pytest.raises(ValueError):
        flags(1 << 20)


async def test_no_flags_give_everything_back_to_the_owner_and_keep_the_token(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path
) -> None:
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob"), NETWORK)
    await options.set_helper_token_flags(NONE)
    assert options.helper_token_sid == "fake:bob"
    await job.resume()
    await job.wait()
    assert {request.identity for request in network.requests} == {"alice"}


async def test_the_helper_is_looked_at_when_the_flags_are_set_and_not_before(manager: BitsManager, tmp_path: Path) -> None:
    """A call that has to wait for another command meets the token that this has set."""
    job, options = await job_with(manager, tmp_path / "f", fake_token("bob"), NETWORK)
    admins = await options_of(job, fake_token("admin", elevated=True))
    with impersonate(fake_token("root", elevated=True)):
        first = asyncio.ensure_future(admins.set_helper_token())
    second = asyncio.ensure_future(options.set_helper_token_flags(NONE))
    await let_things_happen()
    await first
    with pytest.raises(bits.AccessDenied):
        await second
    assert options.helper_token_flags is NETWORK
