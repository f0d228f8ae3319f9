"""Another data set's user features in a model's rows: by name and value, whatever their order."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jobs.training import catalogue
from jobs.training.catalogue import ALWAYS, UserValues, catalogue_of
from jobs.training.model import select_requests
from pipeline.batches.loader import EvaluationLoader
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED, Vocabulary


def values_of(batch, vocabulary):
    """{user row: raw values of each feature, "?" for unknown ones}."""
    found, start = {}, 0
    for user, lengths in zip(batch.user.tolist(), batch.user_feature_lengths.tolist(), strict=True):
        found[user] = {}
        for (name, values), length in zip(vocabulary.user_features.items(), lengths, strict=True):
            rows = batch.user_feature_values[start : start + length].tolist()
            found[user][name] = ["?" if row == 1 else values[row - 2] for row in rows]
            start += length
    assert start == batch.user_feature_values.numel()
    return found


def only_batch(data, **requests):
    (batch,) = EvaluationLoader(data, requests=RequestConfig(**requests), part="test", batch_events=10**6)
    return batch


def test_features_and_values_are_matched_by_name_and_what_the_model_lacks_is_unknown(data):
    batch = only_batch(data)
    model = Vocabulary.empty("int64").with_user_values({"age": ["9"], "hobbies": ["h2", "h0"], "gender": ["m"]})
    model = model.with_user_values({"gender": ["f"]})
    translated = UserValues.between(data.vocabulary, model).translate(batch)
    before, after = values_of(batch, data.vocabulary), values_of(translated, model)
    assert list(model.user_features) == ["age", "gender", "hobbies"]
    assert before.keys() == after.keys()
    for user, known in before.items():
        hobbies = ["?" if value == "h1" else value for value in known["hobbies"]]
        assert after[user] == {"age": [], "gender": known["gender"], "hobbies": hobbies}
    assert any("?" in values["hobbies"] for values in after.values())
    nothing = UserValues.between(data.vocabulary, Vocabulary.empty("int64")).translate(batch)
    assert nothing.user_feature_lengths.shape == (batch.num_users, 0)
    assert nothing.user_feature_values.numel() == 0


def test_selected_requests_bring_the_values_of_their_users(data):
    batch = only_batch(data)
    whole = values_of(batch, data.vocabulary)
    for first in range(0, batch.num_requests, 3):
        part = select_requests(batch, first, min(first + 3, batch.num_requests))
        expected = {user: whole[user] for user in batch.user[batch.request_user[first : first + 3]].tolist()}
        assert values_of(part, data.vocabulary) == expected
    empty = select_requests(batch, 0, 0)
    assert empty.user_feature_lengths.shape == (0, 2)
    assert torch.equal(empty.user_feature_values, torch.zeros(0, dtype=torch.int64))
    without = dataclasses.replace(
        batch, user_feature_lengths=batch.user_feature_lengths[:, :0], user_feature_values=batch.user_feature_values[:0]
    )
    assert select_requests(without, 1, 3).user_feature_lengths.shape == (2, 0)


def test_selected_requests_bring_the_labels_of_their_events(data):
    batch = only_batch(data, min_label=0)
    assert set(batch.event_label.tolist()) == {1, 2}
    part = select_requests(batch, 2, 5)
    for place, user in enumerate(part.user.tolist()):
        start, end = part.event_offsets[place : place + 2].tolist()
        first = int(batch.event_offsets[batch.user.tolist().index(user)])
        assert part.event_label[start:end].tolist() == batch.event_label[first : first + end - start].tolist()


@pytest.fixture
def always_warned():
    """PyTorch gives its warnings each time, not once per process; any is an error."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(before)


def test_first_times_of_items_are_read_from_arrays_that_nobody_may_write_to(data, monkeypatch, always_warned):
    alone = SimpleNamespace(
        is_initialized=lambda: True,
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        all_reduce=lambda *_, **__: None,
        ReduceOp=dist.ReduceOp,
    )
    monkeypatch.setattr(catalogue, "dist", alone)
    events = [data.read(group) for group in range(data.num_groups)]
    assert not events[0].time.flags.writeable
    size, wanted = data.vocabulary.size, {}
    for group in events:
        for item, time in zip(group.item.tolist(), group.time.tolist(), strict=True):
            wanted[item] = min(time, wanted.get(item, time))
    found = catalogue_of(
        Shards.open(data.path), requests=RequestConfig(split="temporal", valid_from=1, test_from=2),
        training_count=np.zeros(size, np.int64),
    ).first_time  # fmt: skip
    assert found is not None
    assert found.tolist() == [wanted.get(row, ALWAYS) for row in range(size)]
    assert wanted.keys() >= {NUM_RESERVED, size - 1}
