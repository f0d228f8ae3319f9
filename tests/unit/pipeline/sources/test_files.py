import dataclasses
import gzip
import json
import os
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.events import DataError, EventColumns
from pipeline.log import readers
from pipeline.log.inputs import FileFormat
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest
from pipeline.sources.files import ImportConfig, ItemColumns, UserColumns, import_files
from tests.support.changed_files import WAYS, truncated

RATINGS = "uid;movie;when;stars\n1;5;100;3\n2;6;200;4\n1;6;150;5\n"
CONFIG = ImportConfig(
    columns=EventColumns(user_id="uid", item_id="movie", timestamp="when", integer_ids=True),
    files=FileFormat(separator=";"),
    items=ItemColumns(
        item_id="id", features=("year",), list_features=("genres",),
        files=FileFormat(format="csv", separator="::", encoding="latin-1", header=("id", "title", "genres", "year")),
    ),
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "ratings.csv").write_text(RATINGS)
    (tmp_path / "movies.dat").write_bytes(
        "5::Le Café::Drama|War::1999\n6::Up::Comedy::2009\nx::?::::\n".encode("latin-1")
    )
    return str(tmp_path / "ratings.csv"), str(tmp_path / "movies.dat"), str(tmp_path / "log")


def test_a_mapped_csv_becomes_a_typed_event_log(files):
    events, items, out = files
    result = import_files(events, out, config=CONFIG, items=items)
    assert (result.events, result.items, result.rejected, result.reused) == (3, 2, 0, False)
    log = pl.read_parquet(f"{out}/events-00000.parquet")
    assert log.schema == {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Datetime("ms", "UTC")}
    assert log["timestamp"].dt.epoch("s").to_list() == [100, 200, 150]
    table = pl.read_parquet(f"{out}/items.parquet")
    assert table.rows() == [(5, "1999", ["Drama", "War"]), (6, "2009", ["Comedy"])]
    source = json.loads(Path(out, "source.json").read_text())
    assert [entry["name"].split("/")[-1] for entry in source["inputs"]] == ["ratings.csv"]
    assert set(os.listdir(out)) == {"events-00000.parquet", "items.parquet", "source.json"}


def test_the_same_import_is_reused_and_another_is_refused(files):
    events, items, out = files
    import_files(events, out, config=CONFIG, items=items)
    stamp = os.stat(f"{out}/source.json").st_mtime_ns
    assert import_files(events, out, config=CONFIG, items=items).reused
    assert os.stat(f"{out}/source.json").st_mtime_ns == stamp
    with pytest.raises(
        DataError, match=r"was imported from items '.*movies.dat', asked is no file; name a new directory"
    ):
        import_files(events, out, config=CONFIG)
    other = ImportConfig(columns=EventColumns(user_id="movie", item_id="uid", timestamp="when"), files=CONFIG.files)
    with pytest.raises(DataError, match=r"imported (from items .*|with mapping.columns.user_id='uid'), asked is "):
        import_files(events, out, config=other)
    with open(events, "a") as stream:
        stream.write("3;5;300;1\n")
    with pytest.raises(DataError, match=r"was imported before '.*' changed; name a new directory"):
        import_files(events, out, config=CONFIG, items=items)


def test_a_damaged_log_is_not_reused(files):
    events, _, out = files
    import_files(events, out, config=CONFIG)
    os.truncate(f"{out}/events-00000.parquet", 10)
    with pytest.raises(DataError, match=r"events-00000.parquet is missing or changed; remove the directory"):
        import_files(events, out, config=CONFIG)


