"""From ``--system`` specifications to systems on a collection; vectors and scores are kept by fingerprint."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from eval.dense import DenseSystem, encoded, truncated_corpus
from eval.fusion import FusedSystem, Normalisation
from eval.shape import of_passages
from eval.specs import SystemSpec
from eval.systems import (
    BM25System,
    IndexSystem,
    RerankSystem,
    RunSystem,
    ScoredRerank,
    ServerSystem,
    System,
    reranked,
)
from retrieval_kd.artifacts import MANIFEST, file_sha256, fingerprint
from retrieval_kd.collections.base import Collection, Qrels
from retrieval_kd.encoders.base import Encoder
from retrieval_kd.encoders.card import CARD
from retrieval_kd.encoders.matryoshka import TruncatedEncoder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import EncoderSpec
from retrieval_kd.runs import Run, Shortlist

if TYPE_CHECKING:
    from retrieval_kd.teachers.cross_encoder import CrossEncoder

_SETTINGS = "config_sentence_transformers.json"
_BODY_SETTINGS = "sentence_bert_config.json"
_RERANK_DEPTH = 100
_RERANK_LENGTH = 192


class Component(NamedTuple):
    """What a system opened before has given, for those that start from it.

    Attributes:
        name: What tables print.
        run: Its rankings as it searched: of passages, under MaxP.
        shaped: Its rankings as they are measured: always of documents.
    """

    name: str
    run: Run
    shaped: Run


class Opener:
    """Opens systems; a model is loaded once, a corpus encoded once, a pair scored once."""

    def __init__(self, cache: Path, stack: contextlib.ExitStack) -> None:
        """Take the folder of vectors and scores, and what closes connections at the end."""
        self._cache = cache
        self._stack = stack
        self._encoders: dict[tuple[str, ...], Encoder] = {}
        self._teachers: dict[tuple[str, int], CrossEncoder] = {}
        self.identities: dict[str, str] = {}

    def open(
        self,
        spec: SystemSpec,
        collection: Collection,
        documents: Collection,
        qrels: Qrels,
        components: Mapping[str, Component],
    ) -> System:
        """Open one system on a collection.

        Args:
            spec: What to open.
            collection: What is searched: documents, or their passages.
            documents: The documents themselves, which run files rank.
            qrels: The judgements, whose queries a run file must answer.
            components: What each system opened before has given, by its reference.

        Raises:
            RkdError: whatever is wrong with the system.
        """
        match spec.kind:
            case "bm25":
                from retrieval_kd.mining.bm25 import VARIANT

                system: System = BM25System(collection)
                self.identities[str(spec)] = VARIANT
            case "model":
                system = self._model(spec, collection)
            case "pair":
                system = self._pair(spec, collection)
            case "index":
                system = self._index(spec, collection, documents)
            case "server":
                system = self._server(spec, collection)
            case "run":
                system = RunSystem.read(Path(spec.target).name, Path(spec.target), documents, qrels)
                self.identities[str(spec)] = f"sha256 {file_sha256(Path(spec.target))}"
            case "pyserini":
                from eval.lucene import LuceneSystem

                (k1,), (b,) = spec.numbers("k1", "0.9"), spec.numbers("b", "0.4")
                system = LuceneSystem(spec.target, documents, k1, b, passages=collection is not documents)
            case "rerank":
                first = components[spec.components[0]]
                system = self._rerank(spec, collection if of_passages(first.run) else documents, first.name, first.run)
            case _:
                system = self._fused(spec, components)
        if spec.name:
            # Every system is a small object of its own, so the name can be given after it was opened.
            system = _renamed(system, spec.name)
        return system

    def _model(self, spec: SystemSpec, collection: Collection) -> System:
        encoder = self.encoder(spec.target, spec)
        return self._dense(spec, encoder, encoder, collection)

    def _pair(self, spec: SystemSpec, collection: Collection) -> System:
        if "documents" not in spec.options:
            raise DataError(f"--system {spec}: a pair needs the document encoder too: documents=MODEL")
        query, document = self.encoder(spec.target), self.encoder(spec.options["documents"])
        if spec.options.get("same_space", "no") == "yes":
            query = _Declared(query, document)
        return self._dense(spec, query, document, collection)

    def _dense(self, spec: SystemSpec, query: Encoder, document: Encoder, collection: Collection) -> System:
        corpus = encoded(document, collection, self._cache)
        name = query.card.name if query is document else f"{query.card.name} over {document.card.name}"
        if "dim" in spec.options:
            dimension = spec.integer("dim", 1)
            query = TruncatedEncoder(query, dimension)
            corpus = truncated_corpus(corpus, dimension, self._cache)
            name = f"{name}, {dimension} d"
        role = "student" if query.card.role == "query" else "bi-encoder"
        system = DenseSystem(name, query, corpus, role, document)
        self.identities[str(spec)] = f"encoder {query.card.fingerprint[:12]}, vectors {corpus.fingerprint[:12]}"
        return system

    def encoder(self, model: str, spec: SystemSpec | None = None) -> Encoder:
        """Open an encoder: an exported one under onnxruntime, any other sentence-transformers model in torch.

        A model without a card takes maximum length and prefixes from its own files unless the
        specification names them.
        """
        options = {} if spec is None else {key: value for key, value in spec.options.items() if key != "dim"}
        key = (model, *(f"{name}={value}" for name, value in sorted(options.items())))
        if key not in self._encoders:
            self._encoders[key] = _open_encoder(model, spec, options)
        return self._encoders[key]

    def _index(self, spec: SystemSpec, collection: Collection, documents: Collection) -> System:
        from index.search import Searcher
        from index.served import served_folder
        from retrieval_kd.encoders.onnx import OnnxEncoder

        given = spec.options.get("encoder")
        store, folder = served_folder(Path(spec.target), Path(given) if given else None)
        encoder, searcher = OnnxEncoder.load(folder, threads=len(os.sched_getaffinity(0))), Searcher.open(store)
        self.identities[str(spec)] = f"index version {searcher.version}, encoder {encoder.card.fingerprint[:12]}"
        role = "student" if encoder.card.role == "query" else "bi-encoder"
        system = IndexSystem(f"{encoder.card.name} over {spec.target}", role, encoder, searcher, collection)
        # An index knows the documents it was built from; of passages they have no fingerprint here.
        if collection is documents:
            _require_built_from(spec, store, searcher.version, documents)
        return system

    def _server(self, spec: SystemSpec, collection: Collection) -> System:
        from serve.client import RetrievalClient

        client = self._stack.enter_context(RetrievalClient(spec.target))
        index, encoder = client.index(), client.server_info().query_encoder
        self.identities[str(spec)] = f"index {index.index_version}, encoder {encoder.fingerprint[:12]}"
        return ServerSystem(f"server {spec.target}", client, collection)

    def _rerank(self, spec: SystemSpec, collection: Collection, first_name: str, first: Run) -> System:
        from retrieval_kd.scores.store import ScoreStore
        from retrieval_kd.teachers.cross_encoder import CrossEncoder
        from retrieval_kd.teachers.scoring import score_candidates

        depth = spec.integer("depth", _RERANK_DEPTH)
        key = (spec.target, spec.integer("max_length", _RERANK_LENGTH))
        if key not in self._teachers:
            self._teachers[key] = CrossEncoder.load(*key)
        teacher = self._teachers[key]
        name = f"{Path(spec.target).name} over {first_name} top-{depth}"
        self.identities[str(spec)] = f"cross-encoder {teacher.fingerprint[:12]}"
        timed = RerankSystem(name, RunSystem(first_name, first), teacher, collection, depth)
        lists = [Shortlist(query_id, top.doc_ids) for query_id, top in _tops(first, depth).items()]
        if not lists:
            return ScoredRerank(name, first, timed)
        identity = {
            "teacher": teacher.fingerprint,
            "collection": collection.fingerprint,
            "lists": [[item.query_id, *item.doc_ids] for item in lists],
        }
        folder = self._cache / f"score-{fingerprint(identity)[:12]}"
        score_candidates(teacher, collection, lists, folder)
        scores = ScoreStore.open(folder).score_lists(lists)
        scored = {
            item.query_id: reranked(first[item.query_id], values) for item, values in zip(lists, scores, strict=True)
        }
        return ScoredRerank(name, scored, timed)

    def _fused(self, spec: SystemSpec, components: Mapping[str, Component]) -> System:
        fused = [components[reference] for reference in spec.components]
        # One run may rank passages and another documents: only as they are measured do their ids mean the same.
        parts = [component.shaped for component in fused]
        joined = " + ".join(component.name for component in fused)
        if spec.kind == "rrf":
            k = spec.integer("k", 60)
            return FusedSystem(f"RRF of {joined}, k {k}", parts, k)
        weights, how = spec.numbers("weights"), spec.options.get("normalise", "minmax")
        label = f"{how} {'/'.join(f'{weight:g}' for weight in weights)} of {joined}"
        return FusedSystem(label, parts, weights=weights, normalise=cast("Normalisation", how))


class _Declared:
    """A query encoder of a published pair, which its owner declares to lie in the document encoder's space."""

    def __init__(self, encoder: Encoder, document: Encoder) -> None:
        self._encoder = encoder
        self.card = encoder.card.in_space_of(document.card, "query")
        self.encode = encoder.encode


