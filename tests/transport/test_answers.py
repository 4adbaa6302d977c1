"""What may be asked, and the decision table of answers row by row."""

import base64
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from bits_async.errors import (
    HTTP_ERROR,
    AuthFailed,
    BitsError,
    ErrorCode,
    ErrorContext,
    InvalidArgument,
    RemoteFileError,
)
from bits_async.transport.answers import (
    MAX_LOCATION,
    MAX_RETRY_AFTER,
    MAX_URL,
    Accept,
    AlreadyComplete,
    Answer,
    Asked,
    Challenged,
    Complete,
    Condition,
    FileChanged,
    HeaderFields,
    Headers,
    Redirect,
    Refuse,
    Restart,
    Verdict,
    authority,
    check_url,
    connect_target,
    downgrades,
    judge,
    parse_authority,
    resolve_location,
    retry_after,
    validator_of,
)
from bits_async.transport.digests import Digests
from bits_async.transport.ranges import Slice, Validator

URL = "https://files.example/big.iso?sig=secret"
MONDAY = "Mon, 02 Nov 2026 10:00:00 GMT"
TUESDAY = "Tue, 03 Nov 2026 10:00:00 GMT"
PINNED = Validator('"a"', MONDAY, 200)
DATED = Validator(None, MONDAY, 200)


def answer(status: int, *lines: str) -> Answer:
    return Answer(status, HeaderFields(tuple(line.split(": ", 1)) for line in lines))  # type: ignore[misc]


def asked(start: int = 0, end: int | None = None, pinned: Validator | None = None) -> Asked:
    return Asked(URL, start, end, pinned)


# -- what may be asked


@pytest.mark.parametrize(
    ("url", "as_asked"),
    [
        ("http://h", "http://h"),
        ("http://h/", "http://h/"),
        ("HTTP://H/Path", "http://H/Path"),
        ("http://h?q=1", "http://h/?q=1"),
        ("http://h/a#part", "http://h/a"),
        ("http://h:/a", "http://h:/a"),
        ("https://h:8443/a", "https://h:8443/a"),
        ("http://h/a/../b/./%2e%2e/c//d;x?y=%7E&z=+/?", "http://h/a/../b/./%2e%2e/c//d;x?y=%7E&z=+/?"),
        ("https://h/k?X-Amz-Signature=a%2Fb%3D&e=%zz|{}", "https://h/k?X-Amz-Signature=a%2Fb%3D&e=%zz|{}"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("http://127.0.0.1/a", "http://127.0.0.1/a"),
        ("http://b\u00fccher.example/\u00fc?\u20ac", "http://xn--bcher-kva.example/%C3%BC?%E2%82%AC"),
        ("http://b\u00fccher.example:81/", "http://xn--bcher-kva.example:81/"),
        ("http://stra\u00dfe.example/", "http://xn--strae-oqa.example/"),
        ("http://under_score.example/", "http://under_score.example/"),
        ("http://host.example./a", "http://host.example./a"),
    ],
)
def test_a_url_is_asked_for_as_it_stands(url: str, as_asked: str) -> None:
    assert check_url(url) == as_asked
    assert check_url(as_asked) == as_asked


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h/a",
        "//h/a",
        "/a",
        "ftp://h/a",
        "file:///etc/passwd",
        "http:h/a",
        "http:/h/a",
        "http://",
        "http:///a",
        "http://?q",
        "http://:80/a",
        "http://user@h/a",
        "http://user:password@h/a",
        "http://@h/a",
        "http://h/a b",
        " http://h/a",
        "http://h/a\r\nHost: evil",
        "http://h/a\tb",
        "http://h/\x00",
        "http://h/\x7f",
        "http://h/\x85",
        "http://h\\@evil/",
        "http://h\\evil/",
        "http://h:port/",
        "http://h:0/",
        "http://h:65536/",
        "http://h:-1/",
        "http://h:80:80/",
        "http://[::1/",
        "http://::1/",
        "http://[::1]x/",
        "http://[fe80::1%25eth0]/",
        "http://[h]/",
        "http://a..b/",
        "http://.h/",
        "http://%68/",
        "http://h*/",
        "http://" + "a" * 64 + "/",
        "http://" + ".".join(["a" * 60] * 5) + "/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://h.0x7f/",
        "http://256.1.1.1/",
        "http://\u2028/",
        "http://h/\ud800",
    ],
)
def test_a_url_that_cannot_be_fetched_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_url(url)
    assert caught.value.code == ErrorCode.E_INVALIDARG
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("url", [None, b"http://h/", 5])
def test_a_url_is_text(url: Any) -> None:
    with pytest.raises(InvalidArgument, match="text"):
        check_url(url)


def test_a_url_has_at_most_2200_characters() -> None:
    longest = "http://h/" + "a" * (MAX_URL - 9)
    assert check_url(longest) == longest
    with pytest.raises(InvalidArgument) as caught:
        check_url(longest + "a")
    assert caught.value.code == ErrorCode.BG_E_STRING_TOO_LONG


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("http://H.Example/a", "h.example", 80, "h.example:80"),
        ("https://h/", "h", 443, "h:443"),
        ("https://h:8443/", "h", 8443, "h:8443"),
        ("https://h:/", "h", 443, "h:443"),
        ("https://[::1]/", "::1", 443, "[::1]:443"),
        ("https://[2001:DB8:0:0:0:0:0:1]:8/", "2001:db8::1", 8, "[2001:db8::1]:8"),
        ("https://B\u00dcCHER.example/", "xn--bcher-kva.example", 443, "xn--bcher-kva.example:443"),
        ("https://10.0.0.1:00080/", "10.0.0.1", 80, "10.0.0.1:80"),
    ],
)
def test_t23_the_target_of_a_tunnel_is_rebuilt_from_the_parsed_host(url: str, host: str, port: int, target: str) -> None:
    assert authority(url) == (host, port)
    assert connect_target(url) == target


