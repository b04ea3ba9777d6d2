"""Filters over stored fields: a small typed tree, read from JSON, evaluated on Arrow columns.

    {"and": [{"range": {"year": {"ge": 2020}}}, {"not": {"in": {"language": ["de", "fr"]}}}]}

A document without the field matches no comparison, so ``not`` of that comparison matches it. A field that
holds lists matches when one of the list's values does.
"""

from __future__ import annotations

import functools
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
_LARGEST_INT = 2**63 - 1
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
    if where.count(".") > _DEEPEST:
        raise DataError(f"filter: more than {_DEEPEST} levels deep; flatten it")
    key, body = _only_entry(raw, where)
    place = f"{where}.{key}"
    if key in ("and", "or"):
        if not isinstance(body, Sequence) or isinstance(body, str):
            raise DataError(f"{place}: {body!r} is not a list of filters")
        parts = tuple(filter_from_json(part, f"{place}.{i}") for i, part in enumerate(body))
        return And(parts) if key == "and" else Or(parts)
    if key == "not":
        return Not(filter_from_json(body, place))
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
    if isinstance(wanted, Range):
        bounds = {name: _bound(bound, wanted.field, holds) for name, bound in wanted.bounds.items()}
        found = functools.reduce(pc.and_, (_COMPARE[name](values, bound) for name, bound in bounds.items()))
    else:
        wanted_values = (wanted.value,) if isinstance(wanted, Eq) else wanted.values
        equal = [same for value in wanted_values for same in _same(value, wanted.field, holds)]
        found = pc.is_in(values, value_set=pa.array(equal, type=values.type))
    hit = np.asarray(pc.fill_null(found, False), dtype=bool)
    if not in_lists:
        return hit
    mask = np.zeros(len(column), dtype=bool)
    mask[np.asarray(pc.list_parent_indices(column))[hit]] = True
    return mask


def _bound(value: Value, field: str, holds: str) -> pa.Scalar:
    _require_type(value, field, holds)
    return pa.scalar(float(value) if isinstance(value, int) and abs(value) > _LARGEST_INT else value)


def _same(value: Value, field: str, holds: str) -> list[Value]:
    """Return the value as the field's type has it; nothing when that type has no such value."""
    _require_type(value, field, holds)
    if holds == "float":
        return [float(value)]
    if holds == "int":
        return [int(value)] if value == value // 1 and abs(value) <= _LARGEST_INT else []  # type: ignore[operator]
    return [value]


def _require_type(value: Value, field: str, holds: str) -> None:
    if not (
        isinstance(value, bool)
        if holds == "bool"
        else isinstance(value, str)
        if holds == "text"
        else isinstance(value, int | float) and not isinstance(value, bool)
    ):
        raise DataError(f"filter: field {field!r} holds {holds}, so it cannot be compared with {value!r}")
