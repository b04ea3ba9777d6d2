"""Vectors of many texts on disk: encoded in resumable shards, merged into one mapped matrix.

A long encoding is the most expensive step that can be interrupted, so it is cut into windows of
``SHARD_SIZE`` texts; a window whose ids are on disk is never encoded again. The finished folder holds
``vectors.npy``, ``ids.txt`` (one id a line) and the encoder's ``card.json``, with rows in ascending id
order: the row number then breaks ties exactly as :func:`retrieval_kd.runs.rank` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build, fingerprint
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.progress import Advance, progress

STAGE = "encode"
VECTORS = "vectors.npy"
IDS = "ids.txt"
SHARD_SIZE = 4096
_BLOCK_ROWS = 16384
# float32 sums of a thousand squares stay within 1e-6 of 1; a vector that was never normalised does not.
_UNIT_TOLERANCE = 1e-3

Texts = Iterable[tuple[str, str]]
"""Pairs of id and text, in an order that is the same on every run."""


@dataclass(frozen=True)
class EncodedCorpus:
    """Vectors of texts, by id; documents or queries.

    Attributes:
        ids: Ids in ascending order.
        vectors: float32 ``[len(ids), card.dimension]``, mapped from disk, rows in the order of ``ids``.
        card: The encoder that made them.
        fingerprint: Identity of the encoding: encoder, texts and side.
        texts_fingerprint: Identity of the texts; for a corpus its ``corpus_fingerprint``.
    """

    ids: list[str]
    vectors: Vectors
    card: EncoderCard
    fingerprint: str
    texts_fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> EncodedCorpus:
        """Open a finished folder; the vectors stay on disk until they are read.

        Raises:
            ArtifactError: the folder is not a finished encoding, or its files disagree.
        """
        artifact = Artifact.load(folder, STAGE)
        ids, vectors, card = read_ids(folder / IDS), map_vectors(folder / VECTORS), EncoderCard.load(folder)
        if vectors.shape != (len(ids), card.dimension):
            raise ArtifactError(
                f"{folder / VECTORS}: shape {vectors.shape}, but {len(ids)} ids and dimension {card.dimension}; "
                "encode again"
            )
        return cls(ids, vectors, card, artifact.fingerprint, artifact.inputs["texts"])

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Return each id's row."""
        return {text_id: row for row, text_id in enumerate(self.ids)}


def encode_corpus(encoder: Encoder, collection: Collection, folder: Path) -> Artifact:
    """Encode every document of a collection; memory holds one window of texts and all ids.

    Raises:
        DataError: no documents, a repeated or unwritable id, or a vector that is not finite or, under
            ``card.normalize``, not of unit length; names the document.
        EncoderMismatch: the encoder does not encode documents.
    """

    def documents() -> Texts:
        return ((document.doc_id, document.content) for document in collection.documents())

    return _encode(encoder, documents, "document", collection.corpus_fingerprint, folder, total=None)


def encode_texts(encoder: Encoder, texts: Mapping[str, str], side: Side, folder: Path) -> EncodedCorpus:
    """Encode texts by id, or open the folder where the same encoder has encoded the same texts before.

    Raises:
        DataError: as :func:`encode_corpus`.
        EncoderMismatch: the encoder does not encode that side.
    """
    _encode(encoder, lambda: sorted(texts.items()), side, fingerprint(dict(texts)), folder, total=len(texts))
    return EncodedCorpus.load(folder)


def read_ids(path: Path) -> list[str]:
    """Read a file of ids, one a line.

    Raises:
        ArtifactError: the file is missing, not UTF-8, or ends within a line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot read the ids ({error}); build {path.parent} again") from None
    # Only "\n" ends an id: universal newlines and splitlines would cut ids that hold "\r" or U+2028.
    *ids, rest = text.split("\n")
    if rest:
        raise ArtifactError(f"{path}: the last line is torn; build {path.parent} again")
    return ids


def write_ids(path: Path, ids: Iterable[str]) -> None:
    """Write ids one a line, atomically.

    Raises:
        DataError: an id is empty, holds a line break, or is not valid Unicode; names it.
    """
    with atomic_write(path, "wb") as file:
        for text_id in ids:
            if not text_id or "\n" in text_id:
                raise DataError(f"id {text_id!r}: empty or with a line break; give the text another id")
            try:
                file.write(text_id.encode("utf-8") + b"\n")
            except UnicodeEncodeError:
                raise DataError(f"id {text_id!r}: not valid Unicode; give the text another id") from None


def map_vectors(path: Path) -> Vectors:
    """Open a ``.npy`` matrix of float32 without reading it.

    Raises:
        ArtifactError: the file is missing, torn, or not a float32 matrix.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot map the vectors ({error}); build {path.parent} again") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype != np.float32:
        raise ArtifactError(f"{path}: not a float32 matrix; build {path.parent} again")
    return vectors


