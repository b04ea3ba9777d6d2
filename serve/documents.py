"""Documents as callers upsert them: what is encoded of them and what is stored with them.

A caller gives a document's title among its fields, and its text there or beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.collections.base import Document
from serve.fields import fields_from_message


def content(message: pb.Document) -> str:
    """Return what the encoder reads of a document: what it would have read of it in a build."""
    text = message.text or _text(message.fields, "text")
    return Document(message.doc_id, _text(message.fields, "title"), text).content


def stored_fields(message: pb.Document, types: Mapping[str, str]) -> dict[str, Any]:
    """Return what is stored with a document in an index whose fields hold ``types``; its text is, too."""
    stored = fields_from_message(message.fields, types)
    return {**stored, "text": message.text} if message.text else stored


def _text(struct: Struct, name: str) -> str:
    # Asking a map of protobuf's for a key that it lacks would add the key.
    return struct.fields[name].string_value if name in struct.fields else ""
