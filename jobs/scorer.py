"""The registered model: a data frame of (history, candidates) in, scores out; torch, numpy, pyarrow, safetensors only.

jobs/register.py writes this file and the model files it imports into one `scorer.py` that MLflow stores beside the
weights and runs where this repository is unknown.

    import mlflow, pandas as pd
    model = mlflow.pyfunc.load_model("models:/solar-movielens-100k@champion")
    model.predict(pd.DataFrame({"history": [[50, 181]], "candidates": [[172, 1, 999999]]}))["scores"]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file
from torch import Tensor

from models.interface import ModelInput, Recommender

UNKNOWN_ITEM_ROW = 1


class Scorer(PythonModel):
    """Loads one exported model directory and scores requests.

    Columns of a request:
      history         item ids, oldest first
      candidates      item ids
      history_time    optional: milliseconds since 1970 UTC of each event; needed if the model uses time
      history_action  optional: action name of each event
      time            optional: milliseconds since 1970 UTC of the request; default = the last event's
    """

    def load_context(self, context: Any) -> None:
        self.load(Path(context.artifacts["model"]))

    def load(self, directory: Path) -> None:
        """Read what jobs/register.py exported."""
        self.settings = json.loads((directory / "scorer.json").read_text())
        items = pq.read_table(directory / "items.parquet")
        first = self.settings["first_item_row"]
        self.item_ids: pa.Array = items["item_id"].combine_chunks()
        """Raw ids (int64 or strings); item_ids[i] has row i + first_item_row."""
        self._index = pd.Index(self.item_ids.to_numpy(zero_copy_only=False))
        self._code_of_action = {name: code for code, name in enumerate(self.settings["actions"])}
        self.item_IC: Tensor = load_file(directory / "table-item.safetensors")["weight"]
        """[item rows, C]."""
        features = [
            _mean_rows(load_file(directory / f"table-{name}.safetensors")["weight"], items[name].to_pylist(), first)
            for name in self.settings["features"]
        ]
        empty = torch.zeros(len(self.item_IC), 0, self.item_IC.shape[1])
        self.features_IFC: Tensor = torch.stack(features, dim=1) if features else empty
        """[item rows, F, C]: the mean of each item's feature rows."""
        self.tower: Recommender = build_scorer_tower(self.settings["model"], num_features=len(features))
        self.tower.load_state_dict(load_file(directory / "model.safetensors"))
        self.tower.eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row of `scores` per request, in the order of its candidates; a logit each (sigmoid = probability)."""
        frame = _checked(model_input, uses_time=bool(self.settings["model"].get("time_features")))
        scores: list[list[float]] = []
        for first in range(0, len(frame), self.settings["requests_per_forward"]):
            part = frame.iloc[first : first + self.settings["requests_per_forward"]]
            scores.extend(self._score(part))
        return pd.DataFrame({"scores": scores}, index=model_input.index)

    def _score(self, frame: pd.DataFrame) -> list[list[float]]:
        keep = self.settings["max_history"]
        histories = [list(history)[-keep:] for history in frame["history"]]
        candidates = [list(ids) for ids in frame["candidates"]]
        times = [list(times)[-keep:] for times in _column(frame, "history_time", [[0] * len(h) for h in histories])]
        actions = [
            list(names)[-keep:] for names in _column(frame, "history_action", [[""] * len(h) for h in histories])
        ]
        asked = _column(frame, "time", [history[-1] if history else 0 for history in times])
        rows, index = torch.unique(
            torch.from_numpy(self.rows([item for items in histories + candidates for item in items])),
            return_inverse=True,
        )
        num_events = sum(len(history) for history in histories)
        inputs = ModelInput(
            item_IC=self.item_IC[rows],
            features_IFC=self.features_IFC[rows],
            event_offsets_U1=_offsets(histories),
            event_item_N=index[:num_events],
            event_time_N=_integers(times),
            event_action_N=torch.from_numpy(self.codes([name for names in actions for name in names])),
            request_user_B=torch.arange(len(frame)),
            request_position_B=torch.tensor([len(history) for history in histories]),
            request_time_B=torch.tensor([int(time) for time in asked]),
            candidate_offsets_B1=_offsets(candidates),
            candidate_item_M=index[num_events:],
        )
        with torch.no_grad():
            logits_M = self.tower(inputs)
        return [part.tolist() for part in logits_M.split([len(ids) for ids in candidates])]

    def rows(self, raw_ids: Sequence[Any] | pa.Array) -> np.ndarray:
        """int64 table rows of raw item ids, UNKNOWN_ITEM_ROW for an id, or null, that is not in the model."""
        ids: Any = raw_ids if isinstance(raw_ids, pa.Array) else pa.array(raw_ids, self.item_ids.type)
        encoded = ids.dictionary_encode()
        places = self._index.get_indexer(pd.Index(encoded.dictionary.to_numpy(zero_copy_only=False)))
        row_of_code = np.append(
            np.where(places < 0, UNKNOWN_ITEM_ROW, places + self.settings["first_item_row"]), UNKNOWN_ITEM_ROW
        ).astype(np.int64)
        codes = encoded.indices.fill_null(len(encoded.dictionary))
        return row_of_code[codes.to_numpy(zero_copy_only=False)]

    def codes(self, actions: Iterable[str | None]) -> np.ndarray:
        """int64 codes of action names, 0 for a name, or None, that is not in the model."""
        return np.fromiter((self._code_of_action.get(name or "", 0) for name in actions), np.int64)


def build_scorer_tower(settings: dict[str, Any], *, num_features: int) -> Recommender:
    """The tower whose classes stand above in the exported file; inside the repository, models/."""
    from jobs.training.model import build_tower  # scorer: replaced at export

    return build_tower(settings, num_features=num_features)


def _mean_rows(weight: Tensor, values: list[list[int]], first_item_row: int) -> Tensor:
    """[item rows, C]: the mean of each item's feature rows; zero for items without any (padding and unknown too)."""
    lengths = torch.tensor([0] * first_item_row + [len(value) for value in values])
    flat = torch.tensor([row for value in values for row in value], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros(len(lengths), weight.shape[1]).index_add(0, owner, weight[flat])
    return total / lengths.clamp(min=1).unsqueeze(1)


def _checked(frame: pd.DataFrame, *, uses_time: bool) -> pd.DataFrame:
    for column in ("history", "candidates", *(["history_time"] if uses_time else [])):
        if column not in frame:
            raise ValueError(f"column {column!r} is missing: this model needs it, the frame has {list(frame.columns)}")
    for column in ("history_time", "history_action"):
        if column in frame:
            lengths = zip(frame["history"], frame[column], strict=True)
            wrong = next((row for row, (left, right) in enumerate(lengths) if len(left) != len(right)), None)
            if wrong is not None:
                raise ValueError(f"row {wrong}: {column} and history differ in length: give one entry per event")
    return frame


def _column(frame: pd.DataFrame, name: str, default: list[Any]) -> list[Any]:
    return list(frame[name]) if name in frame else default


def _offsets(lists: list[list[Any]]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *(len(items) for items in lists)]))


def _integers(lists: list[list[Any]]) -> Tensor:
    return torch.tensor([int(value) for values in lists for value in values], dtype=torch.int64)
