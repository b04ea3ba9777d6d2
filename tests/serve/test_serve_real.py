"""The real thing: MiniLM exported, 200 documents indexed, served, and compared with the offline ranking."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from serve_fakes import STRANGER, Start

from index.build import build_index
from index.search import Searcher
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_texts
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import ArtifactError, EncoderMismatch
from retrieval_kd.export.onnx_export import export_encoder
from retrieval_kd.export.parity import Probes
from retrieval_kd.recipes.schema import EncoderSpec, ExportSpec, IndexSpec
from retrieval_kd.runs import Ranking
from serve.client import RetrievalClient, SearchResult
from serve.config import ServeConfig
from serve.engine import Engine
from serve.indexes import StoreSource
from serve.limits import Limits
from serve.server import run_server

CORPUS = Path(__file__).resolve().parents[2] / "../shared/data/beir/scifact"
pytestmark = pytest.mark.slow


class World(NamedTuple):
    """An exported encoder, an index store and queries."""

    encoder: Path
    store: Path
    queries: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("torch")
    if not CORPUS.is_dir():
        pytest.skip("the scifact collection is not beside the repository")
    from retrieval_kd.encoders.torch_encoder import TorchEncoder

    folder = tmp_path_factory.mktemp("served")
    with (CORPUS / "corpus.jsonl").open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    documents = {row["_id"]: f"{row['title']} {row['text'][:200]}" for row in rows}
    with (CORPUS / "queries.jsonl").open() as lines:
        queries = [json.loads(line)["text"] for line, _ in zip(lines, range(24), strict=False)]
    some = dict(list(documents.items())[:20])
    qrels = {"0": {next(iter(some)): 1}}
    export_encoder(
        TorchEncoder.load(EncoderSpec()), folder / "encoder", ExportSpec(), Probes({"0": queries[0]}, some, qrels)
    )
    encoder = OnnxEncoder.load(folder / "encoder")
    corpus = encode_texts(encoder, documents, "document", folder / "corpus")
    build_index(corpus, IndexSpec(), folder / "store", encoder.card)
    return World(folder / "encoder", folder / "store", queries)


def same(result: SearchResult, ranking: Ranking) -> bool:
    scores = np.array([hit.score for hit in result.hits], dtype=np.float32)
    return tuple(hit.doc_id for hit in result.hits) == ranking.doc_ids and np.array_equal(scores, ranking.scores)


def test_served_rankings_are_the_offline_ones_alone_together_and_in_a_batch(world: World, start: Start) -> None:
    """Figures measured offline are only about the service if every bit of its rankings is theirs."""
    encoder, searcher = OnnxEncoder.load(world.encoder), Searcher.open(world.store)
    running = start(encoder, searcher)
    expected = searcher.search(encoder.encode(world.queries, "query"), 10)
    with RetrievalClient(running.target, timeout=60) as client:
        assert client.index().index_version == searcher.version
        assert client.server_info().query_encoder.fingerprint == encoder.card.fingerprint
        single = [client.search(text) for text in world.queries]
        with ThreadPoolExecutor(12) as callers:
            together = list(callers.map(client.search, world.queries))
        batch = client.batch_search(world.queries)
        assert np.array_equal(client.embed(world.queries), encoder.encode(world.queries, "query"))
    for results in (single, together, batch):
        assert all(same(result, ranking) for result, ranking in zip(results, expected, strict=True))


def test_an_encoder_of_another_space_or_a_missing_index_is_refused(world: World, tmp_path: Path) -> None:
    """Both give a server that starts, and then ranks nonsense or nothing."""
    encoder = OnnxEncoder.load(world.encoder, 1)
    encoder._card = STRANGER
    with pytest.raises(EncoderMismatch, match="query encoder 'stranger'"):
        asyncio.run(enter(Engine(encoder, StoreSource(world.store), Limits(), 1)))
    with pytest.raises(ArtifactError, match="no index is published"):
        asyncio.run(enter(Engine(encoder, StoreSource(tmp_path / "nowhere"), Limits(), 1)))


def test_the_student_of_the_index_with_another_prefix_is_refused(world: World, tmp_path: Path) -> None:
    """Fault: wrong prefix at load. Same weights, same space, every ranking plausible, and ten points of nDCG gone."""
    encoder = OnnxEncoder.load(world.encoder, 1)
    student = replace(encoder.card.in_space_of(encoder.card, "query"), query_prefix="query: ")
    corpus = EncodedCorpus.load(world.encoder.parent / "corpus")
    build_index(corpus, IndexSpec(), tmp_path, student)
    encoder._card = replace(student, query_prefix="")
    with pytest.raises(EncoderMismatch, match="has query_prefix '' instead of 'query: '"):
        asyncio.run(enter(Engine(encoder, StoreSource(tmp_path), Limits(), 1)))


async def enter(engine: Engine) -> None:
    async with engine:
        raise AssertionError("it must not serve")


def test_run_server_raises_what_the_command_line_shows(world: World, tmp_path: Path) -> None:
    """The command turns an RkdError into one line and exit code 1; anything else is a traceback."""
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(ArtifactError, match="no index is published"):
        run_server(ServeConfig(tmp_path / "nowhere", world.encoder, port=0, threads=1))