def _tops(run: Run, depth: int) -> dict[str, Any]:
    return {query_id: ranking.top(depth) for query_id, ranking in run.items() if len(ranking)}


def _renamed(system: System, name: str) -> System:
    # The protocol lets a name be read only.
    opened: Any = system
    if is_dataclass(opened):
        opened = replace(cast("Any", opened), name=name)
    else:
        opened.name = name
    return cast("System", opened)


def _open_encoder(model: str, spec: SystemSpec | None, options: Mapping[str, str]) -> Encoder:
    folder = resolve_model(model)
    if (folder / MANIFEST).is_file() and (folder / CARD).is_file():
        _refuse_options(spec, options, "an exported encoder has its length and prefixes in its card")
        from retrieval_kd.encoders.onnx import OnnxEncoder

        return OnnxEncoder.load(folder, threads=len(os.sched_getaffinity(0)))
    import torch

    from retrieval_kd.encoders.torch_encoder import TorchEncoder

    if (folder / CARD).is_file():
        _refuse_options(spec, options, "a trained encoder has its length and prefixes in its card")
        encoder = TorchEncoder.open(folder)
    else:
        published = _published(folder)
        length = published["max_length"] if spec is None else spec.integer("max_length", published["max_length"])
        encoder = TorchEncoder.load(
            EncoderSpec(
                model,
                max_length=length,
                query_prefix=options.get("query_prefix", published["query_prefix"]),
                document_prefix=options.get("document_prefix", published["document_prefix"]),
            )
        )
    return encoder.to("cuda") if torch.cuda.is_available() else encoder