@pytest.mark.parametrize("url", ["https://h\r\nX: y/", "https://h:443\r\n\r\nGET /", "https://h @evil/", "https://u@h/"])
def test_t23_no_text_of_a_url_smuggles_a_line_into_connect(url: str) -> None:
    with pytest.raises(InvalidArgument):
        connect_target(url)


@given(st.text(max_size=60))
def test_t23_whatever_the_host_connect_gets_one_clean_target_or_nothing(text: str) -> None:
    try:
        target = connect_target(f"https://{text}/")
    except InvalidArgument:
        return
    assert target.isascii()
    assert not any(character in target for character in " \r\n\t\0/?#@\\")


def test_the_parts_of_an_authority() -> None:
    assert parse_authority("Proxy.Example:3128") == ("proxy.example", 3128)
    assert parse_authority("proxy") == ("proxy", None)
    assert parse_authority("[::1]") == ("::1", None)
    with pytest.raises(ValueError, match="user information"):
        parse_authority("user:secret@proxy")


RFC_BASE = "http://a/b/c/d;p?q"


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        # RFC 3986, 5.4.1 and 5.4.2; fragments are never asked for
        ("g", "http://a/b/c/g"),
        ("./g", "http://a/b/c/g"),
        ("g/", "http://a/b/c/g/"),
        ("/g", "http://a/g"),
        ("//g", "http://g"),
        ("?y", "http://a/b/c/d;p?y"),
        ("g?y", "http://a/b/c/g?y"),
        ("#s", "http://a/b/c/d;p?q"),
        ("g#s", "http://a/b/c/g"),
        ("g?y#s", "http://a/b/c/g?y"),
        (";x", "http://a/b/c/;x"),
        ("g;x", "http://a/b/c/g;x"),
        ("g;x?y#s", "http://a/b/c/g;x?y"),
        (".", "http://a/b/c/"),
        ("./", "http://a/b/c/"),
        ("..", "http://a/b/"),
        ("../", "http://a/b/"),
        ("../g", "http://a/b/g"),
        ("../..", "http://a/"),
        ("../../", "http://a/"),
        ("../../g", "http://a/g"),
        ("../../../g", "http://a/g"),
        ("../../../../g", "http://a/g"),
        ("/./g", "http://a/g"),
        ("/../g", "http://a/g"),
        ("g.", "http://a/b/c/g."),
        (".g", "http://a/b/c/.g"),
        ("g..", "http://a/b/c/g.."),
        ("..g", "http://a/b/c/..g"),
        ("./../g", "http://a/b/g"),
        ("./g/.", "http://a/b/c/g/"),
        ("g/./h", "http://a/b/c/g/h"),
        ("g/../h", "http://a/b/c/h"),
        ("g;x=1/./y", "http://a/b/c/g;x=1/y"),
        ("g;x=1/../y", "http://a/b/c/y"),
        ("g?y/./x", "http://a/b/c/g?y/./x"),
        ("g?y/../x", "http://a/b/c/g?y/../x"),
        # ours
        ("https://other.example:8443/x?sig=a%2Fb%20c&d=%zz", "https://other.example:8443/x?sig=a%2Fb%20c&d=%zz"),
        (" /padded\t", "http://a/padded"),
        ("/with space?and one", "http://a/with%20space?and%20one"),
        ("/\u00fc", "http://a/%C3%BC"),
        ("/\udcfc", "http://a/%FC"),  # a byte that was not UTF-8, as header parsers hand it over
        ("//b\u00fccher.example/x", "http://xn--bcher-kva.example/x"),
        ("/a//b", "http://a/a//b"),
        ("/%2e%2e/x", "http://a/%2e%2e/x"),
    ],
)
def test_a_redirect_leads_where_rfc_3986_says(reference: str, target: str) -> None:
    assert resolve_location(RFC_BASE, reference) == target


def test_a_relative_redirect_from_a_bare_host_begins_at_the_root() -> None:
    assert resolve_location("http://a", "x") == "http://a/x"
    assert resolve_location("http://a?q", "?r") == "http://a/?r"


BAD_LOCATIONS = [
    "",
    "  ",
    "/a\r\nSet-Cookie: x",
    "/a\nb",
    "/a\x00",
    "/a\x1b[31m",
    "ftp://h/a",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "http:",
    "http:path",
    "http://",
    "//",
    "http://user:secret@h/",
    "//user@h/",
    "http://h:99999/",
    "http://h\\@evil/",
    "http://127.1/",
    "/\ud800",
    "/" + "a" * MAX_LOCATION,
]


@pytest.mark.parametrize("location", BAD_LOCATIONS)
def test_a_redirect_to_a_place_that_cannot_be_asked_is_an_error_of_the_server(location: str) -> None:
    with pytest.raises(RemoteFileError) as caught:
        resolve_location(URL, location)
    assert caught.value.code == ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED
    assert not caught.value.transient
    assert "secret" not in str(caught.value)


@given(st.text(max_size=40))
def test_a_redirect_leads_to_a_url_that_may_be_asked_or_nowhere(location: str) -> None:
    try:
        target = resolve_location(URL, location)
    except RemoteFileError:
        return
    assert check_url(target) == target


@pytest.mark.parametrize(
    ("base", "target", "gives_up_tls"),
    [
        ("https://h/", "http://h/", True),
        ("HTTPS://h/", "http://h/", True),
        ("https://h/", "HTTPS://x/", False),
        ("http://h/", "http://x/", False),
        ("http://h/", "https://x/", False),
    ],
)
def test_a_redirect_that_gives_up_tls_is_flagged(base: str, target: str, gives_up_tls: bool) -> None:
    assert downgrades(base, target) is gives_up_tls


# -- the question


@pytest.mark.parametrize(
    ("question", "fields"),
    [
        (asked(), {}),
        (asked(pinned=PINNED), {}),
        (asked(0, 100), {"Range": "bytes=0-99"}),
        (asked(100, None, PINNED), {"Range": "bytes=100-", "If-Range": '"a"'}),
        (asked(100, 150, DATED), {"Range": "bytes=100-149", "If-Range": MONDAY}),
        (asked(100, 150, Validator('W/"a"', None, 200)), {"Range": "bytes=100-149"}),
    ],
)
def test_every_range_request_of_a_pinned_version_carries_if_range(question: Asked, fields: dict[str, str]) -> None:
    assert question.headers() == {"Accept-Encoding": "identity", **fields}
    assert question.ranged == ("Range" in fields)


