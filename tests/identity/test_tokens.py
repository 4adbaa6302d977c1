"""Tokens are values, and pairs choose between them."""

import ast
import copy
import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import spnego

from bits_async.errors import InvalidArgument, TokenRequired
from bits_async.identity.tokens import HelperTokenFlags, ImpersonationLevel, LocalUser, Token, TokenPair
from tests.identity.somebody import Somebody, a_token

BOTH = HelperTokenFlags.LOCAL_FILE | HelperTokenFlags.NETWORK


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


@pytest.mark.posix  # it asks by uid
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


@pytest.mark.parametrize("twin", ["posix", "windows"])
def test_t10_what_elevated_means_stands_in_one_function_of_each_platform(twin: str) -> None:
    """Every identity that is made there asks it; none is said to be elevated, or not, by anything else."""
    source = Path(__file__).parents[2] / "bits_async" / "identity" / f"{twin}.py"
    tree = ast.parse(source.read_text())
    kinds = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Identity")}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = [call.args[1] for call in calls if isinstance(call.func, ast.Name) and call.func.id in kinds | {"cls"} and len(call.args) > 1]
    assert made
    assert {ast.unparse(argument) for argument in made} == {"is_elevated(account)"}
    assert len([node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "is_elevated"]) == 1


def test_t12_a_helper_that_became_an_administrator_acts_for_an_administrator_only() -> None:
    plain, admin = Somebody("bob"), Somebody("bob", elevated=True)
    for owner_elevated, helper, today, refused in [
        (False, plain, admin, True),
        (False, plain, plain, False),
        (False, admin, admin, False),  # an elevated caller set it, or it would not be there
        (True, plain, admin, False),
    ]:
        pair = TokenPair(Token._make(Somebody("alice", elevated=owner_elevated)), Token._make(helper), HelperTokenFlags.LOCAL_FILE)
        assert pair.owner is not None
        assert pair.helper is not None
        pair.check_today(pair.owner, Somebody("alice", elevated=True))  # his own rights are his own
        if refused:
            with pytest.raises(TokenRequired):
                pair.check_today(pair.helper, today)
        else:
            pair.check_today(pair.helper, today)


@pytest.mark.parametrize(
    "wrong",
    [
        {"user": None},
        {"user": True},
        {"user": "alice", "realms": "CORP.EXAMPLE"},  # as text, "EXAMPLE" would be in it
        {"user": "alice", "realms": frozenset({5})},
        {"user": "alice", "system": "no"},
    ],
    ids=str,
)
def test_t09_a_mapping_to_a_local_user_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        LocalUser(**wrong)