def write_vectors(path: Path, blocks: Iterable[Vectors], shape: tuple[int, int]) -> None:
    """Write blocks of rows as one float32 ``.npy`` matrix, atomically and one block in memory at a time."""
    with atomic_write(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype="<f4").data)


def _encode(
    encoder: Encoder, texts: Callable[[], Texts], side: Side, texts_fingerprint: str, folder: Path, total: int | None
) -> Artifact:
    card = encoder.card
    card.prefix(side)
    spec = Spec(
        STAGE,
        config={"side": side, "shard_size": SHARD_SIZE},
        # The space changes no vector but stands in the card that is saved beside them.
        inputs={"encoder": card.fingerprint, "space": card.space_fingerprint, "texts": texts_fingerprint},
    )

    def work(target: Path) -> Mapping[str, Any]:
        if not (target / IDS).exists():
            with progress(f"encode with {card.name}", total, "texts") as advance:
                shards = _encode_shards(encoder, texts(), side, target, advance)
            _merge(target, shards, card.dimension)
        _remove_shards(target)
        card.save(target)
        return {"texts": len(read_ids(target / IDS)), "dimension": card.dimension}

    return build(folder, spec, work)


def _encode_shards(encoder: Encoder, texts: Texts, side: Side, folder: Path, advance: Advance) -> int:
    """Write the shards that are missing and return how many there are."""
    shards = 0
    for shards, window in enumerate(_windows(texts), start=1):
        ids = [text_id for text_id, _ in window]
        vectors_file, ids_file = _shard(folder, shards - 1)
        if ids_file.exists():
            if read_ids(ids_file) != ids:
                raise DataError(
                    f"{ids_file}: holds other ids than the texts at its place, so their order is not fixed; "
                    f"delete {folder} and encode again"
                )
        else:
            vectors = encoder.encode([text for _, text in window], side)
            check_vectors(vectors, ids, encoder.card)
            write_vectors(vectors_file, [vectors], vectors.shape)
            # The ids come last: a shard with ids is a finished one.
            write_ids(ids_file, ids)
        advance(len(window))
    if shards == 0:
        raise DataError("no texts to encode; the collection is empty")
    return shards


def _windows(texts: Texts) -> Iterator[list[tuple[str, str]]]:
    stream = iter(texts)
    while window := list(itertools.islice(stream, SHARD_SIZE)):
        yield window


def _shard(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"vectors-{number:05d}.npy", folder / f"ids-{number:05d}.txt"


def check_vectors(vectors: Vectors, ids: Sequence[str], card: EncoderCard) -> None:
    """Refuse vectors that are not what a card promises.

    Raises:
        DataError: another shape or dtype, or a vector that is not finite or, under ``card.normalize``, not of unit
            length; names the text.
    """
    if vectors.shape != (len(ids), card.dimension) or vectors.dtype != np.float32:
        raise DataError(
            f"encoder {card.name!r} gave {vectors.dtype} {vectors.shape} for {len(ids)} texts of dimension "
            f"{card.dimension}; export it again"
        )
    norms = np.linalg.norm(vectors, axis=1)
    for bad, what in (
        (~np.isfinite(norms), "not finite"),
        (card.normalize & (np.abs(norms - 1) > _UNIT_TOLERANCE), "not of unit length, which the card promises"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(
                f"text {ids[row]!r}: its vector is {what} (length {norms[row]}); export encoder {card.name!r} again"
            )


def _merge(folder: Path, shards: int, dimension: int) -> None:
    """Write all shards as one matrix in ascending id order; the ids come last and mark it finished."""
    ids = [text_id for number in range(shards) for text_id in read_ids(_shard(folder, number)[1])]
    order = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    ids = [ids[i] for i in order]
    for before, after in itertools.pairwise(ids):
        if before == after:
            raise DataError(f"id {after!r} occurs twice; give each text an id of its own")
    write_vectors(folder / VECTORS, _gather(folder, order, dimension), (len(ids), dimension))
    write_ids(folder / IDS, ids)


def _gather(folder: Path, order: npt.NDArray[np.int64], dimension: int) -> Iterator[Vectors]:
    """Yield blocks of rows in a new order, one shard open at a time (a large corpus has more than we may open)."""
    for start in range(0, len(order), _BLOCK_ROWS):
        rows = order[start : start + _BLOCK_ROWS]
        block = np.empty((len(rows), dimension), dtype=np.float32)
        shard_of = rows // SHARD_SIZE
        for number in np.unique(shard_of):
            mine = shard_of == number
            block[mine] = map_vectors(_shard(folder, int(number))[0])[rows[mine] % SHARD_SIZE]
        yield block


def _remove_shards(folder: Path) -> None:
    for pattern in ("ids-*.txt", "vectors-*.npy"):
        for path in folder.glob(pattern):
            path.unlink()
