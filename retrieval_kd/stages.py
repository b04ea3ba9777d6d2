"""The stages of a distillation, each an artifact named after its recipe and its inputs.

A stage asks for the stages it needs, so asking for the last one runs all of them, and what is already
there is opened. Artifacts lie under one root and are named by a fingerprint of everything that goes
into them: two recipes that share a teacher and candidates share the scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifacts import MANIFEST, Artifact, Spec, build, fingerprint
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection, dev_queries, training_queries
from retrieval_kd.collections.beir import write_beir
from retrieval_kd.collections.python_docs import PythonDocs, installed_versions
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus, encode_texts
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError
from retrieval_kd.mining.bm25 import bm25_run
from retrieval_kd.mining.candidates import (
    CandidateList,
    MiningReport,
    read_candidates,
    sample_candidates,
    write_candidates,
)
from retrieval_kd.mining.dense import dense_run
from retrieval_kd.recipes.schema import DEMO_COLLECTION, CandidatesSpec, CollectionSpec, FineTuneSpec, Recipe
from retrieval_kd.runs import Ranking, Run, Scores, Shortlist, read_trec, write_trec

if TYPE_CHECKING:
    from retrieval_kd.encoders.torch_encoder import TorchEncoder
    from retrieval_kd.export.onnx_export import Probes
    from retrieval_kd.teachers.cross_encoder import CrossEncoder
    from retrieval_kd.training.dev import DevSet

TRAIN_LISTS = "train.jsonl"
DEV_POOL_QUERIES = 100
DEV_POOL_DEPTH = 10
PROBE_QUERIES = 200
PROBE_DOCUMENTS = 100
Announce = Callable[[str], None]


class Workspace:
    """A recipe and the folder its artifacts live in; each property or method is a stage."""

    def __init__(self, recipe: Recipe, root: Path, announce: Announce = lambda _: None) -> None:
        """Prepare the stages of ``recipe`` under ``root``; nothing runs yet.

        Args:
            recipe: What to make.
            root: Where artifacts live; shared between recipes.
            announce: Called with one sentence before each stage that has work to do.
        """
        self.recipe = recipe
        self.root = root
        self._announce = announce

    @cached_property
    def collection(self) -> Collection:
        """Open the recipe's collection; the built-in one is read from the installed sources once and kept."""
        spec = self.recipe.collection
        if DEMO_COLLECTION in (spec.path, *spec.distractors):
            kept = str(self._python_docs())
            paths = [kept if path == DEMO_COLLECTION else path for path in (spec.path, *spec.distractors)]
            spec = CollectionSpec(paths[0], tuple(paths[1:]))
        return open_collection(spec)

    def _python_docs(self) -> Path:
        spec = Spec("collect", {"collection": DEMO_COLLECTION}, installed_versions())
        folder = self.folder(spec, "read the docstrings of the installed packages")

        def work(target: Path) -> Mapping[str, Any]:
            collection = PythonDocs()
            write_beir(collection, target / collection.name)
            return {"documents": sum(1 for _ in collection.documents())}

        build(folder, spec, work)
        return folder / PythonDocs.name

    @cached_property
    def start(self) -> TorchEncoder:
        """Load the encoder that everything starts from."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return TorchEncoder.load(self.recipe.encoder)

    @cached_property
    def encoder_export(self) -> Path:
        """Export the recipe's encoder, which encodes documents and is a teacher of its own; return its folder."""
        return self._export(self.start)

    @cached_property
    def encoder(self) -> OnnxEncoder:
        """Open the recipe's encoder."""
        return OnnxEncoder.load(self.encoder_export)

    @cached_property
    def corpus(self) -> EncodedCorpus:
        """Encode every document with the recipe's encoder."""
        return self.encoded_by(self.encoder)

    def encoded_by(self, encoder: OnnxEncoder) -> EncodedCorpus:
        """Encode every document with any encoder."""
        card = encoder.card
        inputs = {"encoder": card.fingerprint, "space": card.space, "corpus": self.collection.corpus_fingerprint}
        folder = self.folder(Spec("encode", {}, inputs), f"encode the corpus with {card.name}")
        encode_corpus(encoder, self.collection, folder)
        return EncodedCorpus.load(folder)

    @cached_property
    def first_stage(self) -> dict[str, dict[str, Ranking]]:
        """Rank the corpus for each train and dev query: source name to TREC run."""
        sources = self.recipe.candidates.sources
        queries = {**self.training_queries, **self.dev[0]}
        spec = Spec(
            "mine",
            config={"sources": sources, "depth": self.recipe.candidates.depth},
            inputs={
                "collection": self.collection.fingerprint,
                "encoder": self.encoder.card.fingerprint,
                "queries": fingerprint(queries),
            },
        )
        folder = self.folder(spec, f"mine candidates with {' and '.join(sources)}")

        def work(target: Path) -> Mapping[str, Any]:
            for source in sources:
                if not (target / f"{source}.trec").is_file():
                    write_trec(target / f"{source}.trec", self._retrieve(source, queries), source)
            return {"queries": len(queries)}

        build(folder, spec, work)
        return {source: read_trec(folder / f"{source}.trec") for source in sources}

    def _retrieve(self, source: str, queries: Mapping[str, str]) -> Run:
        if source == "bm25":
            return bm25_run(self.collection, queries, self.recipe.candidates.depth)
        return dense_run(self.encoder, queries, self.corpus, self.recipe.candidates.depth)

    @cached_property
    def training_queries(self) -> dict[str, str]:
        """Return the queries that may be trained on."""
        return training_queries(self.collection)

    @cached_property
    def dev(self) -> tuple[dict[str, str], Any]:
        """Return the texts and judgements of the queries that choose among checkpoints."""
        return dev_queries(self.collection)

    @cached_property
    def candidates(self) -> list[CandidateList]:
        """Draw each training query's candidate list."""
        return self._lists(self.recipe.candidates, limit=0, label="candidates")

    def _lists(self, spec: CandidatesSpec, limit: int, label: str) -> list[CandidateList]:
        seed = self.recipe.seed
        inputs = {
            "collection": self.collection.fingerprint,
            "encoder": self.encoder.card.fingerprint,
            "queries": fingerprint(self.training_queries),
        }
        stage = Spec("sample", {**dataclasses.asdict(spec), "limit": limit}, inputs, seed)
        folder = self.folder(stage, f"sample {label}")

        def work(target: Path) -> Mapping[str, Any]:
            allowed = _some_queries(self.training_queries, limit)
            runs = {
                source: {query_id: run[query_id] for query_id in allowed if query_id in run}
                for source, run in self.first_stage.items()
            }
            report = MiningReport()
            write_candidates(target / TRAIN_LISTS, sample_candidates(self.collection, runs, spec, seed, report))
            return report.to_json()

        build(folder, stage, work)
        return read_candidates(folder / TRAIN_LISTS)

    @cached_property
    def teacher_folder(self) -> Path:
        """Return the cross-encoder's folder, fine-tuning it first if the recipe says so."""
        spec = self.recipe.teacher.fine_tune
        if spec is None:
            return resolve_model(self.recipe.teacher.model)
        return self._fine_tuned(spec)

    def _fine_tuned(self, spec: FineTuneSpec) -> Path:
        from retrieval_kd.teachers.fine_tune import fine_tune_cross_encoder

        sampling = dataclasses.replace(self.recipe.candidates, negatives=spec.negatives)
        lists = self._lists(sampling, limit=spec.queries, label="lists for the teacher")
        stage = Spec(
            "teach",
            config={**dataclasses.asdict(spec), "max_length": self.recipe.teacher.max_length},
            inputs={"collection": self.collection.fingerprint, "lists": _identity(lists)},
            seed=self.recipe.seed,
        )
        folder = self.folder(stage, "fine-tune the cross-encoder teacher")
        fine_tune_cross_encoder(self.collection, lists, spec, self.recipe.teacher.max_length, self.recipe.seed, folder)
        return folder

    @cached_property
    def cross_encoder(self) -> CrossEncoder:
        """Load the cross-encoder teacher."""
        from retrieval_kd.teachers.cross_encoder import CrossEncoder

        return CrossEncoder.load(str(self.teacher_folder), self.recipe.teacher.max_length)

    @cached_property
    def raw_scores(self) -> list[Scores]:
        """Score every candidate with the cross-encoder: raw logits, one array a list."""
        return self.cross_encoder_scores(self.candidates)

    def cross_encoder_scores(self, lists: Sequence[Shortlist]) -> list[Scores]:
        """Score any shortlists with the cross-encoder; only pairs that no earlier stage has scored are scored."""
        from retrieval_kd.scores.store import ScoreStore
        from retrieval_kd.teachers.cross_encoder import score_candidates

        teacher = {"teacher": self.cross_encoder.fingerprint, "collection": self.collection.fingerprint}
        scores = [np.full(len(item.doc_ids), np.nan, dtype=np.float32) for item in lists]
        for folder in self._finished("score", teacher):
            _fill(scores, ScoreStore.open(folder).find(lists))
        rest = [
            Shortlist(item.query_id, tuple(np.array(item.doc_ids)[np.isnan(known)].tolist()))
            for item, known in zip(lists, scores, strict=True)
            if np.isnan(known).any()
        ]
        if rest:
            pairs = sum(len(item.doc_ids) for item in rest)
            folder = self.folder(
                Spec("score", {}, {**teacher, "lists": _identity(rest)}),
                f"score {pairs:,} pairs with the cross-encoder",
            )
            score_candidates(self.cross_encoder, self.collection, rest, folder)
            _fill(scores, ScoreStore.open(folder).find(lists))
        return scores

    def _finished(self, stage: str, inputs: Mapping[str, str]) -> list[Path]:
        """Return the finished artifacts of a stage that were made from these inputs, in the order of their names."""
        folders = sorted(path.parent for path in self.root.glob(f"{stage}-*/{MANIFEST}"))
        found = []
        for folder in folders:
            # A torn folder is no store; the stage that owns it mends it when it runs.
            with contextlib.suppress(ArtifactError):
                if inputs.items() <= Artifact.load(folder, stage).inputs.items():
                    found.append(folder)
        return found

    @cached_property
    def query_vectors(self) -> EncodedCorpus:
        """Encode the training queries with the recipe's encoder: targets, and half of an ensemble."""
        return self.encoded_queries(self.training_queries)

    def encoded_queries(self, queries: Mapping[str, str]) -> EncodedCorpus:
        """Encode any queries with the recipe's encoder."""
        inputs = {"encoder": self.encoder.card.fingerprint, "queries": fingerprint(dict(queries))}
        folder = self.folder(
            Spec("encode", {}, inputs), f"encode {len(queries):,} queries with {self.encoder.card.name}"
        )
        return encode_texts(self.encoder, queries, "query", folder)

    @cached_property
    def teacher_scores(self) -> list[Scores]:
        """Combine the teacher's members as the recipe says: one float32 array a list."""
        from retrieval_kd.scores.normalise import combine

        teacher = self.recipe.teacher
        members: list[list[Scores]] = []
        weights: list[float] = []
        if teacher.cross_encoder_weight > 0:
            members.append(self.raw_scores)
            weights.append(teacher.cross_encoder_weight)
        if teacher.encoder_weight > 0:
            members.append(self.encoder_scores(self.candidates, self.query_vectors))
            weights.append(teacher.encoder_weight)
        return [combine(scores, weights, teacher.normalise) for scores in zip(*members, strict=True)]

    def encoder_scores(self, lists: Sequence[Shortlist], queries: EncodedCorpus) -> list[Scores]:
        """Score candidate lists with the recipe's encoder itself."""
        from retrieval_kd.teachers.bi_encoder import score_with_vectors

        rows = [queries.row_of[item.query_id] for item in lists]
        return score_with_vectors(queries.vectors[rows], self.corpus, lists)

    def untrained_student(self) -> TorchEncoder:
        """Build the student before any training, the layer-cut start; anew for each caller, for training changes it."""
        from retrieval_kd.students.build import build_student

        return build_student(self.start, self.recipe.student, self.start.card)

    @cached_property
    def student_folder(self) -> Path:
        """Train the student and return its folder: a sentence-transformers model with its card and metrics."""
        recipe = self.recipe
        config = {
            "student": dataclasses.asdict(recipe.student),
            "losses": [dataclasses.asdict(loss) for loss in recipe.losses],
            "schedule": dataclasses.asdict(recipe.schedule),
            "teacher": dataclasses.asdict(recipe.teacher) if self.needs_teacher else None,
        }
        inputs = {
            "collection": self.collection.fingerprint,
            "encoder": self.encoder.card.fingerprint,
            "candidates": _identity(self.candidates),
            "teacher": self.cross_encoder.fingerprint if self.needs_teacher else "",
        }
        spec = Spec("train", config, inputs, recipe.seed)
        folder = self.folder(spec, f"train the {recipe.student.mode} student")
        build(folder, spec, self._train)
        return folder

    @property
    def needs_teacher(self) -> bool:
        """Return whether any loss of the recipe reads the teacher's scores."""
        from retrieval_kd.losses.registry import LOSSES

        infos = [LOSSES[loss.name] for loss in self.recipe.losses]
        return any(info.kind != "embeddings" and "teacher" in info.needs for info in infos)

    def _train(self, folder: Path) -> Mapping[str, Any]:
        import torch

        from retrieval_kd.training.batches import TrainingSet
        from retrieval_kd.training.loop import train
        from retrieval_kd.training.towers import DocumentTower, FrozenDocuments, LiveDocuments

        recipe = self.recipe
        student = self.untrained_student()
        rows = [self.query_vectors.row_of[item.query_id] for item in self.candidates]
        data = TrainingSet(
            lists=self.candidates,
            texts=self.training_queries,
            teacher=self.teacher_scores if self.needs_teacher else None,
            qrels=self.collection.qrels("train"),
            query_targets=self.query_vectors.vectors[rows],
        )

        def documents(device: torch.device) -> DocumentTower:
            if recipe.student.mode == "asymmetric":
                return FrozenDocuments(self.corpus, device)
            return LiveDocuments(student, self.collection, self.corpus, recipe.schedule.micro_tokens, device)

        summary = train(student, documents, data, self._dev_set(), recipe.losses, recipe.schedule, recipe.seed, folder)
        student.save(folder)
        return summary

    def _dev_set(self) -> DevSet:
        from retrieval_kd.training.dev import DevSet

        queries, qrels = self.dev
        if self.recipe.student.mode == "asymmetric":
            return DevSet(queries, qrels, self.collection, self.corpus)
        chosen = _some_queries(queries, DEV_POOL_QUERIES)
        judged = {query_id: qrels[query_id] for query_id in chosen}
        pool = {doc_id for grades in judged.values() for doc_id in grades}
        for run in self.first_stage.values():
            pool.update(
                doc_id for query_id in chosen if query_id in run for doc_id in run[query_id].doc_ids[:DEV_POOL_DEPTH]
            )
        return DevSet(chosen, judged, self.collection, corpus=None, pool=tuple(sorted(pool)))

    @cached_property
    def student_export(self) -> Path:
        """Export the trained student through the parity gate and return the ONNX encoder's folder."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return self._export(TorchEncoder.open(self.student_folder))

    @cached_property
    def student(self) -> OnnxEncoder:
        """Open the exported student."""
        return OnnxEncoder.load(self.student_export)

    @cached_property
    def undistilled(self) -> OnnxEncoder:
        """Export the layer-cut start, the baseline that shows what distillation bought."""
        return OnnxEncoder.load(self._export(self.untrained_student()))

    def _export(self, encoder: TorchEncoder) -> Path:
        from retrieval_kd.export.onnx_export import export_encoder

        card = encoder.card
        spec = Spec(
            "export",
            config={**dataclasses.asdict(self.recipe.export), "card": card.to_json()},
            inputs={"collection": self.collection.fingerprint},
        )
        folder = self.folder(spec, f"export {card.name} to ONNX and compare it with torch")
        # A query encoder has no document side of its own: its rankings are over the vectors it will search.
        export_encoder(encoder, folder, self.recipe.export, self._probes(self.corpus if card.role == "query" else None))
        return folder

    def _probes(self, corpus: EncodedCorpus | None) -> Probes:
        """Take the dev queries and the documents they need, so that the gate sees ranking on real text."""
        from retrieval_kd.export.onnx_export import Probes

        queries, qrels = self.dev
        chosen = _some_queries(queries, PROBE_QUERIES)
        judged = {query_id: qrels[query_id] for query_id in chosen}
        wanted = dict.fromkeys(doc_id for grades in judged.values() for doc_id in grades)
        documents = self.collection.contents(list(wanted)[:PROBE_DOCUMENTS])
        return Probes(chosen, documents, judged, corpus)

    def folder(self, spec: Spec, doing: str) -> Path:
        """Return the folder of a stage, named by its identity; says what is being done if it is still to be made."""
        folder = self.root / f"{spec.stage}-{spec.fingerprint[:12]}"
        if not (folder / MANIFEST).is_file():
            self._announce(doing)
        return folder


def _fill(scores: Sequence[Scores], found: Sequence[Scores]) -> None:
    """Put what was found where a score is still missing."""
    for known, new in zip(scores, found, strict=True):
        unknown = np.isnan(known)
        known[unknown] = new[unknown]


def _identity(lists: Sequence[Shortlist]) -> str:
    return fingerprint([dataclasses.astuple(item) for item in lists])


def _some_queries(queries: Mapping[str, str], limit: int) -> dict[str, str]:
    """Return ``limit`` queries chosen by a hash of their ids, in their own order; all when 0."""
    if limit == 0 or len(queries) <= limit:
        return dict(queries)
    chosen = set(sorted(queries, key=fingerprint)[:limit])
    return {query_id: text for query_id, text in queries.items() if query_id in chosen}
