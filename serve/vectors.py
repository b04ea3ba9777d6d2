"""Vectors on the wire, for server and client alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from protos.dense.retrieval.v1 import retrieval_pb2 as pb

if TYPE_CHECKING:  # the client needs no tokenizer
    from retrieval_kd.encoders.base import Vectors

LITTLE_ENDIAN_F32 = np.dtype("<f4")
LITTLE_ENDIAN_F16 = np.dtype("<f2")
_LARGEST_F16 = 65504.0


def from_message(message: pb.Vector) -> Vectors:
    """Return a message's numbers as float32 ``[d]``; bytes must be a multiple of a number's size."""
    match message.WhichOneof("encoding"):
        case "f32_le":
            return np.frombuffer(message.f32_le, dtype=LITTLE_ENDIAN_F32).astype(np.float32, copy=False)
        case "f16_le":
            return np.frombuffer(message.f16_le, dtype=LITTLE_ENDIAN_F16).astype(np.float32)
        case _:
            return np.asarray(message.floats.values, dtype=np.float32)


def to_message(vector: Vectors, encoding: pb.VectorEncoding.ValueType) -> pb.Vector:
    """Return float32 ``[d]`` as a message; an unspecified encoding means plain floats.

    Numbers beyond the range of 16 bits become its largest, so that no finite vector turns infinite on the way.
    """
    if encoding == pb.VECTOR_ENCODING_F32_LE:
        return pb.Vector(f32_le=vector.astype(LITTLE_ENDIAN_F32, copy=False).tobytes())
    if encoding == pb.VECTOR_ENCODING_F16_LE:
        return pb.Vector(f16_le=vector.clip(-_LARGEST_F16, _LARGEST_F16).astype(LITTLE_ENDIAN_F16).tobytes())
    return pb.Vector(floats=pb.FloatVector(values=vector.tolist()))
