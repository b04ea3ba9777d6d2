"""The members of a teacher: one class for each way to come to a score."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from retrieval_kd.artifacts import MANIFEST, Artifact, Spec, canonical_json, fingerprint
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.recipes.schema import EncoderSpec, FineTuneSpec, MemberSpec
from retrieval_kd.runs import Scores, Shortlist

if TYPE_CHECKING:
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.scores.store import ScoreStore
    from retrieval_kd.stages.workspace import Workspace
    from retrieval_kd.teachers.cross_encoder import CrossEncoder
    from retrieval_kd.teachers.scoring import PairScorer


class Member(Protocol):
    """A ranker in a workspace; nothing of it is read before it is asked for something."""

    @property
    def spec(self) -> MemberSpec:
        """Return what the recipe says of it."""

    @property
    def name(self) -> str:
        """Return the name of the model or file."""

    @property
    def folder(self) -> Path:
        """Return its model's folder, making the model first if the recipe says so; of a file, the file."""

    @property
    def fingerprint(self) -> str:
        """Return the identity of its scores."""

    @property
    def scores_new_lists(self) -> bool:
        """Return whether it can score lists of any length that nobody has scored yet, at a cost that fits them."""

    @property
    def reranker(self) -> PairScorer | None:
        """Return what reads the texts of a pair, None where it reads none."""

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return its scores of each list, float32 ``[documents]``, its activation applied.

        Args:
            lists: Any shortlists.
            queries: The texts of their queries, and of others whose vectors may be wanted later.
        """


def open_member(workspace: Workspace, spec: MemberSpec) -> Member:
    """Prepare a member.

    Raises:
        RecipeError: no stage makes such a member yet.
    """
    if spec.kind in ("pairwise", "late_interaction") or spec.compress:
        raise RecipeError(f"teacher.members ({spec.kind}): no stage makes it yet; use another kind, without compress")
    if spec.kind == "cross_encoder":
        return CrossEncoderMember(workspace, spec)
    if spec.kind == "bi_encoder":
        return BiEncoderMember(workspace, spec)
    return FileMember(spec)


class CrossEncoderMember:
    """A cross-encoder; each pair is scored once in a workspace, and its logit kept."""

    scores_new_lists = True

    def __init__(self, workspace: Workspace, spec: MemberSpec) -> None:
        """Prepare it."""
        self.spec = spec
        self._workspace = workspace

    @property
    def name(self) -> str:
        """Return the model's name."""
        return Path(self.spec.model).name or "fine-tuned"

    @cached_property
    def folder(self) -> Path:
        """Return the model's folder, fine-tuning it first if the recipe says so."""
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
    def reranker(self) -> CrossEncoder:
        """Load the cross-encoder."""
        from retrieval_kd.teachers.cross_encoder import CrossEncoder

        spec = self.spec
        return CrossEncoder.load(str(self.folder), spec.max_length, spec.template, spec.activation)

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of model and activation."""
        return fingerprint([self.reranker.fingerprint, self.spec.activation])

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return the activated logits; only pairs that no earlier stage has scored are scored."""
        from retrieval_kd.scores.normalise import activate

        return [
            activate(logits, self.spec.activation) for logits in stored_scores(self._workspace, self.reranker, lists)
        ]


class BiEncoderMember:
    """An encoder whose vectors are compared: the recipe's own, or any other."""

    scores_new_lists = True
    reranker = None

    def __init__(self, workspace: Workspace, spec: MemberSpec) -> None:
        """Prepare it."""
        self.spec = spec
        self._workspace = workspace

    @property
    def name(self) -> str:
        """Return the encoder's name."""
        return self._encoder.card.name

    @cached_property
    def _encoder(self) -> OnnxEncoder:
        spec = self.spec
        if not spec.model:
            return self._workspace.encoder
        return self._workspace.exported(
            EncoderSpec(spec.model, spec.max_length, spec.query_prefix, spec.document_prefix)
        )

    @property
    def folder(self) -> Path:
        """Return the folder of the published model."""
        return resolve_model(self.spec.model or self._workspace.recipe.encoder.model)

    @property
    def fingerprint(self) -> str:
        """Return the encoder's fingerprint."""
        return self._encoder.card.fingerprint

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return dot products."""
        return self._workspace.encoder_scores(lists, self._encoder, queries)


class FileMember:
    """Scores that are there already: a TREC run, a score store, or a file of scores."""

    scores_new_lists = False
    reranker = None

    def __init__(self, spec: MemberSpec) -> None:
        """Prepare it."""
        self.spec = spec

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.folder.stem

    @property
    def folder(self) -> Path:
        """Return the file, or the store's folder."""
        return Path(self.spec.path)

    @cached_property
    def _store(self) -> ScoreStore:
        from retrieval_kd.scores.files import read_scores

        return read_scores(self.folder)

    @property
    def fingerprint(self) -> str:
        """Return the identity of scores and activation."""
        return fingerprint([self._store.fingerprint, self.spec.activation])

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return the file's scores, activated; a pair without one is an error that says how many there are."""
        from retrieval_kd.scores.normalise import activate

        return [activate(scores, self.spec.activation) for scores in self._store.score_lists(lists)]


def stored_scores(workspace: Workspace, ranker: PairScorer, lists: Sequence[Shortlist]) -> list[Scores]:
    """Return a ranker's raw scores of any lists; only pairs that no earlier stage has scored are scored."""
    from retrieval_kd.scores.store import ScoreStore
    from retrieval_kd.teachers.scoring import score_candidates

    teacher = {"teacher": ranker.fingerprint, "collection": workspace.collection.fingerprint}
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
            Spec("score", {}, {**teacher, "lists": identity(rest)}), f"score {pairs:,} pairs with {ranker.name}"
        )
        score_candidates(ranker, workspace.collection, rest, folder)
        _fill(scores, ScoreStore.open(folder).find(lists))
    return scores


def identity(lists: Iterable[Shortlist]) -> str:
    """Return the sha256 over lists of candidates, one list in memory at a time."""
    digest = hashlib.sha256()
    for item in lists:
        digest.update(f"{canonical_json(dataclasses.astuple(item))}\n".encode())
    return digest.hexdigest()


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
