"""``rkd index``: build, verify and inspect index versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli.common import AsJson, emit

app = typer.Typer(help="Build, verify and inspect index versions.", no_args_is_help=True)
Store = Annotated[Path, typer.Argument(help="The index store's folder.")]


@app.command()
def build(
    store: Store,
    collection: Annotated[str, typer.Option(help="The collection whose documents are indexed.")],
    encoder: Annotated[Path, typer.Option(help="The exported encoder that encodes the documents.")],
    query_encoder: Annotated[
        Path | None, typer.Option(help="The exported encoder queries will use; the same one by default.")
    ] = None,
    kind: Annotated[str, typer.Option(help="flat or hnsw.")] = "flat",
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

    spec = section(IndexSpec, {"kind": kind}, "index")
    folder = vectors or store / "vectors"
    documents = OnnxEncoder.load(encoder)
    queries = EncoderCard.load(query_encoder) if query_encoder else documents.card
    # Again in build_index; here it costs no encoding.
    require_same_space(queries, documents.card)
    encode_corpus(documents, open_collection(CollectionSpec(collection)), folder)
    version = build_index(EncodedCorpus.load(folder), spec, store, queries)
    emit({"version": version.name, "store": str(store)}, as_json)


@app.command()
def verify(store: Store, as_json: AsJson = False) -> None:
    """Compare every file of every version with its sha256 and open the current one."""
    from index.verify import verify as verify_store

    emit({"store": str(store), "whole_versions": verify_store(store)}, as_json)


@app.command()
def inspect(store: Store, as_json: AsJson = False) -> None:
    """Print what the current version holds and who made it."""
    from index.verify import inspect as inspect_store

    emit(inspect_store(store), as_json)
