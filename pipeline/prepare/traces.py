"""What is left of users who should be forgotten: every file that can hold an id is read, whichever manifest names it.

    listed_users    reads the file that names the users
    traces          finds them in a data set

It parses the list by other code than user_list.py, and shares no searching with forgetting.py and compaction.py, whose
work it checks.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.events import DataError, Reason
from pipeline.log.inputs import MISSING_WORDS, FileFormat, find_inputs
from pipeline.log.streams import COMPRESSIONS, open_raw
from pipeline.prepare.staging import STAGING
from pipeline.prepare.user_list import COLUMN, is_table
from pipeline.shards.manifest import Manifest, current_manifest, manifest_numbers, read_manifest
from pipeline.shards.tombstones import Tombstones
from pipeline.storage import Store


def listed_users(path: str, *, column: str | None, integers: bool) -> set[str]:
    """The ids that a file names; it is known to be readable (user_list.read_users)."""
    with _opened(path) as stream:
        texts = set(_texts(stream, path, column or COLUMN)) - {"", None}
    return {str(int(text)) if integers else str(text) for text in texts if text is not None}


def traces(path: str, users: Collection[str]) -> list[str]:
    """What is left of these users in a data set; one line per place. DataError: there is no data set."""
    store, wanted, current = Store(path), set(users), current_manifest(path)
    if current is None:
        raise DataError(f"{path}: no prepared data set there; check the path")
    states = [read_manifest(path, number=number) for number in manifest_numbers(store)]

    # Indexes and shards of all states, and of none: killed runs leave files that no manifest names.
    found = []
    for name in [f"{folder}/{leaf}" for folder in ("index", "shards") for leaf in store.names(folder)]:
        if left := len(wanted & _ids(store, name)):
            found.append(f"{name}: {left} of them ({_named_by(name, states)})")

    # Counts of their requests, unfinished files of other runs, the quarantine.
    counted = {state.fingerprint[:16] for state in states}
    for leaf in store.names("requests"):
        if leaf.partition("-")[0] not in counted:
            found.append(f"requests/{leaf}: counts of requests in a state that was removed; `solar gc` removes them")
    for leaf in [name for name in store.names() if name.startswith(STAGING)] + store.unfinished():
        found.append(f"{leaf}: unfinished files of another run, which may hold their events")
    folders = [f"rejected/{folder}" for folder in store.names("rejected")]
    for name in [f"{folder}/{leaf}" for folder in folders for leaf in store.names(folder)]:
        if left := _about(_rejected(store, name), wanted):
            found.append(f"{name}: {left} rejected rows")

    # Tombstones: the promise that later logs cannot bring them back.
    stones = Tombstones.of(path, current)
    missing = len(wanted) if stones is None else sum(not stones.has(user) for user in wanted)
    if missing:
        found.append(f"tombstones: {missing} of them are not among the forgotten users, a later ingest would add them")
    return found


def _texts(stream: IO[bytes], path: str, column: str) -> Iterator[str | None]:
    kind = re.sub(r"\.(gz|bz2|xz|zst|zip)$", "", path.lower())
    if not is_table(path):
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"):
            yield line[:-2] if line.endswith("\r\n") else line[:-1] if line.endswith("\n") else line
    elif kind.endswith(".parquet"):
        for value in pq.read_table(io.BytesIO(stream.read()), columns=[column])[column].to_pylist():
            yield None if value is None else str(value)
    elif kind.endswith(("csv", "tsv")):
        # Words for no value count without quotes alone, which Python's own reader does not tell apart.
        table = pa_csv.read_csv(
            stream,
            parse_options=pa_csv.ParseOptions(delimiter="\t" if kind.endswith("tsv") else ",", newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                include_columns=[column], column_types={column: pa.string()}, null_values=["", *MISSING_WORDS],
                strings_can_be_null=True, quoted_strings_can_be_null=False,
            ),
        )  # fmt: skip
        yield from table[column].to_pylist()
    else:
        for line in stream.read().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            value = json.loads(line).get(column) if line.strip() else None
            # 1.0 is the integer 1, as in a log.
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            yield None if value is None or value != value else str(value)


def _opened(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    if not is_table(path) and not path.lower().endswith(COMPRESSIONS):
        return open_raw(path, name=path)
    [file] = find_inputs(path, options=FileFormat(format="auto" if is_table(path) else "csv"))
    return file.open()


def _ids(store: Store, name: str) -> set[str]:
    """The ids in column user_id of a file; none if it is not a complete Parquet file."""
    found: set[str] = set()
    # Not found: another command has removed it since it was listed.
    with contextlib.suppress(pa.ArrowInvalid, FileNotFoundError), store.open(name) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False)
        for group in range(parquet.num_row_groups):
            found |= {str(user) for user in parquet.read_row_group(group, columns=["user_id"])["user_id"].to_pylist()}
    return found


def _rejected(store: Store, name: str) -> list[dict[str, str]]:
    """The rows of a file of the quarantine; none if it has been removed since it was listed."""
    try:
        return pq.read_table(io.BytesIO(store.read(name)), columns=["reason", "record"]).to_pylist()
    except FileNotFoundError:
        return []


def _named_by(name: str, states: list[Manifest]) -> str:
    numbers = [str(state.number) for state in states if any(entry["name"] == name for entry in state.entries())]
    if not numbers:
        return "in no manifest: a killed run left it; `solar gc` removes it"
    return f"manifest{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def _about(rows: list[dict[str, str]], wanted: set[str]) -> int:
    """How many rejected rows are about these users."""
    others = [user for user in wanted if re.search(r"[^\w-]", user)]

    def is_about(record: str, is_line: bool) -> bool:
        if is_line:
            return bool(wanted & set(re.split(r"[^\w-]+", record))) or any(user in record for user in others)
        value: Any = json.loads(record).get("user_id")
        return value is not None and str(value) in wanted

    return sum(is_about(row["record"], row["reason"] == Reason.MALFORMED_ROW) for row in rows)
