"""RecGRELA against its formulas, one head, one position and one pair of units at a time, in float64."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.interface import ModelInput
from models.recgrela import GrelaLayer, RecGrela, RecGrelaConfig
from models.recgrela_state import RecGrelaState
from models.running_attention import running_attention
from tests.support.attention_maps import attention_maps, attention_rank
from tests.support.model_inputs import WIDTH, random_inputs, randomise

L, HEADS = 8, 2
LENGTHS = (0, 1, L - 1, L, L + 5)
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
"""Float64 sums in another order; rounding is near 1e-14, the published epsilon 1e-6 has to show."""


def build(form: Literal["published", "causal"], **options: Any) -> RecGrela:
    torch.manual_seed(0)
    config = RecGrelaConfig(width=WIDTH, num_heads=HEADS, num_layers=2, max_length=L, form=form, **options)
    model = randomise(RecGrela(config)).double().eval()
    assert isinstance(model, RecGrela)
    return model


def every_length() -> ModelInput:
    """One request at the end of a history of each length."""
    return random_inputs(lengths=LENGTHS, requests=tuple(enumerate(LENGTHS)), sizes=(3, 1, 2, 0, 4))


def rows_of(inputs: ModelInput, user: int) -> Tensor:
    start, stop = inputs.event_offsets_U1[user : user + 2].tolist()
    return inputs.item_IC[inputs.event_item_N[start:stop]].double()


def plain_states(model: RecGrela, row_TD: Tensor) -> Tensor:
    """state_TD of one window."""
    x = plain_norm(row_TD, model.norm)
    for layer in model.layers:
        assert isinstance(layer, GrelaLayer)
        x = plain_layer(layer, x, causal=model.config.form == "causal")
    return x


def plain_layer(layer: GrelaLayer, x: Tensor, *, causal: bool) -> Tensor:
    length, width = x.shape
    normed = plain_norm(x, layer.norm)
    value = plain_linear(normed, layer.input)
    query_key = plain_linear(value, layer.query_key)
    query, key = phi(query_key[:, :width]), phi(query_key[:, width:])
    turned_query, turned_key = plain_rotary(query), plain_rotary(key)
    mixed = torch.zeros(length, width, dtype=torch.float64)
    for n in range(length):
        read = range(n + 1) if causal else range(length)
        for head in range(HEADS):
            units = slice(head * width // HEADS, (head + 1) * width // HEADS)
            outer, mean = 0, 0
            for j in read:
                outer = outer + torch.outer(turned_key[j, units], value[j, units]) / len(read)
                mean = mean + key[j, units] / len(read)
            mixed[n, units] = turned_query[n, units] @ outer / (query[n, units] @ mean + 1e-6)
        if layer.local is not None and layer.local.bias is not None:
            heard = layer.local.bias.clone()
            for back in range(4):
                if n >= back:
                    heard = heard + layer.local.weight[:, 0, 3 - back] * value[n - back]
            mixed[n] += heard * torch.sigmoid(heard)
    if layer.gate is not None:
        gate = plain_linear(normed, layer.gate)
        mixed = mixed * gate * torch.sigmoid(gate)
    x = x + plain_linear(mixed, layer.output)
    hidden = plain_linear(plain_norm(x, layer.mlp_norm), layer.mlp.first)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + plain_linear(hidden, layer.mlp.second)


def phi(value: Tensor) -> Tensor:
    return torch.where(value > 0, value + 1, value.exp())


def plain_rotary(value: Tensor) -> Tensor:
    turned = value.clone()
    for n in range(value.shape[0]):
        for i in range(value.shape[1] // 2):
            angle = n / 10000 ** (2 * i / value.shape[1])
            number = complex(float(value[n, 2 * i]), float(value[n, 2 * i + 1])) * complex(
                math.cos(angle), math.sin(angle)
            )
            turned[n, 2 * i], turned[n, 2 * i + 1] = number.real, number.imag
    return turned


def plain_norm(value: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = value - value.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias


def plain_linear(value: Tensor, linear: torch.nn.Linear) -> Tensor:
    return value @ linear.weight.T + linear.bias


@torch.no_grad()
def test_published_form_reads_all_positions_of_a_padded_window() -> None:
    model, inputs = build("published"), every_length()
    found_BD = model.request_states(inputs, model.item_vectors(inputs))
    for b, length in enumerate(LENGTHS):
        row_nD = rows_of(inputs, b)[-L:]
        padded_LD = torch.cat([row_nD, model.padding_D.expand(L - len(row_nD), WIDTH)])
        expected_D = plain_states(model, padded_LD)[max(min(length, L) - 1, 0)]
        torch.testing.assert_close(found_BD[b], expected_D, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("augmentation", [True, False])
@pytest.mark.parametrize("selector", [True, False])
def test_causal_form_reads_the_events_so_far(augmentation: bool, selector: bool) -> None:
    model = build("causal", rank_augmentation=augmentation, rank_selector=selector)
    inputs = every_length()
    found_BD = model.request_states(inputs, model.item_vectors(inputs))
    for b in range(len(LENGTHS)):
        row_nD = rows_of(inputs, b)[-L:]
        expected_D = plain_states(model, row_nD if len(row_nD) else model.padding_D[None])[-1]
        torch.testing.assert_close(found_BD[b], expected_D, **EXACT)


@torch.no_grad()
def test_all_prefixes_in_one_pass_are_the_prefixes_one_by_one() -> None:
    model = build("causal")
    requests = tuple((0, position) for position in range(L + 1))
    inputs = random_inputs(lengths=(L,), requests=requests, sizes=(1,) * (L + 1))
    # One window of events, and one of padding for the empty history.
    assert model.windows(inputs).event_KT.shape == (2, L)
    found_BD = model.request_states(inputs, model.item_vectors(inputs))
    for position in range(L + 1):
        row_nD = rows_of(inputs, 0)[:position] if position else model.padding_D[None]
        expected_D = plain_states(model, row_nD)[-1]
        torch.testing.assert_close(found_BD[position], expected_D, **EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_running_attention_and_its_gradient_are_those_of_the_double_loop(chunk: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(2, 10, width, generator=generator, dtype=torch.float64) for width in (3, 3, 4, 4)]
    query, key, value = (side.requires_grad_() for side in sides[:3])
    expected = torch.stack([torch.stack([prefix_sum(query, key, value, x, t) for t in range(10)]) for x in range(2)])
    found = running_attention(query, key_XTD=key, value_XTV=value, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found_bars = torch.autograd.grad((found * sides[3]).sum(), (query, key, value))
    expected_bars = torch.autograd.grad((expected * sides[3]).sum(), (query, key, value))
    torch.testing.assert_close(found_bars, expected_bars, rtol=1e-12, atol=1e-12)


def prefix_sum(query: Tensor, key: Tensor, value: Tensor, x: int, t: int) -> Tensor:
    return torch.stack([(query[x, t] @ key[x, j]) * value[x, j] for j in range(t + 1)]).sum(0)


def test_published_size_is_that_of_the_authors_log() -> None:
    model = RecGrela(RecGrelaConfig(form="published"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 217_984
    assert 217_984 + (3_416 + 1) * 64 == 436_672


@torch.no_grad()
def test_recurrent_state_is_the_causal_form_event_by_event() -> None:
    model = build("causal")
    requests = tuple((user, position) for user in range(2) for position in range(L + 1))
    inputs = random_inputs(lengths=(L, L), requests=requests, sizes=(1,) * len(requests))
    expected_UTD = model.request_states(inputs, model.item_vectors(inputs)).unflatten(0, (2, L + 1))
    state = RecGrelaState.empty(model, 2)
    torch.testing.assert_close(state.state_XD, expected_UTD[:, 0], **EXACT)
    rows = [rows_of(inputs, user) for user in range(2)]
    for n in range(L):
        state = RecGrelaState(**state.tensors()).add(model, torch.stack([row_TD[n] for row_TD in rows]))
        torch.testing.assert_close(state.state_XD, expected_UTD[:, n + 1], **EXACT)
    assert state.count_X.tolist() == [L, L]
    assert (
        sum(tensor[0].numel() for tensor in state.tensors().values())
        == 1 + 2 * (HEADS * (WIDTH // HEADS) ** 2 + WIDTH + 3 * WIDTH) + WIDTH
    )


@torch.no_grad()
def test_recurrent_state_goes_on_where_a_longer_window_would() -> None:
    model = build("causal")
    longer = RecGrela(RecGrelaConfig(width=WIDTH, num_heads=HEADS, num_layers=2, max_length=3 * L)).double().eval()
    longer.load_state_dict(model.state_dict())
    inputs = random_inputs(lengths=(3 * L,), requests=((0, 3 * L),), sizes=(1,))
    state = RecGrelaState.empty(model, 1)
    for row_D in rows_of(inputs, 0):
        state = state.add(model, row_D[None])
    torch.testing.assert_close(state.state_XD, longer.request_states(inputs, longer.item_vectors(inputs)), **EXACT)


def test_a_state_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="form = causal"):
        RecGrelaState.empty(build("published"), 1)
    with pytest.raises(ValueError, match="eval"):
        RecGrelaState.empty(build("causal").train(), 1)


@torch.no_grad()
@pytest.mark.parametrize("form", ["published", "causal"])
def test_attention_maps_are_what_a_layer_does_to_its_values(form: Literal["published", "causal"]) -> None:
    model = build(form)
    row_TD = torch.randn(L, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = attention_maps(model, row_TD)[0]
    layer = model.layers[0]
    assert isinstance(layer, GrelaLayer)
    got: list[Tensor] = []
    hook = layer.output.register_forward_pre_hook(lambda _, args: got.append(args[0][0]))
    layer(model.norm(row_TD[None]))
    hook.remove()
    mixed_TD = torch.einsum("dnj,jd->nd", first.modulated_DTT, first.value_TD) + first.offset_TD
    torch.testing.assert_close(mixed_TD, got[0], **EXACT)
    assert torch.equal(first.attention_HTT, first.attention_HTT.tril()) == (form == "causal")


def test_rank_is_bounded_by_a_heads_width_until_the_convolution_fills_it() -> None:
    row_TD = torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    head_width = WIDTH // HEADS
    with_both = attention_maps(build("published"), row_TD)[0]
    assert attention_rank(with_both.attention_HTT).max() <= head_width
    assert attention_rank(with_both.modulated_DTT).min() > head_width
    gate_alone = attention_maps(build("published", rank_augmentation=False), row_TD)[0]
    assert attention_rank(gate_alone.modulated_DTT).max() <= head_width
    rank_three = torch.diag(torch.tensor([5.0, 1.0, 1e-3, 1e-9, 0.0]))
    assert attention_rank(rank_three) == 3
    assert attention_rank(rank_three, tolerance=0.1) == 2


def test_attention_path_is_left_out_for_whole_windows_in_training() -> None:
    model = build("causal", dropout=0.0, drop_path=0.5).train()
    layer = model.layers[0]
    assert isinstance(layer, GrelaLayer)
    state_KTD = torch.randn(200, 3, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        kept_KTD = layer.eval()(state_KTD)
        found_KTD = layer.train()(state_KTD)
        without_KTD = state_KTD + layer.mlp(layer.mlp_norm(state_KTD))
    left_out_K = (found_KTD == without_KTD).flatten(1).all(1)
    assert 60 < int(left_out_K.sum()) < 140
    assert not torch.isclose(found_KTD[~left_out_K], kept_KTD[~left_out_K]).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"form": "prefix"}, "form = 'prefix' must be published"),
        ({"width": 15, "num_heads": 3}, "width = 15 must be even"),
        ({"width": 16, "num_heads": 3}, "must be a multiple of num_heads = 3"),
        ({"drop_path": 1.0}, "drop_path = 1.0 must be at least 0 and below 1"),
        ({"max_length": 0}, "max_length = 0 must be at least 1"),
    ],
)
def test_a_bad_setting_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        RecGrelaConfig(**options)


def test_published_maps_refuse_training_mode() -> None:
    model = build("published").train()
    with pytest.raises(ValueError, match="eval"):
        attention_maps(model, F.one_hot(torch.arange(4), WIDTH).double())
