"""Every file of a path is read, or left out and named, or refused by name."""

import json
import os
import socket
from pathlib import Path

import polars as pl
import pytest

from pipeline.events import DataError
from pipeline.log.inputs import AGAIN, EMPTY, IGNORED, FileFormat, find, find_inputs, summary
from pipeline.sources.event_log import write_event_log

ROWS = "user_id,item_id,timestamp\n1,2,3\n"


@pytest.fixture
def folder(tmp_path):
    """A folder `log` with these files."""

    def make(*names, text=ROWS):
        for name in names:
            path = tmp_path / "log" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "log")

    return make


def names(path, **options):
    return [file.name for file in find_inputs(str(path), options=FileFormat(**options))]


def formats(path, **options):
    found = find_inputs(str(path), options=FileFormat(**options))
    return {file.name.split("/")[-1]: (file.format, file.compression, file.separator) for file in found}


def test_known_endings_of_any_case_tell_format_compression_and_separator(folder):
    log = folder("a.csv", "b.TSV.gz", "c.json.ZST", "d.JsonL.bz2", "e.ndjson.xz", "f.Parquet", "g.csv.zip")
    assert formats(log) == {
        "a.csv": ("csv", None, ","),
        "b.TSV.gz": ("csv", ".gz", "\t"),
        "c.json.ZST": ("jsonl", ".zst", ","),
        "d.JsonL.bz2": ("jsonl", ".bz2", ","),
        "e.ndjson.xz": ("jsonl", ".xz", ","),
        "f.Parquet": ("parquet", None, ","),
        "g.csv.zip": ("csv", ".zip", ","),
    }
    assert formats(log, separator=";")["b.TSV.gz"] == ("csv", ".gz", ";")


def test_the_given_format_is_that_of_names_without_one_and_of_a_single_file(folder):
    log = folder("part-00000", "part-00001.gz", "day.txt", "day.json")
    given = {
        "part-00000": ("csv", None, ","),
        "part-00001.gz": ("csv", ".gz", ","),
        "day.txt": ("csv", None, ","),
        "day.json": ("jsonl", None, ","),
    }
    assert formats(log, format="csv") == formats(f"{log}/*", format="csv") == given
    assert formats(f"{log}/day.json", format="csv") == {"day.json": ("csv", None, ",")}
    assert formats(f"{log}/day.txt", format="json") == {"day.txt": ("jsonl", None, ",")}


def test_files_of_unknown_format_are_refused_by_name_and_number(folder):
    log = folder("a.csv", "notes.md", "part-0", "sub/b.bak", "sub/c.log", "sub/d.csv")
    with pytest.raises(DataError) as error:
        find_inputs(log, options=FileFormat())
    assert str(error.value) == (
        f"{log}: 4 files are not read: log/notes.md (its name does not tell the format), log/part-0 (its name does not "
        "tell the format), log/sub/b.bak (its name does not tell the format) and 1 more; give their format with "
        "--files.format, or leave them out with --files.ignore '[PATTERN, ...]'"
    )


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("notes.md", {"notes.md"}),
        ("*.md", {"notes.md", "old/b.md"}),
        (["old", "*.md"], {"notes.md", "old/b.md", "old/[1].csv"}),
        ("old/*", {"old/b.md", "old/[1].csv"}),
        ("[1].csv", {"old/[1].csv"}),
    ],
)
def test_a_pattern_leaves_out_names_and_folders_and_they_are_told(folder, ignore, left):
    found = find(folder("a.csv", "notes.md", "old/b.md", "old/[1].csv"), options=FileFormat(ignore=ignore))
    assert found.left_out == {f"log/{name}": IGNORED for name in left}
    assert set(found.unread) == {"log/notes.md", "log/old/b.md"} - set(found.left_out)


def test_hidden_files_and_markers_are_apart_unless_a_pattern_names_them(folder):
    log = folder("a.csv", "_SUCCESS", ".a.csv.crc", "._a.csv", "_temporary/0/b.csv", ".tmp/c.csv")
    found = find(log, options=FileFormat())
    assert ([file.name for file in found.inputs], found.left_out, found.unread) == (["log/a.csv"], {}, {})
    assert names(f"{log}/*") == ["log/a.csv"]
    assert names(f"{log}/_temporary/*/*.csv") == ["_temporary/0/b.csv"]