def test_the_same_question_can_be_asked_elsewhere() -> None:
    question = asked(5, 6, PINNED)
    assert question.at(question.url) is question
    assert question.at("http://other/") == Asked("http://other/", 5, 6, PINNED.at_another_url())  # an ETag is of its own resource only


# -- the decision table: accept

FIRST = Validator('"a"', MONDAY, 200)


@pytest.mark.parametrize(
    ("question", "reply", "verdict"),
    [
        # 200 from the first byte
        (
            asked(),
            answer(200, "Content-Length: 200", 'ETag: "a"', f"Last-Modified: {MONDAY}"),
            Accept(0, 200, 200, FIRST, ranged=False),
        ),
        (asked(), answer(200, "Content-Length: 0"), Accept(0, 0, 0, Validator(size=0), ranged=False)),
        (asked(), answer(200, "Transfer-Encoding: chunked"), Accept(0, None, None, Validator(), ranged=False)),
        (asked(), answer(200, "Transfer-Encoding: Chunked"), Accept(0, None, None, Validator(), ranged=False)),
        (asked(0, 100), answer(200, "Content-Length: 200"), Accept(0, 200, 200, Validator(size=200), ranged=False)),
        (asked(), answer(200, "Content-Length: 5368709120"), Accept(0, 5 << 30, 5 << 30, Validator(size=5 << 30), ranged=False)),
        (
            asked(0, None, PINNED),
            answer(200, "Content-Length: 200", 'ETag: "a"'),
            Accept(0, 200, 200, FIRST, ranged=False),  # what was known stays known
        ),
        (
            asked(0, None, PINNED),
            answer(200, "Transfer-Encoding: chunked", 'ETag: "a"'),
            Accept(0, None, 200, FIRST, ranged=False),
        ),
        (
            asked(0, None, Validator(None, None, 200)),
            answer(200, "Content-Length: 200", 'ETag: "a"'),
            Accept(0, 200, 200, Validator('"a"', None, 200), ranged=False),
        ),
        (
            asked(),
            answer(200, "Content-Length: 200", "Content-Range: bytes 0-199/200"),
            Accept(0, 200, 200, Validator(size=200), ranged=False),
        ),
        (
            asked(),
            answer(200, "Content-Length: 200", "Content-Encoding: identity"),
            Accept(0, 200, 200, Validator(size=200), ranged=False),
        ),
        # 206, exact
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-199/200", "Content-Length: 100", 'ETag: "a"', f"Last-Modified: {MONDAY}"),
            Accept(100, 100, 200, FIRST, ranged=True),
        ),
        (
            asked(100, 150, PINNED),
            answer(206, "Content-Range: bytes 100-149/200", 'ETag: "a"'),
            Accept(100, 50, 200, FIRST, ranged=True),
        ),
        (
            asked(100, 150, DATED),
            answer(206, "Content-Range: bytes 100-149/200", f"Last-Modified: {MONDAY}", "Transfer-Encoding: chunked"),
            Accept(100, 50, 200, DATED, ranged=True),
        ),
        (
            asked(0, 100),
            answer(206, "Content-Range: bytes 0-99/200", "Content-Length: 100", 'ETag: "a"'),
            Accept(0, 100, 200, Validator('"a"', None, 200), ranged=True),
        ),
        (asked(0, 1 << 31), answer(206, "Content-Range: bytes 0-4/5"), Accept(0, 5, 5, Validator(size=5), ranged=True)),
        # a server may send less than was asked for
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-149/200", "Content-Length: 50", 'ETag: "a"'),
            Accept(100, 50, 200, FIRST, ranged=True),
        ),
        # `*`: the size is the pinned one's, if the version is proved by its ETag
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-199/*", 'ETag: "a"'),
            Accept(100, 100, 200, FIRST, ranged=True),
        ),
        # the size was not known at first
        (
            asked(100, None, Validator('"a"', MONDAY)),
            answer(206, "Content-Range: bytes 100-199/200", 'ETag: "a"'),
            Accept(100, 100, 200, FIRST, ranged=True),
        ),
    ],
)
def test_the_bytes_that_were_asked_for_are_accepted(question: Asked, reply: Answer, verdict: Accept) -> None:
    assert judge(question, reply) == verdict


# -- the decision table: restart


@pytest.mark.parametrize(
    ("question", "reply", "validator", "changed"),
    [
        # 200 to a range request: never appended
        (asked(100, None, PINNED), answer(200, "Content-Length: 200", 'ETag: "a"'), FIRST, False),
        (
            asked(100, None, PINNED),
            answer(200, "Content-Length: 200", 'ETag: "b"', f"Last-Modified: {TUESDAY}"),
            Validator('"b"', TUESDAY, 200),
            True,
        ),
        (
            asked(100, None, DATED),
            answer(200, "Content-Length: 200", f"Last-Modified: {TUESDAY}"),
            Validator(None, TUESDAY, 200),
            True,
        ),
        (asked(100, None, None), answer(200, "Content-Length: 200"), Validator(size=200), False),
        # a login page in place of the file
        (asked(100, None, PINNED), answer(200, "Content-Length: 37", "Content-Type: text/html"), Validator(size=37), True),
        (asked(0, 100, PINNED), answer(200, "Content-Length: 37", "Content-Type: text/html"), Validator(size=37), True),
        (asked(100, None, PINNED), answer(200, "Transfer-Encoding: chunked", "Content-Type: text/html"), Validator(), True),
        # the length contradicts what is pinned, also where nothing was written yet
        (asked(0, None, PINNED), answer(200, "Content-Length: 199", 'ETag: "a"'), Validator('"a"', None, 199), True),
        (asked(0, None, Validator(size=200)), answer(200, "Content-Length: 199"), Validator(size=199), True),
        # If-Range ignored: a part of the new version
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-199/200", 'ETag: "b"'),
            Validator('"b"', None, 200),
            True,
        ),
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-299/300", 'ETag: "a"'),
            Validator('"a"', None, 300),
            True,
        ),
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-149/150", 'ETag: "a"'),
            Validator('"a"', None, 150),
            True,
        ),
        (
            asked(100, None, DATED),
            answer(206, "Content-Range: bytes 100-199/200", f"Last-Modified: {TUESDAY}"),
            Validator(None, TUESDAY, 200),
            True,
        ),
        # the validator disappeared, or was never strong
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-199/200"), Validator(size=200), True),
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-199/200", f"Last-Modified: {MONDAY}"),
            Validator(None, MONDAY, 200),
            True,
        ),
        (asked(100, None, DATED), answer(206, "Content-Range: bytes 100-199/200"), Validator(size=200), True),
        (
            asked(100, None, Validator('W/"a"', None, 200)),
            answer(206, "Content-Range: bytes 100-199/200", 'ETag: W/"a"'),
            Validator('W/"a"', None, 200),
            False,
        ),
        (
            asked(100, None, None),
            answer(206, "Content-Range: bytes 100-199/200", 'ETag: "a"'),
            Validator('"a"', None, 200),
            False,
        ),
        (asked(0, 100, PINNED), answer(206, "Content-Range: bytes 0-99/200", 'ETag: "b"'), Validator('"b"', None, 200), True),
        # `*` proves no size
        (
            asked(100, None, DATED),
            answer(206, "Content-Range: bytes 100-199/*", f"Last-Modified: {MONDAY}"),
            Validator(None, MONDAY, None),
            True,
        ),
        (
            asked(100, None, Validator('"a"')),
            answer(206, "Content-Range: bytes 100-199/*", 'ETag: "a"'),
            Validator('"a"'),
            False,
        ),
        # 416 on anything but a complete file
        (asked(100, None, PINNED), answer(416, "Content-Range: bytes */100"), None, True),
        (asked(200, None, PINNED), answer(416, "Content-Range: bytes */300"), None, True),
        (asked(200, None, PINNED), answer(416, "Content-Range: bytes */200", 'ETag: "b"'), None, True),
        (asked(250, None, PINNED), answer(416, "Content-Range: bytes */200"), None, True),
        (asked(200, None, PINNED), answer(416), None, True),
        (asked(200, None, PINNED), answer(416, "Content-Range: nonsense"), None, True),
        (asked(200, None, PINNED), answer(416, "Content-Range: bytes 0-99/200"), None, True),
        (asked(100, None, Validator('"a"')), answer(416, "Content-Range: bytes */100"), None, True),
        (asked(0, 100, PINNED), answer(416, "Content-Range: bytes */0"), None, True),
        (asked(100, None, None), answer(416, "Content-Range: bytes */100"), None, True),
        # 412
        (asked(100, None, PINNED), answer(412), None, True),
        (asked(0, None, PINNED), answer(412), None, True),
    ],
)
def test_what_is_not_proved_to_be_the_same_version_restarts_the_file(
    question: Asked, reply: Answer, validator: Validator | None, changed: bool
) -> None:
    verdict = judge(question, reply)
    assert isinstance(verdict, Restart)
    assert (verdict.validator, verdict.changed) == (validator, changed)
    assert verdict.reason


