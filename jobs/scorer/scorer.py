"""The registered model: requests (history, candidates) in, scores out; torch, numpy, pandas, pyarrow, safetensors only.

jobs/runs/export.py concatenates this file, the files of this folder that it imports and those of models/ into one
`scorer.py`. MLflow stores it with the weights and runs it where this repository is not installed. `solar score` and
evaluation use it, too.

    import mlflow, pandas as pd
    model = mlflow.pyfunc.load_model("models:/solar-movielens-100k@champion")
    model.predict(pd.DataFrame({"history": [[50, 181]], "candidates": [[172, 1, 999999]]}))["scores"]

A history is the same as in training: the events strictly before the request's time, in the log's total order (time,
then the log's `order` column, else raw item id and action), and of these the latest max_history.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file
from torch import Tensor

from jobs.scorer.checksums import COUNTERS, checked_digest
from jobs.scorer.histories import NO_TIME, Histories, RequestError, UserFeature, flat_offsets, flat_ranges
from jobs.scorer.request_columns import UNKNOWN_ROW, RequestReader
from jobs.scorer.request_frame import Limits, request_batch
from jobs.scorer.user_states import pack_states, stored_too_late
from models.interface import HistorySums, ModelInput, Recommender, known_candidates
from models.item_counters import ItemCounters
from models.prior import PRIOR_PREFIX, Prior, PriorModel

FORWARD_ENTRIES = 1 << 16
"""Events plus candidates of one forward (about 1 KB each at width 64). A request with more has a forward of its own, or
several if candidates do not attend to each other."""
REQUEST_ENTRIES = 128
"""Cost of a request besides its events and candidates, in such entries: Gram matrix and decomposition, in float64."""

UNKNOWN_SCORE = float(np.finfo(np.float32).min)
"""The score of a candidate that the model does not know: below all others, and finite, as JSON needs it. The tower's
logit of such a candidate is that of an untrained row, and says nothing."""
LONGEST_MESSAGE = 400
"""Characters of an InvalidRequest: it may quote a value of the request."""


class InvalidRequest(MlflowException, RequestError):
    """The requests cannot be scored; MLflow's server answers with status 400 and the message, which is one line."""

    def __init__(self, reason: str) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in reason[:LONGEST_MESSAGE]).split())
        super().__init__(line, error_code=BAD_REQUEST)

    def serialize_as_json(self) -> str:
        """What the server answers. It has put the whole input, over several lines, in front of `message` by then."""
        self.message = str(self)
        return super().serialize_as_json()