def test_an_empty_file_is_told_and_a_log_of_empty_files_is_refused(folder):
    log = folder("a.csv", "b.jsonl", text="")
    with pytest.raises(DataError, match=r"no event files there \(2 files empty: log/a.csv, log/b.jsonl\); expected"):
        find(log, options=FileFormat())
    folder("c.csv")
    assert find(log, options=FileFormat()).left_out == {"log/a.csv": EMPTY, "log/b.jsonl": EMPTY}


def test_the_tables_of_an_event_log_are_known_beside_its_source_json_alone(tmp_path):
    def fill(writer):
        writer.add_events(pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [3]}))
        writer.add_items(pl.DataFrame({"item_id": [2], "kind": ["x"]}))
        writer.add_rejected(pl.DataFrame({"reason": ["x"], "record": [""]}))

    log = str(tmp_path / "log")
    write_event_log(log, source={}, fill=fill)
    found = find(log, options=FileFormat())
    assert ([file.name for file in found.inputs], found.left_out, found.unread) == (
        ["log/events-00000.parquet"], {}, {}
    )  # fmt: skip
    assert names(f"{log}/*.parquet") == ["log/events-00000.parquet"]
    # Without a source.json of ours nobody knows what they are, unless they are read as tables.
    Path(log, "source.json").write_text(json.dumps([{"user_id": 1, "item_id": 2, "timestamp": 3}]))
    assert list(find(log, options=FileFormat()).unread) == ["log/items.parquet", "log/rejected.parquet"]
    found = find(log, options=FileFormat(), tables=[f"{log}/items.parquet"])
    assert [file.name for file in found.inputs] == ["log/events-00000.parquet", "log/source.json"]
    assert list(found.unread) == ["log/rejected.parquet"]


def test_a_table_inside_the_log_is_not_read_as_events(folder):
    log = folder("clicks.csv", "products.csv")
    found = find(log, options=FileFormat(), tables=[f"{log}/products.csv"])
    assert [file.name for file in found.inputs] == ["log/clicks.csv"]


def test_a_file_beside_its_compressed_form_is_refused(folder):
    log = folder("a.csv", "a.csv.gz", "b.csv.gz", "b.json.gz")
    with pytest.raises(DataError, match=r"1 file is not read: log/a.csv.gz \(beside log/a.csv: which of the two\?\)"):
        find_inputs(log, options=FileFormat())
    assert len(find_inputs(log, options=FileFormat(ignore="a.csv.gz"))) == 3


def test_links_to_files_and_folders_are_followed(folder, tmp_path):
    log = folder("a.csv")
    (tmp_path / "other/deep").mkdir(parents=True)
    (tmp_path / "other/deep/b.csv").write_text(ROWS)
    os.symlink(tmp_path / "other", f"{log}/linked")
    os.symlink(tmp_path / "other/deep", tmp_path / "start")
    assert names(log) == ["log/a.csv", "log/linked/deep/b.csv"]
    assert names(f"{log}/**/*.csv") == ["log/a.csv", "log/linked/deep/b.csv"]
    assert names(tmp_path / "start") == ["start/b.csv"]


def test_a_file_with_several_ways_to_it_is_read_once_under_its_own_name(folder):
    log = folder("dt=2/z.csv", "y.csv")
    os.symlink("dt=2", f"{log}/current")
    os.symlink("y.csv", f"{log}/a.csv")
    os.link(f"{log}/y.csv", f"{log}/z.csv")
    found = find(log, options=FileFormat())
    assert [file.name for file in found.inputs] == ["log/dt=2/z.csv", "log/y.csv"]
    assert found.left_out == dict.fromkeys(("log/current", "log/a.csv", "log/z.csv"), AGAIN)
    assert summary(found.left_out) == {f"files {AGAIN}: log/a.csv, log/current, log/z.csv": 3}


def test_crossed_links_end_and_list_each_file_once(folder):
    """Each folder has two links to the next: 2^40 ways to the last one."""
    log = folder(*(f"{n}/x.csv" for n in range(40)))
    for n in range(39):
        for side in "lr":
            os.symlink(f"../{n + 1}", f"{log}/{n}/{side}")
    assert len(find_inputs(log, options=FileFormat())) == 40
    assert len(find_inputs(f"{log}/0/**", options=FileFormat())) == 40


