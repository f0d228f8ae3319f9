"""The learning rate is a function of the step; only matrices decay."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from jobs.training.optimizers import OptimizerConfig


def test_rate_warms_up_linearly_and_falls_to_its_final_share():
    config = OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1)
    rates = [config.lr_share_at(step, num_steps=1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9])
    assert rates[9] == pytest.approx(1.0, abs=0.01)
    assert rates[1000] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))


def test_only_matrices_decay():
    tower = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, plain = OptimizerConfig(weight_decay=0.5).parameter_groups(tower)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.5
    assert plain["weight_decay"] == 0
    assert len(plain["params"]) == 3
