"""A recipe, the folder its artifacts live in, and what its stages share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from retrieval_kd.artifacts import MANIFEST, PLAN, Artifact, Spec, asked_of, build, file_sha256, fingerprint
from retrieval_kd.changes import changes, shown
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection, dev_queries, training_queries
from retrieval_kd.collections.beir import write_beir
from retrieval_kd.collections.extra import extra_texts
from retrieval_kd.collections.msmarco import is_msmarco_run, read_top1000
from retrieval_kd.collections.python_docs import PythonDocs, installed_versions
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus, encode_texts
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.exact import exact_search
from retrieval_kd.mining.bm25 import VARIANT, BM25Index
from retrieval_kd.mining.candidates import LISTS, CandidateList, read_candidates, write_candidates
from retrieval_kd.mining.pool import MiningReport
from retrieval_kd.mining.sampling import sample_candidates
from retrieval_kd.recipes.schema import (
    DEMO_COLLECTION,
    CandidatesSpec,
    CollectionSpec,
    CompressSpec,
    EncoderSpec,
    ExportSpec,
    ExtraTextsSpec,
    FineTuneSpec,
    Recipe,
    SourceSpec,
    TeacherSpec,
)
from retrieval_kd.runs import Run, Scores, Shortlist, TrecFiles, write_trec
from retrieval_kd.stages.first_stage import FirstStage
from retrieval_kd.stages.teaching import Teaching
from retrieval_kd.stages.training import TrainingStage

if TYPE_CHECKING:
    from retrieval_kd.encoders.torch_encoder import TorchEncoder
    from retrieval_kd.export.onnx_export import Probes
    from retrieval_kd.stages.members import Member
    from retrieval_kd.training.dev import DevSet

RUN = "run-{:05d}.trec"
RUN_QUERIES = 4096
DEV_POOL_QUERIES = 100
DEV_POOL_DEPTH = 10
PROJECTION_QUERIES = 8192
PROBE_QUERIES = 200
PROBE_DOCUMENTS = 100
CALIBRATION_QUERIES = 256
Announce = Callable[[str], None]
Retrieve = Callable[[Mapping[str, str]], Run]


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
        self._teachers: dict[TeacherSpec, Teaching] = {}
        self._named_unfinished: set[str] = set()
        # Opening one hashes all of it, and the ids of each take memory: what is in use is shared, the rest let go.
        self._corpora: WeakValueDictionary[Path, EncodedCorpus] = WeakValueDictionary()

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
        """Load the recipe's encoder."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return TorchEncoder.load(self.recipe.encoder)

    @cached_property
    def student_start(self) -> TorchEncoder:
        """Load the encoder that the student is cut from."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        start = self.recipe.student.start
        return self.start if start is None else TorchEncoder.load(start)

    @cached_property
    def encoder_export(self) -> Path:
        """Export the recipe's encoder, which encodes documents and is a teacher of its own; return its folder."""
        return self.export(self.start)

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
        corpus = self._corpora.get(folder)
        if corpus is None:
            corpus = self._corpora[folder] = EncodedCorpus.load(folder)
        return corpus

    def documents_for(self, encoder: OnnxEncoder) -> EncodedCorpus:
        """Return the corpus in an encoder's space: its own vectors, or those of the encoder it was distilled into."""
        if encoder.card.role == "symmetric" and encoder.card.space_fingerprint != self.encoder.card.space_fingerprint:
            return self.encoded_by(encoder)
        return self._searched_by(encoder.card)

    def _searched_by(self, card: EncoderCard) -> EncodedCorpus:
        """Return the vectors that a query encoder searches: the recipe's encoder's, or a trained document encoder's."""
        if card.space_fingerprint == self.encoder.card.space_fingerprint:
            return self.corpus
        # Stages in order: one that is still to be trained comes after the one the query encoder is from.
        stage = next(
            stage
            for stage in self.training
            if EncoderCard.load(stage.folder).space_fingerprint == card.space_fingerprint
        )
        return self.encoded_by(stage.document_encoder)

    def first_stages(self, candidates: CandidatesSpec, student: Callable[[str], OnnxEncoder]) -> list[FirstStage]:
        """Return the sources of candidates; each ranks the corpus for every train and dev query when it is read.

        Args:
            candidates: The sources and the ranks they keep.
            student: The student that an earlier stage left, by the stage's name; the present one by ``""``.
        """
        return [self._first_stage(source, candidates.depth, student) for source in candidates.sources]

    def _first_stage(self, source: SourceSpec, depth: int, student: Callable[[str], OnnxEncoder]) -> FirstStage:
        if source.kind == "run":
            path = Path(source.path)
            if not path.is_file():
                raise RecipeError(f"candidates.sources: {path} is not a file; give a run or MS MARCO's top 1000")
            # Opening it now says what is wrong with it before anything is ranked.
            run: Run = read_top1000(path) if is_msmarco_run(path) else TrecFiles([path])
            return FirstStage(source.name, file_sha256(path), lambda: run)
        if source.kind == "bm25":
            return self._ranked(
                source, depth, VARIANT, lambda: partial(BM25Index.build(self.collection).search, k=depth)
            )
        if source.kind == "student":
            encoder = student(source.stage)
        else:
            encoder = self.exported(source.encoder) if source.encoder else self.encoder

        def dense() -> Retrieve:
            corpus = self.documents_for(encoder)
            require_same_space(encoder.card, corpus.card)
            # Kept, for training wants the vectors of its queries too, and a large encoder takes long over them.
            encoded = [self.encoded_queries(some, encoder) for some in (self.training_queries, self.dev[0])]

            def retrieve(queries: Mapping[str, str]) -> Run:
                found = [next(one for one in encoded if query_id in one.row_of) for query_id in queries]
                vectors = [one.vectors[one.row_of[query_id]] for one, query_id in zip(found, queries, strict=True)]
                return exact_search(list(queries), np.stack(vectors), corpus, depth)

            return retrieve

        return self._ranked(source, depth, encoder.card.fingerprint, dense)

    def _ranked(self, source: SourceSpec, depth: int, ranker: str, prepare: Callable[[], Retrieve]) -> FirstStage:
        """Return a source whose run is an artifact, made by shards of queries so that it resumes and never grows."""
        queries = {**self.training_queries, **self.dev[0]}
        inputs = {"collection": self.collection.fingerprint, "queries": fingerprint(queries), "ranker": ranker}
        spec = Spec("mine", {"source": source.kind, "depth": depth}, inputs)

        def work(target: Path) -> Mapping[str, Any]:
            rows, retrieve = list(queries.items()), None
            for number, start in enumerate(range(0, len(rows), RUN_QUERIES)):
                path = target / RUN.format(number)
                if not path.is_file():
                    retrieve = retrieve or prepare()
                    write_trec(path, retrieve(dict(rows[start : start + RUN_QUERIES])), source.kind)
            return {"queries": len(queries)}

        def run() -> Run:
            folder = self.folder(spec, f"mine candidates with {source.name}")
            artifact = build(folder, spec, work)
            return TrecFiles([folder / entry.path for entry in artifact.files])

        return FirstStage(source.name, spec.fingerprint, run)

    @cached_property
    def training_queries(self) -> dict[str, str]:
        """Return the queries that may be trained on."""
        return training_queries(self.collection)

    @cached_property
    def dev(self) -> tuple[dict[str, str], Any]:
        """Return the texts and judgements of the queries that choose among checkpoints."""
        return dev_queries(self.collection)

    def mine(
        self,
        candidates: CandidatesSpec,
        student: Callable[[str], OnnxEncoder],
        label: str,
        teacher: Teaching | None = None,
    ) -> Artifact:
        """Mine a candidate list for each training query; the report is the manifest's summary.

        Args:
            candidates: Sources, filters, strategy.
            student: As in :meth:`first_stages`.
            label: What the lists are for.
            teacher: Scores the pools, where ``candidates.needs_scores``.

        Raises:
            DataError: no query got a list; says why.
        """
        sources = self.first_stages(candidates, student)
        inputs = {
            "collection": self.collection.fingerprint,
            "queries": fingerprint(self.training_queries),
            "sources": fingerprint([source.fingerprint for source in sources]),
            "teacher": teacher.fingerprint if teacher else "",
        }
        stage = Spec("sample", dataclasses.asdict(candidates), inputs, self.recipe.seed)
        folder = self.folder(stage, f"sample {label}")

        def work(target: Path) -> Mapping[str, Any]:
            runs = {source.name: source.run for source in sources}
            report, queries = MiningReport(), self.training_queries
            scorer = None if teacher is None else partial(teacher.scores, queries=queries)
            wanted = list(_some_queries(queries, candidates.queries))
            lists = sample_candidates(
                self.collection, runs, candidates, self.recipe.seed, report, scorer, queries=wanted
            )
            write_candidates(target / LISTS, lists)
            if not report.lists:
                raise DataError(
                    f"{self.collection.name}: mining made no list for {report.queries} training queries "
                    f"({report.left_out}); widen candidates.window or filter, or name other sources"
                )
            return report.to_json()

        return build(folder, stage, work)

    def read_lists(self, mined: Artifact) -> list[CandidateList]:
        """Read the lists of a mining or selecting stage."""
        return read_candidates(mined.path / LISTS)

    def lists_for_teacher(self, spec: FineTuneSpec | CompressSpec) -> list[CandidateList]:
        """Mine what a teacher is made with: the recipe's own candidates, before any teacher can filter."""
        own = self.recipe.candidates
        strategy = "random" if own.strategy == "stratified" else own.strategy
        candidates = dataclasses.replace(
            own, queries=spec.queries, negatives=spec.negatives, strategy=strategy, filter=None
        )
        return self.read_lists(self.mine(candidates, self._untrained, label="lists for the teacher"))

    def _untrained(self, _: str) -> OnnxEncoder:
        return self.undistilled

    def teacher(self, spec: TeacherSpec) -> Teaching:
        """Return the teacher of a stage; stages that name the same one share it."""
        return self._teachers.setdefault(spec, Teaching(self, spec))

    @cached_property
    def training(self) -> tuple[TrainingStage, ...]:
        """Return the recipe's stages of training, in order."""
        stages: list[TrainingStage] = []
        for spec in self.recipe.training:
            stages.append(TrainingStage(self, spec, tuple(stages)))
        return tuple(stages)

    @property
    def last(self) -> TrainingStage:
        """Return the stage whose student is the recipe's."""
        return self.training[-1]

    @property
    def reranking(self) -> TrainingStage:
        """Return the stage whose cross-encoder is the recipe's: the last that trains one along, or else the last."""
        return next((stage for stage in reversed(self.training) if stage.spec.joint is not None), self.last)

    @cached_property
    def query_vectors(self) -> EncodedCorpus:
        """Encode the training queries with the recipe's encoder: targets, and half of an ensemble."""
        return self.encoded_queries(self.training_queries, self.encoder)

    def encoded_queries(self, queries: Mapping[str, str], encoder: OnnxEncoder) -> EncodedCorpus:
        """Encode any queries with any encoder."""
        inputs = {"encoder": encoder.card.fingerprint, "queries": fingerprint(dict(queries))}
        folder = self.folder(Spec("encode", {}, inputs), f"encode {len(queries):,} queries with {encoder.card.name}")
        return encode_texts(encoder, queries, "query", folder)

    def extra_texts(self, spec: ExtraTextsSpec, steps: int) -> dict[str, str]:
        """Return the texts that a stage's embedding losses read beside its queries; empty where it wants none.

        Args:
            spec: Which texts.
            steps: Steps that read them.
        """
        if spec.batch == 0:
            return {}
        others = [open_collection(CollectionSpec(path)) for path in spec.collections]
        return extra_texts(self.collection, others, spec.phrases, steps * spec.batch)

    def encoder_scores(
        self, lists: Sequence[Shortlist], encoder: OnnxEncoder, queries: Mapping[str, str]
    ) -> list[Scores]:
        """Score shortlists of ``queries``, which are all encoded, by the dot product of an encoder's vectors."""
        from retrieval_kd.teachers.bi_encoder import score_with_vectors

        vectors = self.encoded_queries(queries, encoder)
        rows = [vectors.row_of[item.query_id] for item in lists]
        return score_with_vectors(vectors.vectors[rows], self.documents_for(encoder), lists)

    @cached_property
    def cut(self) -> Path:
        """Cut the student out of the encoder that it starts from and return its folder."""
        from retrieval_kd.students.build import build_student, fit_projection

        student, start = self.recipe.student, self.student_start
        other = student.start is not None
        # A start that does not depend on the collection is shared between collections.
        counted = other or student.kind == "static" or student.vocabulary.keep == "corpus"
        inputs = {
            "encoder": self.start.card.fingerprint,
            "name": start.card.name,
            "collection": self.collection.fingerprint if counted else "",
        }
        if other:
            inputs["start"] = start.card.fingerprint
        spec = Spec("cut", student.shape, inputs)
        folder = self.folder(spec, f"cut the student out of {start.card.name}")

        def work(target: Path) -> Mapping[str, Any]:
            documents = (document.content for document in self.collection.documents())
            texts = itertools.chain(documents, self.training_queries.values())
            made = build_student(start, student, self.start.card, texts)
            if other:
                fitted = _some_queries(self.training_queries, PROJECTION_QUERIES)
                rows = [self.query_vectors.row_of[query_id] for query_id in fitted]
                fit_projection(made, list(fitted.values()), self.query_vectors.vectors[rows])
            made.save(target)
            return {"parameters": made.card.parameters}

        build(folder, spec, work)
        return folder

    def untrained_student(self) -> TorchEncoder:
        """Open the student before any training; anew for each caller, for training changes it."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return TorchEncoder.open(self.cut)

    @cached_property
    def dev_set(self) -> DevSet:
        """Return the dev queries with what they search: the same for every stage and source, so that curves compare."""
        from retrieval_kd.training.dev import DevSet

        queries, qrels = self.dev
        if self.recipe.student.mode == "asymmetric":
            return DevSet(queries, qrels, self.collection, self.corpus)
        chosen = _some_queries(queries, DEV_POOL_QUERIES)
        judged = {query_id: qrels[query_id] for query_id in chosen}
        pool = {doc_id for grades in judged.values() for doc_id in grades}
        usual = dataclasses.replace(self.recipe.candidates, sources=CandidatesSpec().sources)
        for source in self.first_stages(usual, self._untrained):
            run = source.run
            pool.update(
                doc_id for query_id in chosen if query_id in run for doc_id in run[query_id].doc_ids[:DEV_POOL_DEPTH]
            )
        return DevSet(chosen, judged, self.collection, corpus=None, pool=tuple(sorted(pool)))

    @property
    def student(self) -> OnnxEncoder:
        """Open the exported student of the last stage, at the recipe's precision."""
        return self.last.served

    @cached_property
    def undistilled(self) -> OnnxEncoder:
        """Export the layer-cut start, the baseline that shows what distillation bought."""
        return OnnxEncoder.load(self.export(self.untrained_student()))

    def exported(self, spec: EncoderSpec) -> OnnxEncoder:
        """Export any published encoder."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return OnnxEncoder.load(self.export(TorchEncoder.load(spec)))

    def export(self, encoder: TorchEncoder) -> Path:
        """Export an encoder at fp32 through the parity gate and return the ONNX encoder's folder."""
        gate = dataclasses.replace(self.recipe.export, precision="fp32")
        card = encoder.card
        # A query encoder has no document side of its own: its rankings are over the vectors it will search.
        return self._export(encoder, gate, self._probes(self._searched_by(card) if card.role == "query" else None))

    def export_lowered(self, encoder: TorchEncoder, exported: OnnxEncoder) -> Path:
        """Export an encoder at the recipe's precision, measured on all of dev against its fp32 export."""
        probes = self._probes(self.documents_for(exported), limit=0)
        calibration = tuple(_some_queries(self.training_queries, CALIBRATION_QUERIES).values())
        return self._export(encoder, self.recipe.export, probes, calibration)

    def _export(self, encoder: TorchEncoder, gate: ExportSpec, probes: Probes, calibration: Sequence[str] = ()) -> Path:
        from retrieval_kd.export.onnx_export import export_encoder

        card = encoder.card
        spec = Spec(
            "export",
            config={**dataclasses.asdict(gate), "card": card.to_json()},
            inputs={"collection": self.collection.fingerprint},
        )
        folder = self.folder(spec, f"export {card.name} to ONNX at {gate.precision} and compare it with torch")
        export_encoder(encoder, folder, gate, probes, calibration)
        return folder

    def export_reranker(self, member: Member) -> Path:
        """Export a cross-encoder through a gate of its own and return the folder; it serves without torch."""
        from retrieval_kd.export.reranker_export import export_reranker

        spec = member.spec
        inputs = {"collection": self.collection.fingerprint, "reranker": member.fingerprint}
        folder = self.folder(
            Spec("export-reranker", {}, inputs), f"export {member.name} to ONNX and compare its scores with torch"
        )
        probes = self._probes(None)
        documents = itertools.cycle(probes.documents.values())
        pairs = list(zip(probes.queries.values(), documents, strict=False))
        export_reranker(member.folder, spec.max_length, spec.template, pairs, folder)
        return folder

    def _probes(self, corpus: EncodedCorpus | None, limit: int = PROBE_QUERIES) -> Probes:
        """Take dev queries and the documents they need, so that the gate sees ranking on real text."""
        from retrieval_kd.export.onnx_export import Probes

        queries, qrels = self.dev
        chosen = _some_queries(queries, limit)
        judged = {query_id: qrels[query_id] for query_id in chosen}
        wanted = dict.fromkeys(doc_id for grades in judged.values() for doc_id in grades)
        documents = self.collection.contents(list(wanted)[:PROBE_DOCUMENTS])
        return Probes(chosen, documents, judged, corpus)

    def folder(self, spec: Spec, doing: str) -> Path:
        """Return the folder of a stage, named by its identity; says what is being done if it is still to be made.

        A stage that was left unfinished under another configuration is named, once, with the keys that differ: it is
        not what goes on.
        """
        folder = self.root / f"{spec.stage}-{spec.fingerprint[:12]}"
        if not (folder / MANIFEST).is_file():
            anew = "" if (folder / PLAN).is_file() else self._left_unfinished(spec)
            self._announce(doing + anew)
        return folder

    def _left_unfinished(self, spec: Spec) -> str:
        left = {}
        asked = spec.asked or spec.config
        for plan in sorted(self.root.glob(f"{spec.stage}-*/{PLAN}")):
            before = asked_of(plan)
            # Some stages are built under a configuration of their own, which says nothing about this one; and neither
            # another recipe's or another stage's training nor another ranker's scores would ever have become these.
            named = all(before.get(key) == asked.get(key) for key in ("recipe", "name"))
            comparable = named and before.keys() == asked.keys()
            if comparable and (differences := changes(before, asked)):
                left[plan.parent.name] = differences
        for name in self._named_unfinished & left.keys():
            del left[name]
        if not left:
            return ""
        name, differences = min(left.items(), key=lambda item: len(item[1]))
        self._named_unfinished.add(name)
        return f" from the beginning: the unfinished {name} was made otherwise ({shown(differences)})"


def _some_queries(queries: Mapping[str, str], limit: int) -> dict[str, str]:
    """Return ``limit`` queries chosen by a hash of their ids, in their own order; all when 0."""
    if limit == 0 or len(queries) <= limit:
        return dict(queries)
    chosen = set(sorted(queries, key=fingerprint)[:limit])
    return {query_id: text for query_id, text in queries.items() if query_id in chosen}
