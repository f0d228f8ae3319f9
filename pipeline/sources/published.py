"""Public data sets as their owners publish them -> event log: which files, which columns, which labels are positive.

A layout is plain data that files.py interprets; each data set names the public page that documents its layout. Files
are found inside a directory by their names (published_files.py), so that an unpacked download can be given unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import polars as pl

from pipeline.events import EventColumns
from pipeline.log.inputs import FileFormat
from pipeline.sources import recbole
from pipeline.sources.event_log import Imported
from pipeline.sources.files import ImportConfig, ItemColumns, Progress, UserColumns, import_files
from pipeline.sources.published_files import Layout, Published, find_published
from pipeline.sources.recbole import RecBoleConfig

_CSV = FileFormat(format="csv")
_DAT = FileFormat(format="csv", separator="::", encoding="latin-1")
_TSV = FileFormat(format="csv", separator="\t", quoted=False)
_ATOMIC = dataclasses.replace(_TSV, typed_header=True)


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
_FOLDER = "(.*)/"
"""A release has one file of events."""
_LIKED = 4.0
"""Ratings of at least this many stars are positives."""

REJECTED_RATIO = 0.05
"""Largest share of invalid rows by default: published logs have some, such as times before 1970, and nobody can mend
them."""

PUBLISHED: Mapping[str, Published] = {
    "movielens": Published(
        source="https://files.grouplens.org/datasets/movielens/ (README of each data set)",
        layouts=(
            # 20M, 25M, 32M, latest, latest-small.
            Layout(
                events=("ratings.csv",), release=_FOLDER,
                config=ImportConfig(
                    columns=EventColumns(user_id="userId", item_id="movieId", label="rating", integer_ids=True),
                    items=_MOVIES, files=_CSV, min_label=_LIKED,
                ),
                items="movies.csv",
            ),
            # 1M, 10M.
            Layout(
                events=("ratings.dat",), release=_FOLDER,
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
                events=("u.data",), release=_FOLDER,
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
                events=("log_standard_*.csv",), release="_(pure|1k|27k)[_.]",
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
                events=("*.jsonl",), not_events=("meta_*",),
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
                events=("behaviors.tsv",), release="(?i)mind(small|large)", label_sign=r"-[01]\s*$",
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
                events=("UserBehavior.csv",), release=_FOLDER,
                config=ImportConfig(
                    columns=EventColumns(action="behavior", integer_ids=True),
                    files=FileFormat(format="csv", header=("user_id", "item_id", "category", "behavior", "timestamp")),
                ),
            ),
        ),
    ),
    "yambda": Published(
        source="https://huggingface.co/datasets/yandex/yambda (flat files; times count from the start of the log)",
        is_ranked=True,
        layouts=(
            Layout(
                events=("multi_event.parquet",), release=_FOLDER,
                config=ImportConfig(columns=EventColumns(user_id="uid", action="event_type")),
            ),
            Layout(
                events=("listens.parquet",), release=_FOLDER, config=ImportConfig(columns=EventColumns(user_id="uid"))
            ),
            Layout(
                events=("likes.parquet",), release=_FOLDER, config=ImportConfig(columns=EventColumns(user_id="uid"))
            ),
        ),
    ),
    "recbole": Published(
        source="https://recbole.io/docs/user_guide/data/atomic_files.html",
        layouts=(
            Layout(
                events=("*.inter",), release=r"([^/.]+)[^/]*$",
                config=ImportConfig(
                    files=_ATOMIC, items=ItemColumns(files=_ATOMIC), users=UserColumns(files=_ATOMIC)
                ),
                items="*.item", users="*.user",
            ),
        ),
    ),
}  # fmt: skip


def import_published(
    name: str, path: str, out: str, *, atomic: RecBoleConfig = RecBoleConfig(),
    max_rejected_ratio: float = REJECTED_RATIO, progress: Progress | None = None,
) -> Imported:  # fmt: skip
    """Write the event log `out` of a public data set, from its unpacked directory or its events file. `atomic`: how to
    read RecBole's files; `max_rejected_ratio`: largest share of invalid rows.

    DataError: a file is missing, there are several releases, or an error of import_files, which names the file.
    """
    found = find_published(name, PUBLISHED[name], path)
    config, left_out = found.layout.config, found.left_out
    items, users = found.items, found.users
    if name == "recbole":
        config = recbole.atomic_config(config, found.events[0], items, users, atomic)
        items = items if config.items.features or config.items.list_features else []
        users = users if config.users.features or config.users.list_features else []
    config = dataclasses.replace(config, max_rejected_ratio=max_rejected_ratio)
    return import_files(
        [file.url for file in found.events], out, config=config, items=[file.url for file in items],
        users=users[0].url if users else None, reshape=found.layout.reshape, left_out=left_out, published=name,
        progress=progress,
    )  # fmt: skip
