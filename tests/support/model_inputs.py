"""Small random inputs of a tower, jagged in every way."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from models.interface import ModelInput
from models.solar import SolarConfig

WIDTH, NUM_ITEMS, NUM_FEATURES, NUM_USER_FEATURES = 16, 30, 2, 3
MS_PER_MINUTE = 60_000
BASE = SolarConfig(
    width=WIDTH,
    num_heads=2,
    rank=4,
    checkpoint_every=5,
    recent_window=8,
    num_actions=3,
    set_attention=True,
    set_attention_exact_up_to=100,
    ffn_multiple=2,
    num_user_features=NUM_USER_FEATURES,
    context_features=True,
    absolute_time=True,
    repeats=True,
)
"""SOLAR with all its parts but the labels of events, small."""
FIRST_ROW = 3
"""Row of the first item of `random_inputs` in the table."""
LABELLED = dataclasses.replace(BASE, history_labels=True)


def random_inputs(
    *,
    lengths: tuple[int, ...] = (0, 7, 40, 23),
    requests: tuple[tuple[int, int], ...] = ((0, 0), (1, 7), (1, 0), (2, 40), (2, 33), (3, 5)),
    sizes: tuple[int, ...] = (4, 1, 0, 9, 3, 4),
    seed: int = 0,
) -> ModelInput:
    """Users with `lengths` events; requests are (user, position); `sizes` counts the candidates of each request."""
    generator = torch.Generator().manual_seed(seed)
    offsets_U1 = torch.tensor([0, *lengths]).cumsum(0)
    num_events, num_candidates = int(offsets_U1[-1]), sum(sizes)
    user_B = torch.tensor([user for user, _ in requests], dtype=torch.long)
    position_B = torch.tensor([position for _, position in requests], dtype=torch.long)
    gaps_N = torch.randint(0, 3000, (num_events,), generator=generator) * MS_PER_MINUTE
    time_N = 1_700_000_000_000 + gaps_N.cumsum(0)
    last_B = (offsets_U1[user_B] + position_B - 1).clamp_min(0) if len(requests) else position_B
    return ModelInput(
        item_IC=torch.randn(NUM_ITEMS, WIDTH, generator=generator).requires_grad_(),
        features_IFC=torch.randn(NUM_ITEMS, NUM_FEATURES, WIDTH, generator=generator),
        user_features_UGC=torch.randn(
            len(lengths), NUM_USER_FEATURES, WIDTH, generator=torch.Generator().manual_seed(seed + 100)
        ),
        event_offsets_U1=offsets_U1,
        event_item_N=torch.randint(0, NUM_ITEMS, (num_events,), generator=generator),
        event_time_N=time_N,
        event_action_N=torch.randint(0, 3, (num_events,), generator=generator),
        event_label_N=torch.randint(0, 3, (num_events,), generator=torch.Generator().manual_seed(seed + 200)),
        request_user_B=user_B,
        request_position_B=position_B,
        request_time_B=time_N[last_B] + 7 * MS_PER_MINUTE if len(requests) else position_B,
        candidate_offsets_B1=torch.tensor([0, *sizes]).cumsum(0),
        candidate_item_M=torch.randint(0, NUM_ITEMS, (num_candidates,), generator=generator),
        item_row_I=torch.arange(NUM_ITEMS) + FIRST_ROW,
    )


def empty_inputs() -> ModelInput:
    """What a rank without work gets."""
    none, zero = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    return ModelInput(
        item_IC=torch.zeros(0, WIDTH, requires_grad=True),
        features_IFC=torch.zeros(0, NUM_FEATURES, WIDTH),
        user_features_UGC=torch.zeros(0, NUM_USER_FEATURES, WIDTH),
        event_offsets_U1=zero,
        event_item_N=none,
        event_time_N=none,
        event_action_N=none,
        event_label_N=none,
        request_user_B=none,
        request_position_B=none,
        request_time_B=none,
        candidate_offsets_B1=zero,
        candidate_item_M=none,
        item_row_I=none,
    )


def only_request(inputs: ModelInput, b: int) -> ModelInput:
    """The same batch with one of its requests, and the events of that request's user alone."""
    user = int(inputs.request_user_B[b])
    events = slice(int(inputs.event_offsets_U1[user]), int(inputs.event_offsets_U1[user + 1]))
    candidates = slice(int(inputs.candidate_offsets_B1[b]), int(inputs.candidate_offsets_B1[b + 1]))
    candidate_item_M = inputs.candidate_item_M[candidates]
    return dataclasses.replace(
        inputs,
        user_features_UGC=inputs.user_features_UGC[user : user + 1],
        event_offsets_U1=torch.tensor([0, events.stop - events.start]),
        event_item_N=inputs.event_item_N[events],
        event_time_N=inputs.event_time_N[events],
        event_action_N=inputs.event_action_N[events],
        event_label_N=inputs.event_label_N[events],
        request_user_B=torch.zeros(1, dtype=torch.long),
        request_position_B=inputs.request_position_B[b : b + 1],
        request_time_B=inputs.request_time_B[b : b + 1],
        candidate_offsets_B1=torch.tensor([0, candidate_item_M.numel()]),
        candidate_item_M=candidate_item_M,
    )


def on_meta(inputs: ModelInput) -> ModelInput:
    """The same batch without values, but for what a tower reads on the host."""
    host = {"event_offsets_U1", "request_user_B", "request_position_B", "candidate_offsets_B1", "num_reserved"}
    absent = {"known_candidates_B", "stored", "counted_until_B"}
    fields = {field.name for field in dataclasses.fields(inputs)} - host - absent
    on_device = {name: getattr(inputs, name).detach().to("meta") for name in fields}
    on_device["item_IC"].requires_grad_()
    return dataclasses.replace(inputs, **on_device)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start value, so that nothing is equal because it is still zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    """Gradient of each parameter by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_that_everything_learns(model: torch.nn.Module, inputs: ModelInput) -> None:
    """Every parameter and every candidate's row has a gradient."""
    model(inputs).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name
    assert inputs.item_IC.grad is not None
    assert (inputs.item_IC.grad[inputs.candidate_item_M].abs().sum(1) > 0).all()


def check_empty_batch(model: torch.nn.Module, inputs: ModelInput) -> None:
    """No candidate, no logit, and still a gradient for every parameter: all ranks join the reduction."""
    logits_M = model(inputs)
    assert logits_M.shape == (0,)
    assert logits_M.dtype == torch.float32
    logits_M.sum().backward()
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients(model).values())
    assert inputs.item_IC.grad is not None
