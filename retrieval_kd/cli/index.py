"""``rkd index``: the life of index versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli.common import AsJson, emit

app = typer.Typer(help="Build, check, publish and collect index versions.", no_args_is_help=True)
Store = Annotated[Path, typer.Argument(help="The index store's folder.")]


@app.command()
def build(
    store: Store,
    collection: Annotated[str, typer.Option(help="The collection whose documents are indexed.")],
    encoder: Annotated[Path, typer.Option(help="The exported encoder that encodes the documents.")],
    query_encoder: Annotated[
        Path | None, typer.Option(help="The exported encoder queries will use; the same one by default.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="How it is searched: exact, fastscan, ivf, ivf-pq, ivf-rabitq, hnsw, hnsw-sq8.")
    ] = "exact",
    storage: Annotated[str, typer.Option(help="How vectors are kept: float32, float16 or sq8.")] = "float32",
    dimension: Annotated[
        int, typer.Option(min=0, help="Leading numbers of each vector that are kept (a Matryoshka size); 0 keeps all.")
    ] = 0,
    fields: Annotated[
        str, typer.Option(help="What is stored with each document: title, text, keys of its metadata; comma between.")
    ] = "",
    vectors: Annotated[
        Path | None, typer.Option(help="Where the encoded corpus is kept; STORE/vectors by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode a corpus, build an index version and publish it; a killed build goes on where it stopped."""
    from index.build import build_index
    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.card import EncoderCard, require_same_space
    from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.recipes.loader import section
    from retrieval_kd.recipes.schema import CollectionSpec, IndexSpec

    spec = section(IndexSpec, {"kind": kind, "storage": storage, "dimension": dimension}, "index")
    folder = vectors or store / "vectors"
    documents = OnnxEncoder.load(encoder)
    queries = EncoderCard.load(query_encoder) if query_encoder else documents.card
    # Again in build_index; here it costs no encoding.
    require_same_space(queries, documents.card)
    corpus = open_collection(CollectionSpec(collection))
    encode_corpus(documents, corpus, folder)
    stored = [name.strip() for name in fields.split(",") if name.strip()]
    version = build_index(EncodedCorpus.load(folder), spec, store, queries, collection=corpus, fields=stored)
    emit({"version": version.name, "store": str(store)}, as_json)


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