@pytest.mark.parametrize("target", [".", "..", "../.."])
@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.csv"])
def test_a_link_to_a_folder_above_is_refused(folder, target, pattern):
    log = folder("sub/a.csv")
    os.symlink(target, f"{log}/sub/loop")
    with pytest.raises(DataError, match=r"log/sub/loop \(a link to a folder that it lies in\)"):
        find_inputs(log + pattern, options=FileFormat())
    assert names(log + pattern, ignore="loop") == ["log/sub/a.csv"]


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: os.symlink("nowhere", path), "a link to nothing"),
        (lambda path: os.symlink(os.path.basename(path), path), "not readable: Too many levels of symbolic links"),
        (os.mkfifo, "a FIFO"),
        (make_socket, "a socket"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ],
)
def test_what_is_no_file_is_refused_at_once_by_its_kind(folder, make, why, monkeypatch):
    monkeypatch.chdir(folder("a.csv"))
    make("b.csv")
    for path in (".", "*", "*.csv"):
        with pytest.raises(DataError, match=rf"1 file is not read: log/b.csv \({why}\)"):
            find_inputs(path, options=FileFormat())
        assert names(path, ignore="b.*") == ["log/a.csv"]
    with pytest.raises(DataError, match=rf"^b.csv: {why}; name a regular file"):
        find_inputs("b.csv", options=FileFormat())


def test_an_unreadable_file_or_folder_is_refused_by_name(folder, monkeypatch):
    log = folder("a.csv", "secret.csv", "closed/b.csv")

    def scandir(path, real=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    # The rights themselves do not stop root.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("secret.csv"))
    monkeypatch.setattr(os, "scandir", scandir)
    unread = find(log, options=FileFormat()).unread
    assert unread == dict.fromkeys(("log/secret.csv", "log/closed"), "not readable by this user")


@pytest.mark.parametrize("name", ["a[1].csv", "*.csv", "a?.csv", "s3::day.csv", "a b#c%20.csv", "日々-é.csv", "~.csv"])
def test_any_name_that_exists_is_taken_as_it_is(folder, name):
    log = folder(name, "a1.csv", f"{name}.d/b.csv")
    assert names(f"{log}/{name}") == [f"log/{name}"]
    assert names(f"{log}/{name}.d") == [f"{name}.d/b.csv"]
    assert f"log/{name}" in names(log)
    for file in find_inputs(log, options=FileFormat()):
        with file.open() as stream:
            assert stream.read() == ROWS.encode()


def test_a_name_that_is_not_utf8_is_refused_and_printable(folder):
    log = folder("a.csv")
    strange = os.fsdecode(b"caf\xe9.csv")
    Path(log, strange).write_text(ROWS)
    for path in (log, f"{log}/*"):
        with pytest.raises(DataError, match=r"log/caf\\xe9.csv \(a name that is not UTF-8\)"):
            find_inputs(path, options=FileFormat())
        assert names(path, ignore="caf*") == ["log/a.csv"]
    with pytest.raises(DataError, match=r"/log/caf\\xe9.csv: the name is not UTF-8; rename it"):
        find_inputs(f"{log}/{strange}", options=FileFormat())


def test_missing_path_empty_directory_and_unknown_format_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        find_inputs(str(tmp_path / "nowhere"), options=FileFormat())
    for path in (tmp_path, tmp_path / "*.csv", tmp_path / "**"):
        with pytest.raises(DataError, match="no event files"):
            find_inputs(str(path), options=FileFormat())
    (tmp_path / "log.dat").write_text("")
    with pytest.raises(DataError, match="set format"):
        find_inputs(str(tmp_path / "log.dat"), options=FileFormat())


def test_another_file_system_is_listed_in_the_same_way():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("day[1].csv", "sub/a::b.csv", "sub/_SUCCESS", "sub/notes.md", "empty.csv"):
        memory.pipe_file(f"/bucket/log/{name}", b"" if name == "empty.csv" else ROWS.encode())
    found = find("memory://bucket/log", options=FileFormat())
    assert [file.name for file in found.inputs] == ["log/day[1].csv", "log/sub/a::b.csv"]
    assert (list(found.left_out), list(found.unread)) == (["log/empty.csv"], ["log/sub/notes.md"])
    assert names("memory://bucket/log/day[1].csv") == ["log/day[1].csv"]
    assert names("memory://bucket/log/*", ignore="*.md") == ["log/day[1].csv", "log/sub/a::b.csv"]
    for file in found.inputs:
        with file.open() as stream:
            assert stream.read() == ROWS.encode()
