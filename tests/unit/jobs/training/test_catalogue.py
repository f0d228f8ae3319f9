"""Another data set's user features in a model's rows: by name and value, whatever their order."""

from __future__ import annotations

import dataclasses

import torch

from jobs.training.catalogue import UserValues
from jobs.training.model import select_requests
from pipeline.batches.loader import EvaluationLoader
from pipeline.batches.requests import RequestConfig
from pipeline.shards.vocabulary import Vocabulary


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


def only_batch(data):
    (batch,) = EvaluationLoader(data, requests=RequestConfig(), part="test", batch_events=10**6)
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
