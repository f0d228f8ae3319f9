"""Public data sets as their owners publish them -> event log: which files, which columns, which labels are positive.

A layout is plain data that files.py interprets; each data set names the public page that documents its layout. Files
are found inside a directory by their names, so that an unpacked download can be given unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from pipeline.events import DataError, EventColumns
from pipeline.log import inputs, readers
from pipeline.log.inputs import FileFormat
from pipeline.sources.event_log import Imported
from pipeline.sources.files import ImportConfig, ItemColumns, Progress, Reshape, UserColumns, import_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a data set is published."""

    events: tuple[str, ...]
    """Patterns of file names; every one must match."""
    config: ImportConfig
    items: str | None = None
    """Pattern of the items table, which is read if it exists."""
    users: str | None = None
    """Pattern of the users table, which is read if it exists."""
    reshape: Reshape | None = None
    """Rows as they are in the file -> one row per event, with a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A public data set."""

    source: str
    """Where its layout is documented."""
    layouts: tuple[Layout, ...]
    """The first one whose files exist is read."""


_CSV = FileFormat(format="csv")
_DAT = FileFormat(format="csv", separator="::", encoding="latin-1")
_TSV = FileFormat(format="csv", separator="\t", quoted=False)


def _explode_impressions(rows: pl.DataFrame) -> pl.DataFrame:
    """MIND: "N1-0 N2-1" -> one event for each shown item, with label 1 if it was clicked."""
    shown = rows.with_columns(pl.col("item_id").str.split(" ")).explode("item_id")
    parts = pl.col("item_id").str.splitn("-", 2).struct
    # Impression numbers start again at 1 in each file.
    request = pl.format("{} {}", "request_id", "timestamp")
    return shown.with_columns(
        item_id=parts.field("field_0"),
        label=parts.field("field_1"),
        request_id=request,
        timestamp=pl.col("timestamp").str.to_datetime("%m/%d/%Y %I:%M:%S %p", strict=False),
    )


_MOVIES = ItemColumns(item_id="movieId", list_features=("genres",), files=_CSV)
_LIKED = 4.0
"""Ratings of at least this many stars are positives."""

PUBLISHED: Mapping[str, Published] = {
    "movielens": Published(
        source="https://files.grouplens.org/datasets/movielens/ (README of each data set)",
        layouts=(
            # 20M, 25M, 32M, latest, latest-small.
            Layout(
                events=("ratings.csv",),
                config=ImportConfig(
                    columns=EventColumns(user_id="userId", item_id="movieId", label="rating", integer_ids=True),
                    items=_MOVIES, files=_CSV, min_label=_LIKED,
                ),
                items="movies.csv",
            ),
            # 1M, 10M.
            Layout(
                events=("ratings.dat",),
                config=ImportConfig(
                    columns=EventColumns(label="rating", integer_ids=True),
                    files=dataclasses.replace(_DAT, header=("user_id", "item_id", "rating", "timestamp")),
                    items=ItemColumns(
                        list_features=("genres",),
                        files=dataclasses.replace(_DAT, header=("item_id", "title", "genres")),
                    ),
                    users=UserColumns(
                        features=("gender", "age", "occupation"),
                        files=dataclasses.replace(_DAT, header=("user_id", "gender", "age", "occupation", "zip")),
                    ),
                    min_label=_LIKED,
                ),
                items="movies.dat", users="users.dat",
            ),
            # 100K.
            Layout(
                events=("u.data",),
                config=ImportConfig(
                    columns=EventColumns(label="rating", integer_ids=True),
                    files=dataclasses.replace(_TSV, header=("user_id", "item_id", "rating", "timestamp")),
                    users=UserColumns(
                        features=("gender", "occupation"),
                        files=FileFormat(
                            format="csv", separator="|", header=("user_id", "age", "gender", "occupation", "zip")
                        ),
                    ),
                    min_label=_LIKED,
                ),
                users="u.user",
            ),
        ),
    ),
    "kuairand": Published(
        source="https://github.com/chongminggao/KuaiRand (README: Pure, 1K and 27K differ in the suffix of file names)",
        layouts=(
            Layout(
                events=("log_standard_*.csv",),
                config=ImportConfig(
                    columns=EventColumns(
                        item_id="video_id", timestamp="time_ms", timestamp_unit="ms", action="tab", label="is_click",
                        integer_ids=True,
                    ),
                    items=ItemColumns(
                        item_id="video_id", features=("author_id", "video_type", "upload_type", "music_type"),
                        list_features=("tag",), list_separator=",", files=_CSV,
                    ),
                    users=UserColumns(
                        features=("user_active_degree", "follow_user_num_range", "register_days_range"), files=_CSV
                    ),
                    files=_CSV,
                ),
                items="video_features_basic_*.csv", users="user_features_*.csv",
            ),
        ),
    ),
    "amazon-2023": Published(
        source="https://amazon-reviews-2023.github.io/ (raw reviews; rating_only files of the benchmarks)",
        layouts=(
            Layout(
                events=("*.csv",),
                config=ImportConfig(
                    columns=EventColumns(item_id="parent_asin", timestamp_unit="ms", label="rating"),
                    files=_CSV,
                    min_label=_LIKED,
                ),
            ),
            Layout(
                events=("*.jsonl*",),
                config=ImportConfig(
                    columns=EventColumns(item_id="parent_asin", timestamp_unit="ms", label="rating"), min_label=_LIKED
                ),
            ),
        ),
    ),
    "mind": Published(
        source="https://learn.microsoft.com/azure/open-datasets/dataset-microsoft-news",
        layouts=(
            Layout(
                events=("behaviors.tsv",),
                config=ImportConfig(
                    columns=EventColumns(
                        user_id="user", item_id="shown", timestamp="time", request_id="impression", label="label"
                    ),
                    files=dataclasses.replace(_TSV, header=("impression", "user", "time", "history", "shown")),
                    items=ItemColumns(
                        features=("category", "subcategory"),
                        files=dataclasses.replace(
                            _TSV,
                            header=(
                                "item_id", "category", "subcategory", "title", "abstract", "url", "title_entities",
                                "abstract_entities",
                            ),
                        ),
                    ),
                ),
                items="news.tsv",
                reshape=_explode_impressions,
            ),
        ),
    ),
    "taobao": Published(
        source="https://tianchi.aliyun.com/dataset/649 (User Behavior Data from Taobao for Recommendation)",
        layouts=(
            Layout(
                events=("UserBehavior.csv*",),
                config=ImportConfig(
                    columns=EventColumns(action="behavior", integer_ids=True),
                    files=FileFormat(format="csv", header=("user_id", "item_id", "category", "behavior", "timestamp")),
                ),
            ),
        ),
    ),
    "yambda": Published(
        source="https://huggingface.co/datasets/yandex/yambda (flat files; times count from the start of the log)",
        layouts=(
            Layout(
                events=("multi_event.parquet",),
                config=ImportConfig(columns=EventColumns(user_id="uid", action="event_type")),
            ),
            Layout(events=("listens.parquet",), config=ImportConfig(columns=EventColumns(user_id="uid"))),
            Layout(events=("likes.parquet",), config=ImportConfig(columns=EventColumns(user_id="uid"))),
        ),
    ),
    "recbole": Published(
        source="https://recbole.io/docs/user_guide/data/atomic_files.html",
        layouts=(
            Layout(
                events=("*.inter",),
                config=ImportConfig(files=dataclasses.replace(_TSV, typed_header=True)),
                items="*.item", users="*.user",
            ),
        ),
    ),
}  # fmt: skip


