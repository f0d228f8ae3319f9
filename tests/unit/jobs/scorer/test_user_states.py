"""What a state keeps of the labels and of the older events of a history, against a computation event by event."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from jobs.scorer import packed_states
from jobs.scorer.histories import Histories
from models.interface import DECAY_EVENTS

KEPT, NOW = 7, 20_000_000


@pytest.fixture
def scorer(data, export, monkeypatch):
    """Of a small model, whose states have the older items as if it counted repeats."""
    monkeypatch.setattr(packed_states, "WHOLE_EVENTS", 10)
    found = export(data, max_history=2000, repeats=False, history_labels=True).scorer()
    assert found.tower.kept_events == KEPT
    assert not found.state_shape.older
    found.state_shape = dataclasses.replace(found.state_shape, older=True)
    return found


def random_histories(scorer, *lengths) -> Histories:
    rng = np.random.default_rng(3)
    rows = [
        {
            "history": rng.integers(98, 132, length).tolist(),
            "history_time": [NOW + k for k in range(length)],
            "history_label": [[0, 1, None][k] for k in rng.integers(0, 3, length)],
        }
        for length in lengths
    ]
    return scorer.histories(pa.RecordBatch.from_pandas(pd.DataFrame(rows), preserve_index=False))


def test_a_state_counts_the_older_events_of_each_item_and_their_labels(scorer):
    histories = random_histories(scorer, 4, 60, 200)
    stored = scorer.states(pa.array(scorer.build_states(histories), pa.large_binary()))
    assert stored.label.tolist() == [*histories.label[:4], *histories.label[57:64], *histories.label[-KEPT:]]
    states = stored.stored
    assert (states.request.tolist(), states.length.tolist()) == ([1, 2], [60, 200])
    place_of_row = np.arange(scorer.num_rows) * 10
    inputs = states.tensors(lambda row: place_of_row[row])
    for s, (start, length) in enumerate(((4, 60), (64, 200))):
        older = [(int(histories.row[start + k]), int(histories.label[start + k]), k) for k in range(length - KEPT)]
        entries = slice(*states.older_offsets[s : s + 2].tolist())
        items = sorted({row for row, _, _ in older if row >= 2})
        assert states.older_row[entries].tolist() == items
        assert inputs.older_item_E[entries].tolist() == place_of_row[items].tolist()
        by_item = [[(label, length - 1 - k) for row, label, k in older if row == item] for item in items]
        assert inputs.older_count_E[entries].tolist() == [len(events) for events in by_item]
        assert inputs.older_label_E[entries].tolist() == [sum(label == 2 for label, _ in events) for events in by_item]
        decayed = [sum(0.5 ** (age / DECAY_EVENTS) for _, age in events) for events in by_item]
        assert inputs.older_decayed_E.dtype.is_floating_point
        assert inputs.older_decayed_E[entries].tolist() == pytest.approx(decayed, rel=1e-6)
        assert int(inputs.known_labels_S[s]) == sum(label > 0 for _, label, _ in older)
        assert int(inputs.positive_labels_S[s]) == sum(label == 2 for _, label, _ in older)


def test_states_that_are_taken_keep_their_labels(scorer):
    histories = random_histories(scorer, 60, 4, 200)
    stored = scorer.states(pa.array(scorer.build_states(histories), pa.large_binary()))
    taken = stored.take(np.array([2, 1]))
    assert taken.label.tolist() == [*histories.label[-KEPT:], *histories.label[60:64]]
    assert taken.stored.older_labels.tolist() == stored.stored.older_labels[1:].tolist()
    first, last = stored.stored.older_offsets[1:].tolist()
    for name in ("older_label", "older_decayed"):
        assert getattr(taken.stored, name).tolist() == getattr(stored.stored, name)[first:last].tolist()
