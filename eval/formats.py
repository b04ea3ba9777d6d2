"""How numbers are written for people: one place for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_APPLICABLE = "–"
_STAGES = ("tokenize", "queue", "encode", "search", "server", "total")


def quality(value: float) -> str:
    """Return a measure with three decimals, such as ``0.872``."""
    return f"{value:.3f}"


def in_stage_order(stages: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the stages of a query in the order in which it passes them, the total last."""
    return sorted(stages.items(), key=lambda item: _STAGES.index(item[0]))


def optional(value: float | None) -> str:
    """Return a measure with three decimals, a dash where there is none."""
    return NOT_APPLICABLE if value is None else quality(value)


def interval(bounds: Sequence[float]) -> str:
    """Return an interval, such as ``0.860–0.884``."""
    return f"{quality(bounds[0])}–{quality(bounds[1])}"


def difference(value: float) -> str:
    """Return a signed difference with a real minus sign, such as ``−0.012``."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(value: float) -> str:
    """Return a p-value, never as zero."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """Return a count with an SI suffix, such as ``22.7 M``."""
    if value is None:
        return NOT_APPLICABLE
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    """Return milliseconds with three significant digits, without unit."""
    if value is None:
        return NOT_APPLICABLE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    """Return bytes as whole megabytes (10^6), without unit."""
    return NOT_APPLICABLE if value is None else f"{value / 1e6:,.0f}"


def whole(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return NOT_APPLICABLE if value is None else f"{value:,.0f}"
