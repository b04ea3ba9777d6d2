"""Differences between configurations are told by key."""

from __future__ import annotations

import pytest

from retrieval_kd.changes import changes, shown


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"schedule": {"epochs": 2, "clip": 1}}, {"schedule": {"epochs": 3, "clip": 1}}, ["schedule.epochs: 2 -> 3"]),
        ({"a": None}, {"a": "x"}, ['a: null -> "x"']),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a: [1, 2] -> [1, 3]"]),
        ({"a": {}}, {"a": {"b": 1}}, ["a.b: absent -> 1", "a: {} -> absent"]),
        (
            {"stages": [{"name": "one", "n": 1}, {"name": "two", "n": 1}]},
            {"stages": [{"name": "zero", "n": 1}, {"name": "one", "n": 1}, {"name": "two", "n": 2}]},
            ['stages.zero.name: absent -> "zero"', "stages.zero.n: absent -> 1", "stages.two.n: 1 -> 2"],
        ),
        (
            {"losses": [{"name": "x", "w": 1}, {"name": "x", "w": 2}]},
            {"losses": [{"name": "x", "w": 1}, {"name": "x", "w": 3}]},
            ["losses.1.w: 2 -> 3"],
        ),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 2}]}}, []),
        ({"a": "x" * 90 + "1"}, {"a": "x" * 90 + "2"}, [f'a: "{"x" * 59}... -> "{"x" * 59}...']),
    ],
)  # fmt: skip
def test_changes_by_hand(old: dict[str, object], new: dict[str, object], told: list[str]) -> None:
    """Without it a person would compare two YAML files of a hundred keys by eye."""
    assert changes(old, new) == told
    assert changes(new, new) == changes(old, old) == []


def test_a_line_stays_a_line() -> None:
    """Without it a recipe of another year would print all of its keys."""
    assert shown(["a: 1 -> 2"]) == "a: 1 -> 2"
    assert shown([f"k{i}: 1 -> 2" for i in range(9)]) == "k0: 1 -> 2; k1: 1 -> 2; k2: 1 -> 2; and 6 more"