def import_published(name: str, path: str, out: str, *, progress: Progress | None = None) -> Imported:
    """Write the event log `out` of a public data set, from its unpacked directory or its events file.

    DataError: a file is missing, or an error of import_files, which names the file.
    """
    published = PUBLISHED[name]
    for layout in published.layouts:
        if all(_find(path, pattern) for pattern in layout.events):
            break
    else:
        wanted = " or ".join(" and ".join(layout.events) for layout in published.layouts)
        raise DataError(f"{path}: no {wanted} there; unpack {name} as published: {published.source}")
    events = [file for pattern in layout.events for file in _find(path, pattern)]
    config = layout.config
    items, users = (_only(path, pattern) for pattern in (layout.items, layout.users))
    if name == "recbole":
        config = _atomic_config(config, events[0], items, users)
        items = items if config.items.features or config.items.list_features else None
        users = users if config.users.features or config.users.list_features else None
    return import_files(
        events, out, config=config, items=items, users=users, reshape=layout.reshape, published=name, progress=progress,
    )  # fmt: skip


def _find(path: str, pattern: str) -> list[str]:
    """Files with this name pattern: the path itself if it is a file, else files inside it."""
    root = Path(path)
    found = sorted(root.rglob(pattern)) if root.is_dir() else [root] if root.match(pattern) else []
    return [str(file) for file in found if file.is_file()]


def _only(path: str, pattern: str | None) -> str | None:
    """The table next to the events; the first one if each part of the data set has a copy."""
    root = Path(path)
    found = _find(str(root if root.is_dir() else root.parent), pattern) if pattern else []
    return found[0] if found else None


def _atomic_config(config: ImportConfig, events: str, items: str | None, users: str | None) -> ImportConfig:
    """The columns by their type in the header: token = id or category, token_seq = list of categories."""
    event_kinds = _kinds(events)
    if "timestamp" not in event_kinds:
        raise DataError(f"{events}: no column timestamp; without times use `solar import files` with an order")
    columns = EventColumns(label="label" if "label" in event_kinds else None)
    tables = {}
    for file, kind, key in ((items, ItemColumns, "items"), (users, UserColumns, "users")):
        kinds = _kinds(file) if file else {}
        kinds.pop(f"{key[:-1]}_id", None)
        tables[key] = kind(
            features=tuple(name for name, found in kinds.items() if found == "token"),
            list_features=tuple(name for name, found in kinds.items() if found == "token_seq"),
            list_separator=" ", files=config.files,
        )  # fmt: skip
    return dataclasses.replace(config, columns=columns, **tables)


def _kinds(path: str) -> dict[str, str]:
    """{column: token, token_seq, float or float_seq} of an atomic file."""
    (file,) = inputs.find_inputs(path, options=_TSV)
    pairs = [name.split(":") for name in readers.read_schema(file, options=_TSV)]
    if bad := [pair for pair in pairs if len(pair) != 2]:
        raise DataError(f"{path}: column {':'.join(bad[0])!r} has no type; RecBole writes name:type")
    return {name: kind for name, kind in pairs}
