"""What a batch offers its losses: one dataclass for each kind of input.

A loss's positional parameters are field names of its kind, so the training loop fills one dataclass and needs no
special case: ``function(*info.arguments(inputs))``. Fields that no loss of the recipe needs stay None.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """Kind ``scores``: each query against its own list, right-padded; column 0 is the positive.

    Attributes:
        student: float [B, L].
        mask: bool [B, L], True on real candidates.
        teacher: float [B, L].
        previous: float [B, L], scores of a frozen copy of the student as the stage began.
        positives: bool [B, L], the candidates judged relevant.
        blend: float [], how far the target has moved from the student (0) to the teacher (1).
    """

    student: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    previous: Tensor | None = None
    positives: Tensor | None = None
    blend: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """Kind ``pairs``: a teacher that compares two candidates of a list at a time.

    Attributes:
        student: float [B, L].
        mask: bool [B, L], True on real candidates.
        preferences: float [B, L, L], probability that i is more relevant than j; any number where not compared.
        compared: bool [B, L, L], the pairs that the teacher was asked about. A training set keeps both as one float32
            [L, L] array a list, NaN where the teacher was not asked, on the diagonal too.
    """

    student: Tensor
    mask: Tensor
    preferences: Tensor
    compared: Tensor


@dataclass(frozen=True, kw_only=True)
class InBatchInputs:
    """Kind ``in_batch``: each query against every unique document of the batch.

    Attributes:
        student: float [B, C].
        positives: bool [B, C].
        mask: bool [B, C], the documents that a query competes with; its positives among them.
        teacher: float [B, C].
        scored: bool [B, C], where the teacher's score is known; without in-batch scores, the query's own list.
        listed: bool [B, C], the query's own list.
        documents: float [C, C], the similarity of each document to each other, by the encoder of the documents.
        blend: float [], as in ``ScoreInputs``.
    """

    student: Tensor
    positives: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    scored: Tensor | None = None
    listed: Tensor | None = None
    documents: Tensor | None = None
    blend: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingInputs:
    """Kind ``embeddings``: vectors of the same texts from student and teacher.

    Attributes:
        student: float [N, d].
        teacher: float [N, d], or of another width for relational losses.
        bank: float [M, d], earlier teacher vectors that serve as negatives; M may be 0.
    """

    student: Tensor
    teacher: Tensor
    bank: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StackInputs:
    """Kind ``stacks``: several score lists of the same candidates, from layers or from heads.

    Attributes:
        student: float [K, B, L], one list for each of the student's layers or heads.
        mask: bool [B, L], True on real candidates; column 0 is the positive.
        teacher: float [K, B, L], of the teacher's layers matched with the student's.
        positives: bool [B, L], the candidates judged relevant.
    """

    student: Tensor
    mask: Tensor
    teacher: Tensor | None = None
    positives: Tensor | None = None


Inputs = ScoreInputs | PairInputs | InBatchInputs | EmbeddingInputs | StackInputs
