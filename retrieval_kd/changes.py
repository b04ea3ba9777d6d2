"""What differs between two configurations, key by key, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN_KEYS = 3
_SHOWN_CHARACTERS = 60


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key.path: old -> new`` for each value that differs, in the order of the new configuration.

    Items of a list that are mappings go by their ``name``, or by their place from 0; other lists are values.

    Args:
        old: Plain JSON values, as read from a manifest.
        new: Likewise.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys((*after, *before))
    return [
        f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def shown(differences: list[str]) -> str:
    """Return the first few differences in one line, and how many more there are."""
    more = len(differences) - _SHOWN_KEYS
    return "; ".join(differences[:_SHOWN_KEYS]) + (f"; and {more} more" if more > 0 else "")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        names = [item.get("name") for item in value]
        distinct = None not in names and len(set(names)) == len(names)
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{names[i] if distinct else i}")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
