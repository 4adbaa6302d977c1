"""Tokens are values, pairs choose between them, and the ambient identity stays where it was put."""

import asyncio
import copy
import gc
import os
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import spnego

from bits_async.errors import TokenRequired
from bits_async.identity.tokens import (
    HelperTokenFlags,
    ImpersonationLevel,
    LocalIdentity,
    Token,
    TokenPair,
    current_token,
    impersonate,
    impersonation,
    revert_to_self,
)

BOTH = HelperTokenFlags.LOCAL_FILE | HelperTokenFlags.NETWORK


@dataclass
class Somebody:
    """A local identity that only writes down what happens to it."""

    name: str = "alice"
    key: str = "uid:1000"
    elevated: bool = False
    is_process: bool = False
    closed: list[str] = field(default_factory=list)

    def assume(self) -> None: ...

    def check(self) -> None: ...

    def fresh(self) -> LocalIdentity:
        return self

    def close(self) -> None:
        self.closed.append(self.name)


def a_token(name: str = "alice", **values: Any) -> Token:
    return Token._make(Somebody(name), **values)


@pytest.fixture
def alice() -> Token:
    return a_token()


@pytest.fixture
def bob() -> Token:
    return a_token("bob")


# -- a token


def test_flags_and_levels_have_the_numbers_of_bits() -> None:
    assert [(flag.name, flag.value) for flag in HelperTokenFlags] == [("LOCAL_FILE", 1), ("NETWORK", 2)]
    assert HelperTokenFlags.NONE.value == 0
    assert [level.value for level in ImpersonationLevel] == [0, 1, 2, 3]


def test_the_sid_names_the_local_user_and_the_principal() -> None:
    assert a_token().sid == "uid:1000"
    assert a_token(network=spnego.Password("alice@REALM", "pw"), principal="alice@REALM").sid == "uid:1000:alice@REALM"


def test_a_token_is_made_by_its_makers_only() -> None:
    with pytest.raises(TypeError, match="for_process"):
        Token()
    with pytest.raises(TypeError, match="final"):
        type("Mine", (Token,), {})


def test_a_token_cannot_be_changed(alice: Token) -> None:
    for name in ("name", "elevated", "local", "_network", "new"):
        with pytest.raises(AttributeError):
            setattr(alice, name, "root")
    with pytest.raises(AttributeError):
        del alice.name
    assert not hasattr(alice, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_token_cannot_be_pickled(alice: Token, protocol: int) -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(alice, protocol)


def test_a_token_shows_its_name_and_no_secret() -> None:
    token = a_token("ali\x1b[31mce", network=spnego.Password("alice@REALM", "hunter2"), principal="alice@REALM")
    assert repr(token) == str(token) == "<Token ali\N{REPLACEMENT CHARACTER}[31mce>"


def test_two_tokens_of_one_name_are_two(alice: Token) -> None:
    other = a_token()
    assert alice != other
    assert len({alice, other, alice}) == 2
    assert copy.copy(alice) is copy.deepcopy(alice) is alice


def test_a_closed_token_gives_nothing_away_any_more() -> None:
    token = a_token(network=spnego.Password("alice@REALM", "pw"), principal="alice@REALM")
    token.close()
    token.close()
    assert token.closed
    assert token.local.closed == ["alice"]  # type: ignore[attr-defined]
    with pytest.raises(TokenRequired) as caught:
        _ = token.network
    assert caught.value.identity == "alice"
    assert token.sid == "uid:1000:alice@REALM"  # still fit for a log


def test_a_token_is_released_when_the_last_holder_lets_go() -> None:
    somebody = Somebody()
    token = Token._make(somebody)
    holder = [token]
    del token
    gc.collect()
    assert somebody.closed == []
    holder.clear()
    gc.collect()
    assert somebody.closed == ["alice"]


def test_the_processes_token_cannot_be_taken_from_the_others() -> None:
    Token.for_process().close()
    assert not Token.for_process().closed
    assert Token.for_process().network is not None


async def test_ones_own_users_token_can_be_closed() -> None:
    token = await Token.for_user(os.geteuid())
    token.close()
    assert token.closed
    assert not Token.for_process().closed


def test_the_default_network_credential_is_made_when_it_is_first_asked_for() -> None:
    asked: list[bool] = []

    def ask() -> spnego.CredentialCache:
        asked.append(True)
        return spnego.CredentialCache()

    token = a_token(default_network=ask)
    assert not asked
    assert not token.has_credentials
    assert isinstance(token.network, spnego.CredentialCache)
    assert asked == [True]


# -- a pair


@pytest.mark.parametrize(
    ("flags", "local", "network"),
    [
        (HelperTokenFlags.NONE, "owner", "owner"),
        (HelperTokenFlags.LOCAL_FILE, "helper", "owner"),
        (HelperTokenFlags.NETWORK, "owner", "helper"),
        (BOTH, "helper", "helper"),
    ],
)
def test_the_flags_say_where_the_helper_acts(flags: HelperTokenFlags, local: str, network: str) -> None:
    pair = TokenPair(a_token("owner"), a_token("helper"), flags)
    assert pair.acting_for(HelperTokenFlags.LOCAL_FILE).name == local
    assert pair.acting_for(HelperTokenFlags.NETWORK).name == network


def test_a_missing_token_is_never_replaced_by_the_other(alice: Token) -> None:
    for pair in (TokenPair(alice, None, BOTH), TokenPair(None, alice, HelperTokenFlags.NONE)):
        for use in (HelperTokenFlags.LOCAL_FILE, HelperTokenFlags.NETWORK):
            with pytest.raises(TokenRequired):
                pair.acting_for(use)


def test_a_closed_token_acts_no_more(alice: Token, bob: Token) -> None:
    bob.close()
    with pytest.raises(TokenRequired) as caught:
        TokenPair(alice, bob, BOTH).acting_for(HelperTokenFlags.NETWORK)
    assert caught.value.identity == "bob"


# -- the ambient identity


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
