"""A JSON array is read as if it had one object per line."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import DataError
from pipeline.log import json_arrays
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.json_arrays import array_lines, is_array
from pipeline.log.readers import read_blocks

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def elements(text, *, encoding="utf-8"):
    lines = b"".join(array_lines(io.BytesIO(text.encode(encoding)), name="log.json")).decode(encoding)
    return [json.loads(line) for line in lines.split("\n")[:-1]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(values, max_size=8), indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans(),
    chunk=st.integers(4, 40),
)  # fmt: skip
def test_any_array_in_any_layout_gives_its_elements(rows, indent, ascii_only, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_CHUNK_BYTES", chunk)
        assert elements(json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + " \n") == rows


def test_blanks_a_byte_order_mark_and_windows_line_ends_are_no_part_of_it():
    assert elements('\ufeff [\r\n{"a":\r\n1}\r\n, {"a": "] , {"}\r\n]\r\n') == [{"a": 1}, {"a": "] , {"}]
    assert elements('[{"a": "é"}]', encoding="latin-1") == [{"a": "é"}]


def test_the_first_letter_tells_arrays_from_lines():
    assert is_array(b"\xef\xbb\xbf\n  [{")
    assert not is_array(b'{"a": [1]}\n')
    assert not is_array(b"")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"a": 1}, {"a": 2}', "no comma or bracket after it in the element at byte 10"),
        ('[{"a": 1}, {"a": ', "expecting value in the element at byte 10"),
        ('[{"a": 1}, {"a" 1}, {"a": 3}]', "expecting ':' delimiter in the element at byte 10"),
        ('[{"a": 1} {"a": 2}]', "no comma or bracket"),
        ('[{"a": 1},]', "expecting value"),
        ("[", "expecting value"),
        ("[" * 100_000, "too many brackets"),
        ('[{"a": 1}] [{"a": 2}]', "there is more after the end"),
        ('[{"a": 1}]\n{"a": 2}', "there is more after the end"),
    ],
)
def test_a_damaged_array_is_refused_with_the_place(text, why):
    with pytest.raises(DataError, match=rf"^log.json: .*{why}"):
        elements(text)


def test_an_element_without_end_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(json_arrays, "LONGEST_ELEMENT", 1 << 20)
    read = 0

    class Endless(io.RawIOBase):
        def read(self, size=-1):
            nonlocal read
            read += size
            return (b'[{"a": "' if read == size else b"").ljust(size, b"x")

    stream: Any = Endless()
    with pytest.raises(DataError, match="more than 1 MiB in the element at byte 1"):
        list(array_lines(stream, name="log.json"))
    assert read <= 4 << 20


def test_a_file_may_hold_an_array_or_lines(tmp_path):
    rows = [{"user_id": f"u{n}", "item_id": "é", "timestamp": n} for n in range(3)]
    mapping = {name: name for name in rows[0]}
    for number, text in enumerate([json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows))]):
        for ending in ("json", "jsonl", "ndjson"):
            path = tmp_path / f"{number}.{ending}"
            path.write_text(text)
            (file,) = find_inputs(str(path), options=FileFormat())
            blocks = read_blocks(file, mapping=mapping, options=FileFormat())
            assert [row for block in blocks for row in block.table.rows()] == [(f"u{n}", "é", str(n)) for n in range(3)]
