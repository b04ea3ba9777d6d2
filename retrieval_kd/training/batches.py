"""What one step trains on: ragged candidate lists over the documents of a batch, each document once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_kd.collections.base import Qrels
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList


@dataclass(frozen=True)
class ExtraTexts:
    """Texts that only embedding losses read, encoded as queries.

    Attributes:
        texts: Id to text.
        targets: float32 ``[len(texts), d]``, the vectors to regress onto, in the order of ``texts``.
        batch: Texts of one step.
    """

    texts: Mapping[str, str]
    targets: Vectors
    batch: int

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Return the ids, in order."""
        return tuple(self.texts)

    def positions(self, seed: int, step: int) -> npt.NDArray[np.int64]:
        """Return the texts of a step: successive pieces of permutations drawn from (seed, pass over the texts)."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        passes, within = np.divmod(places, len(self.texts))
        orders = {number: _order(seed, number, len(self.texts)) for number in np.unique(passes).tolist()}
        rows = [orders[number][place] for number, place in zip(passes.tolist(), within, strict=True)]
        return np.array(rows, dtype=np.int64)


# A step reads a few dozen places, of one pass or of two; an order of a million takes longer than the step to draw.
@functools.lru_cache(maxsize=2)
def _order(seed: int, number: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order of one pass over the extra texts."""
    return np.random.default_rng([seed, number, 1]).permutation(count)


@dataclass(frozen=True)
class TrainingSet:
    """The queries of a training run with their candidates and the teacher's opinion of them.

    Attributes:
        lists: One candidate list a query.
        texts: Query id to text.
        teacher: One float32 array a list, aligned with its documents; None when no loss asks for it.
        members: Reads what the members of an ensemble gave to ``teacher``, by name, before they were combined; for
            warnings. None where one gave it all.
        qrels: The train split's judgements, for in-batch positives.
        query_targets: float32 ``[len(lists), d]``, the vectors that embedding losses regress onto.
        preferences: One float32 ``[documents, documents]`` array a list: entry (i, j) is the probability, by a
            pairwise teacher, that document i is more relevant than j; NaN where it was not asked, on the diagonal
            too. None without such a teacher.
        maxsim: From query ids and document ids to a late-interaction teacher's scores of each query for each document,
            float ``[B, C]``; None when no loss asks for them.
        extra: Texts for embedding losses alone; None without.
    """

    lists: Sequence[CandidateList]
    texts: Mapping[str, str]
    teacher: Sequence[npt.NDArray[np.float32]] | None
    qrels: Qrels
    query_targets: Vectors
    preferences: Sequence[npt.NDArray[np.float32]] | None = None
    maxsim: Callable[[Sequence[str], Sequence[str]], Tensor] | None = None
    extra: ExtraTexts | None = None
    members: Callable[[], Mapping[str, Sequence[npt.NDArray[np.float32]]]] | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        if self.extra is not None and (both := self.texts.keys() & self.extra.texts.keys()):
            raise DataError(f"training set: {min(both)!r} is a query and an extra text; give each text its own id")
        parts = {"scores": self.teacher, "preferences": self.preferences}
        given = {name: part for name, part in parts.items() if part is not None}
        sizes = {len(self.lists), len(self.query_targets), *map(len, given.values())}
        if len(sizes) != 1 or not self.lists:
            raise DataError(
                f"training set: {sorted(sizes)} lists, scores and targets; make all from the same candidates"
            )
        for name, part in given.items():
            for item, values in zip(self.lists, part, strict=True):
                if set(values.shape) != {len(item.doc_ids)}:
                    shape = " x ".join(map(str, values.shape))
                    raise DataError(f"query {item.query_id!r}: {len(item.doc_ids)} candidates, {shape} teacher {name}")


@dataclass(frozen=True)
class Batch:
    """One step's queries against the documents they share.

    Attributes:
        rows: Positions of the queries in the training set, int64 ``[B]``.
        query_ids: Their ids.
        doc_ids: The ``C`` distinct documents of all lists, in order of first appearance.
        columns: Position of each candidate among ``doc_ids``, int64 ``[B, L]``; 0 where masked.
        mask: True on real candidates, bool ``[B, L]``.
        teacher: The teacher's scores, float32 ``[B, L]``; 0 where masked, None without a teacher.
        positives: Which of the batch's documents are judged relevant, bool ``[B, C]``.
        preferences: A pairwise teacher's, float32 ``[B, L, L]``; NaN where it was not asked, None without one.
    """

    rows: npt.NDArray[np.int64]
    query_ids: tuple[str, ...]
    doc_ids: tuple[str, ...]
    columns: Tensor
    mask: Tensor
    teacher: Tensor | None
    positives: Tensor
    preferences: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return replace(
            self,
            columns=self.columns.to(device),
            mask=self.mask.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
            positives=self.positives.to(device),
            preferences=None if self.preferences is None else self.preferences.to(device),
        )


def epoch_batches(count: int, size: int, seed: int, epoch: int, limit: int = 0) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the positions of each batch of one epoch, a permutation drawn from (seed, epoch).

    Args:
        count: Queries in all.
        size: Queries in a batch.
        seed: Seed of the run.
        epoch: The epoch, from 0.
        limit: Stop after this many queries; after all when 0.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)[: limit or count]
    for start in range(0, len(order), size):
        yield order[start : start + size]


def assemble(data: TrainingSet, rows: npt.NDArray[np.int64]) -> Batch:
    """Gather the lists at ``rows`` over their distinct documents."""
    lists = [data.lists[row] for row in rows]
    position = {doc_id: i for i, doc_id in enumerate(dict.fromkeys(d for item in lists for d in item.doc_ids))}
    longest = max(len(item.doc_ids) for item in lists)
    columns = torch.zeros((len(lists), longest), dtype=torch.int64)
    mask = torch.zeros((len(lists), longest), dtype=torch.bool)
    teacher = None if data.teacher is None else torch.zeros((len(lists), longest))
    preferences = None if data.preferences is None else torch.full((len(lists), longest, longest), torch.nan)
    positives = torch.zeros((len(lists), len(position)), dtype=torch.bool)
    for i, (row, item) in enumerate(zip(rows, lists, strict=True)):
        length = len(item.doc_ids)
        columns[i, :length] = torch.tensor([position[doc_id] for doc_id in item.doc_ids])
        mask[i, :length] = True
        if teacher is not None and data.teacher is not None:
            teacher[i, :length] = torch.from_numpy(data.teacher[row])
        if preferences is not None and data.preferences is not None:
            preferences[i, :length, :length] = torch.from_numpy(data.preferences[row])
        for doc_id, grade in data.qrels[item.query_id].items():
            if grade > 0 and doc_id in position:
                positives[i, position[doc_id]] = True
    query_ids = tuple(item.query_id for item in lists)
    return Batch(rows, query_ids, tuple(position), columns, mask, teacher, positives, preferences)