SAID = "sha-256=:" + base64.b64encode(bytes(32)).decode() + ":"
OTHER = "sha-256=:" + base64.b64encode(bytes(31) + b"x").decode() + ":"
OF_SAID = Digests(sha256=bytes(32).hex())


@pytest.mark.parametrize("pinned", [PINNED, DATED, Validator('W/"a"', MONDAY, 200)], ids=["ETag", "date", "weak"])
def test_another_digest_is_another_version_whatever_the_validators_say(pinned: Validator) -> None:
    question = asked(100, None, replace(pinned, digests=OF_SAID))
    lines = ["Content-Range: bytes 100-199/200", f"Last-Modified: {MONDAY}", *([f"ETag: {pinned.etag}"] if pinned.etag else [])]
    for status, more in ((206, lines), (200, ["Content-Length: 200", *lines[1:]])):
        other = judge(question, answer(status, *more, f"Repr-Digest: {OTHER}"))
        assert isinstance(other, Restart)
        assert other.changed
    assert isinstance(judge(question, answer(206, *lines, f"Repr-Digest: {SAID}")), Accept)
    assert isinstance(judge(question, answer(206, *lines)), Accept), "it need not be told again"


def test_the_same_digest_proves_the_same_version_though_its_date_is_another() -> None:
    question = asked(100, None, replace(DATED, digests=OF_SAID))
    reply = answer(206, "Content-Range: bytes 100-199/200", f"Last-Modified: {TUESDAY}", f"Repr-Digest: {SAID}")
    assert isinstance(judge(question, reply), Accept)


# -- the decision table: complete, redirect, challenge


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (asked(200, None, PINNED), answer(416, "Content-Range: bytes */200")),
        (asked(200, None, PINNED), answer(416, "Content-Range: bytes */200", 'ETag: "a"')),
        (asked(200, None, DATED), answer(416, "Content-Range: bytes */200", "Content-Length: 37")),
        (asked(200, None, Validator('"a"')), answer(416, "Content-Range: bytes */200", 'ETag: "a"')),
        (asked(0, 100), answer(416, "Content-Range: bytes */0")),
        (asked(0, 100, Validator('"a"', None, 0)), answer(416, "Content-Range: bytes */0")),
    ],
)
def test_416_where_the_pinned_file_ends_means_complete(question: Asked, reply: Answer) -> None:
    assert judge(question, reply) == Complete(question.start)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_name_an_absolute_place_and_flag_the_loss_of_tls(status: int) -> None:
    question = asked(100, None, PINNED)
    assert judge(question, answer(status, "Location: ../other?x=%2F#f")) == Redirect("https://files.example/other?x=%2F")
    assert judge(question, answer(status, "Location: http://mirror.example/b")) == Redirect("http://mirror.example/b", downgrade=True)
    assert judge(question, answer(status, "Location: /b", "Location: /b")) == Redirect("https://files.example/b")


