"""From stored logits to one teacher: activations, named normalisations, and the weighted mean of several teachers.

Rankers score on scales of their own (logits from -11 to 11, cosines from 0 to 1), so averaging raw
scores lets the widest scale decide alone. Every step makes new scores: the store keeps raw logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores

Normalisation = Literal["none", "zscore", "minmax", "percentile", "rank"]
Activation = Literal["identity", "sigmoid", "logit_difference"]
Bounds = tuple[float, float]
"""A teacher's 1st and 99th percentile over all of its lists."""

_PERCENTILES = (1, 99)


def activate(logits: Scores, how: Activation) -> Scores:
    """Return scores from stored logits, float32 of the same shape.

    ``identity`` and ``logit_difference`` return them as they are: a classifier of two labels is stored as the second
    label's logit minus the first's, the log-odds. ``sigmoid`` gives the probability, in 0..1.
    """
    if how != "sigmoid":
        return logits
    # tanh does not overflow where exp does.
    return (0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))).astype(np.float32)


def percentile_bounds(lists: Sequence[Scores]) -> Bounds:
    """Return the 1st and 99th percentile of a teacher's scores over all lists.

    Raises:
        DataError: there is no score, one is not finite, or the two percentiles are the same.
    """
    everything = np.concatenate([np.asarray(scores, dtype=np.float64) for scores in lists] or [np.empty(0)])
    if len(everything) == 0 or not np.isfinite(everything).all():
        raise DataError(f"{len(everything)} scores, not all of them finite numbers; mend the teacher that made them")
    low, high = np.percentile(everything, _PERCENTILES)
    if low == high:
        raise DataError(
            f"1st and 99th percentile of the scores are both {low:g}: nothing to scale; use another teacher"
        )
    return float(low), float(high)


def normalise(scores: npt.ArrayLike, how: Normalisation, bounds: Bounds | None = None) -> Scores:
    """Return one list's scores on a named scale, float32 of the same length.

    ``none`` returns them as they are. ``zscore`` gives mean 0 and population standard deviation 1.
    ``minmax`` maps the lowest to 0 and the highest to 1. ``rank`` maps the worst to 0 and the best to 1 with equal
    steps, equal scores to the mean of their places. ``percentile`` clips to ``bounds`` and maps these to 0 and 1, one
    scale for all queries (Tamber et al., arXiv 2502.19712); it alone keeps lists of good documents above lists of
    bad ones. A list whose scores are all equal prefers no document: it becomes zeros (``zscore``, the mean) or halves
    (``minmax``, ``rank``, the middle), so that it neither adds to nor takes from another teacher's order.

    Args:
        scores: One list, float ``[documents]``.
        how: The scale.
        bounds: Of ``percentile``: the teacher's, from :func:`percentile_bounds`.

    Raises:
        DataError: the list is empty, not one-dimensional, or holds a score that is not finite, or ``percentile``
            has no bounds.
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
    elif how == "percentile":
        if bounds is None:
            raise DataError("percentile scales by the bounds of all lists; give percentile_bounds of the teacher")
        low, high = bounds
        out = (values.clip(low, high) - low) / (high - low)
    elif how == "zscore":
        out = (values - values.mean()) / values.std() if highest > lowest else np.zeros_like(values)
    elif how == "minmax":
        out = (values - lowest) / (highest - lowest) if highest > lowest else np.full_like(values, 0.5)
    elif how == "rank":
        out = _places(values) / (len(values) - 1) if highest > lowest else np.full_like(values, 0.5)
    else:
        raise DataError(f"no normalisation is called {how!r}; known: none, zscore, minmax, percentile, rank")
    return out.astype(np.float32)


def _places(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return each value's place from 0, the lowest; equal values share the mean of their places."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    mean_place: npt.NDArray[np.float64] = np.cumsum(sizes) - (sizes + 1) / 2
    return mean_place[group]


def combine(
    members: Sequence[npt.ArrayLike], weights: Sequence[float], how: Normalisation, bounds: Sequence[Bounds] = ()
) -> Scores:
    """Return the weighted mean of several teachers' scores of one list, each normalised first.

    Args:
        members: For each teacher the scores of the same documents in the same order.
        weights: One weight for each teacher, not negative, one above 0; only their ratio matters.
        how: The normalisation of each member.
        bounds: Of ``percentile``: each teacher's.

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
    limits = bounds or (None,) * len(members)
    scaled = [normalise(member, how, limit) for member, limit in zip(members, limits, strict=True)]
    lengths = [len(member) for member in scaled]
    if len(set(lengths)) > 1:
        raise DataError(f"teachers scored {lengths} documents of one list; score the same candidates with each")
    return np.average(scaled, axis=0, weights=weights).astype(np.float32)


def ensemble(members: Mapping[str, Sequence[Scores]], weights: Sequence[float], how: Normalisation) -> list[Scores]:
    """Combine several teachers' scores of many lists; ``percentile`` scales by each teacher's bounds over these lists.

    Args:
        members: For each teacher, by name, its scores of the same lists in the same order.
        weights: As in :func:`combine`.
        how: As in :func:`combine`.

    Returns:
        For each list float32, one score for each document.

    Raises:
        DataError: teachers that scored different numbers of lists, a teacher without bounds, or what :func:`combine`
            raises.
    """
    numbers = [len(member) for member in members.values()]
    if len(set(numbers)) > 1:
        raise DataError(f"teachers scored {numbers} lists; score the same candidates with each")
    bounds = [_bounds(name, member) for name, member in members.items()] if how == "percentile" else []
    return [combine(scores, weights, how, bounds) for scores in zip(*members.values(), strict=True)]


def _bounds(name: str, lists: Sequence[Scores]) -> Bounds:
    try:
        return percentile_bounds(lists)
    except DataError as error:
        raise DataError(f"teacher member {name}: {error}") from None
