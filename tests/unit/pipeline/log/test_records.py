import csv
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.log import records
from pipeline.log.records import cut_lines, cut_records, first_record

LIMIT = 12
LETTERS = 'a,"\n\r\0'


def by_definition(text):
    """(text of all records, malformed lines): each record is tried from its first line on, with one more at a time."""
    lines, good, malformed = split_at_lf(text), "", []
    while lines:
        for size in range(1, len(lines) + 1):
            record = "".join(lines[:size])
            if (state := state_after(record.removesuffix("\n").removesuffix("\r"))) != "open":
                break
        if state == "closed" and (size == 1 or len(record) <= LIMIT):
            good += record
        else:
            size = 1
            malformed.append(lines[0].removesuffix("\n").removesuffix("\r"))
        lines = lines[size:]
    return good, malformed


def split_at_lf(text):
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + [lines[-1]] * bool(lines[-1])


def state_after(record):
    """closed, open (in quotes) or wrong: what RFC 4180 says of a record, letter by letter."""
    state = "start"
    for letter in record:
        if letter == "\0" or (letter == "\r" and state != "open"):
            return "wrong"
        if state == "open":
            state = "quote" if letter == '"' else "open"
        elif state == "quote":
            if letter not in '",':
                return "wrong"
            state = "open" if letter == '"' else "start"
        elif letter == ",":
            state = "start"
        else:
            state = "open" if letter == '"' and state == "start" else "inside"
    return "open" if state == "open" else "closed"


def cut_in_pieces(text, size):
    rest, found, malformed = b"", b"", []
    for start in range(0, len(text), size):
        cut = cut_records(rest + text[start : start + size], separator=b",", final=False)
        rest = (rest + text[start : start + size])[cut.used :]
        found += cut.records
        malformed += cut.malformed
    cut = cut_records(rest, separator=b",", final=True)
    return found + cut.records, [*malformed, *cut.malformed]


@settings(max_examples=400, deadline=None)
@given(text=st.text(LETTERS, max_size=40), size=st.integers(1, 41))
@example(text='a","a\n' * 5, size=40)
@example(text='"\n""\n""\n\n"",a', size=7)
def test_records_are_what_rfc_4180_says_for_any_size_of_blocks(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LONGEST_QUOTED", LIMIT)
        found, malformed = cut_in_pieces(text.encode(), size)
    good, bad = by_definition(text)
    assert (found.decode(), [line.decode() for line in malformed]) == (good, bad)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(st.text('ab,"\n', max_size=6), min_size=2, max_size=2), max_size=8))
def test_what_a_csv_writer_wrote_is_never_malformed(rows):
    sink = io.StringIO()
    csv.writer(sink).writerows(rows)
    text = sink.getvalue().encode()
    cut = cut_records(text, separator=b",", final=True)
    assert (cut.records, cut.malformed, cut.used) == (text, [], len(text))


def test_the_place_of_a_malformed_line_counts_records_and_no_blank_lines():
    cut = cut_records(b'1,"a\nb"\n\n2,"c\n3,d"e\n4,"f"g\n', separator=b",", final=True)
    assert (cut.malformed, cut.malformed_at) == ([b'2,"c', b'4,"f"g'], [1, 3])
    assert cut.records == b'1,"a\nb"\n\n3,d"e\n'
    cut = cut_lines(b"a\n\nb\0\nc\n\0", final=False)
    assert (cut.records, cut.malformed, cut.malformed_at, cut.used) == (b"a\n\nc\n", [b"b\0"], [1], 8)


def test_lines_that_close_and_open_a_quote_are_looked_at_twice_at_most(monkeypatch):
    seen, original = [0], records._without_end

    def counted(line):
        seen[0] += 1
        return original(line)

    monkeypatch.setattr(records, "_without_end", counted)
    lines = 2_000
    # From its start each line leaves a quote open, and from inside a quote too.
    cut = cut_records(b'a","b\n' * lines, separator=b",", final=True)
    assert len(cut.malformed) == lines
    assert seen[0] <= 3 * lines


def test_the_first_record_may_span_lines_and_follow_blank_ones():
    text = b'\n\r\n"a\nb",c\r\n1,2\n'
    assert first_record(text, separator=b",", final=False) == (b'"a\nb",c', text.index(b"1,2"))
    assert first_record(b'"a\nb', separator=b",", final=True) is None
    assert first_record(b"a,b", separator=b",", final=False) is None
    assert first_record(b"a,b", separator=None, final=True) == (b"a,b", 3)
