"""Challenge lists are read as RFC 9110 means them, whatever the peer makes of them."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.auth.challenge import (
    MAX_CHALLENGES,
    MAX_PARAMS,
    MAX_TEXT,
    Challenge,
    parse_challenges,
    parse_params,
    quote,
)
from bits_async.errors import AuthFailed


def read(*lines: str) -> list[tuple[str, str | None, dict[str, str]]]:
    return [(found.scheme, found.token68, dict(found.params)) for found in parse_challenges(lines)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        ([""], []),
        (["Negotiate"], [("negotiate", None, {})]),
        (["Negotiate", "NTLM"], [("negotiate", None, {}), ("ntlm", None, {})]),
        (["Negotiate, NTLM"], [("negotiate", None, {}), ("ntlm", None, {})]),
        ([" ,, Negotiate ,,NTLM, "], [("negotiate", None, {}), ("ntlm", None, {})]),
        (["NTLM TlRMTVNTUAACAAAA=="], [("ntlm", "TlRMTVNTUAACAAAA==", {})]),
        (["Negotiate oYG2==, Basic realm=x"], [("negotiate", "oYG2==", {}), ("basic", None, {"realm": "x"})]),
        (['Basic realm="simple"'], [("basic", None, {"realm": "simple"})]),
        (['BASIC REALM = "simple"'], [("basic", None, {"realm": "simple"})]),
        (['Basic\trealm="a b", charset="UTF-8"'], [("basic", None, {"realm": "a b", "charset": "UTF-8"})]),
        (
            # RFC 9110, 11.6.1
            ['Basic realm="simple", Newauth realm="apps", type=1, title="Login to \\"apps\\""'],
            [("basic", None, {"realm": "simple"}), ("newauth", None, {"realm": "apps", "type": "1", "title": 'Login to "apps"'})],
        ),
        (
            ['Digest realm="a, Basic realm=b", nonce="n==", qop="auth,auth-int", stale=TRUE, Negotiate'],
            [
                ("digest", None, {"realm": "a, Basic realm=b", "nonce": "n==", "qop": "auth,auth-int", "stale": "TRUE"}),
                ("negotiate", None, {}),
            ],
        ),
        (
            # Apache and Squid, as seen on the wire
            ['Digest realm="Realm", nonce="deEtttNgBgA=22d838114af7", algorithm=MD5, qop="auth"', 'Basic realm="Realm"'],
            [
                ("digest", None, {"realm": "Realm", "nonce": "deEtttNgBgA=22d838114af7", "algorithm": "MD5", "qop": "auth"}),
                ("basic", None, {"realm": "Realm"}),
            ],
        ),
        (['Basic realm=""'], [("basic", None, {"realm": ""})]),
        (["Basic realm="], [("basic", "realm=", {})]),
    ],
)
def test_a_list_over_one_or_many_lines_is_read_challenge_by_challenge(
    lines: list[str], expected: list[tuple[str, str | None, dict[str, str]]]
) -> None:
    assert read(*lines) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('Basic realm="never closed, Negotiate', []),
        ('Basic realm="x\\', []),
        ('Digest realm="a", realm="b", Negotiate', [("negotiate", None, {})]),
        ('Digest realm="a" nonce="b", Negotiate', [("negotiate", None, {})]),
        ("realm=x, Negotiate", [("negotiate", None, {})]),
        ("@@@, Negotiate", [("negotiate", None, {})]),
        ("Negotiate@, NTLM", [("ntlm", None, {})]),
        ("Basic realm=@, NTLM", [("ntlm", None, {})]),
        ("Negotiate abc==, x=1, NTLM", [("ntlm", None, {})]),
        ('"Negotiate", NTLM', [("ntlm", None, {})]),
        ("Basic realm=\xe9, NTLM", [("ntlm", None, {})]),
        ('Basic realm="\udce9", NTLM', [("basic", None, {"realm": "\udce9"}), ("ntlm", None, {})]),
    ],
)
def test_what_cannot_be_read_is_left_out_and_hides_nothing_else(line: str, expected: list[tuple[str, str | None, dict[str, str]]]) -> None:
    assert read(line) == expected


@pytest.mark.parametrize("character", ["\r", "\n", "\0", "\x1b", "\x7f"])
def test_a_line_with_control_characters_is_refused(character: str) -> None:
    with pytest.raises(AuthFailed) as caught:
        parse_challenges([f'Basic realm="x{character}Set-Cookie: y"'])
    assert not caught.value.transient
    with pytest.raises(AuthFailed):
        parse_params([f"nextnonce=x{character}"])


def test_no_peer_makes_us_read_without_end() -> None:
    assert len(read("NTLM," * (2 * MAX_CHALLENGES))) == MAX_CHALLENGES
    assert read("Digest " + ", ".join(f"p{number}=1" for number in range(MAX_PARAMS + 1)) + ", NTLM") == [("ntlm", None, {})]
    assert read("NTLM", "Negotiate " + "A" * MAX_TEXT) == [("ntlm", None, {})]
    assert read('Basic realm="' + '"x' * (MAX_TEXT // 3)) == []  # and it takes no time


def test_repr_shows_no_token() -> None:
    [challenge] = parse_challenges(["Negotiate c2VjcmV0LXRva2Vu"])
    assert "c2VjcmV0" not in repr(challenge)
    assert challenge.realm == ""


def test_authentication_info_is_read_as_parameters() -> None:
    found = parse_params(['rspauth="6629fae4", cnonce="0a4f,1=", nc=00000001', "qop=auth,, @, rspauth=other"])
    assert dict(found) == {"rspauth": "6629fae4", "cnonce": "0a4f,1=", "nc": "00000001", "qop": "auth"}
    assert dict(parse_params(["", 'nextnonce="x'])) == {}


tokens = st.text(string.ascii_lowercase + string.digits + "!#$%&'*+-.^_`|~", min_size=1, max_size=12)
values = st.text(st.characters(exclude_categories=["Cc"], exclude_characters="\x7f"), max_size=20)
token68s = st.from_regex(r"[A-Za-z0-9\-._~+/]{1,30}={0,2}", fullmatch=True)
challenges = st.one_of(
    st.builds(Challenge, tokens),
    st.builds(Challenge, tokens, token68s),
    st.builds(Challenge, tokens, st.none(), st.dictionaries(tokens, values, min_size=1, max_size=5)),
)


def written_out(challenge: Challenge) -> str:
    if challenge.token68 is not None:
        return f"{challenge.scheme} {challenge.token68}"
    params = ", ".join(f"{name}={quote(value)}" for name, value in challenge.params.items())
    return f"{challenge.scheme} {params}".rstrip()


@given(st.lists(st.lists(challenges, max_size=4), max_size=4))
def test_what_is_written_is_read_back(lines: list[list[Challenge]]) -> None:
    written = [", ".join(written_out(challenge) for challenge in line) for line in lines]
    assert list(parse_challenges(written)) == [challenge for line in lines for challenge in line]


@given(st.dictionaries(tokens, values, max_size=6))
def test_parameters_that_are_written_are_read_back(params: dict[str, str]) -> None:
    assert dict(parse_params([", ".join(f"{name}={quote(value)}" for name, value in params.items())])) == params


@given(st.lists(st.text(st.sampled_from('aN=",\\ \t\x80\udcff@;'), max_size=40), max_size=4))
def test_garbage_is_read_without_an_exception(lines: list[str]) -> None:
    for challenge in parse_challenges(lines):
        assert challenge.scheme == challenge.scheme.lower()
    parse_params(lines)
