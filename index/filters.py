"""Filters over stored fields: a small typed tree, read from JSON, evaluated on Arrow columns.

    {"and": [{"range": {"year": {"ge": 2020}}}, {"not": {"in": {"language": ["de", "fr"]}}}]}

A document without the field matches no comparison, so ``not`` of that comparison matches it. A field that
holds lists matches when one of the list's values does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_kd.errors import DataError, did_you_mean

Value = bool | int | float | str
Mask = npt.NDArray[np.bool_]
_COMPARE = {"gt": pc.greater, "ge": pc.greater_equal, "lt": pc.less, "le": pc.less_equal}
_LEAST_INT, _LARGEST_INT = -(2**63), 2**63 - 1
# What a comparison becomes when its bound is replaced by the nearest value that is larger, or smaller.
_ABOVE = {"gt": "ge", "ge": "ge", "lt": "lt", "le": "lt"}
_BELOW = {"gt": "gt", "ge": "gt", "lt": "le", "le": "le"}
_DEEPEST = 32


@dataclass(frozen=True)
class Eq:
    """Documents whose field equals a value."""

    field: str
    value: Value


@dataclass(frozen=True)
class In:
    """Documents whose field equals one of some values."""

    field: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        """Refuse a list that nothing can be in."""
        if not self.values:
            raise DataError(f"filter in on {self.field!r}: no values; give at least one")


@dataclass(frozen=True)
class Range:
    """Documents whose field lies between bounds; numbers by size, strings by code point."""

    field: str
    gt: int | float | str | None = None
    ge: int | float | str | None = None
    lt: int | float | str | None = None
    le: int | float | str | None = None

    def __post_init__(self) -> None:
        """Refuse a range without bounds."""
        if not self.bounds:
            raise DataError(f"filter range on {self.field!r}: no bounds; give gt, ge, lt or le")

    @property
    def bounds(self) -> dict[str, int | float | str]:
        """Return the bounds that are set, by name."""
        return {name: bound for name in _COMPARE if (bound := getattr(self, name)) is not None}


@dataclass(frozen=True)
class And:
    """Documents that all of some filters match."""

    filters: tuple[Filter, ...]

    def __post_init__(self) -> None:
        """Refuse a list of no filters."""
        _require_filters("and", self.filters)


@dataclass(frozen=True)
class Or:
    """Documents that one of some filters matches."""

    filters: tuple[Filter, ...]

    def __post_init__(self) -> None:
        """Refuse a list of no filters."""
        _require_filters("or", self.filters)


@dataclass(frozen=True)
class Not:
    """Documents that a filter does not match."""

    filter: Filter


Filter = Eq | In | Range | And | Or | Not


def matches(wanted: Filter, batch: pa.RecordBatch, stored: Mapping[str, str]) -> Mask:
    """Return which documents of a batch a filter matches, bool ``[batch.num_rows]``.

    Args:
        wanted: The filter.
        batch: Documents, a column for each stored field.
        stored: What each field holds; see :mod:`index.documents`.

    Raises:
        DataError: a field that is not stored or cannot be compared, or a value of another type than the field's.
    """
    if isinstance(wanted, Not):
        return ~matches(wanted.filter, batch, stored)
    if isinstance(wanted, And):
        every: Mask = np.logical_and.reduce([matches(part, batch, stored) for part in wanted.filters])
        return every
    if isinstance(wanted, Or):
        some: Mask = np.logical_or.reduce([matches(part, batch, stored) for part in wanted.filters])
        return some
    if wanted.field not in stored:
        raise DataError(f"filter: no field {wanted.field!r} is stored{did_you_mean(wanted.field, stored)}")
    holds = stored[wanted.field].removeprefix("list of ")
    if holds == "json":
        raise DataError(f"filter: field {wanted.field!r} holds JSON of mixed types, which cannot be compared")
    return _compared(wanted, batch.column(wanted.field), holds)


def terms(wanted: Filter) -> Iterator[Eq | In | Range]:
    """Return every comparison in a filter, for limits on its size."""
    if isinstance(wanted, Not):
        yield from terms(wanted.filter)
    elif isinstance(wanted, And | Or):
        for part in wanted.filters:
            yield from terms(part)
    else:
        yield wanted


def filter_from_json(raw: Any, where: str = "filter") -> Filter:
    """Read a filter from decoded JSON: one key, ``eq``, ``in``, ``range``, ``and``, ``or`` or ``not``.

    Raises:
        DataError: another shape or key; names the place in the tree.
    """
    return _filter(raw, where, _DEEPEST)


def _filter(raw: Any, where: str, levels: int) -> Filter:
    if levels == 0:
        raise DataError(f"filter: more than {_DEEPEST} levels deep; flatten it")
    key, body = _only_entry(raw, where)
    place = f"{where}.{key}"
    if key in ("and", "or"):
        if not isinstance(body, Sequence) or isinstance(body, str):
            raise DataError(f"{place}: {body!r} is not a list of filters")
        parts = tuple(_filter(part, f"{place}.{i}", levels - 1) for i, part in enumerate(body))
        return And(parts) if key == "and" else Or(parts)
    if key == "not":
        return Not(_filter(body, place, levels - 1))
    if key not in ("eq", "in", "range"):
        raise DataError(f"{where}: key {key!r}{did_you_mean(key, ('and', 'or', 'not', 'eq', 'in', 'range'))}")
    field, operand = _only_entry(body, place)
    place = f"{place}.{field}"
    if key == "eq":
        return Eq(field, _value(operand, place))
    if key == "in":
        if not isinstance(operand, Sequence) or isinstance(operand, str):
            raise DataError(f"{place}: {operand!r} is not a list of values")
        return In(field, tuple(_value(value, place) for value in operand))
    if not isinstance(operand, Mapping):
        raise DataError(f"{place}: {operand!r} is not an object of bounds; give gt, ge, lt or le")
    for bound in operand:
        if bound not in _COMPARE:
            raise DataError(f"{place}: bound {bound!r}{did_you_mean(str(bound), _COMPARE)}")
    return Range(field, **{bound: _value(value, place) for bound, value in operand.items()})


def _only_entry(raw: Any, where: str) -> tuple[str, Any]:
    if not isinstance(raw, Mapping) or len(raw) != 1:
        raise DataError(f"{where}: {raw!r} is not an object with one key")
    ((key, body),) = raw.items()
    return str(key), body


def _value(raw: Any, where: str) -> Value:
    if not isinstance(raw, Value):
        raise DataError(f"{where}: {raw!r} is neither text, number, true nor false")
    return raw


def _require_filters(name: str, filters: Sequence[Filter]) -> None:
    if not filters:
        raise DataError(f"filter {name}: no filters; give at least one")


def _compared(wanted: Eq | In | Range, column: pa.Array, holds: str) -> Mask:
    in_lists = pa.types.is_list(column.type)
    values = pc.list_flatten(column) if in_lists else column
    try:
        found = _bounded(wanted, values, holds) if isinstance(wanted, Range) else _among(wanted, values, holds)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise DataError(f"filter: field {wanted.field!r} cannot be compared ({error}); give another value") from None
    hit = np.asarray(pc.fill_null(found, False), dtype=bool)
    if not in_lists:
        return hit
    mask = np.zeros(len(column), dtype=bool)
    mask[np.asarray(pc.list_parent_indices(column))[hit]] = True
    return mask


def _bounded(wanted: Range, values: pa.Array, holds: str) -> pa.Array:
    comparisons = (_exactly(name, bound, wanted.field, holds) for name, bound in wanted.bounds.items())
    return functools.reduce(
        pc.and_, (_COMPARE[name](values, pa.scalar(bound, type=values.type)) for name, bound in comparisons)
    )


def _among(wanted: Eq | In, values: pa.Array, holds: str) -> pa.Array:
    given = (wanted.value,) if isinstance(wanted, Eq) else wanted.values
    held = [near for value in given if (near := _nearest(value, wanted.field, holds)) == value]
    if holds == "float" and 0.0 in held:
        # Arrow looks a value up by its bits, and zero has two.
        held += [0.0, -0.0]
    return pc.is_in(values, value_set=pa.array(held, type=values.type))


def _exactly(name: str, bound: Value, field: str, holds: str) -> tuple[str, Value]:
    """Return the comparison with a value of the field's type that says the same as one with any number."""
    near = _nearest(bound, field, holds)
    if near == bound:
        return name, near
    return (_ABOVE if near > bound else _BELOW)[name], near  # type: ignore[operator]


def _nearest(value: Value, field: str, holds: str) -> Value:
    """Return a value of the field's type that has none of that type between itself and the given one."""
    _require_type(value, field, holds)
    if holds == "int":
        return math.floor(min(max(value, _LEAST_INT), _LARGEST_INT))  # type: ignore[arg-type]
    return float(value) if holds == "float" else value


def _require_type(value: Value, field: str, holds: str) -> None:
    if not (
        isinstance(value, bool)
        if holds == "bool"
        else isinstance(value, str)
        if holds == "text"
        else isinstance(value, int | float) and not isinstance(value, bool)
    ):
        raise DataError(f"filter: field {field!r} holds {holds}, so it cannot be compared with {value!r}")
    if holds in ("int", "float") and not _is_comparable(value):
        raise DataError(f"filter: field {field!r} is compared with NaN or an integer beyond all floats; give a number")


def _is_comparable(number: Any) -> bool:
    try:
        return not math.isnan(number)
    except OverflowError:
        return False
