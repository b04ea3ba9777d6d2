"""Stored fields on the wire, for server and client alike: JSON values in protobuf's Struct, whose numbers are doubles.

A double tells every integer from its neighbours up to ``2**53 - 1`` and not beyond, so an integer that lies beyond
travels as a decimal string, as 64-bit integers do in protobuf's own JSON; a field of numbers takes it for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

LARGEST = 2**53 - 1
"""The largest integer that travels as a number."""
_DECIMAL = re.compile(r"-?[0-9]{1,309}")
"""No integer that any field holds is longer."""


def fields_to_message(fields: Mapping[str, Any]) -> Struct:
    """Return a document's fields as the protocol has them.

    Raises:
        ValueError: a value that JSON has not.
    """
    message = Struct()
    message.update(_each(fields, _exact))
    return message


def stored_to_message(fields: Mapping[str, Any]) -> Struct:
    """Return fields that an index has stored; numbers that JSON has not, which old indexes may hold, become null."""
    message = Struct()
    message.update(_each(fields, lambda value: _exact(value) if _is_json(value) else None))
    return message


def fields_from_message(message: Struct, types: Mapping[str, str]) -> dict[str, Any]:
    """Return a document's fields.

    Args:
        message: What came, without fault.
        types: What each field of the index holds, by name.
    """
    return {
        name: _each(value, _number if is_of(types.get(name, ""), "int", "float") else _whole)
        for name, value in MessageToDict(message).items()
    }


def fields_of_hit(message: Struct) -> dict[str, Any]:
    """Return the stored fields of a hit; a whole number up to :data:`LARGEST` is an ``int``, whatever was stored."""

    def number(value: Any) -> Any:
        return _whole(value) if isinstance(value, float) and abs(value) <= LARGEST else value

    return {name: _each(value, number) for name, value in MessageToDict(message).items()}


def is_of(holds: str, *types: str) -> bool:
    """Return whether a field holds values of one of the types, or lists of them."""
    return holds.removeprefix("list of ") in types


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a JSON value with all that is neither object nor list in it changed."""
    if isinstance(value, Mapping):
        return {name: _each(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each(one, change) for one in value]
    return change(value)


def _exact(value: Any) -> Any:
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return str(value)
    return value


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else _whole(value)
