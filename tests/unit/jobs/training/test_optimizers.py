"""The learning rate is a function of the step and of the share of the training that is done; only matrices decay."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from jobs.training.dense_engine import parameter_groups
from jobs.training.job import TrainingConfig
from jobs.training.optimizers import OptimizerConfig


def test_rate_warms_up_linearly_and_falls_to_its_final_share():
    config = OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1)
    rates = [config.lr_share_at(step, share_done=step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9])
    assert rates[9] == pytest.approx(1.0, abs=0.01)
    assert rates[1000] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))


def test_only_matrices_decay():
    tower = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, plain = parameter_groups(tower, weight_decay=0.5)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.5
    assert plain["weight_decay"] == 0
    assert len(plain["params"]) == 3


def test_share_of_the_training_follows_steps_or_seconds_whichever_ends_first():
    by_steps, by_both = TrainingConfig(), TrainingConfig(max_seconds=60.0)
    assert by_steps.share_done(step=25, num_steps=100, seconds=1e9) == 0.25
    assert by_both.share_done(step=25, num_steps=100, seconds=6.0) == 0.25
    assert by_both.share_done(step=25, num_steps=100, seconds=30.0) == 0.5
    assert by_both.share_done(step=25, num_steps=100, seconds=90.0) == 1.0
