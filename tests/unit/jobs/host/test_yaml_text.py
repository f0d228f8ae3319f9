"""Dates and times of day in YAML are text, quoted or not; everything else is as YAML says."""

from __future__ import annotations

import datetime

import pytest
import yaml

from jobs.host.yaml_text import parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-21",
        "2026-1-2",
        "2026-11-21T03:00:00",
        "2026-11-21 03:00:00Z",
        "04:00",
        "14:00",
        "23:59:30",
        "7:30:15.5",
    ],
)
def test_what_looks_like_a_date_or_a_time_of_day_is_text(text):
    assert parse_yaml(f"until: {text}") == {"until": text} == parse_yaml(f"until: '{text}'")


def test_other_scalars_keep_their_types():
    assert parse_yaml("[1, 1.5, 20240131, 1_000, -3, true, null, 0x1f, a:b, 12, 2026]") == [
        1, 1.5, 20240131, 1000, -3, True, None, 31, "a:b", 12, 2026,
    ]  # fmt: skip


def test_yaml_itself_is_not_changed():
    assert yaml.safe_load("2026-11-21") == datetime.date(2026, 11, 21)
