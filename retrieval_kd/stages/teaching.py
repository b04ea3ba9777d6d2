"""A teacher of a recipe: its model, made or found, and its scores of any lists."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrieval_kd.artifacts import MANIFEST, Artifact, Spec, fingerprint
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError
from retrieval_kd.recipes.schema import FineTuneSpec, TeacherSpec
from retrieval_kd.runs import Scores, Shortlist

if TYPE_CHECKING:
    from retrieval_kd.stages.workspace import Workspace
    from retrieval_kd.teachers.cross_encoder import CrossEncoder


class Teaching:
    """A teacher in a workspace, whose models and scores stages share."""

    def __init__(self, workspace: Workspace, spec: TeacherSpec) -> None:
        """Prepare a teacher; nothing is read yet."""
        self.spec = spec
        self._workspace = workspace

    @cached_property
    def folder(self) -> Path:
        """Return the cross-encoder's folder, fine-tuning it first if the recipe says so."""
        if self.spec.fine_tune is None:
            return resolve_model(self.spec.model)
        return self._fine_tuned(self.spec.fine_tune)

    def _fine_tuned(self, spec: FineTuneSpec) -> Path:
        from retrieval_kd.teachers.fine_tune import fine_tune_cross_encoder

        workspace = self._workspace
        lists = workspace.lists_for_teacher(spec)
        stage = Spec(
            "teach",
            config={**dataclasses.asdict(spec), "max_length": self.spec.max_length},
            inputs={"collection": workspace.collection.fingerprint, "lists": identity(lists)},
            seed=workspace.recipe.seed,
        )
        folder = workspace.folder(stage, "fine-tune the cross-encoder teacher")
        seed = workspace.recipe.seed
        fine_tune_cross_encoder(workspace.collection, lists, spec, self.spec.max_length, seed, folder)
        return folder

    @cached_property
    def cross_encoder(self) -> CrossEncoder:
        """Load the cross-encoder."""
        from retrieval_kd.teachers.cross_encoder import CrossEncoder

        return CrossEncoder.load(str(self.folder), self.spec.max_length)

    @property
    def fingerprint(self) -> str:
        """Return the identity of the scores."""
        return fingerprint(
            {
                "cross-encoder": self.cross_encoder.fingerprint,
                "encoder": self._workspace.encoder.card.fingerprint,
                "combination": [self.spec.normalise, self.spec.cross_encoder_weight, self.spec.encoder_weight],
            }
        )

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Combine the members' scores as the recipe says: one float32 array a list.

        Args:
            lists: Any shortlists.
            queries: The texts of their queries, and of others whose vectors may be wanted later.
        """
        from retrieval_kd.scores.normalise import combine

        members: list[list[Scores]] = []
        weights: list[float] = []
        if self.spec.cross_encoder_weight > 0:
            members.append(self.cross_encoder_scores(lists))
            weights.append(self.spec.cross_encoder_weight)
        if self.spec.encoder_weight > 0:
            members.append(self._workspace.encoder_scores(lists, self._workspace.encoder, queries))
            weights.append(self.spec.encoder_weight)
        return [combine(scores, weights, self.spec.normalise) for scores in zip(*members, strict=True)]

    def cross_encoder_scores(self, lists: Sequence[Shortlist]) -> list[Scores]:
        """Score any shortlists with the cross-encoder; only pairs that no earlier stage has scored are scored."""
        from retrieval_kd.scores.store import ScoreStore
        from retrieval_kd.teachers.cross_encoder import score_candidates

        workspace = self._workspace
        teacher = {"teacher": self.cross_encoder.fingerprint, "collection": workspace.collection.fingerprint}
        scores = [np.full(len(item.doc_ids), np.nan, dtype=np.float32) for item in lists]
        for folder in _finished(workspace.root, "score", teacher):
            _fill(scores, ScoreStore.open(folder).find(lists))
        rest = [
            Shortlist(item.query_id, tuple(np.array(item.doc_ids)[np.isnan(known)].tolist()))
            for item, known in zip(lists, scores, strict=True)
            if np.isnan(known).any()
        ]
        if rest:
            pairs = sum(len(item.doc_ids) for item in rest)
            folder = workspace.folder(
                Spec("score", {}, {**teacher, "lists": identity(rest)}),
                f"score {pairs:,} pairs with the cross-encoder",
            )
            score_candidates(self.cross_encoder, workspace.collection, rest, folder)
            _fill(scores, ScoreStore.open(folder).find(lists))
        return scores


def identity(lists: Sequence[Shortlist]) -> str:
    """Return the sha256 over lists of candidates."""
    return fingerprint([dataclasses.astuple(item) for item in lists])


def _finished(root: Path, stage: str, inputs: Mapping[str, str]) -> list[Path]:
    """Return the finished artifacts of a stage that were made from these inputs, in the order of their names."""
    found = []
    for folder in sorted(path.parent for path in root.glob(f"{stage}-*/{MANIFEST}")):
        # A torn folder is no store; the stage that owns it mends it when it runs.
        with contextlib.suppress(ArtifactError):
            if inputs.items() <= Artifact.load(folder, stage).inputs.items():
                found.append(folder)
    return found


def _fill(scores: Sequence[Scores], found: Sequence[Scores]) -> None:
    """Put what was found where a score is still missing."""
    for known, new in zip(scores, found, strict=True):
        unknown = np.isnan(known)
        known[unknown] = new[unknown]