@pytest.mark.parametrize("status", [401, 407])
def test_a_challenge_names_its_seat(status: int) -> None:
    assert judge(asked(100, None, PINNED), answer(status, "Content-Length: 37")) == Challenged(status)


# -- the decision table: refuse


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        # 206 that is not what was asked
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 0-199/200", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 101-199/200", 'ETag: "a"')),
        (asked(100, 150, PINNED), answer(206, "Content-Range: bytes 100-150/200", 'ETag: "a"')),
        (asked(100, 150, PINNED), answer(206, "Content-Range: bytes 100-299/*", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-200/*", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-199/200", "Content-Length: 99", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-199/200", "Content-Length: 101", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Length: 100", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes */200", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-250/200", 'ETag: "a"')),
        (asked(100, None, PINNED), answer(206, "Content-Range: lines 100-199/200", 'ETag: "a"')),
        (
            asked(100, None, PINNED),
            answer(206, "Content-Range: bytes 100-199/200", "Content-Range: bytes 100-149/200", 'ETag: "a"'),
        ),
        (asked(100, None, PINNED), answer(206, "Content-Type: multipart/byteranges; boundary=x", 'ETag: "a"')),
        (
            asked(100, None, PINNED),
            answer(206, "Content-Type: Multipart/ByteRanges", "Content-Range: bytes 100-199/200", 'ETag: "a"'),
        ),
        # encoded in spite of identity
        (asked(), answer(200, "Content-Length: 37", "Content-Encoding: gzip")),
        (asked(), answer(200, "Content-Length: 37", "Content-Encoding: identity, br")),
        (asked(), answer(200, "Content-Length: 37", "Content-Encoding: identity", "Content-Encoding: x-gzip")),
        (asked(100, None, PINNED), answer(206, "Content-Range: bytes 100-199/200", 'ETag: "a"', "Content-Encoding: deflate")),
        # a part sent as the whole
        (asked(), answer(200, "Content-Length: 100", "Content-Range: bytes 0-99/200")),
        (asked(), answer(200, "Content-Length: 100", "Content-Range: bytes 100-199/200")),
        # no file in it
        (asked(), answer(204)),
        (asked(), answer(205)),
        (asked(), answer(201, "Content-Length: 0")),
        (asked(), answer(203, "Content-Length: 200")),
        (asked(), answer(207)),
        (asked(), answer(226)),
        (asked(), answer(100)),
        (asked(), answer(101)),
        (asked(), answer(199)),
        (asked(), answer(0)),
        (asked(), answer(600)),
        (asked(), answer(999)),
    ],
)
def test_an_answer_that_breaks_the_rules_is_refused_for_good(question: Asked, reply: Answer) -> None:
    error = refused(judge(question, reply))
    assert (error.code, error.context) == (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorContext.REMOTE_FILE)
    assert not error.transient
    assert error.http_status == reply.status
    assert "secret" not in str(error)


FRAMINGS = [
    ("Content-Length: 200", "Content-Length: 201"),
    ("Content-Length: 200", "Content-Length: 200"),
    ("Content-Length: 200, 200",),
    ("Content-Length: 200", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: gzip, chunked",),
    ("Transfer-Encoding: identity",),
    ("Content-Length: -1",),
    ("Content-Length: +200",),
    ("Content-Length: 0x10",),
    ("Content-Length: 2e2",),
    ("Content-Length: \u0662",),
    ("Content-Length: ",),
    ("Content-Length: " + "9" * 30,),
]


@pytest.mark.parametrize("lines", FRAMINGS)
@pytest.mark.parametrize("status", [200, 206, 302, 401, 404, 407, 416, 503])
def test_t26_framing_told_twice_or_wrongly_ends_the_answer_whatever_it_is(status: int, lines: tuple[str, ...]) -> None:
    error = refused(judge(asked(), answer(status, "Location: /b", "Content-Range: bytes 0-199/200", *lines)))
    assert error.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
    assert error.context is (ErrorContext.GENERAL_TRANSPORT if status == 407 else ErrorContext.REMOTE_FILE)


def test_a_file_whose_end_only_the_closing_connection_tells_is_refused() -> None:
    assert refused(judge(asked(), answer(200))).code == ErrorCode.BG_E_MISSING_FILE_SIZE


def test_a_part_of_a_file_of_untold_size_is_refused() -> None:
    error = refused(judge(asked(0, 100), answer(206, "Content-Range: bytes 0-99/*")))
    assert error.code == ErrorCode.BG_E_MISSING_FILE_SIZE


@pytest.mark.parametrize("lines", [(), *((f"Location: {location}",) for location in BAD_LOCATIONS), ("Location: /a", "Location: /b")])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_nowhere_is_refused(status: int, lines: tuple[str, ...]) -> None:
    error = refused(judge(asked(), answer(status, *lines)))
    assert error.code in (ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED, ErrorCode.BG_E_INVALID_SERVER_RESPONSE)
    assert not error.transient
    assert error.http_status == status


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        (202, True),
        (300, False),
        (304, False),
        (305, False),
        (306, True),
        (310, True),
        (400, False),
        (402, False),
        (403, False),
        (404, False),
        (405, False),
        (408, True),
        (409, True),
        (410, False),
        (412, False),
        (416, False),
        (429, True),
        (451, False),
        (500, True),
        (501, False),
        (502, True),
        (503, True),
        (504, True),
        (505, False),
        (599, True),
    ],
)
def test_other_answers_are_errors_that_bits_table_calls_transient_or_not(status: int, transient: bool) -> None:
    error = refused(judge(asked(), answer(status)))
    assert error.code == HTTP_ERROR | status
    assert error.context is ErrorContext.REMOTE_FILE
    assert error.transient is transient
    assert error.http_status == status


