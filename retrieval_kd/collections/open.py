"""From a recipe's ``collection`` section to a collection."""

from __future__ import annotations

from pathlib import Path

from retrieval_kd.collections import beir, msmarco
from retrieval_kd.collections.base import Collection
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.collections.irds import PREFIX, IrdsCollection
from retrieval_kd.collections.joined import JoinedCollection
from retrieval_kd.collections.msmarco import MsMarcoCollection
from retrieval_kd.collections.python_docs import PythonDocs
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import DEMO_COLLECTION, CollectionSpec


def open_collection(spec: CollectionSpec) -> Collection:
    """Open the collection and join its distractors.

    Raises:
        DataError: a path is no collection of a layout we read, or a layout's file is missing.
    """
    base = _open(spec.path)
    if not spec.distractors:
        return base
    return JoinedCollection(base, [_open(path) for path in spec.distractors])


def _open(path: str) -> Collection:
    if not path.strip():
        # An unset shell variable; as a path it would be the current folder.
        raise DataError(f"collection: the path {path!r} is empty; name a folder, {PREFIX}<id> or {DEMO_COLLECTION}")
    if path == DEMO_COLLECTION:
        return PythonDocs()
    if path.startswith(PREFIX):
        return IrdsCollection(path.removeprefix(PREFIX))
    folder = Path(path)
    if (folder / beir.CORPUS).is_file():
        return BeirCollection(folder)
    if any((folder / name).is_file() for name in msmarco.CORPORA):
        return MsMarcoCollection(folder)
    found = "no such folder" if not folder.is_dir() else "neither of the layouts"
    raise DataError(
        f"{path}: {found}; give a folder with {beir.CORPUS} (BEIR) or {msmarco.CORPUS} (MS MARCO), unpacked, "
        f"{PREFIX}<ir_datasets id>, or {DEMO_COLLECTION}"
    )
