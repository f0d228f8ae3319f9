"""Dates and times of day in YAML are text, quoted or not; everything else is as YAML says."""

from __future__ import annotations

import datetime
import itertools
import re

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


@pytest.mark.parametrize("text", ["010", "007", "08", "-010", "+010", "0_7", "1:30", "1:3", "+1:30:00", "1:30.5"])
def test_what_yaml_reads_as_another_number_is_text(text):
    assert parse_yaml(f"epochs: {text}") == {"epochs": text}


@pytest.mark.parametrize("text", ["0", "-0", "0.5", "00.5", "0x1f", "0b11"])
def test_zeros_of_other_numbers_are_theirs(text):
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training: {epochs: 2, epochs: 5}", "line 1: key 'epochs' is in line 1 already: keep one of them"),
        (
            "training:\n  epochs: 2\nseed: 1\ntraining:\n  x: 1",
            "line 4: key 'training' is in line 1 already: keep one of them",
        ),
        ("rows:\n- a: 1\n  'a': 1", "line 3: key 'a' is in line 2 already: keep one of them"),
        ("{<<: {a: 1}, <<: {b: 1}}", "line 1: key '<<' is in line 1 already: keep one of them"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(text, told):
    with pytest.raises(yaml.YAMLError, match=f"^{re.escape(told)}$"):
        parse_yaml(text)


def test_settings_may_be_shared_through_anchors():
    shared = "small: &small {width: 8, rank: 2}\nlarge: {<<: *small, width: 64}\nboth: [*small, *small]"
    small = {"width": 8, "rank": 2}
    assert parse_yaml(shared) == {"small": small, "large": {"width": 64, "rank": 2}, "both": [small, small]}
    assert parse_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{inner}'] * 10)}]\n" for inner, name in itertools.pairwise("abcdefghij")
)
CHAIN = "a0: &a0 []\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: &m {name: solar, x: *m}", "line 1: nested more than 50 levels deep, or an alias stands inside its"),
        ("a: 1\nlist: &l\n- *l", "line 2: nested more than 50 levels deep, or an alias stands inside its anchor"),
        (BOMB, "its aliases expand to more than 100,000 values"),
        (BOMB + "x: {<<: [*j, *j]}", "its aliases expand to more than 100,000 values"),
        (CHAIN, "nested more than 50 levels deep"),
        ("model: " + "[" * 100 + "]" * 100, "nested more than 50 levels deep"),
        ("model: " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep"),
        ("model: " + "{a: " * 3000 + "}" * 3000, "nested more than 50 levels deep"),
        ("a: !!int x", "a value does not fit its type: invalid literal for int"),
        ("a: !!bool maybe", "a value does not fit its type: 'maybe'"),
        ("a: !!timestamp x", "a value does not fit its type"),
        ("a: " + "9" * 5000, "a value does not fit its type: Exceeds the limit"),
    ],
    ids=range(12),
)
def test_what_expands_without_bound_or_does_not_fit_is_refused(text, told):
    with pytest.raises(yaml.YAMLError, match=re.escape(told)):
        parse_yaml(text)


def test_no_text_is_no_value():
    assert parse_yaml("") is None
