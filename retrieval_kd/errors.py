"""Errors a user can act on.

Every message is one line: what is wrong, where (file, line or id), what to do.

    RkdError
    ├── DataError        a collection, run, qrels or score file is not what it claims to be
    ├── RecipeError      a recipe has an unknown key, an impossible value, or names what does not exist
    ├── ArtifactError    a stage's folder is missing, torn, or made by something else
    ├── EncoderMismatch  two encoders do not share a vector space
    ├── ParityError      an exported model does not reproduce the model it came from
    ├── QualityError     a system retrieves worse than its gate allows
    └── ServeError       the server cannot start or a client call failed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RkdError(Exception):
    """Base of every error whose message is meant for the user; the command line exits with 1."""


class DataError(RkdError):
    """A collection, run, qrels or score file is not what it claims to be."""


class RecipeError(RkdError):
    """A recipe has an unknown key, an impossible value, or names something that does not exist."""


class ArtifactError(RkdError):
    """A stage's folder is missing, torn, or was made by another stage."""


class EncoderMismatch(RkdError):
    """Two encoders do not share a vector space, so their dot products mean nothing."""


class ParityError(RkdError):
    """An exported model does not reproduce the model it came from."""


class QualityError(RkdError):
    """A system retrieves worse than its gate allows."""


class ServeError(RkdError):
    """The server cannot start, or a call to it failed."""


_LISTED = 40
"""More names than that drown what the error says."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the nearest known name, else the list of known names, or its beginning."""
    names = sorted(known)
    # What is three times as long as every name is near to none, and with 15 MB from a stranger that took ten seconds.
    comparable = len(name) <= 3 * max(map(len, names), default=0)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6) if comparable else []
    if nearest:
        return f", did you mean {nearest[0]!r}?"
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"; known: {', '.join(names[:_LISTED])}{more}"
