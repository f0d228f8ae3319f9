"""What every attention tower must be, whatever reads the history: SOLAR in all its variants and its competitors."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from models.attention_tower import TowerConfig
from models.din import Din, DinConfig
from models.interface import Recommender
from models.light_sans import LightSans, LightSansConfig
from models.linear_attention import LinearAttention, LinearAttentionConfig
from models.solar import Solar, SolarConfig
from tests.support.model_inputs import (
    BASE,
    LABELLED,
    NUM_FEATURES,
    NUM_ITEMS,
    NUM_USER_FEATURES,
    WIDTH,
    check_empty_batch,
    check_that_everything_learns,
    empty_inputs,
    on_meta,
    only_request,
    random_inputs,
    randomise,
)

COMMON: dict[str, Any] = {"width": WIDTH, "num_heads": 2, "recent_window": 8, "num_actions": 3}
COMMON |= {"num_user_features": NUM_USER_FEATURES, "absolute_time": True, "repeats": True, "history_labels": True}
VARIANTS: dict[str, TowerConfig] = {
    "base": BASE,
    "two layers": dataclasses.replace(BASE, num_layers=2),
    "low-rank sets": dataclasses.replace(BASE, set_attention_exact_up_to=2),
    "no sets, no ffn, inner product": dataclasses.replace(BASE, set_attention=False, ffn_multiple=0, head_width=0),
    "interests alone": dataclasses.replace(BASE, recent_window=0),
    "recent events alone": dataclasses.replace(BASE, interests=False),
    "requests are their histories": dataclasses.replace(
        BASE, user_features=False, context_features=False, absolute_time=False
    ),
    "decay": dataclasses.replace(BASE, half_life=6.0),
    "ablations": dataclasses.replace(
        BASE, gradient="stop", canonical_sign=False, divide_by_events=False, form="bilinear", set_attention=False
    ),
    "gaussian": dataclasses.replace(BASE, form="gaussian", half_life=6.0),
    "no time, no actions": dataclasses.replace(BASE, time_features=False, num_actions=1),
    "labels of events": LABELLED,
    "din": DinConfig(**COMMON),
    "din without window and decay": DinConfig(**{**COMMON, "recent_window": 0}, decay=False),
    "din over the latest events": DinConfig(**COMMON, whole_history=False),
    "linear attention": LinearAttentionConfig(**COMMON),
    "linrec": LinearAttentionConfig(**COMMON, form="linrec"),
    "learned pooling": LightSansConfig(**COMMON, rank=4),
}
TOWERS: dict[type[TowerConfig], type[Recommender]] = {
    SolarConfig: Solar,
    DinConfig: Din,
    LinearAttentionConfig: LinearAttention,
    LightSansConfig: LightSans,
}


def build(config: TowerConfig, dtype: torch.dtype = torch.float64) -> Recommender:
    torch.manual_seed(0)
    model = randomise(TOWERS[type(config)](config, num_features=NUM_FEATURES)).to(dtype).eval()
    assert isinstance(model, Recommender)
    return model


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> TowerConfig:
    return VARIANTS[request.param]


def test_one_request_alone_gets_the_same_logits_as_in_a_batch(config: TowerConfig) -> None:
    model, inputs = build(config), random_inputs()
    together = model(inputs)
    for b in range(inputs.request_user_B.numel()):
        start, stop = inputs.candidate_offsets_B1[b : b + 2].tolist()
        # Float32 logits of a float64 model: other sizes of a matrix product round the last bit of a float32.
        torch.testing.assert_close(model(only_request(inputs, b)), together[start:stop], rtol=1e-6, atol=1e-6)


def test_permuted_candidates_give_permuted_logits(config: TowerConfig) -> None:
    model, inputs = build(config), random_inputs()
    generator = torch.Generator().manual_seed(1)
    sizes = inputs.candidate_offsets_B1.diff().tolist()
    order = torch.cat(
        [
            start + torch.randperm(size, generator=generator)
            for start, size in zip(inputs.candidate_offsets_B1.tolist(), sizes, strict=False)
        ]
    )
    shuffled = dataclasses.replace(inputs, candidate_item_M=inputs.candidate_item_M[order])
    # Rounding of float32 logits; sums over a set run in another order.
    torch.testing.assert_close(model(shuffled), model(inputs)[order], rtol=1e-6, atol=1e-6)


def test_events_after_the_position_change_nothing(config: TowerConfig) -> None:
    model = build(config)
    inputs = random_inputs(lengths=(40,), requests=((0, 0), (0, 13), (0, 33)), sizes=(3, 3, 3))
    other = random_inputs(lengths=(40,), requests=((0, 0), (0, 13), (0, 33)), sizes=(3, 3, 3), seed=9)
    for b, position in enumerate((0, 13, 33)):
        changed = dataclasses.replace(
            inputs,
            **{
                name: torch.cat([getattr(inputs, name)[:position], getattr(other, name)[position:]])
                for name in ("event_item_N", "event_time_N", "event_action_N", "event_label_N")
            },
        )
        before, after = model(inputs).view(3, 3), model(changed).view(3, 3)
        # The same numbers enter; only the batch of decompositions may differ.
        torch.testing.assert_close(after[: b + 1], before[: b + 1], rtol=1e-6, atol=1e-6)
        if b < 2:
            assert not torch.equal(after[2], before[2])


def test_events_before_the_latest_count_where_the_whole_history_is_read(config: TowerConfig) -> None:
    model = build(config)
    inputs = random_inputs(lengths=(40,), requests=((0, 40),), sizes=(30,))
    other = random_inputs(lengths=(40,), requests=((0, 40),), sizes=(30,), seed=9)
    kept = 40 - COMMON["recent_window"]
    item_N = torch.cat([other.event_item_N[:kept], inputs.event_item_N[kept:]])
    before, after = model(inputs), model(dataclasses.replace(inputs, event_item_N=item_N))
    assert torch.equal(before, after) == (config.latest is not None)


def test_empty_history_is_the_same_request_as_a_user_without_events(config: TowerConfig) -> None:
    model = build(config)
    emptied = random_inputs(lengths=(20,), requests=((0, 0),), sizes=(5,))
    without = dataclasses.replace(
        emptied,
        event_offsets_U1=torch.tensor([0, 0]),
        event_item_N=emptied.event_item_N[:0],
        event_time_N=emptied.event_time_N[:0],
        event_action_N=emptied.event_action_N[:0],
        event_label_N=emptied.event_label_N[:0],
    )
    assert torch.equal(model(emptied), model(without))


def test_every_parameter_and_every_item_row_learns(config: TowerConfig) -> None:
    model, inputs = build(config), random_inputs()
    # A candidate of the fourth request is what its user came to last.
    inputs.candidate_item_M[5] = inputs.event_item_N[46]
    check_that_everything_learns(model, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [None, (0,) * 6])
def test_empty_batch_returns_empty_logits_with_a_gradient_for_every_parameter(
    config: TowerConfig, dtype: torch.dtype, sizes: tuple[int, ...] | None
) -> None:
    model = build(config, dtype)
    inputs = empty_inputs() if sizes is None else random_inputs(sizes=sizes)
    check_empty_batch(model, inputs)


def test_bfloat16_tower_stays_near_the_float32_tower(config: TowerConfig) -> None:
    inputs = random_inputs()
    expected, found = build(config, torch.float32)(inputs), build(config, torch.bfloat16)(inputs)
    assert found.dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % a step, and about ten steps in a row.
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_batch_with_equal_sets_equals_the_same_sets_beside_another_size(config: TowerConfig) -> None:
    model = build(config)
    inputs = random_inputs(sizes=(4, 4, 4, 4, 4, 4))
    mixed = random_inputs(sizes=(4, 4, 4, 4, 4, 9))
    mixed = dataclasses.replace(
        mixed, candidate_item_M=torch.cat([inputs.candidate_item_M[:20], mixed.candidate_item_M[20:]])
    )
    mixed = dataclasses.replace(mixed, item_IC=inputs.item_IC, features_IFC=inputs.features_IFC)
    for name in ("event_item_N", "event_time_N", "event_action_N", "event_label_N", "request_time_B"):
        mixed = dataclasses.replace(mixed, **{name: getattr(inputs, name)})
    torch.testing.assert_close(model(mixed)[:20], model(inputs)[:20], rtol=1e-6, atol=1e-6)  # Float32 rounding.


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_back_from_the_device(
    config: TowerConfig, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values: whatever needs one, a GPU would have to be waited for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = TOWERS[type(config)](config, num_features=NUM_FEATURES).to("meta").train(training)
    inputs = random_inputs()
    logits_M = model(on_meta(inputs))
    assert logits_M.shape == inputs.candidate_item_M.shape
    logits_M.sum().backward()


def test_a_new_tower_prefers_what_is_like_the_history(config: TowerConfig) -> None:
    """Before any training: attention is similarity, so the items of a history stand above the others."""
    torch.manual_seed(0)
    model = TOWERS[type(config)](config, num_features=NUM_FEATURES).eval()
    every, above = torch.arange(NUM_ITEMS), []
    for seed in range(8):
        inputs = random_inputs(lengths=(20,), requests=((0, 20),), sizes=(NUM_ITEMS,), seed=seed)
        inputs = dataclasses.replace(inputs, candidate_item_M=every, event_item_N=inputs.event_item_N % 8)
        with torch.no_grad():
            logit_M = model(inputs)
        above.append(bool(logit_M[every < 8].mean() > logit_M[every >= 8].mean()))
    assert all(above)


def test_how_much_likeness_counts_at_first_is_a_factor(config: TowerConfig) -> None:
    def logits(agreement: float) -> torch.Tensor:
        torch.manual_seed(0)
        changed = dataclasses.replace(config, head_width=0, initial_agreement=agreement)
        model = TOWERS[type(config)](changed, num_features=NUM_FEATURES).double().eval()
        with torch.no_grad():
            return model(random_inputs())

    none_M, some_M, all_M = (logits(agreement) for agreement in (0.0, 0.125, 1.0))
    torch.testing.assert_close(some_M - none_M, (all_M - none_M) / 8, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(all_M, none_M, atol=1e-2)
