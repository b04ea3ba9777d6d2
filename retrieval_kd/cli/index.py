"""``rkd index``: the life of index versions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from retrieval_kd.cli.common import AsJson, emit

if TYPE_CHECKING:
    from retrieval_kd.collections.base import Collection
    from retrieval_kd.encoders.corpus import EncodedCorpus
    from retrieval_kd.encoders.onnx import OnnxEncoder

app = typer.Typer(help="Build, check, publish and collect index versions.", no_args_is_help=True)
QUERIES = "Queries nothing was trained on: a file with one a line, or a split of the collection, such as dev."
Recall = Annotated[float, typer.Option(help="Share of the exact ten best that is to be found.")]
Store = Annotated[Path, typer.Argument(help="The index store's folder.")]


@app.command()
def build(
    store: Store,
    collection: Annotated[str, typer.Option(help="The collection whose documents are indexed.")],
    encoder: Annotated[Path, typer.Option(help="The exported encoder that encodes the documents.")],
    query_encoder: Annotated[
        Path | None, typer.Option(help="The exported encoder queries will use; the same one by default.")
    ] = None,
    kind: Annotated[str, typer.Option(help="How it is searched: auto, exact, fastscan, ivf, hnsw, ...")] = "exact",
    storage: Annotated[str, typer.Option(help="How vectors are kept: float32, float16 or sq8.")] = "float32",
    dimension: Annotated[
        int, typer.Option(min=0, help="Leading numbers of each vector that are kept (a Matryoshka size); 0 keeps all.")
    ] = 0,
    queries: Annotated[str | None, typer.Option(help=QUERIES)] = None,
    target_recall: Recall = 0.99,
    memory_mib: Annotated[int, typer.Option(min=0, help="What auto's files may take; 0 is no limit.")] = 0,
    fields: Annotated[
        str, typer.Option(help="What is stored with each document: title, text, keys of its metadata; comma between.")
    ] = "",
    vectors: Annotated[
        Path | None, typer.Option(help="Where the encoded corpus is kept; STORE/vectors by default.")
    ] = None,
    precision: Annotated[str, typer.Option(help="How the encoded corpus is kept: float32 or float16.")] = "float32",
    processes: Annotated[int, typer.Option(min=1, help="Processes that encode; the vectors are the same.")] = 1,
    discard_updates: Annotated[
        bool, typer.Option("--discard-updates", help="Leave the store's updates out; the collection has them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encode a corpus, build an index version and publish it; a killed build goes on where it stopped."""
    from index.build import build_index
    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.card import require_same_space
    from retrieval_kd.encoders.corpus import EncodedCorpus, Precision, Workers, encode_corpus
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.errors import RecipeError, did_you_mean
    from retrieval_kd.recipes.loader import section
    from retrieval_kd.recipes.schema import CollectionSpec, IndexSpec

    asked = {"kind": kind, "storage": storage, "dimension": dimension}
    spec = section(IndexSpec, {**asked, "target_recall": target_recall, "memory_mib": memory_mib}, "index")
    folder = vectors or store / "vectors"
    documents = OnnxEncoder.load(encoder)
    asker = OnnxEncoder.load(query_encoder) if query_encoder else documents
    # Again in build_index; here it costs no encoding.
    require_same_space(asker.card, documents.card)
    corpus = open_collection(CollectionSpec(collection))
    held_out = None if queries is None else _encoded(queries, corpus, asker, store)
    if precision not in get_args(Precision):
        raise RecipeError(f"--precision: {precision!r}{did_you_mean(precision, get_args(Precision))}")
    workers = Workers(partial(OnnxEncoder.load, encoder, 1), processes) if processes > 1 else None
    encode_corpus(documents, corpus, folder, precision=cast("Precision", precision), workers=workers)
    version = build_index(
        EncodedCorpus.load(folder),
        spec,
        store,
        asker.card,
        queries=held_out,
        collection=corpus,
        fields=[name.strip() for name in fields.split(",") if name.strip()],
        discard_updates=discard_updates,
    )
    emit({"version": version.name, "store": str(store)}, as_json)


@app.command()
def tune(
    store: Store,
    queries: Annotated[str, typer.Option(help=QUERIES)],
    query_encoder: Annotated[Path, typer.Option(help="The exported encoder queries will use.")],
    collection: Annotated[str | None, typer.Option(help="The collection, where --queries is a split of it.")] = None,
    target_recall: Recall = 0.99,
    as_json: AsJson = False,
) -> None:
    """Set the current version's search effort to the least that finds enough, and publish that as a new version."""
    from index.build import retune
    from index.store import IndexStore
    from index.verify import inspect as inspect_store
    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.recipes.schema import CollectionSpec

    # Again in retune; here nothing is written yet.
    IndexStore(store).current()
    corpus = None if collection is None else open_collection(CollectionSpec(collection))
    held_out = _encoded(queries, corpus, OnnxEncoder.load(query_encoder), store)
    version = retune(store, held_out, target_recall)
    seen = inspect_store(store)
    effort = {name: seen["index"][name] for name in ("ef_search", "probes", "oversample")}
    emit({"version": version.name, "recall": seen["tuning"]["recall"], **effort}, as_json)


def _encoded(queries: str, collection: Collection | None, encoder: OnnxEncoder, store: Path) -> EncodedCorpus:
    """Encode the queries of a file, one a line, or of a split of the collection."""
    from retrieval_kd.collections.base import split_queries
    from retrieval_kd.collections.files import read_lines
    from retrieval_kd.encoders.corpus import encode_texts
    from retrieval_kd.errors import DataError

    if Path(queries).is_file():
        texts = {f"{number:08d}": line.text for number, line in enumerate(read_lines(Path(queries)), start=1)}
        if not texts:
            raise DataError(f"--queries: {queries} has no queries; write one a line")
    elif collection is not None:
        texts = split_queries(collection, queries)
    else:
        raise DataError(f"--queries: no file {queries!r}; give one query a line, or --collection and a split of it")
    return encode_texts(encoder, texts, "query", store / "queries")


@app.command()
def verify(store: Store, as_json: AsJson = False) -> None:
    """Compare every file of every version with its sha256 and run the current one's self-test."""
    from index.verify import verify as verify_store

    emit({"store": str(store), "whole_versions": verify_store(store)}, as_json)


@app.command()
def inspect(store: Store, as_json: AsJson = False) -> None:
    """Print what the current version holds and who made it."""
    from index.verify import inspect as inspect_store

    emit(inspect_store(store), as_json)


@app.command()
def publish(
    store: Store,
    version: Annotated[str, typer.Argument(help="A version of the store, such as 0000000002-1a2b3c4d.")],
    as_json: AsJson = False,
) -> None:
    """Make a version that the store already has the current one."""
    from index.store import IndexStore

    emit({"store": str(store), "version": IndexStore(store).publish_existing(version).name}, as_json)


@app.command()
def rollback(store: Store, as_json: AsJson = False) -> None:
    """Make the next older version the current one."""
    from index.store import IndexStore

    emit({"store": str(store), "version": IndexStore(store).rollback().name}, as_json)


@app.command()
def gc(
    store: Store,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions stay.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Remove old versions that nobody has open; the current one stays."""
    from index.store import IndexStore

    emit({"store": str(store), "removed": IndexStore(store).collect(keep)}, as_json)
