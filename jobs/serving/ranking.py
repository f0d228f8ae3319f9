"""Scores blocks of requests, ranks their candidates, and counts what was scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.host.errors import UserError
from jobs.scorer.histories import Histories, RequestError, flat_offsets, flat_ranges, list_column
from jobs.scorer.request_columns import UNKNOWN_ROW
from jobs.scorer.request_frame import REQUEST_COLUMNS
from jobs.scorer.scorer import Scorer
from jobs.serving.request_files import Block

SCORES_PER_PART = 1 << 22
"""Scores in memory at a time when the whole catalogue is ranked (requests times items)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """The input, the result and the ranking of `solar score`."""

    requests: str
    """Parquet file with one row per request, or a directory with all such files below it, and no others. Columns:
    history (+ history_time, history_action, history_label) or, with --shards, user_id; candidates; time; any user
    feature of the model by its name. User features and further columns are copied to the result."""
    out: str
    """Parquet file of the result."""
    shards: str | None = None
    """Sequence shards with the users' histories."""
    states: str | None = None
    """Directory of the model's stored states: users with a state are scored from it, others from the shards."""
    top_k: int | None = None
    """Number of best candidates to keep, 1 or more; without a column candidates the whole catalogue is ranked."""
    keep_seen: bool = False
    """Whole catalogue: also rank the items of the user's events before the request's time."""
    overwrite: bool = False
    """Replace an existing result."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be 1 or more")


@dataclasses.dataclass(kw_only=True)
class ScoreCounts:
    """Counts of what was scored; numbers of requests unless stated otherwise."""

    requests: int = 0
    candidates: int = 0
    """Number of candidates that were ranked, before --top_k."""
    unknown_candidates: int = 0
    """Number of these candidates that the model does not know."""
    history_events: int = 0
    """Number of events that the model read."""
    unknown_history_items: int = 0
    """Number of these events whose item the model does not know."""
    unknown_actions: int = 0
    """Number of actions in the requests that the model does not know; it reads them as none."""
    cold: int = 0
    """Requests without any event before them."""
    unknown_users: int = 0
    """Requests whose users are neither in the states nor in the shards."""
    from_states: int = 0
    """Requests whose history is a stored state."""
    without_state: int = 0
    """With --states: requests whose user has no usable state, so that the raw history was read."""
    truncated: int = 0
    """Requests with more events than max_history: the model read the latest ones."""
    user_values: int = 0
    """Number of values of user features that the model read."""
    unknown_user_values: int = 0
    """Number of these values that the model does not know."""

    def add(self, other: dict[str, int]) -> None:
        """Add the counts of another part."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


