"""Each sequence model against its formulas, one position, one head and one event at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from models.gru4rec import Gru4Rec, Gru4RecConfig
from models.hstu import Hstu, HstuConfig
from models.interface import ModelInput
from models.light_sans_sequence import LightSansSequence, LightSansSequenceConfig, pooled_so_far
from models.linrec import LinRec, LinRecConfig
from models.sasrec import SasRec, SasRecConfig
from models.sequence_tower import SequenceModel
from tests.support.model_inputs import WIDTH, random_inputs, randomise

L, HEADS = 8, 2
HEAD = WIDTH // HEADS
LENGTHS = (0, 1, L - 1, L, L + 5)
COMMON: dict[str, Any] = {"width": WIDTH, "num_layers": 2, "max_length": L}
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
"""Float64 sums in another order: rounding is near 1e-14, least lengths of 1e-6 are squared."""


@torch.no_grad()
def check(model: Any, plain: Callable[[Any, Tensor, list[int]], Tensor]) -> None:
    """`plain(model, row_TD, milliseconds)` gives the state at every position of one window."""
    randomise(model).double().eval()
    assert isinstance(model, SequenceModel)
    inputs = random_inputs(lengths=LENGTHS, requests=tuple(enumerate(LENGTHS)), sizes=(1,) * 5)
    found_BD = model.request_states(inputs, model.item_vectors(inputs))
    for b, length in enumerate(LENGTHS):
        row_nD, times = _window(inputs, b)
        missing = (0 if length else 1) if model.causal else L - len(row_nD)
        padded = torch.cat([row_nD, model.padding_D.expand(missing, WIDTH)])
        expected_TD = plain(model, padded, times + [0] * missing)
        torch.testing.assert_close(found_BD[b], expected_TD[max(len(row_nD) - 1, 0)], **EXACT)


def _window(inputs: ModelInput, user: int) -> tuple[Tensor, list[int]]:
    start, stop = inputs.event_offsets_U1[user : user + 2].tolist()
    start = max(start, stop - L)
    return inputs.item_IC[inputs.event_item_N[start:stop]].double(), inputs.event_time_N[start:stop].tolist()


def norm(value: Tensor, module: torch.nn.LayerNorm | None = None, eps: float = 1e-12) -> Tensor:
    centred = value - value.mean(-1, keepdim=True)
    value = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return value if module is None else value * module.weight + module.bias


def linear(value: Tensor, module: torch.nn.Linear) -> Tensor:
    value = value @ module.weight.T
    return value if module.bias is None else value + module.bias


def softmax(score: Tensor) -> Tensor:
    weight = (score - score.max()).exp()
    return weight / weight.sum()


def gelu(value: Tensor) -> Tensor:
    return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))


def elu(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, value.exp() - 1)


def silu(value: Tensor) -> Tensor:
    return value / (1 + (-value).exp())


def units(head: int) -> slice:
    return slice(head * HEAD, (head + 1) * HEAD)


def plain_transformer_end(layer: Any, x: Tensor, found: Tensor) -> Tensor:
    x = norm(x + linear(found, layer.output), layer.norm)
    return norm(x + linear(gelu(linear(x, layer.mlp.first)), layer.mlp.second), layer.mlp_norm)


def plain_sasrec(model: Any, row_TD: Tensor, _: list[int]) -> Tensor:
    x = torch.stack([row_TD[n] * math.sqrt(WIDTH) + model.position.table_LD[n] for n in range(len(row_TD))])
    for layer in model.layers:
        normed = norm(x, layer.query_norm, eps=1e-8)
        query, key_value = linear(normed, layer.query), linear(x, layer.key_value)
        found = torch.zeros_like(x)
        for n in range(len(x)):
            for h in range(HEADS):
                key, value = key_value[: n + 1, :WIDTH][:, units(h)], key_value[: n + 1, WIDTH:][:, units(h)]
                found[n, units(h)] = softmax(key @ query[n, units(h)] / math.sqrt(HEAD)) @ value
        x = norm(normed + linear(found, layer.output), layer.mlp_norm, eps=1e-8)
        x = x + linear(linear(x, layer.mlp.first).clamp_min(0), layer.mlp.second)
    return norm(x, model.norm, eps=1e-8)


def test_sasrec_is_causal_softmax_attention_of_normalised_queries() -> None:
    check(SasRec(SasRecConfig(**COMMON, num_heads=HEADS)), plain_sasrec)


def plain_hstu(model: Any, row_TD: Tensor, times: list[int]) -> Tensor:
    x = row_TD * math.sqrt(WIDTH)
    if model.position is not None:
        x = x + model.position.table_LD[: len(x)]
    for layer in model.layers:
        gate, value, query, key = silu(linear(norm(x, eps=1e-6), layer.sides)).split(WIDTH, dim=1)
        found = torch.zeros_like(x)
        for n in range(len(x)):
            for j in range(n + 1):
                bias = layer.position_L[n - j]
                if layer.time is not None:
                    seconds = max(1.0, (times[n] - times[j]) / 1000)
                    bias = bias + layer.time[min(128, int(math.log(seconds) / 0.301))]
                for h in range(HEADS):
                    weight = silu(query[n, units(h)] @ key[j, units(h)] + bias) / L
                    found[n, units(h)] += weight * value[j, units(h)]
        x = x + linear(norm(found, eps=1e-6) * gate, layer.output)
    return norm(x, eps=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_hstu_is_pointwise_attention_with_a_gate(biased: bool) -> None:
    config = HstuConfig(**COMMON, num_heads=HEADS, time_bias=biased, absolute_positions=biased)
    check(Hstu(config), plain_hstu)


def plain_gru(model: Any, row_TD: Tensor, _: list[int]) -> Tensor:
    unit = model.recurrence
    hidden, states = torch.zeros(unit.hidden_size, dtype=torch.float64), []
    for row in row_TD:
        from_row = (unit.weight_ih_l0 @ row + unit.bias_ih_l0).chunk(3)
        from_state = (unit.weight_hh_l0 @ hidden + unit.bias_hh_l0).chunk(3)
        reset, update = (1 / (1 + (-(from_row[i] + from_state[i])).exp()) for i in range(2))
        hidden = update * hidden + (1 - update) * torch.tanh(from_row[2] + reset * from_state[2])
        states.append(linear(hidden, model.output))
    return torch.stack(states)


def test_gru4rec_is_the_recurrence() -> None:
    check(Gru4Rec(Gru4RecConfig(width=WIDTH, max_length=L, hidden_width=10)), plain_gru)


def plain_linrec(model: Any, row_TD: Tensor, _: list[int]) -> Tensor:
    x = norm(row_TD + model.position.table_LD[: len(row_TD)], model.norm)
    for layer in model.layers:
        query, key, value = linear(x, layer.query_key_value).split(WIDTH, dim=1)
        query, key = elu(query), elu(key)
        found = torch.zeros_like(x)
        for n in range(len(x)):
            read = n + 1 if model.causal else len(x)
            for h in range(HEADS):
                column = key[:read, units(h)] / key[:read, units(h)].square().sum(0).sqrt()
                row = query[n, units(h)] / query[n, units(h)].square().sum().sqrt()
                found[n, units(h)] = row @ (column.T @ value[:read, units(h)]) / math.sqrt(HEAD)
        x = plain_transformer_end(layer, x, found)
    return x


@pytest.mark.parametrize("form", ["published", "causal"])
def test_linrec_normalises_queries_by_row_and_keys_by_column(form: Literal["published", "causal"]) -> None:
    check(LinRec(LinRecConfig(**COMMON, num_heads=HEADS, form=form)), plain_linrec)


def plain_light_sans(model: Any, row_TD: Tensor, _: list[int]) -> Tensor:
    x = norm(row_TD, model.norm)
    for layer in model.layers:
        query, key, value = linear(x, layer.query_key_value).split(WIDTH, dim=1)
        place = norm(model.position.table_LD[: len(x)], layer.position_norm)
        place_query, place_key = linear(place, layer.position_query_key).split(WIDTH, dim=1)
        found = torch.zeros_like(x)
        for n in range(len(x)):
            read = n + 1 if model.causal else len(x)
            interests = [
                torch.stack([softmax(side[:read] @ theta) @ side[:read] for theta in pool.weight])
                for side, pool in ((key, layer.key_pool), (value, layer.value_pool))
            ]
            for h in range(HEADS):
                item = softmax(interests[0][:, units(h)] @ query[n, units(h)] / math.sqrt(HEAD))
                position = softmax(place_key[:read, units(h)] @ place_query[n, units(h)] / math.sqrt(HEAD))
                found[n, units(h)] = item @ interests[1][:, units(h)] + position @ value[:read, units(h)]
        x = plain_transformer_end(layer, x, found)
    return x


@pytest.mark.parametrize("form", ["published", "causal"])
def test_light_sans_attends_to_interests_and_to_positions(form: Literal["published", "causal"]) -> None:
    config = LightSansSequenceConfig(**COMMON, num_heads=HEADS, num_interests=3, form=form)
    check(LightSansSequence(config), plain_light_sans)


def test_interests_so_far_survive_scores_far_apart() -> None:
    """An event that later outweighs everything must not erase the interests before it, nor their gradient."""
    score_KTR = torch.tensor([0.0, 1.0, 300.0]).view(1, 3, 1).requires_grad_()
    value_KTD = torch.tensor([[1.0], [3.0], [9.0]])[None]
    found_KTRD = pooled_so_far(score_KTR, value_KTD)
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(found_KTRD.flatten(), torch.tensor([1.0, 1 + 2 * share, 9.0]))
    (bar,) = torch.autograd.grad(found_KTRD[0, 1].sum(), score_KTR)
    slope = 2 * share * (1 - share)
    torch.testing.assert_close(bar.flatten(), torch.tensor([-slope, slope, 0.0]))