def test_416_to_a_fresh_question_is_an_error_and_no_loop() -> None:
    assert refused(judge(asked(0, 100), answer(416, "Content-Range: bytes */50"))).code == HTTP_ERROR | 416


def test_the_reason_phrase_of_a_server_is_shown_without_control_characters() -> None:
    error = refused(judge(asked(), Answer(404, HeaderFields(), "No\x1b[31mt Found\r\n")))
    assert "\x1b" not in str(error)
    assert "Found" in str(error)


def refused(verdict: Verdict) -> BitsError:
    assert isinstance(verdict, Refuse)
    assert not isinstance(verdict.error, AuthFailed)
    return verdict.error


# -- Retry-After

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def http(date: datetime) -> str:
    return format_datetime(date, usegmt=True)


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        (("Retry-After: 120",), 120),
        (("Retry-After: 0",), 0),
        (("Retry-After:  5 ",), 5),
        ((f"Retry-After: {http(NOON + timedelta(seconds=90))}",), 90),
        ((f"Retry-After: {http(NOON - timedelta(seconds=90))}",), 0),
        # the server's clock is an hour ahead of ours
        ((f"Retry-After: {http(NOON + timedelta(seconds=3690))}", f"Date: {http(NOON + timedelta(hours=1))}"), 90),
        (("Retry-After: 999999999999",), MAX_RETRY_AFTER),
        ((f"Retry-After: {http(NOON + timedelta(days=400))}",), MAX_RETRY_AFTER),
        (("Retry-After: " + "9" * 400,), None),
        (("Retry-After: -5",), None),
        (("Retry-After: soon",), None),
        (("Retry-After: 5", "Retry-After: 6"), None),
        ((), None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when_to_come_again(status: int, lines: tuple[str, ...], seconds: float | None) -> None:
    assert refused(judge(asked(), answer(status, *lines), now=NOON.timestamp())).retry_after == seconds


def test_a_date_without_any_clock_to_compare_it_with_says_nothing() -> None:
    assert retry_after(HeaderFields([("Retry-After", http(NOON))])) is None


def test_only_429_and_503_say_when_to_come_again() -> None:
    assert refused(judge(asked(), answer(500, "Retry-After: 5"))).retry_after is None


# -- what pins the version


@pytest.mark.parametrize(
    ("lines", "validator"),
    [
        (('ETag: "a"', f"Last-Modified: {MONDAY}"), Validator('"a"', MONDAY, 5)),
        (('ETag: W/"a"', f"Last-Modified: {MONDAY}"), Validator('W/"a"', MONDAY, 5)),
        (('ETag: "a"', 'ETag: "b"'), Validator(None, None, 5)),
        ((f"Last-Modified: {MONDAY}", f"Last-Modified: {TUESDAY}"), Validator(None, None, 5)),
        (("ETag: unquoted", "Last-Modified: 0"), Validator(None, None, 5)),
        (('ETag: ""',), Validator(None, None, 5)),
        (('ETag: "' + "a" * 2000 + '"',), Validator(None, None, 5)),
        (('ETag: "\udce4"',), Validator(None, None, 5)),
        # a date as fresh as the answer: the file may be written again within that second (RFC 9110, 8.8.2.2)
        ((f"Last-Modified: {MONDAY}", f"Date: {MONDAY}"), Validator(None, None, 5)),
        (('ETag: W/"a"', f"Last-Modified: {MONDAY}", f"Date: {MONDAY}"), Validator('W/"a"', None, 5)),
        (('ETag: "a"', f"Last-Modified: {MONDAY}", f"Date: {MONDAY}"), Validator('"a"', MONDAY, 5)),
        ((f"Last-Modified: {MONDAY}", "Date: Mon, 02 Nov 2026 10:00:01 GMT"), Validator(None, MONDAY, 5)),
        ((f"Last-Modified: {MONDAY}", "Date: Mon, 02 Nov 2026 09:59:30 GMT"), Validator(None, None, 5)),  # clock skew
        ((f"Last-Modified: {TUESDAY}", f"Date: {MONDAY}"), Validator(None, TUESDAY, 5)),  # set by somebody, not by a clock
        ((f"Last-Modified: {MONDAY}", "Date: now"), Validator(None, MONDAY, 5)),
    ],
)
def test_only_sound_fields_pin_a_version(lines: tuple[str, ...], validator: Validator) -> None:
    assert validator_of(answer(200, *lines).headers, 5) == validator


def test_header_names_are_found_in_any_case_and_repeats_are_kept() -> None:
    fields = HeaderFields([("X-A", "1"), ("x-a", "2")])
    assert (fields.get("X-a"), fields.get("b")) == ("1", None)
    assert (fields.getall("x-A", []), fields.getall("b", ["no"])) == (["1", "2"], ["no"])


def test_the_headers_of_aiohttp_are_judged_as_they_are() -> None:
    headers: Headers = CIMultiDictProxy(CIMultiDict([("content-length", "5"), ("ETAG", '"a"')]))
    assert judge(asked(), Answer(200, headers)) == Accept(0, 5, 5, Validator('"a"', None, 5), ranged=False)


def test_control_flow_carries_what_the_engine_needs() -> None:
    change = FileChanged(PINNED, "changed", changed=False)
    assert (change.validator, change.reason, str(change), change.changed) == (PINNED, "changed", "changed", False)
    assert AlreadyComplete(5).total == 5
    assert not isinstance(change, BitsError)


# -- whatever a peer sends

LINES = st.sampled_from(
    [
        "Content-Length: 200",
        "Content-Length: 100",
        "Content-Length: 37",
        "Transfer-Encoding: chunked",
        'ETag: "a"',
        'ETag: "b"',
        'ETag: W/"a"',
        f"Last-Modified: {MONDAY}",
        f"Last-Modified: {TUESDAY}",
        f"Date: {MONDAY}",
        "Content-Range: bytes 100-199/200",
        "Content-Range: bytes 100-149/200",
        "Content-Range: bytes 0-199/200",
        "Content-Range: bytes 100-199/*",
        "Content-Range: bytes */100",
        "Content-Range: bytes */200",
        "Content-Type: multipart/byteranges",
        "Content-Encoding: gzip",
        "Location: http://other/",
        "Retry-After: 5",
    ]
)
QUESTIONS = st.builds(
    asked,
    st.sampled_from([0, 100, 200]),
    st.sampled_from([None, 250, 300]),
    st.sampled_from([None, PINNED, DATED, Validator('"a"'), Validator('W/"a"', None, 200), Validator(size=200)]),
)


@given(
    QUESTIONS,
    st.sampled_from([200, 206, 416, 412, 302, 401, 404, 503, 204, 100, 304]) | st.integers(),
    st.lists(LINES, max_size=6),
)
@settings(max_examples=500)
def test_the_judge_accepts_only_proved_bytes_and_restarts_only_what_was_begun(question: Asked, status: int, lines: list[str]) -> None:
    reply = answer(status, *lines)
    verdict = judge(question, reply)
    match verdict:
        case Accept():
            assert verdict.start == question.start
            assert verdict.ranged is (status == 206)
            assert verdict.length is None or verdict.total is None or verdict.start + verdict.length <= verdict.total
            if question.start > 0:
                assert verdict.ranged
                assert question.pinned is not None
                assert question.pinned.agrees(verdict.validator)
        case Restart():
            assert question.start > 0 or question.pinned is not None
        case Complete():
            assert verdict.total == question.start
        case Refuse():
            assert verdict.error.url == "https://files.example/big.iso?…"


# -- the whole loop: a careless server, a client that follows the judge


@dataclass
class CarelessServer:
    """Serves several versions of one file; honours ranges and If-Range, and tells its validators, when the schedule says so."""

    versions: list[bytes]
    etags: bool
    dates: bool
    served: set[bytes] = field(default_factory=set)

    def headers(self, number: int) -> list[tuple[str, str]]:
        fields = [("Date", http(NOON))]
        if self.etags:
            fields.append(("ETag", f'"v{number}"'))
        if self.dates:
            fields.append(("Last-Modified", http(NOON - timedelta(hours=10 - number))))
        return fields

    def get(self, asked: Asked, number: int, *, ranges: bool, if_range: bool, forget: bool, chunked: bool) -> tuple[Answer, bytes]:
        content = self.versions[number]
        self.served.add(content)
        fields, wanted = self.headers(number), asked.headers()
        names = {f'"v{number}"', http(NOON - timedelta(hours=10 - number))}
        part = "Range" in wanted and ranges and not (if_range and "If-Range" in wanted and wanted["If-Range"] not in names)
        if forget:
            fields = fields[:1]
        if part and asked.start >= len(content):
            return Answer(416, HeaderFields([*fields[:1], ("Content-Range", f"bytes */{len(content)}")])), b""
        start, end = (asked.start, min(asked.end or len(content), len(content))) if part else (0, len(content))
        if part:
            fields.append(("Content-Range", f"bytes {start}-{end - 1}/{len(content)}"))
        fields.append(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(end - start)))
        return Answer(206 if part else 200, HeaderFields(fields)), content[start:end]