def test_rejected_rows_are_kept_with_their_reason(files, tmp_path):
    events, _, out = files
    with open(events, "a") as stream:
        stream.write("3;5;never;1\n4;5\n")
    config = ImportConfig(columns=CONFIG.columns, files=CONFIG.files, max_rejected_ratio=0.5)
    assert import_files(events, out, config=config).rejected == 2
    assert sorted(pl.read_parquet(f"{out}/rejected.parquet")["reason"]) == ["invalid time", "malformed row"]
    with pytest.raises(DataError, match=r"2 of 5 rows are invalid \(malformed row: 1, invalid time: 1\)"):
        import_files(events, f"{out}2", config=CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["log", "movies.dat", "ratings.csv"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uid;movie;when\n", "the log is empty"),
        ("user;movie;when\n1;2;3\n", "no column 'uid'.*it has 'user', 'movie', 'when'"),
    ],
)
def test_a_bad_file_leaves_nothing_behind(files, tmp_path, text, words):
    events, _, out = files
    Path(events).write_text(text)
    with pytest.raises(DataError, match=words):
        import_files(events, out, config=CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["movies.dat", "ratings.csv"]


def test_a_foreign_directory_is_refused(files):
    events, _, out = files
    os.mkdir(out)
    Path(out, "thesis.tex").touch()
    with pytest.raises(DataError, match="exists and is not an event log"):
        import_files(events, out, config=CONFIG)
    os.unlink(f"{out}/thesis.tex")
    assert import_files(events, out, config=CONFIG).events == 3


def test_items_without_a_usable_id_or_feature_are_refused(files, tmp_path):
    events, _, out = files
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"id,year\nx,1999\n"))
    config = ImportConfig(
        columns=CONFIG.columns, files=CONFIG.files, items=ItemColumns(item_id="id", features=("year",))
    )
    with pytest.raises(DataError, match=r"bad.csv.gz: no id in 'id' is int64"):
        import_files(events, out, config=config, items=str(tmp_path / "bad.csv.gz"))
    nameless = ImportConfig(columns=CONFIG.columns, files=CONFIG.files)
    with pytest.raises(DataError, match=r"no item feature is named"):
        import_files(events, out, config=nameless, items=str(tmp_path / "bad.csv.gz"))


def test_users_become_a_table_beside_the_log(files, prepare, tmp_path):
    events, _, out = files
    (tmp_path / "people.csv").write_text("who,city,likes\n1,Rome,a|b\n2,,\nx,Oslo,c\n")
    users = UserColumns(user_id="who", features=("city",), list_features=("likes",))
    config = dataclasses.replace(CONFIG, users=users)
    result = import_files(events, out, config=config, users=str(tmp_path / "people.csv"))
    assert result.users == 2
    assert pl.read_parquet(f"{out}/users.parquet").columns == ["user_id", "city", "likes"]
    assert import_files(events, out, config=config, users=str(tmp_path / "people.csv")).reused
    prepare(out, tmp_path / "shards")
    assert Shards.open(str(tmp_path / "shards")).vocabulary.user_features == {"city": ("Rome",), "likes": ("a", "b")}
    (tmp_path / "people.csv").write_text("who,city,likes\n1,Oslo,\n")
    with pytest.raises(DataError, match=r"before '.*people.csv' changed"):
        import_files(events, out, config=config, users=str(tmp_path / "people.csv"))


@pytest.mark.parametrize(
    ("table", "users", "words"),
    [
        ({"who": [1], "city": ["x"]}, UserColumns(features=("city",)), r"no column 'user_id' \(mapped to user_id\)"),
        ({"user_id": [1], "age": [1.5]}, UserColumns(features=("age",)), r"feature 'age' is Float64; features are cat"),
        ({"user_id": [1], "age": [1]}, UserColumns(features=("size",)), r"no column 'size' \(mapped to size\)"),
        ({"user_id": [1], "age": [1]}, UserColumns(), r"no user feature is named; set users.features"),
        (
            {"user_id": ["x"], "age": [1]},
            UserColumns(features=("age",)),
            r"no id in 'user_id' is int64, the log's type",
        ),
        (
            {"user_id": [1, 1, 1, 2], "age": [1, 2, 3, 4]},
            UserColumns(features=("age",)),
            "1 user ids are in more than one row",
        ),
    ],
)
def test_users_without_a_usable_id_or_feature_are_refused(files, tmp_path, table, users, words):
    events, _, out = files
    pl.DataFrame(table).write_parquet(tmp_path / "people.parquet")
    with pytest.raises(DataError, match=words) as error:
        import_files(
            events, out, config=dataclasses.replace(CONFIG, users=users), users=str(tmp_path / "people.parquet")
        )
    assert "people.parquet" in str(error.value)
    assert not Path(out).exists()


