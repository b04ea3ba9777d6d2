"""Documents as callers upsert them: what is encoded of them and what is stored with them.

A caller gives a document's title among its fields, and its text there or beside them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.collections.base import Document


def content(message: pb.Document) -> str:
    """Return what the encoder reads of a document: what it would have read of it in a build."""
    text = message.text or _text(message.fields, "text")
    return Document(message.doc_id, _text(message.fields, "title"), text).content


def fields(message: pb.Document) -> dict[str, Any]:
    """Return what is stored with a document; its text is, too."""
    stored: dict[str, Any] = {name: _plain(value) for name, value in MessageToDict(message.fields).items()}
    return {**stored, "text": message.text} if message.text else stored


def _text(struct: Struct, name: str) -> str:
    # Asking a map of protobuf's for a key that it lacks would add the key.
    return struct.fields[name].string_value if name in struct.fields else ""


def _plain(value: Any) -> Any:
    """Protobuf's Struct knows floating point numbers only; a whole number is an integer again."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value