def _require_built_from(spec: SystemSpec, store: Path, version: str, collection: Collection) -> None:
    """Refuse an index of other texts under the same ids, which would be measured as a bad system.

    After updates an index holds other documents than it was built from, perhaps those of the collection now: of such
    a one only number and ids are checked.
    """
    from index.manifest import IndexManifest
    from index.store import VERSIONS
    from index.updates import FOLDED, UpdateLog

    folder = store if store.parent.name == VERSIONS else store / VERSIONS / version
    if (folder / FOLDED).exists() or UpdateLog.of(folder.parent.parent, version).read().updates:
        return
    built_from = IndexManifest.load(folder).content.corpus_fingerprint
    if built_from and built_from != collection.corpus_fingerprint:
        raise DataError(
            f"--system {spec}: index version {version} was built from other documents than {collection.name} has "
            f"(fingerprints {built_from[:12]} and {collection.corpus_fingerprint[:12]}); build it again from these"
        )


def _refuse_options(spec: SystemSpec | None, options: Mapping[str, str], why: str) -> None:
    if options:
        raise DataError(f"--system {spec}: {', '.join(options)} cannot be changed; {why}")


def _published(folder: Path) -> dict[str, Any]:
    """Return what a published model's files say about length and prefixes."""
    prompts = _json(folder / _SETTINGS).get("prompts") or {}
    return {
        "max_length": int(_json(folder / _BODY_SETTINGS).get("max_seq_length") or EncoderSpec().max_length),
        "query_prefix": str(prompts.get("query") or ""),
        "document_prefix": str(prompts.get("document") or prompts.get("passage") or ""),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot read it ({error}); save the model again") from None
    return raw if isinstance(raw, dict) else {}