def test_a_log_that_was_imported_before_there_were_users_is_found_again(files):
    events, items, out = files
    import_files(events, out, config=CONFIG, items=items)
    source = json.loads(Path(out, "source.json").read_text())
    assert "users" not in source["mapping"]
    del source["user_rows"]
    Path(out, "source.json").write_text(json.dumps(source))
    found = import_files(events, out, config=CONFIG, items=items)
    assert (found.reused, found.users) == (True, 0)


def test_json_lines_with_string_ids_and_actions(tmp_path):
    rows = [
        {"user_id": "u1", "item_id": "a", "timestamp": 5, "kind": "view"},
        {"user_id": "u2", "item_id": "b", "timestamp": 6},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = ImportConfig(columns=EventColumns(action="kind"))
    import_files(str(tmp_path / "log.jsonl"), str(tmp_path / "log"), config=config)
    log = pl.read_parquet(tmp_path / "log/events-00000.parquet")
    assert log.drop("timestamp").rows() == [("u1", "a", "view"), ("u2", "b", None)]


def test_an_imported_log_prepares_without_any_mapping(files, prepare, tmp_path):
    events, items, out = files
    import_files(events, out, config=CONFIG, items=items)
    prepare(out, tmp_path / "shards")
    data = Shards.open(str(tmp_path / "shards"))
    assert data.manifest.schema["id_types"] == {"user_id": "int64", "item_id": "int64"}
    assert set(data.vocabulary.features) == {"genres", "year"}


def test_events_of_rare_items_are_left_out_and_counted_over_all_files(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.csv").write_text("uid;movie;when;stars\n1;5;100;3\n2;6;200;4\n1;7;150;5\n")
    (logs / "b.csv").write_text("uid;movie;when;stars\n3;5;100;3\n3;7;not a time;1\n")
    config = dataclasses.replace(CONFIG, min_item_events=2, max_rejected_ratio=0.5)
    result = import_files(str(logs), str(tmp_path / "log"), config=config)
    # The row without a time is no event of item 7.
    assert (result.events, result.rejected) == (2, 1)
    assert result.left_out == {"events of items with fewer than 2": 2}
    assert pl.read_parquet(tmp_path / "log" / "events-00000.parquet")["item_id"].to_list() == [5, 5]
    with pytest.raises(DataError, match="no item has 9 events; lower min_item_events"):
        import_files(str(logs), str(tmp_path / "none"), config=dataclasses.replace(config, min_item_events=9))
    assert not (tmp_path / "none").exists()


def test_a_log_imported_before_there_was_a_limit_is_still_the_same(files):
    events, items, out = files
    import_files(events, out, config=CONFIG, items=items)
    mapping = json.loads(Path(out, "source.json").read_text())["mapping"]
    assert "min_item_events" not in mapping
    assert {"missing", "quoted", "typed_header"}.isdisjoint([*mapping["files"], *mapping["items"]["files"]])
    with pytest.raises(DataError, match=r"imported with mapping\.min_item_events=None, asked is 2"):
        import_files(events, out, config=dataclasses.replace(CONFIG, min_item_events=2), items=items)


def test_an_imported_log_keeps_times_as_fine_as_they_are(tmp_path, prepare, monkeypatch):
    from pipeline.sources import event_log

    monkeypatch.setattr(event_log, "_ROW_GROUP_EVENTS", 1)
    logs, out, shards = tmp_path / "logs", tmp_path / "log", tmp_path / "shards"
    logs.mkdir()
    (logs / "a.csv").write_text("user_id,item_id,timestamp\nu,a,1709164800\n")
    (logs / "b.jsonl").write_text('{"user_id": "u", "item_id": "b", "timestamp": "2024-02-29T00:00:00.000000002Z"}\n')
    (logs / "c.csv").write_text("user_id,item_id,timestamp\nu,c,2024-02-29 00:00\n")
    import_files(str(logs), str(out), config=ImportConfig())
    tables = [pl.read_parquet(path) for path in sorted(out.glob("*.parquet"))]
    assert [table.schema["timestamp"] for table in tables] == [pl.Datetime(unit, "UTC") for unit in ("ms", "ns")]
    times = pl.concat(table["timestamp"].dt.epoch("ns") for table in tables) - 1_709_164_800 * 10**9
    assert times.to_list() == [0, 2, 0]
    manifest = prepare(out, shards).manifest
    assert manifest.schema["columns"] == ["user_id", "item_id", "timestamp", "order"]
    assert manifest.counts["accepted"] == 3


def test_files_that_are_left_out_are_named_and_counted_and_change_no_later_import(tmp_path):
    """A log of several tools: a day twice, an empty file, notes, the table of items."""
    folder, out = tmp_path / "days", str(tmp_path / "log")
    folder.mkdir()
    text = "user_id,item_id,timestamp\n1,2,3\n"
    for name in ("a.csv", "copy of a.csv"):
        (folder / name).write_text(text)
    (folder / "b.csv").write_text(text.replace("2,3", "3,4"))
    (folder / "empty.csv").touch()
    (folder / "items.csv").write_text("item_id,kind\n2,x\n")
    config = ImportConfig(items=ItemColumns(features=("kind",)))
    items = str(folder / "items.csv")
    before = import_files(str(folder), f"{out}1", config=config, items=items)
    (folder / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"1 file is not read: days/notes.md .*--files.ignore"):
        import_files(str(folder), out, config=config, items=items)
    assert not Path(out).exists()
    ignoring = dataclasses.replace(config, files=FileFormat(ignore="*.md"))
    assert import_files(str(folder), f"{out}1", config=ignoring, items=items).reused
    result = import_files(str(folder), out, config=ignoring, items=items)
    assert (result.events, before.events, result.items) == (2, 2, 1)
    assert result.left_out == {
        "file empty: days/empty.csv": 1,
        "file equal to another file in content: days/copy of a.csv": 1,
        "file named by files.ignore: days/notes.md": 1,
    }
    source = json.loads(Path(out, "source.json").read_text())
    assert source["files_left_out"] == {
        "days/copy of a.csv": "equal to another file in content",
        "days/empty.csv": "empty",
        "days/notes.md": "named by files.ignore",
    }
    assert "ignore" not in source["mapping"]["files"]
    assert source["mapping"]["files"]["separator"] == "," == source["mapping"]["items"]["files"]["separator"]
    (folder / "notes.md").unlink()
    assert import_files(str(folder), out, config=config, items=items).left_out == result.left_out


def test_times_in_another_unit_are_refused_by_the_key_and_unusual_ones_are_told(tmp_path):
    path, out = tmp_path / "log.csv", str(tmp_path / "log")
    path.write_text("user_id,item_id,timestamp\nu,a,1709164800000\nu,b,1709164801000\n")
    with pytest.raises(DataError, match=r"2 of 2 times .* as ms, not as s: set columns.timestamp_unit ms"):
        import_files(str(path), out, config=ImportConfig(max_rejected_ratio=1))
    milliseconds = ImportConfig(columns=EventColumns(timestamp_unit="ms"))
    assert import_files(str(path), out, config=milliseconds).notes == ()
    path.write_text("user_id,item_id,timestamp\nu,a,1709164800\n")
    with pytest.raises(DataError, match=r"as s, not as ms: set columns.timestamp_unit s"):
        import_files(str(path), f"{out}2", config=milliseconds)
    path.write_text("user_id,item_id,timestamp\nu,a,12\n")
    notes = import_files(str(path), f"{out}3", config=ImportConfig()).notes
    assert notes == ("1 of 1 times lie before 1990 or after tomorrow",)


def test_a_json_time_keeps_every_nanosecond(tmp_path):
    path, out = tmp_path / "log.jsonl", str(tmp_path / "log")
    path.write_text('{"user_id": "u", "item_id": "a", "timestamp": 1706700000.123456789}\n')
    import_files(str(path), out, config=ImportConfig())
    whole = [1_706_700_000_123_456_789]
    assert pl.read_parquet(f"{out}/events-00000.parquet")["timestamp"].to_physical().to_list() == whole
    path.write_text('{"user_id": "u", "item_id": "a", "timestamp": 1706700000123456789}\n')
    import_files(str(path), f"{out}2", config=ImportConfig(columns=EventColumns(timestamp_unit="ns")))
    assert pl.read_parquet(f"{out}2/events-00000.parquet")["timestamp"].to_physical().to_list() == whole


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        ("s", ["1600000000.123456789", "1600000000.123456788", "1600000000.1234567899", "1600000000"]),
        ("ns", ["1600000000123456789.0", "1600000000123456788.0", "1600000000123456789.9", "1600000000123456787"]),
    ],
)
def test_csv_and_json_give_the_same_times_and_the_same_order(tmp_path, prepare, unit, times):
    rows = [f"u,{place},{time}" for place, time in enumerate(times)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    lines = [f'{{"user_id": "u", "item_id": {place}, "timestamp": {time}}}' for place, time in enumerate(times)]
    (tmp_path / "log.json").write_text("\n".join(lines))
    columns, found = EventColumns(timestamp_unit=unit), []
    for name in ("log.csv", "log.json"):
        out = tmp_path / f"{name}.events"
        import_files(str(tmp_path / name), str(out), config=ImportConfig(columns=columns))
        prepare(out, tmp_path / f"{name}.shards")
        data = Shards.open(str(tmp_path / f"{name}.shards"))
        whole = pl.read_parquet(out / "events-00000.parquet")["timestamp"].to_physical().to_list()
        found.append((whole, digest(data.path), data.vocabulary.items.to_pylist(), data.manifest.schema["columns"]))
    assert found[0] == found[1]
    assert found[0][0][:2] == [1_600_000_000_123_456_789, 1_600_000_000_123_456_788]
    assert "order" in found[0][3]


@pytest.mark.parametrize(("day", "read"), [("20240131", "2024-01-31"), ("20240131123456", "2024-01-31 12:34:56")])
@pytest.mark.parametrize("form", ["csv", "jsonl", "floats"])
def test_dates_written_as_numbers_are_refused_by_column_and_value_until_they_are_read_as_dates(
    tmp_path, day, read, form
):
    path, out = tmp_path / f"log.{'parquet' if form == 'floats' else form}", str(tmp_path / "log")
    rows = [("u", "a", day), ("u", "b", day), ("v", "b", "20240230")]
    if form == "csv":
        path.write_text("user_id,item_id, day \n" + "".join(f"{','.join(row)}\n" for row in rows))
    elif form == "jsonl":
        lines = [json.dumps({"user_id": u, "item_id": i, " day ": int(d)}) for u, i, d in rows]
        path.write_text("\n".join(lines))
    else:
        table = pl.DataFrame(rows, schema=["user_id", "item_id", " day "], orient="row")
        table.with_columns(pl.col(" day ").cast(pl.Float64)).write_parquet(path)
    shown = f"{day}.0" if form == "floats" else day
    for unit in ("s", "ms", "us", "ns"):
        config = ImportConfig(columns=EventColumns(timestamp=" day ", timestamp_unit=unit), max_rejected_ratio=1)
        with pytest.raises(DataError) as error:
            import_files(str(path), out, config=config)
        assert str(error.value) == (
            f"{tmp_path.name}/{path.name}: 2 of 3 times in column ' day ', such as {shown}, lie between 1990 and "
            f"tomorrow as dates (YYYYMMDD), not as {unit}: set columns.timestamp_unit date"
        )
    columns = EventColumns(timestamp=" day ", timestamp_unit="date")
    with pytest.raises(DataError, match=r"20240230.* \(invalid time, row 3"):
        import_files(str(path), out, config=ImportConfig(columns=columns))
    result = import_files(str(path), out, config=ImportConfig(columns=columns, max_rejected_ratio=0.5))
    assert (result.events, result.rejected, result.notes) == (2, 1, ())
    times = pl.read_parquet(f"{out}/events-00000.parquet")["timestamp"]
    assert {str(time) for time in times} == {str(pl.Series([read]).str.to_datetime(time_zone="UTC", time_unit="ms")[0])}


def test_a_data_error_shows_a_bad_value_and_a_way_out_that_the_command_has(tmp_path):
    path, out = tmp_path / "log.csv", str(tmp_path / "log")
    path.write_text("user_id,item_id,timestamp\nu,a,1709164800\nu,b,29.02.2024\n")
    bad = rf"for example '29.02.2024' \(invalid time, row 2 of {tmp_path.name}/log.csv\); check the rows, columns"
    with pytest.raises(DataError, match=bad):
        import_files(str(path), out, config=ImportConfig())
    published = r"29.02.2024.*; get taobao again, read it with `solar import files` and a mapping, or raise max_"
    with pytest.raises(DataError, match=published):
        import_files(str(path), out, config=ImportConfig(), published="taobao")
    path.write_text("user_id,item_id,timestamp\nu,a,1709164800000\n")
    with pytest.raises(
        DataError, match=r"get x again, or read it with `solar import files` and columns.timestamp_unit ms"
    ):
        import_files(str(path), out, config=ImportConfig(), published="x")


def test_a_rating_that_is_no_number_is_a_missing_label(tmp_path):
    path = tmp_path / "log.parquet"
    stars = [5.0, 1.0, float("nan"), float("inf"), None]
    pl.DataFrame({"user_id": "u", "item_id": "abcde", "timestamp": range(5), "stars": stars}).write_parquet(path)
    config = ImportConfig(columns=EventColumns(label="stars"), min_label=4, max_rejected_ratio=0.9)
    import_files(str(path), str(tmp_path / "log"), config=config)
    assert pl.read_parquet(tmp_path / "log/events-00000.parquet")["label"].to_list() == [1, 0]
    assert pl.read_parquet(tmp_path / "log/rejected.parquet")["reason"].to_list() == ["missing label"] * 3


def test_a_word_is_no_rating_and_blanks_around_a_number_do_not_matter(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("user_id,item_id,timestamp,r\nu,a,1,true\nu,b,1,1\nu,c,1,4 \nu,d,1, 5\n")
    config = ImportConfig(columns=EventColumns(label="r"), min_label=4, max_rejected_ratio=0.9)
    done = import_files(str(path), str(tmp_path / "log"), config=config)
    events = pl.read_parquet(tmp_path / "log/events-00000.parquet")
    assert dict(zip(events["item_id"], events["label"], strict=True)) == {"b": 0, "c": 1, "d": 1}
    assert done.rejected == 1


def test_ids_in_json_are_integers_however_they_are_written_or_strings(tmp_path):
    path = tmp_path / "log.jsonl"
    ids = ["1", "1.0", "1e0", '"1"', "true", "1.5", "1e300"]
    path.write_text("".join(f'{{"user_id": {value}, "item_id": 5, "timestamp": 9}}\n' for value in ids))
    done = import_files(str(path), str(tmp_path / "log"), config=ImportConfig(max_rejected_ratio=0.9))
    assert pl.read_parquet(tmp_path / "log/events-00000.parquet")["user_id"].to_list() == ["1"] * 4
    assert done.rejected == 3


def test_rows_of_one_item_are_joined_and_rows_that_differ_are_refused(tmp_path):
    log, items, out = tmp_path / "log.csv", tmp_path / "items.csv", str(tmp_path / "out")
    log.write_text("user_id,item_id,timestamp\nu,1,5\n")
    items.write_text("item_id,kind,tags\n1,a,red\n1,a,blue\n1,a,red\n2,b,big\n,c,lost\n")
    columns = ItemColumns(features=("kind",), list_features=("tags",))
    done = import_files(str(log), out, config=ImportConfig(items=columns), items=str(items))
    table = pl.read_parquet(tmp_path / "out/items.parquet")
    assert table.rows() == [("1", "a", ["red", "blue"]), ("2", "b", ["big"])]
    assert (done.items, done.left_out) == (2, {"rows of the items table whose id is missing or of another type": 1})
    items.write_text("item_id,kind,tags\n1,a,red\n1,b,blue\n")
    with pytest.raises(DataError, match=r"items.csv: 1 items are in several rows with different kind, such as '1'"):
        import_files(str(log), str(tmp_path / "other"), config=ImportConfig(items=columns), items=str(items))


def test_rows_of_users_whose_id_no_event_can_have_are_counted(tmp_path):
    log, users = tmp_path / "log.parquet", tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [5]}).write_parquet(log)
    config = ImportConfig(users=UserColumns(features=("age",)))
    for number, ids in enumerate(([1, None, 3], ["1", "x", "y"], [1.0, 1.5, None])):
        pl.DataFrame({"user_id": ids, "age": ["a", "b", "c"]}).write_parquet(users)
        done = import_files(str(log), str(tmp_path / f"out-{number}"), config=config, users=str(users))
        lost = 1 if number == 0 else 2
        assert done.left_out == {"rows of the users table whose id is missing or of another type": lost}
        assert done.users == 3 - lost


