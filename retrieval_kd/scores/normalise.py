"""Named normalisations of one list of teacher scores, and the weighted mean of several teachers.

Rankers score on scales of their own (logits from -11 to 11, cosines from 0 to 1), so averaging raw
scores lets the widest scale decide alone. A normalisation acts within one query's list, never across
queries, and never in place: the store keeps raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores

Normalisation = Literal["none", "zscore", "minmax"]


def normalise(scores: npt.ArrayLike, how: Normalisation) -> Scores:
    """Return one list's scores on a named scale, float32 of the same length.

    ``none`` returns them as they are. ``zscore`` gives mean 0 and population standard deviation 1.
    ``minmax`` maps the lowest to 0 and the highest to 1. A list whose scores are all equal prefers no
    document: it becomes zeros (``zscore``, the mean) or halves (``minmax``, the middle), so that it
    neither adds to nor takes from another teacher's order.

    Raises:
        DataError: the list is empty, not one-dimensional, or holds a score that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"scores of shape {values.shape}; give one list with at least one score")
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"score {position} of the list is {values[position]}; mend the teacher that made it")
    lowest, highest = values.min(), values.max()
    if how == "none":
        out = values
    elif how == "zscore":
        out = (values - values.mean()) / values.std() if highest > lowest else np.zeros_like(values)
    elif how == "minmax":
        out = (values - lowest) / (highest - lowest) if highest > lowest else np.full_like(values, 0.5)
    else:
        raise DataError(f"no normalisation is called {how!r}; known: none, zscore, minmax")
    return out.astype(np.float32)


def combine(members: Sequence[npt.ArrayLike], weights: Sequence[float], how: Normalisation) -> Scores:
    """Return the weighted mean of several teachers' scores of one list, each normalised first.

    Args:
        members: For each teacher the scores of the same documents in the same order.
        weights: One weight for each teacher, not negative, one above 0; only their ratio matters.
        how: The normalisation of each member.

    Returns:
        float32, one score for each document.

    Raises:
        DataError: members of different lengths, weights that are no weights, or what
            :func:`normalise` raises.
    """
    if len(members) != len(weights) or not members:
        raise DataError(f"{len(members)} teachers but {len(weights)} weights; give one weight for each")
    if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise DataError(f"weights {list(weights)} must be finite, not negative, and one above 0")
    scaled = [normalise(member, how) for member in members]
    lengths = [len(member) for member in scaled]
    if len(set(lengths)) > 1:
        raise DataError(f"teachers scored {lengths} documents of one list; score the same candidates with each")
    return np.average(scaled, axis=0, weights=weights).astype(np.float32)
