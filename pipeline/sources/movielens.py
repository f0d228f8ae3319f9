"""MovieLens-100K -> event log. The files are part of RecBole's wheel, which is read as a zip and never imported.

GroupLens permits research use and forbids redistribution, so the data is downloaded, not shipped with this package.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl

from pipeline.events import DataError, quoted
from pipeline.sources.event_log import EventLogWriter, Imported, find_event_log, write_event_log

_REQUIREMENT = "recbole==1.2.1"
_WHEEL = "recbole-1.2.1-py3-none-any.whl"
_WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_MEMBERS = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_OPTIONAL = {"ml-100k.user"}
"""Some local copies do not have it."""
_COLUMNS = {
    "ml-100k.inter": ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
    "ml-100k.item": ["item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"],
    "ml-100k.user": ["user_id:token", "age:token", "gender:token", "occupation:token"],
}
_AGES = (18, 25, 35, 45, 50, 56)
"""Lowest age of each age group except the youngest: the groups of MovieLens-1M."""
_DOWNLOAD_SECONDS = 300
_LIKED = 4


def import_movielens_100k(
    out: str, *, downloads: str, from_file: str | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Imported:
    """Write the event log: user_id, item_id, timestamp, label (rating of 4 or 5), rating; items with genres and
    release_year; users with gender, age group and occupation.

    The wheel is downloaded by pip into `downloads` and kept there, unless `from_file` names a local copy: the wheel,
    or a directory or zip with ml-100k.inter, ml-100k.item and, for user features, ml-100k.user. DataError: the network
    is not reachable, a checksum is wrong, or files are missing.
    """
    report = progress or (lambda stage, done, total: None)
    files = _read_local(Path(from_file)) if from_file is not None else None
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} if files else _MEMBERS
    source = {"source": "movielens-100k", "inputs": [{"name": name, "sha256": value} for name, value in sums.items()]}
    if existing := find_event_log(out, source=source):
        return existing
    report("download", 0, 1)
    files = files or _read_wheel(_obtain_wheel(Path(downloads)))
    report("download", 1, 1)
    tables = {name: _parse(name, data) for name, data in files.items()}

    def fill(writer: EventLogWriter) -> None:
        writer.add_events(_events(tables["ml-100k.inter"]))
        writer.add_items(_items(tables["ml-100k.item"]))
        if "ml-100k.user" in tables:
            writer.add_users(_users(tables["ml-100k.user"]))

    return write_event_log(out, source=source, fill=fill)


def _obtain_wheel(downloads: Path) -> Path:
    wheel = downloads / _WHEEL
    if not wheel.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1"]
            try:
                done = subprocess.run(
                    [*command, "--disable-pip-version-check", "--dest", folder, _REQUIREMENT],
                    capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False,
                )  # fmt: skip
                problem = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1] if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"no answer within {_DOWNLOAD_SECONDS} s"
            if problem or not (Path(folder) / _WHEEL).exists():
                raise DataError(f"pip could not download {_REQUIREMENT} ({problem}); pass a copy with --from FILE")
            os.replace(Path(folder) / _WHEEL, wheel)
    return wheel


def _read_wheel(wheel: Path) -> dict[str, bytes]:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise DataError(
            f"{wheel}: sha256 is {digest[:12]}..., expected {_WHEEL_SHA256[:12]}...; "
            "remove it or pass another copy with --from FILE"
        )
    return _read_zip(wheel)


def _read_local(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        found = {name: next((file for file in sorted(path.rglob(name)) if file.is_file()), None) for name in _MEMBERS}
        if missing := [name for name, file in found.items() if file is None and name not in _OPTIONAL]:
            raise DataError(f"{path}: no {missing[0]} there; --from needs ml-100k.inter and ml-100k.item")
        return {name: file.read_bytes() for name, file in found.items() if file is not None}
    if not path.is_file():
        raise DataError(f"{path}: no such file; --from needs the {_REQUIREMENT} wheel, or its ml-100k files")
    return _read_wheel(path) if path.suffix == ".whl" else _read_zip(path)


def _read_zip(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            places = {entry.rsplit("/", 1)[-1]: entry for entry in archive.namelist()}
            return {name: archive.read(places[name]) for name in _MEMBERS if name in places or name not in _OPTIONAL}
    except KeyError as error:
        raise DataError(f"{path}: no {error.args[0]} inside; --from needs ml-100k.inter and ml-100k.item") from None
    except (zipfile.BadZipFile, OSError):
        raise DataError(f"{path}: not a complete zip file; copy it again or pass another with --from FILE") from None


def _parse(name: str, data: bytes) -> pl.DataFrame:
    try:
        table = pl.read_csv(io.BytesIO(data), separator="\t", quote_char=None, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{name}: not a tab-separated table; pass another copy with --from FILE") from error
    if missing := [column for column in _COLUMNS[name] if column not in table.columns]:
        raise DataError(f"{name}: no column {missing[0]!r}; it has {quoted(table.columns)}; pass RecBole's file")
    return table


def _events(ratings: pl.DataFrame) -> pl.DataFrame:
    rating = pl.col("rating:float").cast(pl.Float32)
    try:
        return ratings.select(
            pl.col("user_id:token").cast(pl.Int64).alias("user_id"),
            pl.col("item_id:token").cast(pl.Int64).alias("item_id"),
            (pl.col("timestamp:float").cast(pl.Float64) * 1000).cast(pl.Int64).alias("timestamp"),
            (rating >= _LIKED).cast(pl.Int8).alias("label"),
            rating.alias("rating"),
        )
    except pl.exceptions.PolarsError:
        raise DataError("ml-100k.inter: an id, rating or time is not a number; pass another copy with --from") from None


def _items(movies: pl.DataFrame) -> pl.DataFrame:
    return movies.select(
        pl.col("item_id:token").cast(pl.Int64).alias("item_id"),
        pl.col("class:token_seq").str.split(" ").alias("genres"),
        pl.col("release_year:token").alias("release_year"),
    )


def _users(people: pl.DataFrame) -> pl.DataFrame:
    labels = [f"under {_AGES[0]}", *(f"{a}-{b - 1}" for a, b in itertools.pairwise(_AGES)), f"{_AGES[-1]} and over"]
    try:
        return people.select(
            pl.col("user_id:token").cast(pl.Int64).alias("user_id"),
            pl.col("age:token").cast(pl.Int64).cut(_AGES, labels=labels, left_closed=True).cast(pl.String).alias("age"),
            pl.col("gender:token").alias("gender"),
            pl.col("occupation:token").alias("occupation"),
        )
    except pl.exceptions.PolarsError:
        raise DataError("ml-100k.user: an id or age is not a number; pass another copy with --from FILE") from None