@given(st.data(), st.booleans(), st.booleans(), st.lists(st.binary(max_size=12), min_size=1, max_size=4, unique=True))
@settings(max_examples=400)
def test_the_file_is_one_version_that_was_served_or_absent(data: st.DataObject, etags: bool, dates: bool, versions: list[bytes]) -> None:
    server = CarelessServer(versions, etags, dates)
    local, piece, pinned, number = bytearray(), Slice.fresh(), None, 0
    for _ in range(12):
        number = data.draw(st.integers(number, len(versions) - 1), "version")
        flags = {name: data.draw(st.booleans(), name) for name in ("ranges", "if_range", "forget", "chunked")}
        question = Asked(URL, piece.written, None, pinned)
        reply, body = server.get(question, number, **flags)
        match judge(question, reply):
            case Accept() as accepted:
                pinned = accepted.validator
                if accepted.total is not None:
                    piece.end = accepted.total
                received = body[: data.draw(st.integers(0, len(body)), "cut")]
                assert accepted.start == len(local)
                local += received
                piece.advance(len(received))
                if received == body and (piece.done or accepted.total is None):
                    assert bytes(local) in server.served
                    return
                if not pinned.resumable:
                    local, piece = bytearray(), Slice.fresh()
            case Complete():
                assert bytes(local) in server.served
                return
            case Restart():
                local, piece, pinned = bytearray(), Slice.fresh(), None
            case verdict:
                assert isinstance(verdict, Refuse)
                return


def test_a_login_page_that_pins_nothing_is_taken_only_after_everything_before_it_was_dropped() -> None:
    page = answer(200, "Content-Length: 37", "Content-Type: text/html")
    assert isinstance(judge(asked(100, None, PINNED), page), Restart)
    assert isinstance(judge(asked(), page), Accept)


# -- parts that are wanted by themselves, and files that are made when they are asked for


def part(start: int = 0, end: int | None = None, pinned: Validator | None = None) -> Asked:
    return Asked(URL, start, end, pinned, part=True)


SECOND = answer(206, "Content-Range: bytes 100-149/200", "Content-Length: 50", 'ETag: "a"')


def test_a_part_begins_anywhere_while_no_version_is_pinned_and_says_which_it_is_of() -> None:
    assert judge(part(100, 150), SECOND) == Accept(100, 50, 200, Validator('"a"', None, 200), True)
    assert isinstance(judge(asked(100, 150), SECOND), Restart), "the rest of a file is another matter"
    unpinned = answer(206, "Content-Range: bytes 100-149/200", "Content-Length: 50")
    assert judge(part(100, 150), unpinned) == Accept(100, 50, 200, Validator(None, None, 200), True)


def test_a_later_part_is_of_the_pinned_version() -> None:
    assert judge(part(100, 150, PINNED), SECOND) == Accept(100, 50, 200, Validator('"a"', MONDAY, 200), True)
    other = answer(206, "Content-Range: bytes 0-49/200", "Content-Length: 50", 'ETag: "b"')
    verdict = judge(part(0, 50, PINNED), other)
    assert isinstance(verdict, Restart)
    assert verdict.changed


