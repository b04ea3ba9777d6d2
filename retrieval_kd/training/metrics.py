"""The training log: JSON lines for machines, TensorBoard for people, both exact under resume.

Each line has ``event`` and ``step``. An event ``train`` is one step, of the batch as it was before the step:

- ``epoch`` (from 1), ``learning_rate``, ``loss`` (weighted sum), ``losses`` (each term by name, not weighed),
- ``gradient_norm`` before clipping; null where fp16 left the step out,
- ``agreement_top1``, ``agreement_kendall``, ``agreement_kl``, ``student_spread``, ``teacher_spread``: see
  :func:`agreement`,
- ``padding``: share of the tokens passed over that are padding,
- ``queries_per_second`` and ``texts_per_second``: of the whole step; texts are queries and live documents.

An event ``dev`` is an evaluation: ``nDCG@10`` on the dev queries, and beside it the means over the steps since the
evaluation before of the keys in :data:`MEANS`, so that imitation of the teacher and quality can be told apart. At
step 0, before training, it has ``queries`` and ``documents`` (their numbers) instead.

An event ``teach`` is one step of making a teacher: ``loss``, ``learning_rate``, ``gradient_norm``,
``pairs_per_second``, and where a larger cross-encoder teaches it the five keys of :func:`agreement` with that one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from retrieval_kd.artifacts import atomic_write

METRICS = "metrics.jsonl"
MEANS = (
    "loss",
    "agreement_top1",
    "agreement_kendall",
    "agreement_kl",
    "student_spread",
    "teacher_spread",
    "gradient_norm",
    "padding",
)


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, float | None]:
    """Measure how far the student ranks its lists as the teacher does.

    Args:
        student: float ``[B, L]``.
        teacher: float ``[B, L]``.
        mask: bool ``[B, L]``, True on real candidates.

    Returns:
        ``agreement_top1``, the share of lists whose best candidate is the student's and the teacher's (any of the
        teacher's where several tie); ``agreement_kendall``, Kendall's tau-b, mean over the lists where both sides
        tell candidates apart, None where there is none; ``agreement_kl``, KL(teacher || student) between the softmaxes
        of both sides' standardised scores, mean over lists, so that it does not depend on either scale;
        ``student_spread`` and ``teacher_spread``, highest minus lowest score of a list, mean.
    """
    student, teacher = student.double(), teacher.double()
    best = teacher.masked_fill(~mask, -torch.inf).amax(1)
    chosen = teacher.gather(1, student.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
    ours, theirs = (_standardised(scores, mask).masked_fill(~mask, -torch.inf) for scores in (student, teacher))
    log_ours, log_theirs = (scores.log_softmax(1).masked_fill(~mask, 0.0) for scores in (ours, theirs))
    divergence = (log_theirs.exp() * (log_theirs - log_ours)).masked_fill(~mask, 0.0).sum(1)
    return {
        "agreement_top1": (chosen == best).double().mean().item(),
        "agreement_kendall": _kendall(student, teacher, mask),
        "agreement_kl": divergence.mean().item(),
        "student_spread": _spread(student, mask),
        "teacher_spread": _spread(teacher, mask),
    }


def _standardised(scores: Tensor, mask: Tensor) -> Tensor:
    """Return each list's scores with mean 0 and deviation 1; all 0 where they are equal."""
    count = mask.sum(1, keepdim=True)
    centred = (scores - scores.masked_fill(~mask, 0.0).sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1e-12)


def _kendall(student: Tensor, teacher: Tensor, mask: Tensor) -> float | None:
    pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
    ours, theirs = ((x.unsqueeze(2) - x.unsqueeze(1)).sign().masked_fill(~pairs, 0.0) for x in (student, teacher))
    untied = ours.abs().sum((1, 2)) * theirs.abs().sum((1, 2))
    told = untied > 0
    if not bool(told.any()):
        return None
    return ((ours * theirs).sum((1, 2))[told] / untied[told].sqrt()).mean().item()


def _spread(scores: Tensor, mask: Tensor) -> float:
    highest = scores.masked_fill(~mask, -torch.inf).amax(1)
    return (highest - scores.masked_fill(~mask, torch.inf).amin(1)).mean().item()


class MetricsLog:
    """Appends one JSON object a line; opening it for a resumed run forgets what came after the checkpoint."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """Keep the lines up to ``resume_step`` (none when None) and drop the rest, so no step is logged twice."""
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        last = -1 if resume_step is None else resume_step
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last]
        self._since: list[Mapping[str, Any]] = []
        self._latest: dict[str, float] = {}
        self._speeds: list[float] = []
        for line in kept:
            self._remember(json.loads(line))
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one event at one step."""
        line = {"event": event, "step": step, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._remember(line)
        for name, value in _flat(values).items():
            self._board.add_scalar(f"{event}/{name}", value, step)

    def means(self) -> dict[str, float]:
        """Return the means of :data:`MEANS` over the steps since the last evaluation, of keys that have a value."""
        values = {key: [row[key] for row in self._since if row.get(key) is not None] for key in MEANS}
        return {key: sum(some) / len(some) for key, some in values.items() if some}

    def summary(self) -> dict[str, float]:
        """Return the latest means, and the median of ``texts_per_second`` over all steps: the facts of a manifest."""
        speed = {"texts_per_second": statistics.median(self._speeds)} if self._speeds else {}
        return {**(self.means() or self._latest), **speed}

    def _remember(self, line: Mapping[str, Any]) -> None:
        if line["event"] == "train":
            self._since.append(line)
            self._speeds += [line["texts_per_second"]] if "texts_per_second" in line else []
        elif line["event"] == "dev":
            self._latest = {key: line[key] for key in MEANS if key in line}
            self._since.clear()

    def __enter__(self) -> Self:
        """Open the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close both logs, after an error too."""
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Return the lines that ended; a kill can leave a torn last line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in _flat(value).items()})
        elif value is not None:
            flat[name] = float(value)
    return flat
