"""Texts on the wire: protobuf carries Unicode, and Python's strings hold more than that."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from retrieval_kd.errors import ServeError


@contextmanager
def sendable(name: str) -> Iterator[None]:
    """Say which text cannot be sent: half of a surrogate pair, or a byte that was no UTF-8 where it was read.

    Args:
        name: What it was to be sent for.

    Raises:
        ServeError: in place of the codec's own error.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise ServeError(f"{name}: {reprlib.repr(error.object)} is not valid Unicode; mend the text") from None
