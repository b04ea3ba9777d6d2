"""Filters on the wire: to and from the JSON that the index reads."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.errors import ServeError
from serve.limits import Limits
from serve.texts import sendable

if TYPE_CHECKING:
    from index.filters import Filter

_BOUNDS = ("gt", "ge", "lt", "le")
_DEEPEST = Limits().max_filter_depth
"""Far below protobuf's own limit of 100 nested messages, of which a level may be two."""


def filter_from_message(message: pb.Filter) -> Filter:
    """Return the index's filter.

    Raises:
        DataError: a part of it is not set; names the place.
    """
    from index.filters import filter_from_json

    return filter_from_json(_json(message))


def _json(message: pb.Filter) -> dict[str, Any]:
    match message.WhichOneof("condition"):
        case "equals":
            return {"eq": {message.equals.field: _value(message.equals.value)}}
        case "among":
            return {"in": {message.among.field: [_value(value) for value in message.among.values]}}
        case "range":
            bounds = {part.name: value for part, value in message.range.ListFields() if part.name in _BOUNDS}
            return {"range": {message.range.field: {name: _value(value) for name, value in bounds.items()}}}
        case "all_of":
            return {"and": [_json(part) for part in message.all_of.filters]}
        case "any_of":
            return {"or": [_json(part) for part in message.any_of.filters]}
        case "negated":
            return {"not": _json(message.negated)}
        case _:
            return {}


def _value(value: pb.FilterValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


@sendable("filter")
def filter_to_message(raw: Mapping[str, Any]) -> pb.Filter:
    """Return a filter as the protocol has it, from the index's JSON: ``{"eq": {"language": "en"}}``.

    Keys are ``eq``, ``in``, ``range`` (with ``gt``, ``ge``, ``lt``, ``le``), ``and``, ``or`` and ``not``.

    Raises:
        ServeError: another shape; says where.
    """
    return _condition(raw, _DEEPEST)


def _condition(raw: Any, levels: int) -> pb.Filter:
    if levels == 0:
        raise ServeError(f"filter: more than {_DEEPEST} levels deep; flatten it")
    if not isinstance(raw, Mapping) or len(raw) != 1:
        raise ServeError(f"filter: {_shown(raw)} is not an object with one key; give eq, in, range, and, or, or not")
    ((key, body),) = raw.items()
    match key:
        case "and" if _is_list(body):
            return pb.Filter(all_of=pb.FilterList(filters=[_condition(part, levels - 1) for part in body]))
        case "or" if _is_list(body):
            return pb.Filter(any_of=pb.FilterList(filters=[_condition(part, levels - 1) for part in body]))
        case "not":
            return pb.Filter(negated=_condition(body, levels - 1))
        case "eq" | "in" | "range" if isinstance(body, Mapping) and len(body) == 1:
            ((field, operand),) = body.items()
            return _comparison(key, field, operand)
        case _:
            raise ServeError(f"filter: {_shown(raw)} is none of eq, in, range on one field, and, or, not")


def _comparison(key: str, field: str, operand: Any) -> pb.Filter:
    if key == "eq":
        return pb.Filter(equals=pb.FilterEquals(field=field, value=_message(operand)))
    if key == "in" and _is_list(operand):
        return pb.Filter(among=pb.FilterIn(field=field, values=[_message(value) for value in operand]))
    if key == "range" and isinstance(operand, Mapping) and set(operand) <= set(_BOUNDS):
        return pb.Filter(range=pb.FilterRange(field=field, **{name: _message(to) for name, to in operand.items()}))
    raise ServeError(f"filter: {key} on {field!r} cannot take {_shown(operand)}")


def _message(value: Any) -> pb.FilterValue:
    match value:
        case bool():
            return pb.FilterValue(boolean=value)
        case int() if -(2**63) <= value < 2**63:
            return pb.FilterValue(integer=value)
        case float() | int():
            try:
                return pb.FilterValue(number=value)
            except OverflowError:
                raise ServeError("filter: an integer is beyond all numbers of 64 bits; give a smaller one") from None
        case str():
            return pb.FilterValue(text=value)
        case _:
            raise ServeError(f"filter: {_shown(value)} is neither text, number, true nor false")


def _is_list(body: Any) -> bool:
    return isinstance(body, Sequence) and not isinstance(body, str)


def _shown(value: Any) -> str:
    """Return a value for an error, cut short where it is deep or long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__}"
