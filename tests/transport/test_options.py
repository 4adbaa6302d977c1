"""Rules of a job's HTTP options: what may be a custom header, a method, a set of flags."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.auth.policy import Origin
from bits_async.errors import BitsError, ErrorCode, InvalidArgument
from bits_async.transport.options import (
    MAX_CUSTOM_HEADERS,
    ClientCertificate,
    HttpOptions,
    SecurityFlags,
    checked_flags,
    checked_headers,
    checked_method,
    headers_of_text,
    headers_text,
)

HERE, THERE = Origin("https", "here", 443), Origin("https", "there", 443)
SECRET = "s3cret-value"


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        ("X-A: 1", (("X-A", "1"),)),
        ("X-A: 1\r\n", (("X-A", "1"),)),
        ("X-A:1\r\nX-B:  two words \r\n", (("X-A", "1"), ("X-B", "two words"))),
        ([("X-A", "1"), ("X-A", "2"), ("Empty", "")], (("X-A", "1"), ("X-A", "2"), ("Empty", ""))),
        ("User-Agent: mine/1.0: yes", (("User-Agent", "mine/1.0: yes"),)),
    ],
)
def test_headers_come_as_pairs_or_as_lines(given_, expected):
    assert checked_headers(given_) == expected


FORBIDDEN = """
Host Content-Length Transfer-Encoding TE Trailer Upgrade Expect Connection Proxy-Authorization Proxy-Connection PROXY-anything Keep-Alive
Authorization Cookie Range If-Range If-Match if-none-match If-Modified-Since If-Unmodified-Since Accept-Encoding
"""


@pytest.mark.parametrize("name", FORBIDDEN.split())
@pytest.mark.parametrize("change", [str, str.lower, str.upper])
def test_t23_headers_of_the_connection_and_of_the_engine_are_refused(name, change):
    for form in ([(change(name), SECRET)], f"X-Ok: 1\r\n{change(name)}: {SECRET}"):
        with pytest.raises(InvalidArgument) as caught:
            checked_headers(form)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "X A", "X:A", "X\r\nHost", "X\x00", "Xé", "Host ", " Host", "\tHost", "Host\x0b", "(x)", "a/b"])
def test_t23_names_are_tokens(name):
    with pytest.raises(InvalidArgument):
        checked_headers([(name, SECRET)])


@pytest.mark.parametrize("value", ["a\r\nHost: evil", "a\nb", "a\rb", "a\x00b", "a\tb", "a\x7fb", "a\x85b", "é", "\udc80", "a\r\n b"])
def test_t23_values_have_no_control_characters(value):
    with pytest.raises(InvalidArgument) as caught:
        checked_headers([("X-A", SECRET + value)])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["X-A: 1\nX-B: 2", "X-A: 1\r\n\r\nGET /evil", "X-A: 1\r\n folded", "\r\nX-A: 1", "X-A: 1\r\n\r\n", "nothing"]
)
def test_t23_lines_end_with_crlf_only_and_hold_a_header_each(text):
    with pytest.raises(InvalidArgument):
        checked_headers(text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_t23_whatever_is_let_through_is_one_line_that_says_what_it_said(name, value):
    try:
        headers = checked_headers([(name, value)])
    except InvalidArgument:
        return
    line = headers_text(headers)
    assert line.isprintable()
    assert line.isascii()
    assert line == f"{name}: {value.strip(' ')}"
    assert headers_of_text(line) == headers


@pytest.mark.parametrize("form", [lambda n: [("X", "v" * n)], lambda n: f"X: {'v' * n}"])
def test_headers_have_at_most_16384_characters_with_the_nul(form):
    most = MAX_CUSTOM_HEADERS - len("X: ") - 1
    checked_headers(form(most))
    with pytest.raises(InvalidArgument) as caught:
        checked_headers(form(most + 1))
    assert caught.value.code == ErrorCode.BG_E_STRING_TOO_LONG


@pytest.mark.parametrize("given_", [[("X",)], [("X", 1)], [(b"X", b"1")], [("X", "1", "2")], {"XY": "1"}, ["XY"], b"X: 1", 5])
def test_headers_are_pairs_of_text(given_):
    with pytest.raises(InvalidArgument):
        checked_headers(given_)


def test_t19_headers_go_to_the_origins_they_were_bound_to_first():
    options = HttpOptions(headers=(("X", "1"),))
    assert options.headers_for(HERE) == ()
    bound = options.bound([HERE])
    assert bound.headers_for(HERE) == (("X", "1"),)
    assert bound.headers_for(THERE) == ()
    assert bound.bound([THERE]) == bound
    certified = replace(bound, client_certificate=ClientCertificate(source=Path("/me.pem")))
    assert certified.bound([THERE]).certificate_origins == {THERE}
    assert certified.bound([THERE]).bound([HERE]) == certified.bound([THERE]), "and so is a client certificate"
    assert HttpOptions().bound([HERE]).header_origins is None, "headers that are set later are bound then"


def test_t14_headers_are_not_in_a_repr():
    assert SECRET not in repr(HttpOptions(headers=(("X", SECRET),)))


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "REPORT", "M-SEARCH", "X!#$"])
def test_methods_are_tokens_in_capitals(method):
    assert checked_method(method) == method


@pytest.mark.parametrize(
    "method", ["", "get", "Post", "GET /", "GET\r\n", "POST ", "PÖST", "CONNECT", "HEAD", "TRACE", "OPTIONS", "X" * 65, None, 1]
)
def test_t23_other_methods_are_refused(method):
    with pytest.raises(InvalidArgument):
        checked_method(method)


@pytest.mark.parametrize(
    ("method", "status", "after"),
    [
        *(("GET", status, "GET") for status in (301, 302, 303, 307, 308)),
        *(("POST", status, "GET") for status in (301, 302, 303)),
        *(("POST", status, "POST") for status in (307, 308)),
        *(("REPORT", status, "REPORT") for status in (301, 302, 307, 308)),
        ("REPORT", 303, "GET"),
    ],
)
def test_a_redirect_says_what_method_goes_on(method, status, after):
    assert HttpOptions(method=method).after_redirect(status).method == after


F = SecurityFlags


def test_the_numbers_of_the_flags_are_those_of_bits():
    numbers = [flag.value for flag in F]
    assert numbers == [0x1, 0x2, 0x4, 0x8, 0x10, 0x100, 0x200, 0x800]
    assert F.HTTP_REDIRECT_POLICY_ALLOW_SILENT.value == 0


@pytest.mark.parametrize(
    "flags",
    [
        F.HTTP_REDIRECT_POLICY_ALLOW_REPORT | F.HTTP_REDIRECT_POLICY_DISALLOW,
        F.SSL_IGNORE_CERT_WRONG_USAGE,
        F.SSL_ENABLE_CRL_CHECK | F.SSL_IGNORE_UNKNOWN_CA,
    ],
)
def test_flags_that_cannot_be_followed_are_not_implemented(flags):
    with pytest.raises(BitsError) as caught:
        checked_flags(flags)
    assert caught.value.code == ErrorCode.E_NOTIMPL


@pytest.mark.parametrize("flags", [0, 0x200, None, "x"])
def test_flags_are_security_flags(flags):
    with pytest.raises(InvalidArgument):
        checked_flags(flags)


def test_flags_that_can_be_followed_pass():
    for flags in (F(0), F.SSL_IGNORE_CERT_CN_INVALID, F.SSL_IGNORE_CERT_WRONG_USAGE | F.SSL_IGNORE_UNKNOWN_CA, F.SSL_ENABLE_CRL_CHECK):
        assert checked_flags(flags) is flags