class Scorer(RequestReader, PythonModel):
    """Loads one exported model directory and scores requests.

    Columns of a request:
      history         item ids; oldest first, or in any order with history_time (then events are sorted); null = []
      candidates      item ids; an id given twice is scored twice, an empty list has empty scores
      history_time    optional: milliseconds since 1970 UTC of each event (or timestamps); needed if the model uses time
      history_action  optional: action name of each event; null = none
      history_label   optional: label of each event, 0 or 1 (false or true): whether what was shown was clicked, liked
                      or skipped; null or absent = not known
      time            optional: milliseconds since 1970 UTC of the request (or a timestamp): only events strictly before
                      it are history, and history_time is needed. Null or absent = the last event's time, and every
                      event is history; a prior then reads counters of items as they are now
      state           optional: the state of the user's history that `solar score --build-states` stored for this model,
                      as bytes or base64, instead of a history, which must be null or []; null = none
      latest, latest_time, latest_action, latest_label
                      optional: further events, as in a history; those later than the last event of the history or of
                      the state are added to it
      NAME            optional: the category, or list of categories, of the request's user in the user feature NAME
                      (listed in scorer.json); null, [] or absent = none
    An unknown item of the history or category has the untrained row 1, an unknown action counts as none, and an unknown
    candidate has the score UNKNOWN_SCORE. Lists of events must have no
    nulls, except in columns of actions and labels. A row may lack any column but candidates, and the model's times.
    `limits` says how large requests to `predict` may be.
    """

    limits = Limits()

    def load_context(self, context: Any) -> None:
        self.limits = Limits.from_environment()
        self.load(Path(context.artifacts["model"]))

    def load(self, directory: Path) -> None:
        """Read the files that jobs/runs/export.py wrote. DamagedModel: one of them is not what was written."""
        # Checksums, settings, item ids and action codes.
        self.directory = directory
        if (digest := checked_digest(directory)) is not None:
            self.digest = digest
        self.settings = json.loads((directory / "scorer.json").read_text())
        items = pq.read_table(directory / "items.parquet")
        first = self.settings["first_item_row"]
        self.item_ids = items["item_id"].combine_chunks()
        self.item_type = "int64" if pa.types.is_integer(self.item_ids.type) else "string"
        self._index = pd.Index(self.item_ids.to_numpy(zero_copy_only=False))
        self._code_of_action = {name: code for code, name in enumerate(self.settings["actions"])}
        self.uses_time = bool(self.settings["model"].get("time_features"))
        self._ties_by_id = "order" not in self.settings["log_columns"]
        # Tables of items and of their features.
        self.item_IC: Tensor = load_file(directory / "table-item.safetensors")["weight"]
        self.num_rows = len(self.item_IC)
        """[item rows, C]."""
        features = [
            _mean_rows(
                load_file(directory / f"table-{name}.safetensors")["weight"],
                items[name].to_pylist(),
                first,
                width=self.item_IC.shape[1],
            )
            for name in self.settings["features"]
        ]
        empty = torch.zeros(len(self.item_IC), 0, self.item_IC.shape[1])
        self.features_IFC: Tensor = torch.stack(features, dim=1) if features else empty
        """[item rows, F, C]: the mean of each item's feature rows."""
        # Values and tables of user features.
        self.user_features = self.settings.get("user_features", [])
        self.user_values: dict[str, list[str]] = {name: [] for name in self.user_features}
        """{user feature: its raw values}; value i has row i + first_item_row."""
        if self.user_features:
            listed = pq.read_table(directory / "user-values.parquet").to_pydict()
            for name, value in zip(listed["feature"], listed["value"], strict=True):
                self.user_values[name].append(value)
        self.user_tables: list[Tensor] = [
            load_file(directory / f"table-user-{name}.safetensors")["weight"] for name in self.user_features
        ]
        self._row_of_value = {
            name: {value: row for row, value in enumerate(values, start=first)}
            for name, values in self.user_values.items()
        }
        # The tower, and the prior of a model that has one.
        weights = load_file(directory / "model.safetensors")
        of_prior = {name: weights.pop(name) for name in list(weights) if name.startswith(PRIOR_PREFIX)}
        self.tower: Recommender = build_scorer_tower(self.settings["model"], num_features=len(features))
        self.tower.load_state_dict(weights)
        if of_prior:
            prior = Prior(self.settings["task"])
            prior.load_state_dict({name.removeprefix(PRIOR_PREFIX): value for name, value in of_prior.items()})
            evidence_R = load_file(directory / "item-counts.safetensors")["evidence_events"]
            counters = ItemCounters.from_tensors(load_file(directory / COUNTERS), training_R=evidence_R)
            self.tower = PriorModel(self.tower, prior, counters)
        self.tower.eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per request; its `scores` are one logit per candidate, in their order (sigmoid = probability).

        InvalidRequest: a mistake in the requests. Nothing else is raised: MLflow's server would answer with the trace.
        """
        try:
            return self._predict(model_input)
        except RequestError as error:
            raise InvalidRequest(str(error)) from error
        except Exception as error:
            logging.getLogger("solar").exception("a request cannot be scored")
            raise InvalidRequest(f"the requests cannot be scored ({type(error).__name__}): see the log") from error

    def _predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        batch = request_batch(
            model_input, item_type=self.item_type, user_features=self.user_features, limits=self.limits
        )
        histories, time = self.histories(batch), self.request_times(batch)
        if (late := stored_too_late(histories, time)).any():
            raise RequestError(
                f"row {int(np.flatnonzero(late)[0])}: the state has events at or after the request's 'time': omit the "
                "time, or give the history instead"
            )
        offsets, row = self.candidates(batch)
        logits = self.logits(*self.shown(histories, time), offsets, row)
        if not np.isfinite(logits).all():
            raise RequestError("the scores are not finite: a state holds numbers that are too large")
        scores = [part.tolist() for part in np.split(logits, offsets[1:-1])] if len(offsets) > 1 else []
        return pd.DataFrame({"scores": scores}, index=model_input.index)

    def build_states(self, histories: Histories) -> list[bytes]:
        """A state for the latest max_history events of each history. RequestError: the model needs raw histories."""
        if self.tower.kept_events is None:
            raise RequestError(f"{self.settings['model']['name']} needs raw histories: it has no interests to store")
        shown, _ = self.shown(histories, np.full(len(histories.lengths), NO_TIME))

        def sums(some: Histories) -> HistorySums:
            zeros = np.zeros(len(some.lengths) + 1, np.int64)
            with torch.inference_mode():
                return self.tower.history_sums(self._inputs(some, zeros[1:], zeros, np.zeros(0, np.int64)))

        return pack_states(shown, shape=self.state_shape, sums=sums, first_item_row=self.settings["first_item_row"])

    def shown(self, histories: Histories, time: np.ndarray) -> tuple[Histories, np.ndarray]:
        """(the histories that the tower sees, the times) for times of requests [B], which may be NO_TIME."""
        earlier = histories.before(time) if (time < NO_TIME).any() else histories
        return earlier.latest(self.settings["max_history"]), time

    def logits(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> np.ndarray:
        """[M] float32: one logit per candidate, UNKNOWN_SCORE for unknown ones; request b has the candidates
        row[offsets[b] : offsets[b + 1]]."""
        # Split long requests unless candidates attend to each other, and pack the pieces into forwards of limited size.
        request, start, size = _pieces(offsets, most=None if self.tower.scores_sets else FORWARD_ENTRIES)
        cost = np.cumsum(shown.lengths[request] + size + REQUEST_ENTRIES)
        bounds = [0]
        while bounds[-1] < len(request):
            done = cost[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(bounds[-1] + 1, int(np.searchsorted(cost, done + FORWARD_ENTRIES, side="right"))))
        parts = [np.zeros(0, np.float32)]
        for first, last in itertools.pairwise(bounds):
            asked = request[first:last]
            entries = row[start[first] : start[last - 1] + size[last - 1]]
            parts.append(self._forward(shown.take(asked), time[asked], flat_offsets(size[first:last]), entries))
        logits = np.concatenate(parts)
        # A model that was registered before this setting keeps the scores that its own file gives over HTTP.
        if self.settings.get("unknown_last"):
            logits[row == UNKNOWN_ROW] = UNKNOWN_SCORE
        return logits

    def _forward(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.tower(self._inputs(shown, time, offsets, row)).numpy()

    def _inputs(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> ModelInput:
        item, index = torch.from_numpy(np.concatenate([shown.row, row])), None
        if len(item) < len(self.item_IC):
            item, index = torch.unique(item, return_inverse=True)
        # A request without a time is of the time of its last event; counters of items are read as they are now.
        last = np.concatenate([shown.time, [0]])[np.where(shown.lengths > 0, shown.offsets[1:] - 1, len(shown.time))]
        # Look up the distinct rows, in ascending order; with more entries than items, use the whole table (no index).
        first_item_row = self.settings["first_item_row"]
        num_reserved = first_item_row if index is None else int((item < first_item_row).sum())
        candidate_item_M = (item if index is None else index)[len(shown.row) :]
        candidate_offsets_B1 = torch.from_numpy(offsets)
        return ModelInput(
            item_IC=self.item_IC if index is None else self.item_IC[item],
            features_IFC=self.features_IFC if index is None else self.features_IFC[item],
            user_features_UGC=user_vectors(self.user_tables, shown.users, num_users=len(time), like=self.item_IC),
            event_offsets_U1=torch.from_numpy(shown.offsets),
            event_item_N=(item if index is None else index)[: len(shown.row)],
            event_time_N=torch.from_numpy(shown.time),
            event_action_N=torch.from_numpy(shown.action),
            event_label_N=torch.from_numpy(shown.label),
            request_user_B=torch.arange(len(time)),
            request_position_B=torch.from_numpy(shown.lengths),
            request_time_B=torch.from_numpy(np.where(time < NO_TIME, time, last)),
            counted_until_B=torch.from_numpy(time),
            candidate_offsets_B1=candidate_offsets_B1,
            candidate_item_M=candidate_item_M,
            item_row_I=torch.arange(len(self.item_IC)) if index is None else item,
            num_reserved=num_reserved,
            known_candidates_B=known_candidates(
                candidate_item_M, candidate_offsets_B1=candidate_offsets_B1, num_reserved=num_reserved
            ),
            stored=shown.stored and shown.stored.tensors(functools.partial(_place_of_row, item, index)),
        )


def build_scorer_tower(settings: dict[str, Any], *, num_features: int) -> Recommender:
    """The tower; its classes are above in the exported file, and in models/ in the repository."""
    from models.zoo import build_tower  # scorer: replaced at export

    return build_tower(settings, num_features=num_features)


def _mean_rows(weight: Tensor, values: list[list[int]], first_item_row: int, *, width: int) -> Tensor:
    """[item rows, C]: the mean of each item's feature rows; zero for items without any (also padding and unknown), and
    in the last columns if the feature's table is narrower than C = `width`."""
    lengths = torch.tensor([0] * first_item_row + [len(value) for value in values])
    flat = torch.tensor([row for value in values for row in value], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros(len(lengths), width)
    total[:, : weight.shape[1]].index_add_(0, owner, weight[flat])
    return total / lengths.clamp(min=1).unsqueeze(1)


def user_vectors(tables: list[Tensor], users: tuple[UserFeature, ...], *, num_users: int, like: Tensor) -> Tensor:
    """user_features_UGC: the mean row of each feature's values; zero for users without any."""
    found = like.new_zeros(num_users, len(tables), like.shape[1])
    for place, (table, feature) in enumerate(zip(tables, users, strict=True)):
        lengths = torch.from_numpy(feature.lengths)
        owner = torch.repeat_interleave(torch.arange(num_users), lengths)
        total = like.new_zeros(num_users, table.shape[1]).index_add(0, owner, table[torch.from_numpy(feature.row)])
        found[:, place, : table.shape[1]] = total / lengths.clamp(min=1).unsqueeze(1)
    return found


def _place_of_row(item: Tensor, index: Tensor | None, row: np.ndarray) -> np.ndarray:
    """The index of each row in the looked-up `item`, -1 if it is not there. Without `index` the whole table is looked
    up, and a row is its own index."""
    if index is None or not len(row):
        return row
    items = item.numpy()
    place = np.minimum(np.searchsorted(items, row), len(items) - 1)
    return np.where(items[place] == row, place, -1)


def _pieces(offsets: np.ndarray, *, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request, first candidate, number of candidates) of pieces of requests, each of at most `most` candidates."""
    sizes = np.diff(offsets)
    most = int(sizes.max(initial=1)) if most is None else most
    counts = -(-sizes // most)
    request = np.repeat(np.arange(len(sizes)), counts)
    start = offsets[request] + most * flat_ranges(np.zeros_like(counts), counts)
    return request, start, np.minimum(offsets[request + 1] - start, most)
