"""The EncoderCard: everything that decides which vector a text gets, and whose space it lies in.

A card lies beside every model as ``card.json``. It is written at training, checked at export, stored
in the index manifest and enforced at serving. A wrong prefix alone costs ten nDCG points in silence
(pooling, prefix and length disagreements are the most repeated complaint about today's tools), so a
mismatch here is an error and never a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from retrieval_kd.artifacts import fingerprint, read_json, write_json
from retrieval_kd.errors import ArtifactError, EncoderMismatch, did_you_mean

CARD = "card.json"
Role = Literal["symmetric", "query", "document"]
Side = Literal["query", "document"]
Pooling = Literal["mean", "cls"]
Precision = Literal["fp32", "int8-dynamic", "int8-static", "fp16"]

# Fields that say something about an encoder without changing any vector.
_DESCRIPTIVE = frozenset({"name", "role", "space", "layers", "parameters", "fidelity"})
# Fields by which one model makes several query encoders.
_QUERY_SETTINGS = ("query_prefix", "pooling", "max_length", "normalize")
# What stands in the file for readers and follows from the fields.
_DERIVED = frozenset({"fingerprint", "space_fingerprint", "max_batch"})


@dataclass(frozen=True)
class Fidelity:
    """How near an encoder of lower precision comes to its fp32 origin on dev.

    Attributes:
        cosine_min: Least cosine of a text's two vectors.
        cosine_p1: First percentile of the cosines.
        cosine_p50: Their median.
        ndcg_reference: nDCG@10 at fp32.
        ndcg: nDCG@10 at this precision, over the same documents.
        texts: Texts compared.
        queries: Queries ranked.
    """

    cosine_min: float
    cosine_p1: float
    cosine_p50: float
    ndcg_reference: float
    ndcg: float
    texts: int
    queries: int


@dataclass(frozen=True)
class EncoderCard:
    """Identity of an encoder.

    Attributes:
        name: What reports print.
        architecture: The transformer family, such as ``"bert"``; ``"static"`` for a table of token vectors.
        layers: Number of transformer layers.
        parameters: Number of weights.
        pooling: How token states become one vector.
        normalize: Whether vectors have unit length.
        dimensions: Usable vector widths, the full one first (Matryoshka sizes after it).
        max_length: Longest input in tokens, special tokens included; longer texts are cut.
        query_prefix: Text put before every query.
        document_prefix: Text put before every document.
        similarity: How two vectors are compared.
        tokenizer_hash: sha256 of ``tokenizer.json``.
        weights_hash: sha256 over the weights, names and shapes included; below fp32 over the graph.
        precision: Arithmetic of the products with weights.
        role: ``symmetric`` encodes both sides; ``query`` and ``document`` one side only.
        space: Fingerprint of the encoder whose space the vectors lie in; its own when empty.
        fidelity: What a precision below fp32 costs; None at fp32.
    """

    name: str
    architecture: str
    layers: int
    parameters: int
    pooling: Pooling
    normalize: bool
    dimensions: tuple[int, ...]
    max_length: int
    query_prefix: str
    document_prefix: str
    similarity: Literal["dot", "cosine"]
    tokenizer_hash: str
    weights_hash: str
    precision: Precision = "fp32"
    role: Role = "symmetric"
    space: str = ""
    fidelity: Fidelity | None = None

    def __post_init__(self) -> None:
        """Refuse values that no encoder can have."""
        for name, allowed in (("pooling", Pooling), ("role", Role), ("precision", Precision)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ArtifactError(f"encoder card: {name} {value!r}{did_you_mean(str(value), get_args(allowed))}")
        if not self.dimensions or list(self.dimensions) != sorted(set(self.dimensions), reverse=True):
            raise ArtifactError(
                f"encoder card: dimensions {list(self.dimensions)} must be distinct and decreasing; mend {CARD}"
            )
        if self.max_length < 3:
            raise ArtifactError(f"encoder card: max_length {self.max_length} leaves no room for a word; mend {CARD}")

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over weights, tokenizer and every field that changes a vector."""
        return fingerprint({key: value for key, value in asdict(self).items() if key not in _DESCRIPTIVE})

    @property
    def space_fingerprint(self) -> str:
        """Return the fingerprint of the encoder whose space the vectors lie in."""
        return self.space or self.fingerprint

    @property
    def dimension(self) -> int:
        """Return the full vector width."""
        return self.dimensions[0]

    @property
    def max_batch(self) -> int | None:
        """Return how many texts one call may hold.

        Dynamic int8 takes the scale of an activation from all texts of a call (microsoft/onnxruntime#10111), so a
        text has one vector only if it is alone.
        """
        return 1 if self.precision == "int8-dynamic" else None

    def prefix(self, side: Side) -> str:
        """Return the text put before a query or a document.

        Raises:
            EncoderMismatch: the encoder does not encode that side.
        """
        if self.role not in ("symmetric", side):
            raise EncoderMismatch(
                f"encoder {self.name!r} encodes the {self.role} side only; give one for the {side} side"
            )
        return self.query_prefix if side == "query" else self.document_prefix

    def in_space_of(self, other: EncoderCard, role: Role) -> EncoderCard:
        """Return this card as an encoder of one side in another encoder's space."""
        return replace(self, role=role, space=other.space_fingerprint)

    def truncated(self, dimension: int) -> EncoderCard:
        """Return this encoder's card with its vectors cut to their leading ``dimension`` numbers.

        Two encoders that share a space share its truncation to each width. Only widths in ``dimensions`` were
        trained for; frozen document vectors may be cut to any, as far as measured quality allows.

        Raises:
            EncoderMismatch: vectors do not have so many numbers.
        """
        if dimension == self.dimension:
            return self
        if not 1 <= dimension < self.dimension:
            raise EncoderMismatch(
                f"encoder {self.name!r} gives {self.dimension} numbers, which cannot be cut to {dimension}; "
                f"its sizes are {', '.join(map(str, self.dimensions))}"
            )
        return replace(
            self,
            dimensions=(dimension, *(size for size in self.dimensions if size < dimension)),
            space=fingerprint({"space": self.space_fingerprint, "dimension": dimension}),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and for readers the two fingerprints and the batch that follow from them."""
        return {
            **asdict(self),
            "dimensions": list(self.dimensions),
            "fingerprint": self.fingerprint,
            "space_fingerprint": self.space_fingerprint,
            "max_batch": self.max_batch,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> EncoderCard:
        """Read a card and check that its stored fingerprint is that of its fields.

        Raises:
            ArtifactError: an unknown or missing field, an impossible value, or a fingerprint that does
                not fit (the card was edited by hand); names the file.
        """
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in raw.items() if key not in _DERIVED}
        for key in values:
            if key not in known:
                raise ArtifactError(f"{where}: unknown field {key!r}{did_you_mean(key, known)}")
        try:
            fidelity = values.get("fidelity")
            card = cls(
                **{
                    **values,
                    "dimensions": tuple(values["dimensions"]),
                    "fidelity": None if fidelity is None else Fidelity(**fidelity),
                }
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{where}: not an encoder card ({error}); export the encoder again") from None
        if raw.get("fingerprint") != card.fingerprint:
            raise ArtifactError(f"{where}: the fingerprint does not fit the fields; export the encoder again")
        return card

    def save(self, folder: Path) -> None:
        """Write ``card.json`` into a model's folder."""
        write_json(folder / CARD, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> EncoderCard:
        """Read ``card.json`` from a model's folder; see :meth:`from_json` for what it raises."""
        return cls.from_json(read_json(folder / CARD), str(folder / CARD))


def require_same_space(query: EncoderCard, document: EncoderCard) -> None:
    """Refuse a query encoder whose vectors do not lie in the document encoder's space.

    Raises:
        EncoderMismatch: names both encoders and what to do.
    """
    query.prefix("query")
    if query.space_fingerprint != document.space_fingerprint:
        raise EncoderMismatch(
            f"query encoder {query.name!r} (space {query.space_fingerprint[:12]}) cannot search documents encoded by "
            f"{document.name!r} (space {document.space_fingerprint[:12]}); use a query encoder distilled into that "
            "space or encode the corpus again"
        )
    if query.dimension != document.dimension:
        raise EncoderMismatch(
            f"query encoder {query.name!r} gives {query.dimension} numbers, documents have {document.dimension}; "
            "use the encoder the index was built for"
        )


def require_same_settings(query: EncoderCard, known: EncoderCard) -> None:
    """Refuse the model of a known query encoder when its texts are prepared or its states pooled in another way.

    Another model of the space is not refused, nor the same one at another precision, whose weights are its graph's.

    Raises:
        EncoderMismatch: names the keys and both values.
    """
    if (query.weights_hash, query.tokenizer_hash) != (known.weights_hash, known.tokenizer_hash):
        return
    pairs = [(key, getattr(query, key), getattr(known, key)) for key in _QUERY_SETTINGS]
    if other := [f"{key} {mine!r} instead of {theirs!r}" for key, mine, theirs in pairs if mine != theirs]:
        raise EncoderMismatch(
            f"query encoder {query.name!r} has {', '.join(other)}, and is otherwise the one that the index was made "
            "for; use that one, or run `rkd index tune` with this one"
        )