class Ranking:
    """Scores a block and ranks its candidates."""

    def __init__(self, scorer: Scorer, config: ScoreConfig, *, path: Path) -> None:
        self._scorer, self._config, self._path = scorer, config, path

    def schema(self, requests: pa.Schema) -> pa.Schema:
        """The result's columns for requests with these columns."""
        kept = [field for field in requests if field.name not in REQUEST_COLUMNS or field.name == "time"]
        item = pa.int64() if self._scorer.item_type == "int64" else pa.large_string()
        return pa.schema(
            [*kept, pa.field("candidates", pa.large_list(item)), pa.field("scores", pa.large_list(pa.float32()))]
        )

    def of(self, block: Block, counts: ScoreCounts) -> pa.RecordBatch:
        """The result's rows for a block; adds to `counts`."""
        # Score and rank.
        scorer = self._scorer
        shown, time = scorer.shown(block.histories, block.time)
        earlier = block.histories.before(block.time)
        if "candidates" in block.rows.schema.names:
            raw, offsets, scores = self._given(block, shown, time, counts)
        else:
            raw, offsets, scores = self._catalogue(earlier, shown, time, counts)
        # Count.
        counts.requests += block.rows.num_rows
        counts.history_events += len(shown.row)
        if shown.stored is not None:
            counts.history_events += int((shown.stored.length - shown.stored.kept).sum())
        counts.from_states += block.from_states
        counts.without_state += block.without_state
        counts.unknown_history_items += int((shown.row == UNKNOWN_ROW).sum())
        counts.unknown_actions += self._unknown_actions(block.rows)
        counts.cold += int((shown.lengths == 0).sum())
        counts.unknown_users += block.unknown_users
        counts.user_values += sum(len(feature.row) for feature in shown.users)
        counts.unknown_user_values += sum(int((feature.row == UNKNOWN_ROW).sum()) for feature in shown.users)
        counts.truncated += int((earlier.lengths > shown.lengths).sum())
        # Copy the other columns of the requests.
        schema = self.schema(block.rows.schema)
        kept = [block.rows.column(name) for name in schema.names if name not in ("candidates", "scores")]
        lists = [pa.LargeListArray.from_arrays(pa.array(offsets), values) for values in (raw, pa.array(scores))]
        return pa.RecordBatch.from_arrays([*kept, *lists], schema=schema)

    def _unknown_actions(self, rows: pa.RecordBatch) -> int:
        names = [name for name in ("history_action", "latest_action") if name in rows.schema.names]
        given = [list_column(rows, name, values="string", nulls=True).values.drop_null() for name in names]
        known = pa.array(self._scorer.settings["actions"], pa.large_string())
        is_known = pc.is_in  # type: ignore[attr-defined]
        return sum(len(values) - int(is_known(values.cast(known.type), known).true_count) for values in given)

    def _given(self, block: Block, shown: Histories, time: np.ndarray, counts: ScoreCounts) -> tuple[Any, ...]:
        """(raw ids, offsets, scores) of the requests' own candidates, best first."""
        scorer = self._scorer
        try:
            offsets, row = scorer.candidates(block.rows, first_row=block.first_row)
        except RequestError as error:
            raise UserError(f"{self._path}: {error}") from error
        counts.candidates += len(row)
        counts.unknown_candidates += int((row == UNKNOWN_ROW).sum())
        logits = self._logits(shown, time, offsets, row)
        places, kept = best_first(logits, offsets, top_k=self._config.top_k)
        raw = list_column(block.rows, "candidates", values=scorer.item_type).values
        return raw.take(pa.array(places)), kept, logits[places]

    def _catalogue(
        self, earlier: Histories, shown: Histories, time: np.ndarray, counts: ScoreCounts
    ) -> tuple[Any, ...]:
        """(raw ids, offsets, scores) of the best of all items of the model, computed for some requests at a time."""
        scorer, first_item = self._scorer, self._scorer.settings["first_item_row"]
        num_items, num_requests = len(scorer.item_ids), len(time)
        step = max(1, SCORES_PER_PART // num_items)
        items, scores, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for start in range(0, num_requests, step):
            some = np.arange(start, min(start + step, num_requests))
            # Score all items, also the seen ones: where candidates attend to each other, that is the set of evaluation.
            every = np.tile(np.arange(num_items), len(some))
            logits = self._logits(
                shown.take(some), time[some], np.arange(len(some) + 1) * num_items, every + first_item
            )
            wanted = np.ones((len(some), num_items), bool)
            if not self._config.keep_seen:
                seen = earlier.take(some)
                known = seen.row >= first_item
                wanted[seen.owner[known], seen.row[known] - first_item] = False
            offsets, item, logits = flat_offsets(wanted.sum(1)), np.nonzero(wanted)[1], logits[wanted.ravel()]
            counts.candidates += len(item)
            places, kept = best_first(logits, offsets, top_k=self._config.top_k)
            items.append(item[places])
            scores.append(logits[places])
            sizes.append(np.diff(kept))
        raw = scorer.item_ids.take(pa.array(np.concatenate(items)))
        raw = raw.cast(self.schema(pa.schema([])).field("candidates").type.value_type)
        return raw, flat_offsets(np.concatenate(sizes)), np.concatenate(scores)

    def _logits(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> np.ndarray:
        logits = self._scorer.logits(shown, time, offsets, row)
        if not np.isfinite(logits).all():
            raise UserError("the model computes NaN or infinite scores: its weights are damaged; use another version")
        return logits


def best_first(scores: np.ndarray, offsets: np.ndarray, *, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(places of each request's candidates, best first and at most `top_k`; their offsets). Equal scores keep order."""
    sizes = np.diff(offsets)
    places = np.arange(len(scores))
    if top_k is not None:
        # Sort only the candidates that can be among the best.
        least = np.full(len(sizes), -np.inf, np.float32)
        for request in np.flatnonzero(sizes > top_k):
            part = scores[offsets[request] : offsets[request + 1]]
            least[request] = np.partition(part, len(part) - top_k)[len(part) - top_k]
        places = np.flatnonzero(scores >= np.repeat(least, sizes))
    owner = np.repeat(np.arange(len(sizes)), sizes)[places]
    places = places[np.lexsort((-scores[places], owner))]
    found = np.bincount(owner, minlength=len(sizes))
    kept = found if top_k is None else np.minimum(found, top_k)
    return places[flat_ranges(flat_offsets(found)[:-1], kept)], flat_offsets(kept)
