"""Tables: rows are a function of (seed, table, row); features are averaged per item."""

from __future__ import annotations

import pytest
import torch

from models.embeddings import (
    ItemFeature,
    TableSpec,
    UserCodes,
    embedding_collection,
    initial_rows,
    look_up_ids,
    pool_features,
    pool_user_features,
)


def test_rows_do_not_depend_on_how_they_are_cut():
    whole = initial_rows("item", seed=1, first=0, num_rows=1000, width=8, std=0.1)
    cut = [initial_rows("item", seed=1, first=first, num_rows=250, width=8, std=0.1) for first in range(0, 1000, 250)]
    assert torch.equal(torch.cat(cut), whole)


@pytest.mark.parametrize(("seed", "table"), [(2, "item"), (1, "genres")])
def test_another_seed_or_table_has_other_rows(seed, table):
    rows = initial_rows("item", seed=1, first=0, num_rows=10, width=8, std=0.1)
    assert not torch.isclose(rows, initial_rows(table, seed=seed, first=0, num_rows=10, width=8, std=0.1)).any()


def test_rows_are_normal_and_independent():
    rows = initial_rows("item", seed=1, first=10**9, num_rows=20_000, width=16, std=0.5).double()
    # Standard errors at 320,000 draws: mean 0.0009, std 0.0006, kurtosis 0.009, correlation of columns 0.007.
    assert rows.mean().abs() < 0.005
    assert (rows.std() - 0.5).abs() < 0.003
    assert ((rows / 0.5).pow(4).mean() - 3).abs() < 0.05
    correlation = torch.corrcoef(rows.T) - torch.eye(16, dtype=torch.float64)
    assert correlation.abs().max() < 0.04


def test_features_of_items_keep_their_order_and_lengths():
    feature = ItemFeature(name="genres", offsets=torch.tensor([0, 0, 0, 2, 3, 3]), values=torch.tensor([5, 6, 7]))
    values, lengths = feature.of(torch.tensor([3, 4, 2]))
    assert values.tolist() == [7, 5, 6]
    assert lengths.tolist() == [1, 0, 2]


def test_feature_rows_are_averaged_and_absent_ones_are_zero():
    feature = ItemFeature(name="genres", offsets=torch.tensor([0, 0, 0, 2, 2]), values=torch.tensor([2, 3]))
    specs = [TableSpec(name="item", capacity=4, width=6), TableSpec(name="genres", capacity=4, width=6)]
    tables = embedding_collection(specs, device="cpu")
    item_IC, features_IFC = pool_features(tables(look_up_ids(torch.tensor([3, 2]), [feature])), [feature])
    weights = {name: parameter for name, parameter in tables.named_parameters()}
    genres = weights["embeddings.genres.weight"]
    assert torch.equal(item_IC, weights["embeddings.item.weight"][[3, 2]])
    assert torch.equal(features_IFC[0, 0], torch.zeros(6))
    torch.testing.assert_close(features_IFC[1, 0], (genres[2] + genres[3]) / 2)


def users_of(*rows: list[list[int]]) -> UserCodes:
    """One list of values a feature for each user."""
    lengths = torch.tensor([[len(values) for values in row] for row in rows], dtype=torch.int64).view(len(rows), -1)
    values = [value for row in rows for values in row for value in values]
    return UserCodes(lengths_UG=lengths, values=torch.tensor(values, dtype=torch.int64))


def test_users_join_the_look_up_of_items_and_each_table_is_looked_up_once():
    genres = ItemFeature(name="genres", offsets=torch.tensor([0, 0, 0, 2, 2]), values=torch.tensor([2, 3]))
    names = ["item", "genres", "user-sex", "user-likes"]
    tables = embedding_collection([TableSpec(name=name, capacity=8, width=6) for name in names], device="cpu")
    users = users_of([[2], [5, 3]], [[], [3]], [[4], []])
    ids = look_up_ids(torch.tensor([3, 2]), [genres], user_tables=names[2:], users=users)
    assert ids.keys() == names
    assert ids["user-likes"].values().tolist() == [5, 3, 3]
    rows = tables(ids)
    item_IC, features_IFC = pool_features(rows, [genres])
    users_UGC = pool_user_features(rows, names[2:])
    weight = {name.split(".")[1]: parameter for name, parameter in tables.named_parameters()}
    assert torch.equal(item_IC, weight["item"][[3, 2]])
    torch.testing.assert_close(features_IFC[1, 0], weight["genres"][[2, 3]].mean(0))
    zero = torch.zeros(6)
    expected = [
        [weight["user-sex"][2], weight["user-likes"][[5, 3]].mean(0)],
        [zero, weight["user-likes"][3]],
        [weight["user-sex"][4], zero],
    ]
    torch.testing.assert_close(users_UGC, torch.stack([torch.stack(row) for row in expected]))


def test_no_user_and_no_user_table_are_legal():
    tables = embedding_collection([TableSpec(name=n, capacity=8, width=6) for n in ("item", "user-sex")], device="cpu")
    for nobody in (UserCodes.of_nobody(1), None):
        rows = tables(look_up_ids(torch.tensor([0]), [], user_tables=["user-sex"], users=nobody))
        assert pool_user_features(rows, ["user-sex"]).shape == (0, 1, 6)
    unread = look_up_ids(torch.tensor([5]), [], user_tables=[], users=users_of([[2]], [[3]]))
    assert unread.keys() == ["item"]
    assert unread["item"].lengths().tolist() == [1]