@pytest.mark.parametrize(
    "question", [part(100, 150), part(0, 50), part(0, 50, PINNED), replace(part(100, None, PINNED), condition=Condition.NONE)]
)
def test_the_whole_file_in_place_of_a_part_is_a_server_without_ranges(question: Asked) -> None:
    verdict = judge(question, answer(200, "Content-Length: 200", 'ETag: "a"'))
    assert isinstance(verdict, Refuse)
    assert verdict.error.code == ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT
    assert not verdict.error.transient


def test_a_part_that_is_the_whole_file_may_come_as_such() -> None:
    whole = answer(200, "Content-Length: 200", 'ETag: "a"')
    for question in (part(), part(0, 200)):
        assert judge(question, whole) == Accept(0, 200, 200, Validator('"a"', None, 200), False)


def test_another_version_in_place_of_a_part_restarts_the_file() -> None:
    verdict = judge(part(100, 150, PINNED), answer(200, "Content-Length: 200", 'ETag: "b"'))
    assert isinstance(verdict, Restart)
    assert verdict.changed


def test_a_part_beyond_the_end_is_an_invalid_range_and_never_a_complete_file() -> None:
    verdict = judge(part(200), answer(416, "Content-Range: bytes */200"))
    assert isinstance(verdict, Refuse)
    assert verdict.error.code == ErrorCode.BG_E_INVALID_RANGE
    assert isinstance(verdict.error, RemoteFileError)
    assert isinstance(judge(part(200, None, PINNED), answer(416, "Content-Range: bytes */200")), Restart)


def test_412_to_a_part_of_any_version_is_an_error_and_no_loop() -> None:
    assert isinstance(judge(part(100, 150), answer(412)), Refuse)
    assert isinstance(judge(part(100, 150, PINNED), answer(412)), Restart)


def test_a_part_of_a_file_whose_size_is_not_told_is_refused() -> None:
    verdict = judge(part(100, 150), answer(206, "Content-Range: bytes 100-149/*", "Content-Length: 50", 'ETag: "a"'))
    assert isinstance(verdict, Refuse)
    assert verdict.error.code == ErrorCode.BG_E_MISSING_FILE_SIZE


def test_dynamic_content_may_end_with_its_connection() -> None:
    assert judge(Asked(URL, dynamic=True), answer(200)) == Accept(0, None, None, Validator(), False)


# -- a server that does not heed the condition, and one that is not there


@pytest.mark.parametrize(
    ("pinned", "conditions"),
    [(PINNED, ['"a"', MONDAY, None]), (replace(PINNED, last_modified=None), ['"a"', None]), (DATED, [MONDAY, None])],
)
def test_a_whole_file_that_has_not_changed_is_asked_for_by_weaker_conditions(pinned: Validator, conditions: list[str | None]) -> None:
    fields = [*([f"ETag: {pinned.etag}"] if pinned.etag else []), *([f"Last-Modified: {MONDAY}"] if pinned.last_modified else [])]
    condition: Condition | None = Condition.VERSION
    for expected in conditions:
        assert condition is not None
        question = replace(asked(100, None, pinned), condition=condition)
        assert question.headers().get("If-Range") == expected
        verdict = judge(question, answer(200, "Content-Length: 200", *fields))
        assert isinstance(verdict, Restart)
        assert not verdict.changed
        condition = condition.weaker(pinned)
        assert verdict.same is (condition is not None)
    assert condition is None


def test_a_server_that_says_it_knows_no_ranges_is_not_asked_for_some_again() -> None:
    verdict = judge(asked(100, None, PINNED), answer(200, "Content-Length: 200", 'ETag: "a"', "Accept-Ranges: none"))
    assert isinstance(verdict, Restart)
    assert not verdict.same


def test_an_etag_made_of_a_fresh_date_and_the_size_is_as_weak_as_these() -> None:
    def found(etag: str, date: str) -> Validator:
        return validator_of(HeaderFields([("ETag", etag), ("Last-Modified", "Thu, 01 Jan 1970 00:04:16 GMT"), ("Date", date)]), 0x200)

    fresh, later = "Thu, 01 Jan 1970 00:04:16 GMT", "Thu, 01 Jan 1970 00:04:17 GMT"
    assert found('"100-200"', fresh) == Validator('W/"100-200"', None, 0x200)
    assert found('"100-200"', later).strong == '"100-200"'
    assert found('"100-201"', fresh).strong == '"100-201"', "made of something else"


FILE = replace(PINNED, media_type="application/octet-stream")
PAGE = "Content-Type: text/html; charset=utf-8"


@pytest.mark.parametrize("lines", [(PAGE,), (PAGE, 'ETag: "page"'), ("Content-Type: Application/XHTML+XML", "Content-Length: 10")])
@pytest.mark.parametrize("start", [0, 100])
def test_a_web_page_in_place_of_a_file_that_was_none_is_no_version_of_it(lines: tuple[str, ...], start: int) -> None:
    verdict = judge(asked(start, None, FILE), answer(200, *lines))
    assert isinstance(verdict, Refuse)
    assert verdict.error.transient


@pytest.mark.parametrize(
    ("pinned", "lines"),
    [
        (replace(PINNED, media_type="text/html"), (PAGE, 'ETag: "b"')),
        (PINNED, (PAGE, 'ETag: "b"')),  # nobody knows what it was
        (FILE, (PAGE, 'ETag: "a"', f"Last-Modified: {MONDAY}")),  # the same version under another name
        (FILE, ("Content-Type: text/plain", 'ETag: "b"')),
        (FILE, ('ETag: "b"',)),
    ],
)
def test_other_changes_of_the_type_are_changes_of_the_file_or_none(pinned: Validator, lines: tuple[str, ...]) -> None:
    assert isinstance(judge(asked(100, None, pinned), answer(200, "Content-Length: 200", *lines)), Restart)
