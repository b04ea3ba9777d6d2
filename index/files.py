"""Opening a version's files: what is wrong with a file, and what the machine lacks for a moment."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.errors import ArtifactError

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_passing(error: BaseException) -> bool:
    """Return whether an error tells of descriptors or memory that ran out, and so nothing of the file."""
    return isinstance(error, OSError) and error.errno in _PASSING


@contextlib.contextmanager
def sound(path: Path, otherwise: str, *errors: type[Exception]) -> Iterator[None]:
    """Say of a file that cannot be read that it is to be built again, unless the trouble is a passing one.

    Args:
        path: The file.
        otherwise: What is wrong with it then.
        errors: What reading a torn file raises, beside an OSError.

    Raises:
        ArtifactError: the file is missing or torn; names it.
        OSError: the machine has no descriptor or memory left for it.
    """
    torn: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except torn as error:
        if is_passing(error):
            raise
        raise ArtifactError(f"{path}: {otherwise} ({error}); build the index again") from None
