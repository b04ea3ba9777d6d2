"""Which candidate lists a stage trains on: those where the student still errs and the teacher does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import SelectionSpec
from retrieval_kd.runs import Scores, rank


@dataclass
class SelectionReport:
    """What a selection kept and why it left the rest out.

    Attributes:
        lists: Lists looked at.
        kept: Lists kept.
        removed: Lists left out, by reason.
    """

    lists: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> str:
        """Return the reasons with their numbers, in words."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.removed.items()))

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**vars(self), "removed": dict(self.removed)}


def in_disagreement(
    lists: Sequence[CandidateList],
    teacher: Sequence[Scores],
    student: Sequence[Scores],
    spec: SelectionSpec,
    report: SelectionReport,
) -> Iterator[CandidateList]:
    """Yield the lists whose best positive the teacher ranks within ``spec`` and the student within its ranks.

    The positive is the one that the ranker in question ranks best; ties are broken as in any run.

    Args:
        lists: Candidate lists.
        teacher: For each list float32 ``[len(doc_ids)]``.
        student: Likewise, by the student.
        spec: The ranks.
        report: Filled while lists are taken.

    Source: PROD (Lin et al. 2023, arXiv 2209.13335), whose teacher ranks the positive first and student at 2 to 15.
    """
    first, last = spec.student_ranks
    for item, by_teacher, by_student in zip(lists, teacher, student, strict=True):
        report.lists += 1
        if _best_positive(item, by_teacher) > spec.teacher_rank:
            report.removed["that the teacher ranks too low"] += 1
            continue
        place = _best_positive(item, by_student)
        if place < first:
            report.removed["that the student ranks well already"] += 1
        elif place > last:
            report.removed["that the student ranks too low"] += 1
        else:
            report.kept += 1
            yield item


def _best_positive(item: CandidateList, scores: Scores) -> int:
    """Return the best rank, from 1, of a positive."""
    positives = {doc_id for doc_id, label in zip(item.doc_ids, item.labels, strict=True) if label > 0}
    ranking = rank(item.doc_ids, scores)
    return next(place for place, doc_id in enumerate(ranking.doc_ids, start=1) if doc_id in positives)
