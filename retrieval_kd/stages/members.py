"""The members of a teacher: one class for each way to come to a score."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrieval_kd.artifacts import MANIFEST, Artifact, Spec, canonical_json, fingerprint
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.recipes.loader import resolved
from retrieval_kd.recipes.schema import CompressSpec, EncoderSpec, MemberSpec
from retrieval_kd.runs import Scores, Shortlist

if TYPE_CHECKING:
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.scores.preferences import Preferences, PreferenceStore
    from retrieval_kd.scores.store import ScoreStore
    from retrieval_kd.stages.workspace import Workspace
    from retrieval_kd.teachers.cross_encoder import PairwiseRanker
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
    """Prepare a member."""
    if spec.kind in ("cross_encoder", "late_interaction"):
        return TextMember(workspace, spec)
    if spec.kind == "pairwise":
        return PairwiseMember(workspace, spec)
    if spec.kind == "bi_encoder":
        return BiEncoderMember(workspace, spec)
    return FileMember(spec)


class TextMember:
    """A cross-encoder or late-interaction model; each pair is scored once in a workspace, and its raw score kept."""

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
        return _model_folder(self._workspace, self.spec)

    @cached_property
    def reranker(self) -> PairScorer:
        """Load the model."""
        from retrieval_kd.teachers.cross_encoder import CrossEncoder
        from retrieval_kd.teachers.late_interaction import LateInteraction

        spec, folder = self.spec, str(self.folder)
        if spec.kind == "cross_encoder":
            return CrossEncoder.load(folder, spec.max_length, spec.template, spec.activation)
        return LateInteraction.load(folder, spec.max_length, spec.query_prefix, spec.document_prefix)

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of model and activation."""
        return fingerprint([self.reranker.fingerprint, self.spec.activation])

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return the activated raw scores; only pairs that no earlier stage has scored are scored."""
        from retrieval_kd.scores.normalise import activate

        return [
            activate(logits, self.spec.activation) for logits in stored_scores(self._workspace, self.reranker, lists)
        ]


class PairwiseMember:
    """A pairwise ranker, or a file of its preferences; a list is compared once in a workspace."""

    # A list costs the square of its length.
    scores_new_lists = False
    reranker = None

    def __init__(self, workspace: Workspace, spec: MemberSpec) -> None:
        """Prepare it."""
        self.spec = spec
        self._workspace = workspace

    @property
    def name(self) -> str:
        """Return the model's or the file's name."""
        return Path(self.spec.model or self.spec.path).name or "fine-tuned"

    @cached_property
    def folder(self) -> Path:
        """Return the model's folder, fine-tuning it first if the recipe says so; of a file, the file."""
        return Path(self.spec.path) if self.spec.path else _model_folder(self._workspace, self.spec)

    @cached_property
    def _ranker(self) -> PairwiseRanker:
        from retrieval_kd.teachers.cross_encoder import PairwiseRanker

        return PairwiseRanker.load(str(self.folder), self.spec.max_length, self.spec.template, "sigmoid")

    @cached_property
    def _read(self) -> PreferenceStore:
        from retrieval_kd.scores.files import read_preferences

        return read_preferences(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of the preferences and of what is made of them."""
        identity = self._read.fingerprint if self.spec.path else self._ranker.fingerprint
        spec, seed = self.spec, self._workspace.recipe.seed
        return fingerprint([identity, spec.aggregation, spec.comparisons, seed, *self._draw.values()])

    @property
    def _draw(self) -> dict[str, str]:
        """Return how comparisons are drawn, a part of what identifies them; nothing where all are made."""
        return {"draw": "cycle"} if self.spec.comparisons else {}

    def preferences(self, lists: Sequence[Shortlist]) -> list[Preferences]:
        """Return each list's symmetrised preferences, comparing what no earlier stage has compared.

        Raises:
            DataError: there is no preference at all for a document of a list; says how many and names the first.
        """
        from retrieval_kd.scores.preferences import symmetrised

        store = self._read if self.spec.path else self._compared(lists)
        matrices = [symmetrised(preferences) for preferences in store.find(lists)]
        _require_compared(store.path, lists, matrices)
        return matrices

    def _compared(self, lists: Sequence[Shortlist]) -> PreferenceStore:
        from retrieval_kd.scores.preferences import STAGE, PreferenceStore
        from retrieval_kd.teachers.scoring import compare_candidates

        workspace, comparisons = self._workspace, self.spec.comparisons
        inputs = {
            "teacher": self._ranker.fingerprint,
            "collection": workspace.collection.fingerprint,
            "lists": identity(lists),
        }
        asked = _asked(workspace, self.name)
        seed = workspace.recipe.seed if comparisons else 0
        folder = workspace.folder(
            Spec(STAGE, {"comparisons": comparisons, **self._draw}, inputs, seed, asked),
            f"compare the documents of {len(lists):,} lists with {self._ranker.name}",
        )
        compare_candidates(self._ranker, workspace.collection, lists, folder, comparisons, seed, asked=asked)
        return PreferenceStore.open(folder)

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Return the aggregated preferences."""
        from retrieval_kd.scores.preferences import aggregated

        return [aggregated(preferences, self.spec.aggregation) for preferences in self.preferences(lists)]


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


def _model_folder(workspace: Workspace, spec: MemberSpec) -> Path:
    """Return the folder of the model that a member names or has fine-tuned, made smaller if it says so."""
    folder = resolve_model(spec.model) if spec.fine_tune is None else _fine_tuned(workspace, spec)
    return folder if spec.compress is None else _compressed(workspace, spec, spec.compress, folder)


def _compressed(workspace: Workspace, member: MemberSpec, spec: CompressSpec, larger: Path) -> Path:
    from retrieval_kd.teachers.compress import STAGE, compress_stage, model_hash

    lists = workspace.lists_for_teacher(spec)
    start: Path | None = None
    for number, stage in enumerate(spec.stages):
        identity_of_stage = Spec(
            STAGE,
            config={
                "compress": dataclasses.asdict(spec),
                "number": number,
                "max_length": member.max_length,
                "template": member.template,
            },
            inputs={
                "larger": model_hash(larger),
                "collection": workspace.collection.fingerprint,
                "lists": identity(lists),
            },
            seed=workspace.recipe.seed,
        )
        folder = workspace.folder(identity_of_stage, f"make the cross-encoder smaller: {stage.target}")
        compress_stage(
            workspace.collection,
            lists,
            larger,
            spec,
            number,
            member.max_length,
            workspace.recipe.seed,
            folder,
            member.template,
            start,
        )
        start = folder
    assert start is not None
    return start


def _fine_tuned(workspace: Workspace, spec: MemberSpec) -> Path:
    assert spec.fine_tune is not None
    assert spec.kind == "cross_encoder" or spec.kind == "pairwise"
    from retrieval_kd.teachers.fine_tune import STAGE, fine_tune_ranker

    lists = workspace.lists_for_teacher(spec.fine_tune)
    stage = Spec(
        STAGE,
        config={
            "kind": spec.kind,
            "fine_tune": dataclasses.asdict(spec.fine_tune),
            "max_length": spec.max_length,
            "template": spec.template,
        },
        inputs={"collection": workspace.collection.fingerprint, "lists": identity(lists)},
        seed=workspace.recipe.seed,
    )
    folder = workspace.folder(stage, f"fine-tune the {spec.kind.replace('_', '-')} teacher")
    fine_tune_ranker(
        spec.kind,
        workspace.collection,
        lists,
        spec.fine_tune,
        spec.max_length,
        workspace.recipe.seed,
        folder,
        spec.template,
    )
    return folder


def _require_compared(path: Path, lists: Sequence[Shortlist], matrices: Sequence[Preferences]) -> None:
    """Refuse documents of which no preference says anything."""
    unknown = [
        (item.query_id, item.doc_ids[i])
        for item, preferences in zip(lists, matrices, strict=True)
        for i in np.flatnonzero(np.isnan(preferences).all(axis=1))
    ]
    if unknown:
        total = sum(len(item.doc_ids) for item in lists)
        first = ", ".join(f"query {query_id!r} document {doc_id!r}" for query_id, doc_id in unknown[:3])
        raise DataError(
            f"{path}: {len(unknown)} of {total} candidates are in no comparison ({first}"
            f"{', ...' if len(unknown) > 3 else ''}); compare these candidates with this teacher"
        )


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
        asked = _asked(workspace, ranker.name)
        folder = workspace.folder(
            Spec("score", {}, {**teacher, "lists": identity(rest)}, asked=asked),
            f"score {pairs:,} pairs with {ranker.name}",
        )
        score_candidates(ranker, workspace.collection, rest, folder, asked=asked)
        _fill(scores, ScoreStore.open(folder).find(lists))
    return scores


def _asked(workspace: Workspace, ranker: str) -> Mapping[str, Any]:
    """Return the recipe's keys that decide what a ranker scores and how, with the ranker's name."""
    recipe = resolved(workspace.recipe)
    keys = ("collection", "candidates", "teacher", "encoder", "seed", "stages")
    return {"recipe": recipe["name"], "name": ranker, **{key: recipe[key] for key in keys}}


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
