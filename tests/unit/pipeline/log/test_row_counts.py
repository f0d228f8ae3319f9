import polars as pl
import pytest

from pipeline.events import EventColumns, validate
from pipeline.log.inputs import FileFormat, find_inputs
from pipeline.log.readers import read_blocks
from pipeline.log.row_counts import RowCounts

COLUMNS = EventColumns(label="label")
TYPES = {"user_id": "string", "item_id": "string"}
NOW = 1_709_164_800


def count(path, *, columns=COLUMNS):
    (file,) = find_inputs(str(path), options=FileFormat())
    rows = RowCounts()
    for block in read_blocks(file, mapping=columns.mapping(), options=FileFormat()):
        checked = validate(block.table, columns=columns, id_types=TYPES, malformed=block.malformed)
        rows.add(checked, num_rows=block.table.height + len(block.malformed), file=file.name, block=block)
    return rows


def test_each_reason_has_the_first_bad_value_with_its_row(tmp_path):
    path = tmp_path / "log.csv"
    lines = ["u,a,5,1", "u,a,x,1", "u,a", ",a,5,1", "u,a,5,7", "u,a,soon,1", '"u,a,5,1']
    path.write_text("user_id,item_id,timestamp,label\n" + "\n".join(lines) + "\n")
    rows = count(path)
    name = f"{tmp_path.name}/log.csv"
    assert rows.reasons() == "malformed row: 2, missing user: 1, invalid time: 2, invalid label: 1"
    assert rows.first_of_each() == (
        f"for example 'u,a' (malformed row, row 3 of {name}), '' (missing user, row 4 of {name}), "
        f"'x' (invalid time, row 2 of {name}), '7' (invalid label, row 5 of {name})"
    )
    assert rows.read == 7


def test_the_first_parts_give_the_examples_and_long_values_are_cut(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("user_id,item_id,timestamp,label\nu,a," + "x" * 200 + ",1\n")
    second.write_text("user_id,item_id,timestamp,label\nu,a,y,1\nu,a,5,z\n")
    total = RowCounts.total([count(first), count(second)])
    assert total.reasons() == "invalid time: 2, invalid label: 1"
    assert total.first_of_each().startswith(
        f"for example '{'x' * 56}... (invalid time, row 1 of {tmp_path.name}/a.csv)"
    )
    assert total.read == 3


@pytest.mark.parametrize(
    ("unit", "times", "other", "note"),
    [
        ("s", [NOW, NOW, 5], None, None),
        ("s", [NOW * 1_000, NOW * 1_000, NOW], "ms", "2 of 3 times lie"),
        ("ms", [NOW, 5], None, "2 of 2 times lie"),
        ("ms", [NOW, NOW, 5], "s", "3 of 3 times lie"),
        ("ns", [NOW * 1e6, float("nan")], "us", "1 of 1 times lie"),
        ("s", [5, 6], None, "2 of 2 times lie before 1990 or after tomorrow"),
        ("s", ["2024-01-01", "1980-01-01"], None, None),
        ("s", [str(NOW * 10**9)] * 2, "ns", "2 of 2 times lie"),
        ("s", [20240131, 20240201, None], "date", "2 of 2 times lie before 1990 or after tomorrow; 20240131 would not"),
        ("s", [20240131, 5, 6], None, "3 of 3 times lie before 1990 or after tomorrow"),
        ("ms", ["20240131123456", " 20240201000000 "], "date", "2 of 2 times lie"),
        ("ns", [20240131.0, float("nan")], "date", "1 of 1 times lie"),
        ("s", [20240230, 20241301], None, "2 of 2 times lie"),
        ("date", [20240131, 20240230], None, None),
        ("date", [NOW, NOW], "s", "2 of 2 times lie"),
        ("s", [], None, None),
        (
            "ms",
            [NOW * 1_000] * 2 + [NOW],
            None,
            f"of 3 times 1 as s (such as {NOW}) would lie between 1990 and tomorrow",
        ),
        (
            "s",
            [NOW] * 3 + [20240131, NOW * 1_000],
            None,
            "of 5 times 1 as dates (YYYYMMDD) (such as 20240131), 1 as ms",
        ),
    ],
)
def test_another_unit_is_told_and_named_as_the_right_one_only_if_most_times_fit_it(unit, times, other, note):
    columns = EventColumns(timestamp_unit=unit)
    block = pl.DataFrame({"user_id": "u", "item_id": "a", "timestamp": times}, schema_overrides={"user_id": pl.String})
    rows = RowCounts()
    checked = validate(block, columns=columns, id_types=TYPES, malformed=[])
    rows.add(checked, num_rows=block.height, file="x", block=None)
    assert rows.other_unit(unit) == other
    assert (rows.note_on_times(unit) or "").startswith(note or "")
    assert bool(rows.note_on_times(unit)) == bool(note)
