"""What servers and callers say the bytes hash to: which fields are believed, and what they prove."""

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import InvalidArgument
from bits_async.transport.answers import Accept, Answer, Asked, HeaderFields, Restart, judge
from bits_async.transport.digests import MAX_FIELD, Digests, parse_digests, parse_legacy_digests
from bits_async.transport.ranges import Validator

BODY = b"hello"
RAW = hashlib.sha256(BODY).digest()
RAW512 = hashlib.sha512(BODY).digest()
KNOWN = Digests(RAW.hex(), RAW512.hex())


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def field(raw: bytes = RAW, name: str = "sha-256") -> str:
    return f"{name}=:{b64(raw)}:"


OTHER = field(b"\0" * 32)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([field()], Digests(KNOWN.sha256)),
        ([f"{field()}, {field(RAW512, 'sha-512')}"], KNOWN),
        ([field(), field(RAW512, "sha-512")], KNOWN),
        ([f"{field()};note=1"], Digests(KNOWN.sha256)),
        (
            [f"md5=:{b64(b'0' * 16)}:, sha=:{b64(b'0' * 20)}:, unixsum=:AA==:, crc32c=:AAAAAA==:, blake99=:AA==:, {field()}"],
            Digests(KNOWN.sha256),
        ),
        ([f"{OTHER}, {field()}"], Digests(KNOWN.sha256)),  # the last member of a name counts
        ([f"sha-256={b64(RAW)}"], Digests()),  # the older field's writing
        ([field(RAW[:31])], Digests()),
        ([field(RAW, "sha-512")], Digests()),
        (["sha-256=?1"], Digests()),
        (["sha-256=(:AA==: :AA==:)"], Digests()),
        ([f"SHA-256=:{b64(RAW)}:"], Digests()),  # keys are lower case
        (["sha-256=:!!:"], Digests()),
        ([field() + ","], Digests()),
        ([field() + "é"], Digests()),
        ([field() + "," + "x" * MAX_FIELD], Digests()),
        ([], Digests()),
        ([""], Digests()),
    ],
)
def test_a_digest_field_is_a_dictionary_and_what_is_not_understood_says_nothing(lines: list[str], found: Digests) -> None:
    assert parse_digests(lines) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([f"SHA-256={b64(RAW)}"], Digests(KNOWN.sha256)),
        ([f"sha-512={b64(RAW512)},sha-256={b64(RAW)}"], KNOWN),
        ([f"md5={b64(b'0' * 16)}, SHA-256={b64(RAW)}"], Digests(KNOWN.sha256)),
        ([f"UNIXsum=30637,SHA={b64(b'0' * 20)}"], Digests()),
        ([field()], Digests()),
        ([f"SHA-256={b64(RAW)[:-2]}"], Digests()),
        (["SHA-256=" + "A" * MAX_FIELD], Digests()),
        ([""], Digests()),
    ],
)
def test_the_older_field_is_read_as_it_was_written(lines: list[str], found: Digests) -> None:
    assert parse_legacy_digests(lines) == found


@given(st.lists(st.text(max_size=60), max_size=3))
def test_no_text_of_a_server_breaks_the_reading(lines: list[str]) -> None:
    parse_digests(lines), parse_legacy_digests(lines)


def test_one_digest_that_both_know_decides() -> None:
    one, other = Digests("1" * 64), Digests("2" * 64, "3" * 128)
    assert one.contradicts(other)
    assert not one.proves(other)
    assert one.proves(Digests("1" * 64, "3" * 128))
    assert not one.contradicts(Digests(sha512="3" * 128))
    assert not one.proves(Digests(sha512="3" * 128))
    assert one.joined(other) == Digests("1" * 64, "3" * 128)
    assert other.one() == Digests("2" * 64)
    assert Digests(sha512="3" * 128).one() == Digests(sha512="3" * 128)
    assert not Digests().one()


@pytest.mark.parametrize(
    "wrong", [{"sha256": "ab"}, {"sha256": "g" * 64}, {"sha512": "a" * 64}, {"blake3": "a" * 63}, {"sha256": b"a" * 64}, {"blake3": ""}]
)
def test_a_callers_digest_has_the_digits_of_its_algorithm(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(wrong))}= takes"):
        Digests.checked(**wrong)


def test_a_callers_digest_is_taken_in_either_case() -> None:
    assert Digests.checked(sha256="AB" * 32, sha512=None, blake3="CD" * 32) == Digests("ab" * 32, None, "cd" * 32)


# -- judged


def answer(status: int, *fields: str) -> Answer:
    return Answer(status, HeaderFields(tuple(line.split(": ", 1)) for line in fields))  # type: ignore[misc]


PINNED = Validator('"v1"', None, 5, Digests(KNOWN.sha256))
REST = Asked("http://h/f", 2, None, PINNED)
PART = ("Content-Range: bytes 2-4/5", "Content-Length: 3")


@pytest.mark.parametrize("name", ["Repr-Digest", "Content-Digest"])
def test_of_a_whole_file_every_digest_is_the_files(name: str) -> None:
    verdict = judge(Asked("http://h/f"), answer(200, "Content-Length: 5", f"{name}: {field()}"))
    assert isinstance(verdict, Accept)
    assert (verdict.validator.digests, verdict.content) == (Digests(KNOWN.sha256), Digests())


def test_the_older_field_is_believed_of_a_whole_file_only() -> None:
    verdict = judge(Asked("http://h/f"), answer(200, "Content-Length: 5", f"Digest: SHA-256={b64(RAW)}"))
    assert isinstance(verdict, Accept)
    assert verdict.validator.digests == Digests(KNOWN.sha256)
    verdict = judge(REST, answer(206, 'ETag: "v1"', *PART, f"Digest: SHA-256={b64(bytes(32))}"))
    assert isinstance(verdict, Accept)
    assert verdict.validator.digests == PINNED.digests


def test_of_a_part_the_digest_of_the_content_is_that_of_the_part() -> None:
    verdict = judge(REST, answer(206, 'ETag: "v1"', *PART, f"Content-Digest: {OTHER}", f"Repr-Digest: {field(RAW512, 'sha-512')}"))
    assert isinstance(verdict, Accept)
    assert (verdict.validator.digests, verdict.content) == (KNOWN, Digests("00" * 32))


def test_a_digest_that_differs_between_two_ranges_is_another_version_whatever_the_etag_says() -> None:
    verdict = judge(REST, answer(206, 'ETag: "v1"', *PART, f"Repr-Digest: {OTHER}"))
    assert isinstance(verdict, Restart)
    assert verdict.changed


def test_a_digest_that_is_the_same_proves_the_version_where_the_etag_is_gone() -> None:
    verdict = judge(REST, answer(206, *PART, f"Repr-Digest: {field()}"))
    assert isinstance(verdict, Accept)
    assert isinstance(judge(REST, answer(206, *PART)), Restart)


def test_the_digest_of_an_encoded_file_is_never_looked_at_because_the_file_is_refused() -> None:
    verdict = judge(Asked("http://h/f"), answer(200, "Content-Length: 5", "Content-Encoding: gzip", f"Repr-Digest: {field()}"))
    assert not isinstance(verdict, Accept | Restart)
