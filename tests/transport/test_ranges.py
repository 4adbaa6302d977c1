"""Slices cover exactly, positions only advance, and only a proved version continues a file."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import ErrorCode, InvalidArgument
from bits_async.transport.ranges import (
    MAX_REQUEST,
    ContentRange,
    Detached,
    FileRange,
    Slice,
    Unsatisfied,
    Validator,
    checked_ranges,
    checked_requests,
    complete,
    filled,
    http_date,
    joined,
    local_size,
    locate,
    located,
    merge,
    missing,
    parse_content_range,
    range_header,
    recover,
)

MONDAY = "Mon, 02 Nov 2026 10:00:00 GMT"
MONDAY_SPELLED_OTHERWISE = "Monday, 02-Nov-26 10:00:00 GMT"
TUESDAY = "Tue, 03 Nov 2026 10:00:00 GMT"

# -- the version


@pytest.mark.parametrize(
    ("validator", "if_range"),
    [
        (Validator('"a"', MONDAY, 5), '"a"'),
        (Validator('"a"', None, None), '"a"'),
        (Validator('W/"a"', MONDAY, 5), MONDAY),
        (Validator('W/"a"', None, 5), None),
        (Validator(None, MONDAY, 5), MONDAY),
        (Validator(None, "yesterday", 5), None),
        (Validator(None, None, 5), None),
        (Validator('""', None, 5), None),
        (Validator("unquoted", None, 5), None),
        (Validator('"a"b"', None, 5), None),
        (Validator('"\u00e4"', None, 5), None),
        (Validator('"a"\r\nX: y', None, 5), None),
        (Validator(), None),
    ],
)
def test_only_a_strong_etag_or_a_date_asks_for_the_rest_of_a_version(validator: Validator, if_range: str | None) -> None:
    assert validator.if_range() == if_range
    assert validator.resumable == (if_range is not None)


@pytest.mark.parametrize(
    ("pinned", "served", "same"),
    [
        # ETag
        (Validator('"a"', MONDAY, 5), Validator('"a"', MONDAY, 5), True),
        (Validator('"a"', MONDAY, 5), Validator('"b"', MONDAY, 5), False),
        (Validator('"a"', MONDAY, 5), Validator('"a"', TUESDAY, 5), True),  # two strong ones decide
        (Validator('"a"', MONDAY, 5), Validator('"a"', None, 5), True),  # a 206 to If-Range need not repeat Last-Modified
        (Validator('"a"', MONDAY, 5), Validator('"a"', MONDAY, None), True),
        (Validator('"a"', MONDAY, None), Validator('"a"', MONDAY, 5), True),
        (Validator('"a"', MONDAY, 5), Validator('"a"', MONDAY, 6), False),
        (Validator('"a"', MONDAY, 5), Validator(None, MONDAY, 5), False),  # vanished
        # weak ETags never prove sameness, but prove a change
        (Validator('W/"a"', MONDAY, 5), Validator('W/"a"', MONDAY, 5), True),
        (Validator('W/"a"', MONDAY, 5), Validator('W/"a"', TUESDAY, 5), False),
        (Validator('W/"a"', MONDAY, 5), Validator('W/"b"', MONDAY, 5), False),
        (Validator('W/"a"', None, 5), Validator('W/"a"', None, 5), False),
        (Validator('W/"a"', MONDAY, 5), Validator('"a"', MONDAY, 5), True),  # Apache's tags grow strong a second after the change
        (Validator('"a"', MONDAY, 5), Validator('W/"a"', MONDAY, 5), True),
        (Validator('"a"', None, 5), Validator('W/"a"', None, 5), False),
        (Validator('W/"a"', MONDAY, 5), Validator(None, MONDAY, 5), False),
        # Last-Modified
        (Validator(None, MONDAY, 5), Validator(None, MONDAY, 5), True),
        (Validator(None, MONDAY, 5), Validator(None, MONDAY_SPELLED_OTHERWISE, 5), True),
        (Validator(None, MONDAY, 5), Validator(None, TUESDAY, 5), False),
        (Validator(None, MONDAY, 5), Validator(None, MONDAY, 6), False),
        (Validator(None, MONDAY, 5), Validator(None, MONDAY, None), False),
        (Validator(None, MONDAY, None), Validator(None, MONDAY, 5), True),
        (Validator(None, MONDAY, 5), Validator(None, None, 5), False),
        (Validator(None, MONDAY, 5), Validator('"new"', MONDAY, 5), True),
        # nothing to compare
        (Validator(None, None, 5), Validator(None, None, 5), False),
        (Validator(), Validator(), False),
    ],
)
def test_versions_agree_only_when_it_is_proved(pinned: Validator, served: Validator, same: bool) -> None:
    assert pinned.agrees(served) is same


@pytest.mark.parametrize(
    ("pinned", "served", "different"),
    [
        (Validator('"a"', None, 5), Validator(None, None, None), False),
        (Validator('"a"', None, 5), Validator('W/"a"', None, 5), False),
        (Validator('"a"', None, 5), Validator('W/"b"', None, 5), True),
        (Validator(None, None, 5), Validator(None, None, 6), True),
        (Validator(None, MONDAY, 5), Validator(None, TUESDAY, 5), False),
    ],
)
def test_what_is_missing_proves_no_change(pinned: Validator, served: Validator, different: bool) -> None:
    assert pinned.contradicts(served) is different


validators = st.builds(
    Validator,
    st.sampled_from([None, '"a"', '"b"', 'W/"a"', 'W/"b"', "junk", '""']),
    st.sampled_from([None, MONDAY, TUESDAY, "never"]),
    st.sampled_from([None, 0, 5, 6]),
)


@given(validators, validators)
def test_nothing_both_agrees_and_contradicts(pinned: Validator, served: Validator) -> None:
    assert not (pinned.agrees(served) and pinned.contradicts(served))


@given(validators)
def test_a_version_that_can_be_asked_for_agrees_with_itself(validator: Validator) -> None:
    assert validator.agrees(validator) is validator.resumable


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)),
        ("Sunday, 06-Nov-94 08:49:37 GMT", datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)),
        ("Sun Nov  6 08:49:37 1994", datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)),
        ("Sun, 06 Nov 1994 10:49:37 +0200", datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)),
        ("0", None),
        ("-1", None),
        ("Sun, 99 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 99999999999999 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 +99999999", None),
        ("x" * 100, None),
        ("", None),
        (None, None),
    ],
)
def test_dates_of_all_three_forms_are_read_and_nonsense_is_none(text: str | None, date: datetime | None) -> None:
    assert http_date(text) == date


@given(st.text())
def test_no_text_breaks_the_reader_of_dates(text: str) -> None:
    http_date(text)


# -- the bytes


@pytest.mark.parametrize(
    ("start", "end", "written", "durable"),
    [(-1, 5, 0, 0), (0, 5, 6, 0), (0, 5, 2, 3), (3, 5, 2, 2), (3, 5, 4, 2), (3, 2, 3, 3)],
)
def test_a_slice_with_positions_out_of_order_cannot_be_made(start: int, end: int, written: int, durable: int) -> None:
    with pytest.raises(ValueError):
        Slice(start, end, written, durable)


@given(st.integers(0, 10**6), st.lists(st.tuples(st.sampled_from(["advance", "checkpoint"]), st.integers(-5, 1000))))
def test_positions_never_fall_and_durable_never_passes_written(start: int, moves: list[tuple[str, int]]) -> None:
    piece = Slice.fresh(start, start + 5000)
    for move, count in moves:
        before = (piece.written, piece.durable)
        try:
            if move == "advance":
                piece.advance(count)
            else:
                piece.checkpoint(piece.durable + count)
        except ValueError:
            assert (piece.written, piece.durable) == before
        assert piece.written >= before[0]
        assert piece.durable >= before[1]
        assert piece.start <= piece.durable <= piece.written <= start + 5000


@st.composite
def some_progress(draw: st.DrawFn) -> list[Slice]:
    edges = sorted(draw(st.sets(st.integers(0, 10_000), min_size=2, max_size=8)))
    slices = []
    for start, end in pairwise(edges):
        written = draw(st.integers(start, end))
        slices.append(Slice(start, end, written, draw(st.integers(start, written))))
    return draw(st.permutations(slices))


def durable_bytes(slices: list[Slice] | tuple[Slice, ...]) -> set[int]:
    return {position for piece in slices for position in range(piece.start, piece.durable)}


@given(some_progress())
def test_merging_keeps_every_durable_byte_and_the_extent(slices: list[Slice]) -> None:
    merged = merge(slices)
    assert durable_bytes(merged) == durable_bytes(slices)
    assert min(piece.start for piece in slices) == merged[0].start
    assert max(piece.end or 0 for piece in slices) == merged[-1].end
    assert merge(merged) == merged
    assert not any(before.durable == before.end == after.start for before, after in pairwise(merged))


def test_merging_makes_new_slices() -> None:
    mine = Slice.fresh(0, 5)
    (merged,) = merge([mine])
    merged.advance(5)
    assert mine.written == 0


@pytest.mark.parametrize(
    "slices",
    [[Slice.fresh(0, 5), Slice.fresh(4, 9)], [Slice.fresh(0, None), Slice.fresh(4, 9)], [Slice.fresh(1, 5), Slice.fresh(1, 5)]],
)
def test_overlapping_slices_are_not_merged(slices: list[Slice]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        merge(slices)


@pytest.mark.parametrize(
    ("slices", "size", "whole"),
    [
        ([Slice(0, 5, 5, 0), Slice(5, 9, 9, 9)], 9, True),
        ([Slice(5, 9, 9, 9), Slice(0, 5, 5, 0)], 9, True),
        ([Slice(0, 5, 5, 0), Slice(6, 9, 9, 9)], 9, False),
        ([Slice(0, 5, 5, 0), Slice(4, 9, 9, 9)], 9, False),
        ([Slice(0, 5, 4, 0), Slice(5, 9, 9, 9)], 9, False),
        ([Slice(0, 9, 9, 9)], 8, False),
        ([Slice(0, 9, 9, 9)], 10, False),
        ([Slice(0, None, 9, 9)], 9, False),
        ([], 0, True),
        ([], 1, False),
    ],
)
def test_a_file_is_whole_only_without_hole_overlap_or_excess(slices: list[Slice], size: int, whole: bool) -> None:
    assert complete(slices, size) is whole


@pytest.mark.parametrize(
    ("slices", "length", "same_boot", "trusted"),
    [
        ([Slice(0, 100, 10, 10)], 60, True, (Slice(0, 100, 60, 10),)),
        ([Slice(0, 100, 10, 10)], 60, False, (Slice(0, 100, 10, 10),)),
        ([Slice(0, None, 10, 10)], 60, True, (Slice(0, None, 60, 10),)),
        ([Slice(0, 100, 10, 10)], 160, True, (Slice(0, 100, 100, 10),)),
        ([Slice(0, 100, 10, 10)], 9, True, None),
        ([Slice(0, 100, 10, 10)], 9, False, None),
        ([Slice(0, 100, 0, 0)], 0, True, (Slice(0, 100, 0, 0),)),
        ([Slice(0, 50, 20, 10), Slice(50, 100, 80, 70)], 80, True, (Slice(0, 50, 10, 10), Slice(50, 100, 70, 70))),
        ([Slice(0, 50, 20, 10), Slice.fresh(50, 100)], 20, True, (Slice(0, 50, 10, 10), Slice(50, 100, 50, 50))),
        ([Slice(0, 50, 20, 10), Slice(50, 100, 80, 70)], 60, True, None),
    ],
)
def test_after_a_crash_the_length_is_trusted_and_after_a_reboot_only_the_journal(
    slices: list[Slice], length: int, same_boot: bool, trusted: tuple[Slice, ...] | None
) -> None:
    assert recover(slices, length=length, same_boot=same_boot) == trusted


def test_detached_is_a_value() -> None:
    assert Detached(None, b"ab", 5) == Detached(None, b"ab", 5)


# -- their text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("bytes 0-99/200", ContentRange(0, 100, 200)),
        ("bytes 100-199/200", ContentRange(100, 200, 200)),
        ("Bytes  0-0/1 ", ContentRange(0, 1, 1)),
        ("bytes 0-99/*", ContentRange(0, 100, None)),
        ("bytes */200", Unsatisfied(200)),
        ("bytes */0", Unsatisfied(0)),
        ("bytes 5368709120-5368709121/5368709122", ContentRange(5368709120, 5368709122, 5368709122)),
    ],
)
def test_content_ranges_are_read(text: str, value: ContentRange | Unsatisfied) -> None:
    assert parse_content_range(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bytes",
        "bytes */*",
        "bytes 0-99",
        "bytes=0-99/200",
        "items 0-99/200",
        "bytes 99-0/200",
        "bytes 0-200/200",
        "bytes 0-99/50",
        "bytes -5/200",
        "bytes +0-99/200",
        "bytes 0-99/200, bytes 100-199/200",
        "bytes 0-9 9/200",
        "bytes \u0660-\u0669/200",
        "bytes 0-" + "9" * 5000 + "/*",
    ],
)
def test_content_ranges_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_content_range(text)


@given(st.integers(0, 10**15), st.integers(1, 10**15), st.integers(0, 10**15))
def test_a_range_that_was_asked_is_the_range_that_is_understood(start: int, length: int, more: int) -> None:
    first, _, last = range_header(start, start + length).removeprefix("bytes=").partition("-")
    answer = parse_content_range(f"bytes {first}-{last}/{start + length + more}")
    assert answer == ContentRange(start, start + length, start + length + more)


def test_an_open_range_has_no_end() -> None:
    assert range_header(7, None) == "bytes=7-"


@pytest.mark.parametrize(("start", "end"), [(-1, None), (5, 5), (5, 4)])
def test_a_range_without_a_byte_cannot_be_asked(start: int, end: int | None) -> None:
    with pytest.raises(InvalidArgument):
        range_header(start, end)


# -- ranges that a job names

THREE = (FileRange(100, 100), FileRange(1000, 100), FileRange(200, 100))  # the worked example of MC-BUP


def fetched(ranges: tuple[FileRange, ...], start: int, end: int, size: int | None) -> list[tuple[int, int]]:
    """What is asked for, request by request, to get [start, end) of the local file."""
    spans, position = [], start
    while position < end:
        first, stop = locate(ranges, position, size)
        stop = first + end - position if stop is None else min(stop, first + end - position)
        spans.append((first, stop))
        position += stop - first
    return spans


def test_the_worked_example_of_the_protocol() -> None:
    assert fetched(THREE, 25, 225, 2000) == [(125, 200), (1000, 1100), (200, 225)]


def test_neighbouring_ranges_are_one_request_and_a_large_one_several() -> None:
    assert locate((FileRange(5, 5), FileRange(10, 10), FileRange(30, 1)), 2, None) == (7, 20)
    assert locate((FileRange(5, 5), FileRange(10)), 0, None) == (5, None)
    assert locate((FileRange(5, 5), FileRange(10)), 0, 100) == (5, 100)
    assert locate((FileRange(7, 3 * MAX_REQUEST),), 5, None) == (12, 12 + MAX_REQUEST)
    assert locate((FileRange(7),), 0, 3 * MAX_REQUEST) == (7, 7 + MAX_REQUEST)
    assert locate((FileRange(7),), 0, None) == (7, None)


def test_beyond_its_ranges_nothing_is_asked_for() -> None:
    for ranges, position, size in [(THREE, 300, None), ((FileRange(5),), 5, 10)]:
        with pytest.raises(ValueError, match="end before"):
            locate(ranges, position, size)


def test_the_local_file_has_the_sum_of_its_ranges() -> None:
    assert local_size(THREE, None) == local_size(THREE, 2000) == 300
    assert local_size((*THREE, FileRange(1500)), None) is None
    assert local_size((*THREE, FileRange(1500)), 2000) == 800
    assert local_size((), 2000) == 2000
    assert local_size((), None) is None


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=6), st.randoms(), st.integers(0, 200), st.booleans()
)
def test_every_position_is_fetched_from_where_its_range_says(
    gaps: list[tuple[int, int]], order: object, start: int, open_end: bool
) -> None:
    ranges, offset = [], 0
    for gap, length in gaps:
        ranges.append(FileRange(offset + gap, length))
        offset += gap + length
    size = offset + 17
    if open_end:
        ranges[-1] = FileRange(ranges[-1].initial_offset)
    order.shuffle(ranges)  # type: ignore[attr-defined]
    wanted = [byte for each in checked_ranges(ranges) for byte in range(each.initial_offset, each.end or size)]
    assert local_size(ranges, size) == len(wanted)
    spans = fetched(tuple(ranges), min(start, len(wanted)), len(wanted), size)
    assert [byte for span in spans for byte in range(*span)] == wanted[min(start, len(wanted)) :]


@pytest.mark.parametrize(
    ("ranges", "code"),
    [
        ([], ErrorCode.E_INVALIDARG),
        ([FileRange(0, 0)], ErrorCode.E_INVALIDARG),
        ([FileRange(0, -1)], ErrorCode.E_INVALIDARG),
        ([FileRange(0, 1.5)], ErrorCode.E_INVALIDARG),  # type: ignore[arg-type]
        ([(0, 1)], ErrorCode.E_INVALIDARG),
        ([FileRange(-1, 1)], ErrorCode.BG_E_INVALID_RANGE),
        ([FileRange(None, 1)], ErrorCode.BG_E_INVALID_RANGE),  # type: ignore[arg-type]
        ([FileRange(2**64 - 1, 1)], ErrorCode.BG_E_INVALID_RANGE),
        ([FileRange(2**62, 2**62)], ErrorCode.BG_E_INVALID_RANGE),
        ([FileRange(5, 5), FileRange(5, 5)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(5, 5), FileRange(5, 0)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(9, 5), FileRange(5, 5)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(9, 5), FileRange(5)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(5), FileRange(9)], ErrorCode.BG_E_OVERLAPPING_RANGES),
    ],
)
def test_ranges_that_cannot_be_meant_are_refused(ranges: list[FileRange], code: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked_ranges(ranges)
    assert caught.value.code == code


def test_ranges_in_any_order_that_touch_but_do_not_overlap_are_taken_as_they_are() -> None:
    given_ranges = [FileRange(10, 5), FileRange(15, 2**64 - 1), FileRange(0, 10)]
    assert checked_ranges(given_ranges) == (FileRange(10, 5), FileRange(15), FileRange(0, 10))


@pytest.mark.parametrize(
    ("each", "size", "beyond"),
    [
        (FileRange(0), 0, False),
        (FileRange(1), 1, True),
        (FileRange(1), 2, False),
        (FileRange(0, 5), 5, False),
        (FileRange(0, 6), 5, True),
    ],
)
def test_a_range_is_in_the_file_or_it_is_not(each: FileRange, size: int, beyond: bool) -> None:
    assert each.reaches_beyond(size) is beyond


def test_an_etag_says_nothing_at_another_url() -> None:
    assert Validator('"a"', MONDAY, 5).at_another_url() == Validator(None, MONDAY, 5)
    assert not Validator('"a"', None, 5).at_another_url().resumable


# -- on demand


def test_ranges_that_overlap_or_touch_are_one() -> None:
    assert joined([FileRange(10, 5), FileRange(0, 3), FileRange(12, 8), FileRange(3, 2)]) == (FileRange(0, 5), FileRange(10, 10))
    assert joined([FileRange(10), FileRange(0, 3), FileRange(12, 8)]) == (FileRange(0, 3), FileRange(10))
    assert joined([FileRange(0, 30), FileRange(10), FileRange(5, 5)]) == (FileRange(0),)
    assert joined([]) == ()


def test_what_is_written_is_told_without_what_is_still_to_come() -> None:
    slices = [Slice(50, 90, 70, 60), Slice(0, 20, 20, 20), Slice(20, None, 30, 25), Slice(40, 45, 40, 40)]
    assert filled(slices) == (Slice(0, 30, 30, 25), Slice(50, 70, 70, 60))


@pytest.mark.parametrize(
    ("position", "gap"),
    [(0, (0, 10)), (5, (5, 10)), (10, (20, 30)), (29, (29, 30)), (30, (50, 60)), (60, (0, 10)), (10**9, (0, 10))],
)
def test_what_is_missing_is_fetched_from_the_position_on_and_then_from_the_beginning(position: int, gap: tuple[int, int]) -> None:
    wanted = [FileRange(0, 30), FileRange(50)]
    assert missing(wanted, [Slice.fresh(70, 80), Slice(10, 20, 20, 20)], 60, position) == gap


def test_nothing_is_missing_when_all_that_was_asked_for_is_written() -> None:
    assert missing([FileRange(5, 10), FileRange(50)], [Slice(0, 20, 20, 0), Slice(50, None, 60, 60)], 60) is None
    assert missing([], [], None) is None
    assert missing([FileRange(5)], [], None) == (5, None)
    assert missing([FileRange(5)], [], None, 100) == (100, None)


@given(
    st.lists(st.builds(FileRange, st.integers(0, 40), st.integers(1, 20) | st.none()), max_size=4),
    st.lists(st.tuples(st.integers(0, 10), st.integers(1, 10), st.integers(0, 10)), max_size=4),
    st.integers(0, 60),
)
def test_fetching_what_is_missing_again_and_again_fills_exactly_what_is_wanted(
    wanted: list[FileRange], lengths: list[tuple[int, int, int]], position: int
) -> None:
    slices, offset = [], 0
    for gap, length, written in lengths:
        start = offset + gap
        slices.append(Slice(start, start + length, start + min(written, length), start))
        offset = start + length
    size = 60 + offset
    before = {byte for each in slices for byte in range(each.start, each.written)}
    fetched_bytes: set[int] = set()
    while (gap_found := missing(wanted, slices, size, position)) is not None:
        start, end = gap_found
        assert end is not None
        assert start < end
        assert not fetched_bytes & set(range(start, end))
        fetched_bytes |= set(range(start, end))
        slices = [*filled(slices), Slice(start, end, end, start)]
    assert fetched_bytes == {byte for each in wanted for byte in range(each.initial_offset, each.end or size)} - before


def test_bytes_of_a_local_file_are_where_its_ranges_say() -> None:
    assert located(THREE, [FileRange(0, 225)]) == (FileRange(100, 125), FileRange(1000, 100))
    assert located(THREE, [FileRange(50, 100), FileRange(290, 10)]) == (FileRange(150, 50), FileRange(290, 10), FileRange(1000, 50))
    assert located((FileRange(7),), [FileRange(3, 5)]) == (FileRange(10, 5),)
    assert located(THREE, []) == ()


@pytest.mark.parametrize(
    ("ranges", "code"),
    [
        ([], ErrorCode.E_INVALIDARG),
        ([FileRange(0, 0)], ErrorCode.E_INVALIDARG),
        ([FileRange(-1, 1)], ErrorCode.BG_E_INVALID_RANGE),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(ranges: list[FileRange], code: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked_requests(ranges)
    assert caught.value.code == code
    assert checked_requests([FileRange(0, 2), FileRange(1, 2)]) == (FileRange(0, 2), FileRange(1, 2))
