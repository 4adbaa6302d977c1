"""The ambient identity stays where it was put, and reaches as far as the policy says."""

import asyncio
import concurrent.futures
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest

from bits_async.errors import ImpersonationFailed
from bits_async.identity.ambient import (
    TokenFlow,
    carry,
    current_token,
    impersonate,
    impersonation,
    revert_to_self,
    set_token_flow,
)
from bits_async.identity.threads import run_as
from bits_async.identity.tokens import Token
from tests.identity.somebody import a_token


@pytest.fixture
def alice() -> Token:
    return a_token()


@pytest.fixture
def bob() -> Token:
    return a_token("bob")


def test_outside_of_impersonate_the_process_acts() -> None:
    assert current_token() is Token.for_process()
    assert impersonation() is None


def test_impersonate_nests_and_is_undone(alice: Token, bob: Token) -> None:
    with impersonate(alice) as entered:
        assert entered is current_token() is impersonation() is alice
        with impersonate(bob):
            assert current_token() is bob
            with revert_to_self() as process:
                assert process is current_token() is Token.for_process()
                assert impersonation() is None
            assert current_token() is bob
        assert current_token() is alice
    assert current_token() is Token.for_process()


def test_impersonate_is_undone_when_the_block_raises(alice: Token) -> None:
    with pytest.raises(ZeroDivisionError):
        with impersonate(alice):
            _ = 1 / 0
    assert current_token() is Token.for_process()


async def test_the_identity_flows_to_tasks_and_not_back(alice: Token, bob: Token) -> None:
    async def inner() -> Token:
        before = current_token()
        with impersonate(bob):
            await asyncio.sleep(0)
        return before

    with impersonate(alice):
        task = asyncio.create_task(inner())
        await asyncio.sleep(0)
        assert current_token() is alice
    assert await task is alice


async def test_tasks_side_by_side_have_their_own_identity(alice: Token, bob: Token) -> None:
    async def act(token: Token) -> bool:
        with impersonate(token):
            for _ in range(5):
                await asyncio.sleep(0)
                if current_token() is not token:
                    return False
        return True

    assert all(await asyncio.gather(act(alice), act(bob)))


def test_impersonate_takes_a_token_only() -> None:
    with pytest.raises(TypeError, match="takes a Token"):
        impersonate("alice")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda token: impersonate(token), lambda token: revert_to_self()], ids=["impersonate", "revert"])
def test_what_was_never_entered_warns(make: Any, alice: Token) -> None:
    def forget() -> None:
        make(alice)
        gc.collect()

    with pytest.warns(RuntimeWarning, match="never entered"):
        forget()


def test_impersonate_is_entered_once(alice: Token) -> None:
    block = impersonate(alice)
    with block:
        with pytest.raises(RuntimeError, match="once"):
            block.__enter__()
    with pytest.raises(RuntimeError, match="once"):
        block.__enter__()
    assert current_token() is Token.for_process()


async def test_a_block_that_ends_in_another_task_says_so(alice: Token) -> None:
    stack = ExitStack()

    async def enter() -> None:
        stack.enter_context(impersonate(alice))

    await asyncio.create_task(enter())
    with pytest.raises(RuntimeError, match="another task"):
        stack.close()


# -- T11


async def direct(token: Token) -> AsyncIterator[int]:
    with impersonate(token):
        yield 1


async def by_stack(token: Token) -> AsyncIterator[int]:
    with ExitStack() as stack:
        stack.enter_context(impersonate(token))
        yield 1


@contextmanager
def acting(token: Token) -> Iterator[None]:
    with impersonate(token):
        yield


async def by_context_manager(token: Token) -> AsyncIterator[int]:
    with acting(token):
        yield 1


async def reverting(token: Token) -> AsyncIterator[int]:
    with revert_to_self():
        yield 1


@pytest.mark.parametrize("generator", [direct, by_stack, by_context_manager, reverting])
async def test_t11_an_async_generator_cannot_lend_its_identity_to_its_caller(generator: Any, alice: Token) -> None:
    with pytest.raises(RuntimeError, match="async generator"):
        async for _ in generator(alice):
            pytest.fail("it was entered")
    assert current_token() is Token.for_process()


async def test_t11_an_asynccontextmanager_is_an_async_generator_too(alice: Token) -> None:
    @asynccontextmanager
    async def as_alice() -> AsyncIterator[None]:
        with impersonate(alice):
            yield

    with pytest.raises(RuntimeError, match="async generator"):
        async with as_alice():
            pytest.fail("it was entered")


async def test_t11_a_coroutine_may_use_stacks_and_context_managers(alice: Token, bob: Token) -> None:
    with acting(alice), ExitStack() as stack:
        stack.enter_context(impersonate(bob))
        assert current_token() is bob
    assert current_token() is Token.for_process()


async def test_t11_a_function_called_by_an_async_generator_may_impersonate(alice: Token) -> None:
    def name() -> str:
        with impersonate(alice):
            return current_token().name

    async def names() -> AsyncIterator[str]:
        yield name()

    assert [each async for each in names()] == ["alice"]