def test_a_pattern_that_matches_nothing_is_refused_and_names_in_messages_are_patterns(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.csv").write_text("user_id,item_id,timestamp\nu,1,5\n")
    (logs / "b.csv").write_text("user_id,item_id,timestamp\nu,2,5\n")
    for number, pattern in enumerate(("logs/b.csv", "./b.csv", "b.*")):
        config = ImportConfig(files=FileFormat(ignore=pattern))
        assert import_files(str(logs), str(tmp_path / f"log-{number}"), config=config).events == 1
    for path in (logs, logs / "a.csv"):
        with pytest.raises(DataError, match=r"files.ignore '\*.CSV' matches no file there; correct or omit it"):
            import_files(str(path), str(tmp_path / "log"), config=ImportConfig(files=FileFormat(ignore="*.CSV")))


@pytest.mark.parametrize(("name", "is_used"), [("item_id", True), ("x", False)])
def test_parquet_columns_of_one_name_matter_where_they_are_used(tmp_path, name, is_used):
    values = [pa.array(["u"]), pa.array(["i"]), pa.array([9]), pa.array(["a"]), pa.array(["b"])]
    names = ["user_id", "item_id", "timestamp", "x" if name == "x" else name, "x" if name == "x" else "y"]
    pq.write_table(pa.Table.from_arrays(values, names=names), tmp_path / "log.parquet")
    if is_used:
        with pytest.raises(DataError, match=r"log.parquet: 2 columns are called 'item_id' .* rename all but one"):
            import_files(str(tmp_path / "log.parquet"), str(tmp_path / "log"), config=ImportConfig())
    else:
        assert import_files(str(tmp_path / "log.parquet"), str(tmp_path / "log"), config=ImportConfig()).events == 1


def test_a_log_without_a_valid_row_says_why(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,i,yesterday\n")
    with pytest.raises(DataError, match=r"all 1 rows are invalid \(invalid time: 1\); for example 'yesterday'"):
        import_files(str(path), str(tmp_path / "log"), config=ImportConfig(max_rejected_ratio=1))


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("name", ["log.csv", "items.csv", "users.csv"])
def test_a_file_that_changes_between_its_checksum_and_its_reading_leaves_nothing(tmp_path, monkeypatch, change, name):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "u,a,1\nu,b,2\n" * 50)
    (tmp_path / "items.csv").write_text("item_id,kind\nu,x\n")
    # A user may not be there twice, which is what a file that grows would have; a row of nobody may.
    (tmp_path / "users.csv").write_text("user_id,plan\nu,x\n,x\n")
    config = ImportConfig(items=ItemColumns(features=("kind",)), users=UserColumns(features=("plan",)))
    given = {"config": config, "items": str(tmp_path / "items.csv"), "users": str(tmp_path / "users.csv")}
    out = tmp_path / "logs" / "shop"
    with monkeypatch.context() as patch:
        original = readers.log_schema
        patch.setattr(
            readers, "log_schema", lambda *files, **named: change(tmp_path / name) or original(*files, **named)
        )
        with pytest.raises(DataError, match=rf"/{name} changed while it was read; nothing was written; run the same"):
            import_files(str(tmp_path / "log.csv"), str(out), **given)
    assert list(out.parent.iterdir()) == []
    if change is not truncated:
        assert not import_files(str(tmp_path / "log.csv"), str(out), **given).reused


def test_a_json_file_with_the_events_inside_of_an_object_is_refused_by_the_keys_that_are_there(tmp_path, prepare):
    path = tmp_path / "log.json"
    path.write_text('{"data": [{"user_id": "u", "item_id": "a", "timestamp": 1}], "count": 1}')
    told = r"all 1 rows are invalid .*; its first row has 'data', 'count', but not 'user_id', 'item_id', 'timestamp'; "
    with pytest.raises(DataError, match=told):
        import_files(str(path), str(tmp_path / "log"), config=ImportConfig())
    with pytest.raises(DataError, match=told):
        prepare(path, tmp_path / "shards", columns=EventColumns())
