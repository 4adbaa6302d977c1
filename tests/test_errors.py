import errno
import pickle
import ssl
from pathlib import Path
from uuid import uuid4

import pytest

from bits_async import errors
from bits_async.errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    class_of,
    error_from_network,
    error_from_os,
    error_from_status,
    make_error,
)

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BitsError) and value is not BitsError]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_survives_pickling_and_the_journal_with_all_its_fields(kind):
    error = kind("why", job_id=uuid4(), url="http://h/p?signed=1", path=Path("/x"), identity="bob", http_status=5, retry_after=3.0)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.fields() == error.fields()
    fields = error.fields()
    stored = make_error(fields.pop("code"), fields.pop("context"), fields.pop("message"), **fields)
    assert (type(stored), stored.fields()) == (kind, error.fields())


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_says_what_it_is_and_what_to_do_without_arguments(kind):
    error = kind()
    assert error.message
    assert class_of(error.code, error.context) is kind
    assert not isinstance(error, OSError | TimeoutError)


def test_an_error_is_one_line_that_names_code_context_identity_and_place():
    error = errors.LocalFileError("cannot\nwrite \x1b[31m", code=ErrorCode.E_ACCESSDENIED, path="/a\nb", identity="alice")
    text = str(error)
    assert "\n" not in text
    assert "\x1b" not in text
    for part in ("E_ACCESSDENIED (0x80070005, LOCAL_FILE)", "identity alice", "check the permissions"):
        assert part in text


# (status, transient) of "Handling Server Application Errors", with our deviation for 429
STATUSES = [(status, False) for status in (300, 301, 302, 303, 304, 305, 307, 400, 401, 403, 404, 407, 410, 416, 501, 505)]
STATUSES += [(status, True) for status in (306, 308, 408, 409, 429, 500, 502, 503, 504, 599)]


@pytest.mark.parametrize(("status", "transient"), STATUSES)
def test_a_status_is_transient_or_fatal_as_in_bits(status, transient):
    error = error_from_status(status, url="http://h/x?token=abc", reason="No\r\nway", retry_after=7)
    assert error.transient is transient
    assert error.code == 0x80190000 | status
    assert error.http_status == status
    assert error.context is (ErrorContext.GENERAL_TRANSPORT if status == 407 else ErrorContext.REMOTE_FILE)
    assert error.retry_after == (7 if status in (429, 503) else None)
    assert "abc" not in str(error)


@pytest.mark.parametrize(("number", "what"), [(errno.EROFS, "file system writable"), (errno.EDQUOT, "quota")])
def test_an_error_of_the_volume_is_not_blamed_on_permissions_nor_on_the_volumes_size(number: int, what: str) -> None:
    assert what in error_from_os(OSError(number, "text"), path="/data/x", identity="alice").advice


@pytest.mark.parametrize(
    ("number", "code", "transient"),
    [
        (errno.ENOENT, ErrorCode.ERROR_PATH_NOT_FOUND, False),
        (errno.EACCES, ErrorCode.E_ACCESSDENIED, False),
        (errno.ENOSPC, ErrorCode.ERROR_DISK_FULL, True),
        (errno.EISDIR, ErrorCode.ERROR_FILE_EXISTS, False),
        (errno.EIO, ErrorCode.ERROR_WRITE_FAULT, False),
    ],
)
def test_a_failed_file_call_says_which_path_and_which_identity(number, code, transient):
    error = error_from_os(OSError(number, "text"), path="/data/x", identity="alice")
    assert (error.code, error.transient, error.path, error.identity) == (code, transient, Path("/data/x"), "alice")
    assert isinstance(error, errors.LocalFileError)


def test_network_failures_are_told_apart():
    codes = {
        error_from_network(exc, url="http://h/").code
        for exc in (TimeoutError(), ConnectionResetError(), ConnectionRefusedError(errno.ECONNREFUSED, ""), OSError(errno.ENETUNREACH, ""))
    }
    assert codes == {
        ErrorCode.ERROR_WINHTTP_TIMEOUT,
        ErrorCode.BG_E_CONNECTION_CLOSED,
        ErrorCode.BG_E_CONNECT_FAILURE,
        ErrorCode.BG_E_NETWORK_DISCONNECTED,
    }
    refused = ssl.SSLCertVerificationError(1, "x")
    refused.verify_message = "self-signed"
    assert error_from_network(refused, url="https://h/").transient is False


def test_a_server_that_speaks_no_tls_is_not_blamed_for_its_certificate():
    """Somebody wrote https:// and the port of a plain server."""
    failed = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    failed.reason = "WRONG_VERSION_NUMBER"
    error = error_from_network(failed, url="https://h:80/")
    assert "does not speak TLS" in str(error)
    assert "certificate" not in str(error)
    assert "check the port" in error.advice


def test_t14_foreign_exceptions_are_chained_without_what_they_carry():
    class Foreign(Exception):
        pass

    exc = Foreign("Authorization: Basic c2VjcmV0")
    exc.headers = {"Authorization": "c2VjcmV0"}
    kept = errors.scrub(exc)
    assert "c2VjcmV0" not in repr(kept) + str(vars(kept)) + repr(kept.args)
    kept = errors.scrub(ConnectionResetError(104, "reset"))
    assert isinstance(kept, ConnectionResetError)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@h:1/a?b=c#d", "http://h:1/a?…"),
        ("https://h/a", "https://h/a"),
        ("http://h?x", "http://h?…"),
        ("http://h/\x1b[2J", "http://h/\N{REPLACEMENT CHARACTER}[2J"),
        ("http://h:80/@a/b@c", "http://h:80/@a/b@c"),
        ("http://[::1]/@a", "http://[::1]/@a"),
        ("https://u:p@h/@a?b@c", "https://h/@a?…"),
        ("u:p@h/a", "h/a"),
        ("//u:p@h/a", "h/a"),
        ("http:/u:p@h/a", "h/a"),
        ("http://u:p/p@h/a", "http://h/a"),
        ("http://u:p?p@h/a", "http://h/a"),
        ("http://u:p#p@h/a", "http://h/a"),
        (r"http://u:p\p@h/a", "http://h/a"),
        ("h/a?to=http://u:p@x", "x"),
        ("u:p@h/a?to=http://b@x", "x"),
        ("http://u:" + "p" * 3000 + "@h/a", "http://h/a"),
    ],
)
def test_t14_urls_are_shown_without_query_user_or_escape_codes(url, shown):
    assert errors.show_url(url) == shown


@pytest.mark.parametrize("mark", ["\udcff", "\u200f", "\u202e", "\u061c", "\x1b", "\x9b", "\n"])
def test_t14_what_peers_say_can_be_written_to_any_terminal_and_log(mark):
    assert errors.show_text(f"a{mark}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_located_fills_in_only_what_is_missing_and_keeps_the_class():
    error = errors.NetworkError("x", url="http://a/").located(url="http://b/", identity="bob")
    assert (type(error), error.url, error.identity) == (errors.NetworkError, "http://a/", "bob")