# -- how far it reaches


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Iterator[TokenFlow]:
    before = set_token_flow(request.param)
    yield request.param
    set_token_flow(before)


every_policy = pytest.mark.parametrize("policy", list(TokenFlow), indirect=True, ids=[flow.name for flow in TokenFlow])


def seen() -> str:
    """Who is the ambient identity here; "nobody" where none flows."""
    try:
        return current_token().name
    except ImpersonationFailed:
        return "nobody"


async def seen_in_a_task() -> str:
    async def look() -> str:
        return seen()

    return await asyncio.create_task(look())


async def seen_in_a_callback() -> str:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: future.set_result(seen()))
    return str(await future)


def seen_in_a_thread(look: Any) -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0]


@every_policy
async def test_in_the_task_that_impersonates_the_identity_is_there(policy: TokenFlow, alice: Token) -> None:
    with impersonate(alice):
        await asyncio.sleep(0)
        assert seen() == "alice"


@every_policy
@pytest.mark.parametrize(
    "begun", [seen_in_a_task, seen_in_a_callback, lambda: asyncio.to_thread(seen)], ids=["task", "callback", "to_thread"]
)
async def test_never_is_the_policy_under_which_nothing_flows_out_of_impersonate(policy: TokenFlow, begun: Any, alice: Token) -> None:
    with impersonate(alice):
        assert await begun() == ("nobody" if policy is TokenFlow.NEVER else "alice")


@every_policy
async def test_always_is_the_policy_under_which_what_a_thread_wears_flows_on(policy: TokenFlow) -> None:
    loop, process = asyncio.get_running_loop(), Token.for_process()

    async def look() -> str:
        return seen()

    def begin() -> tuple[str, "concurrent.futures.Future[str]"]:
        return seen(), asyncio.run_coroutine_threadsafe(look(), loop)

    inside, task = await run_as(process, begin)
    assert inside == process.name
    assert await asyncio.wrap_future(task) == (process.name if policy is TokenFlow.ALWAYS else "nobody")


@pytest.mark.parametrize("policy", [TokenFlow.NEVER], indirect=True)
async def test_t10_where_no_identity_flows_the_process_does_not_take_its_place(policy: TokenFlow, alice: Token) -> None:
    async def look() -> None:
        with pytest.raises(ImpersonationFailed, match="NEVER"):
            current_token()
        with pytest.raises(ImpersonationFailed):
            impersonation()
        with impersonate(alice):
            assert seen() == "alice"
        with revert_to_self():
            assert current_token() is Token.for_process()

    with impersonate(alice):
        await asyncio.create_task(look())


async def test_a_plain_thread_knows_no_identity_and_carry_takes_it_along(alice: Token) -> None:
    with impersonate(alice):
        assert seen_in_a_thread(seen) == Token.for_process().name
        carried = carry(seen)
    assert seen_in_a_thread(carried) == "alice"
    assert await asyncio.get_running_loop().run_in_executor(None, carried) == "alice"
    assert seen() == Token.for_process().name


@pytest.mark.parametrize("policy", [TokenFlow.NEVER], indirect=True)
async def test_carry_is_a_decision_and_goes_where_the_policy_lets_nothing_go(policy: TokenFlow, alice: Token) -> None:
    with impersonate(alice):
        carried = carry(seen)
    assert seen_in_a_thread(carried) == "alice"


async def test_carry_without_an_identity_carries_the_processes_own(alice: Token) -> None:
    carried = carry(seen)
    with impersonate(alice):
        assert carried() == Token.for_process().name
        assert seen() == "alice"


async def test_a_coroutine_function_stays_one_and_is_carried_to_its_end(alice: Token) -> None:
    async def look(wanted: int) -> tuple[str, int]:
        await asyncio.sleep(0)
        return seen(), wanted

    with impersonate(alice):
        carried = carry(look)
    assert await asyncio.create_task(carried(7)) == ("alice", 7)


def test_a_generator_cannot_be_carried_because_its_caller_would_get_the_identity() -> None:
    def items() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        carry(items)


async def test_an_identity_is_undone_by_a_cancel_and_by_an_exception(alice: Token, bob: Token) -> None:
    async def work() -> str:
        with impersonate(alice):
            try:
                with impersonate(bob):
                    await asyncio.sleep(3600)
            except asyncio.CancelledError:
                assert seen() == "alice"
        return seen()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == Token.for_process().name


def test_the_policy_is_one_of_three() -> None:
    with pytest.raises(TypeError, match="TokenFlow"):
        set_token_flow("managed")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [TokenFlow.NEVER], indirect=True)
@pytest.mark.parametrize("where", ["no loop", "a callback"])
def test_t10_no_identity_flows_to_a_later_callback_of_the_same_loop(policy: TokenFlow, alice: Token, where: str) -> None:
    later: list[str] = []

    def begin() -> None:
        with impersonate(alice):
            loop.call_soon(lambda: later.append(seen()))

    loop = asyncio.new_event_loop()
    try:
        if where == "no loop":
            begin()
        else:
            loop.call_soon(begin)
        loop.call_later(0.01, loop.stop)
        loop.run_forever()
    finally:
        loop.close()
    assert later == ["nobody"]
