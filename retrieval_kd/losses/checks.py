"""What every loss refuses: options out of range, tensors that do not fit, values that are not numbers.

A narrower teacher would broadcast and train towards a uniform distribution at a plausible loss; one NaN would end a
night's training. Each check costs one comparison of shapes and one pass over the values.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, ParamSpec, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from retrieval_kd.errors import DataError

P = ParamSpec("P")


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``; ``open`` leaves ``low`` itself out."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Return whether the value is finite and inside."""
        above = value > self.low if self.open else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"a number in {self.low:g}..{self.high:g}"
        if self.low > -math.inf:
            return f"a finite number {'above' if self.open else 'of at least'} {self.low:g}"
        return "a finite number"


Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Finite = Annotated[float, Range()]
Count = Annotated[int, Range(0)]


@functools.cache
def option_types(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotation of each keyword-only parameter of a loss, or of a loss state's constructor."""
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return MappingProxyType({p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def check_option(name: str, value: object, expected: Any) -> None:
    """Refuse a value that the annotation does not allow.

    Raises:
        DataError: The value has another type, is not among the literals, or is out of range.
    """
    if get_origin(expected) is Literal:
        require(
            value in get_args(expected), f"{name}: {value!r} is not one of {', '.join(map(str, get_args(expected)))}"
        )
    elif get_origin(expected) is tuple:
        require(isinstance(value, list | tuple), f"{name}: {value!r} is not a list of numbers")
        for item in value:  # type: ignore[attr-defined]
            check_option(name, item, get_args(expected)[0])
    elif expected is bool:
        require(isinstance(value, bool), f"{name}: {value!r} is neither true nor false")
    else:
        kind, bounds = get_args(expected)
        number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        wanted = str(bounds) if kind is float else str(bounds).replace("number", "whole number")
        require(number and bounds.holds(value), f"{name}: {value!r} is not {wanted}")


def check_options(function: Callable[..., Any], **options: object) -> None:
    """Refuse options that the function's own annotations do not allow.

    Raises:
        DataError: See ``check_option``.
    """
    expected = option_types(function)
    for name, value in options.items():
        if name in expected:
            check_option(name, value, expected[name])


def validated(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a loss refuse options that its own annotations do not allow, at every call."""

    @functools.wraps(loss)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        check_options(loss, **kwargs)
        return loss(*args, **kwargs)

    return checked


def require(condition: bool, message: str) -> None:
    """Raise DataError with the message unless the condition holds."""
    if not condition:
        raise DataError(f"losses: {message}")


def check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Refuse a mask that is not bool or not exactly of the shape it masks."""
    require(mask.dtype == torch.bool, f"{name} is {mask.dtype}; it must be torch.bool, True on real candidates")
    require(mask.shape == shape, f"{name} {list(mask.shape)} and student {list(shape)} differ in shape")


def scored_candidates(scored: Tensor, mask: Tensor, student: Tensor) -> Tensor:
    """Return bool [B, C]: the allowed documents whose teacher score is known, both masks checked."""
    check_mask("mask", mask, student.shape)
    check_mask("scored", scored, student.shape)
    return scored & mask


def check_candidates(mask: Tensor) -> None:
    """Refuse rows with fewer than two candidates: one candidate's softmax is 1 whatever its score."""
    counts = mask.sum(-1)
    if counts.numel() == 0 or bool((counts < 2).any()):
        row = int((counts.flatten() < 2).int().argmax()) if counts.numel() else 0
        require(False, f"row {row} has fewer than two candidates; a ranking loss needs at least two")


def finite(name: str, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the values in at least float32, zero where masked out.

    Zeros keep whatever a padded entry holds, NaN included, out of the gradient.

    Args:
        name: What the values are, for the message.
        values: Any shape.
        mask: bool, broadcastable to the values' shape: the entries that count; all when None.

    Raises:
        DataError: An entry that counts is NaN or infinite.
    """
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if not bool(torch.isfinite(values).all()):
        wrong = (~torch.isfinite(values)).nonzero()[0].tolist()
        require(False, f"{name} score at {wrong} is {values[tuple(wrong)].item()}; NaN and infinity cannot be learnt")
    return values


def check_lists(mask: Tensor, student: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
    """Check score tensors of one shape against their mask and zero their padding.

    Args:
        mask: bool [B, L], True on real candidates.
        student: float [B, L].
        others: Further scores by name, float [B, L].

    Returns:
        The student's scores and the others', in order, in at least float32, padding zeroed.

    Raises:
        DataError: Shapes differ, a row has fewer than two candidates, or a valid score is not finite.
    """
    require(student.dim() == 2, f"student has shape {list(student.shape)}; it must be [queries, candidates]")
    check_mask("mask", mask, student.shape)
    check_candidates(mask)
    for name, scores in others.items():
        require(
            scores.shape == student.shape,
            f"{name} {list(scores.shape)} and student {list(student.shape)} differ in shape",
        )
    return tuple(finite(name, scores, mask) for name, scores in {"student": student, **others}.items())


def check_labels(mask: Tensor) -> None:
    """Refuse lists whose column 0, the positive, is padding."""
    require(bool(mask[:, 0].all()), "column 0 holds the positive, but a row's mask is False there")


def own_negatives(mask: Tensor, positives: Tensor) -> Tensor:
    """Return bool [B, L]: each list's positive in column 0 and its negatives, without its other positives.

    Args:
        mask: bool [B, L].
        positives: bool [B, L], judged relevant; column 0 is taken for it whatever stands there.

    Raises:
        DataError: Column 0 is padding, or positives do not fit.
    """
    check_labels(mask)
    check_mask("positives", positives, mask.shape)
    others = positives.clone()
    others[:, 0] = False
    return mask & ~others


def check_positives(positives: Tensor, mask: Tensor) -> None:
    """Refuse in-batch labels without a positive, without a negative, or on documents that are not allowed."""
    check_mask("positives", positives, mask.shape)
    require(not bool((positives & ~mask).any()), "positives marks a document that mask does not allow")
    require(bool(positives.any(-1).all()), "a row has no positive")
    require(bool((mask & ~positives).any(-1).all()), "a row has no negative: every allowed document is a positive")


def check_vectors(student: Tensor, teacher: Tensor, *, same_width: bool = True) -> tuple[Tensor, Tensor]:
    """Check two [N, d] tensors of vectors, row by row the same texts.

    Returns:
        Student and teacher in at least float32; the teacher detached.

    Raises:
        DataError: Not two-dimensional, other numbers of rows, other widths where they must agree, or not finite.
    """
    require(student.dim() == 2 and teacher.dim() == 2, "student and teacher vectors must be [texts, dimensions]")
    require(student.shape[0] >= 1, "no vectors: the batch is empty")
    require(
        student.shape[0] == teacher.shape[0],
        f"student has {student.shape[0]} vectors, teacher {teacher.shape[0]}; they must be of the same texts",
    )
    require(
        not same_width or student.shape[1] == teacher.shape[1],
        f"student vectors have {student.shape[1]} dimensions, the teacher's {teacher.shape[1]}; add a projection",
    )
    return finite("student", student), finite("teacher", teacher).detach()
