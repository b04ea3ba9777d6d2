"""The recipe: one description of a whole distillation, as frozen dataclasses.

A field's name is its key in YAML, its type and ``__post_init__`` say what values it takes. The loader
(``retrieval_kd.recipes.loader``) is strict: an unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from retrieval_kd.errors import RecipeError

DEMO_COLLECTION = "python-docs"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


@dataclass(frozen=True)
class CollectionSpec:
    """Which collection, and what joins its corpus.

    Attributes:
        path: A folder in BEIR or MS MARCO layout, ``irds:<ir_datasets id>``, or ``python-docs``.
        distractors: Further collections whose documents join the corpus without judgements.
    """

    path: str = DEMO_COLLECTION
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderSpec:
    """The encoder everything starts from; in asymmetric mode it also encodes the documents.

    Attributes:
        model: A local folder, a hub id, or ``all-MiniLM-L6-v2`` from its PyPI package.
        max_length: Longest input in tokens.
        query_prefix: Text put before every query.
        document_prefix: Text put before every document.
    """

    model: str = DEFAULT_ENCODER
    max_length: int = 256
    query_prefix: str = ""
    document_prefix: str = ""

    def __post_init__(self) -> None:
        """Refuse lengths no encoder can use."""
        _require(3 <= self.max_length <= 8192, f"encoder.max_length: {self.max_length} is not in 3..8192")


@dataclass(frozen=True)
class CandidatesSpec:
    """Which documents the teacher scores for each training query.

    Attributes:
        sources: First stages whose runs are pooled.
        depth: Ranks each source keeps.
        window: First and last rank (1-based, inclusive) that negatives are drawn from.
        negatives: Negatives drawn for each query.
        positives: At most this many judged positives in a list.
        strategy: ``random`` draws from the window, ``top`` takes its best ranks.
    """

    sources: tuple[Literal["bm25", "dense"], ...] = ("bm25", "dense")
    depth: int = 100
    window: tuple[int, int] = (1, 30)
    negatives: int = 3
    positives: int = 1
    strategy: Literal["random", "top"] = "random"

    def __post_init__(self) -> None:
        """Refuse windows that hold no candidate."""
        _require(len(self.sources) > 0, "candidates.sources: empty; name bm25, dense or both")
        _require(self.depth >= 1, f"candidates.depth: {self.depth} must be at least 1")
        _require(self.negatives >= 1, f"candidates.negatives: {self.negatives} must be at least 1")
        _require(self.positives >= 1, f"candidates.positives: {self.positives} must be at least 1")
        first, last = self.window
        _require(
            1 <= first <= last <= self.depth,
            f"candidates.window: [{first}, {last}] must lie in 1..depth ({self.depth}), first before last",
        )


@dataclass(frozen=True)
class FineTuneSpec:
    """How ``rkd teach`` makes a cross-encoder from an encoder: listwise softmax over one positive and negatives.

    Attributes:
        start: The encoder whose body the cross-encoder starts from.
        queries: Train on at most this many queries; all when 0.
        negatives: Mined negatives beside each positive.
        epochs: Passes over the queries.
        batch_queries: Lists in one step.
        learning_rate: Peak rate of AdamW, linear warm-up and decay.
        warmup: Share of the steps that warms up.
    """

    start: str = DEFAULT_ENCODER
    queries: int = 0
    negatives: int = 3
    epochs: int = 1
    batch_queries: int = 16
    learning_rate: float = 4e-5
    warmup: float = 0.1

    def __post_init__(self) -> None:
        """Refuse schedules that cannot run."""
        _require(self.queries >= 0, f"teacher.fine_tune.queries: {self.queries} must not be negative")
        _require(self.negatives >= 1, f"teacher.fine_tune.negatives: {self.negatives} must be at least 1")
        _require(self.epochs >= 1, f"teacher.fine_tune.epochs: {self.epochs} must be at least 1")
        _require(self.batch_queries >= 1, f"teacher.fine_tune.batch_queries: {self.batch_queries} must be at least 1")
        _require(0 < self.learning_rate < 1, f"teacher.fine_tune.learning_rate: {self.learning_rate} is not in (0, 1)")
        _require(0 <= self.warmup < 1, f"teacher.fine_tune.warmup: {self.warmup} is not in [0, 1)")


@dataclass(frozen=True)
class TeacherSpec:
    """The ranker whose scores the student learns.

    Attributes:
        model: Cross-encoder: a local folder or hub id; empty to make one by ``fine_tune``.
        max_length: Longest (query, document) pair in tokens.
        fine_tune: How to make the cross-encoder; its defaults where neither it nor ``model`` is given.
        normalise: Named normalisation of each member's scores within a query's list before they are
            averaged; ``none`` keeps raw logits and allows one member only.
        cross_encoder_weight: Weight of the cross-encoder in the average.
        encoder_weight: Weight of the document encoder's own scores; above 0 makes an ensemble of two.
    """

    model: str = ""
    max_length: int = 192
    fine_tune: FineTuneSpec | None = None
    normalise: Literal["none", "zscore", "minmax"] = "zscore"
    cross_encoder_weight: float = 0.5
    encoder_weight: float = 0.5

    def __post_init__(self) -> None:
        """Refuse ensembles without a member or on different scales."""
        if not self.model and self.fine_tune is None:
            object.__setattr__(self, "fine_tune", FineTuneSpec())
        _require(not (self.model and self.fine_tune), "teacher: give either model or fine_tune, not both")
        _require(8 <= self.max_length <= 8192, f"teacher.max_length: {self.max_length} is not in 8..8192")
        weights = (self.cross_encoder_weight, self.encoder_weight)
        _require(
            min(weights) >= 0 and max(weights) > 0,
            f"teacher: weights {weights} must not be negative, and one must be above 0",
        )
        _require(
            self.normalise != "none" or min(weights) == 0,
            "teacher.normalise: none cannot average two teachers on different scales; use zscore",
        )


@dataclass(frozen=True)
class StudentSpec:
    """The small encoder that is trained.

    Attributes:
        mode: ``asymmetric`` trains a query tower against the frozen document vectors of ``encoder``;
            ``symmetric`` trains one tower for both sides.
        layers: Layers of ``encoder`` the student keeps, 0-based, increasing.
        pooling: How token states become one vector.
        projection: Add a linear map to the document encoder's width (always added when widths differ).
        dropout: Dropout while training.
    """

    mode: Literal["asymmetric", "symmetric"] = "asymmetric"
    layers: tuple[int, ...] = (0, 2, 5)
    pooling: Literal["mean", "cls"] = "mean"
    projection: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse layer lists that name no student."""
        _require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            f"student.layers: {list(self.layers)} must be increasing layer numbers, the first layer being 0",
        )
        _require(0 <= self.dropout < 1, f"student.dropout: {self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class LossSpec:
    """One term of the training loss.

    Attributes:
        name: A loss of ``retrieval_kd.losses.registry``.
        weight: Its factor in the sum.
        options: Its hyper-parameters, checked against the loss's own keyword arguments.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse terms that would push the wrong way."""
        _require(self.weight > 0, f"losses: {self.name} has weight {self.weight}; it must be above 0")


@dataclass(frozen=True)
class ScheduleSpec:
    """How long and how fast the student trains.

    Attributes:
        epochs: Passes over the training queries.
        epoch_queries: Queries of one pass, drawn anew for each; all when 0.
        batch_queries: Queries in one optimiser step.
        micro_tokens: Padded tokens in one forward pass.
        learning_rate: Peak rate of AdamW.
        warmup: Share of the steps that warms up linearly.
        decay: Shape of the way down after the peak.
        weight_decay: AdamW's decay of matrices.
        clip: Largest gradient norm.
        evaluations: Dev evaluations in all, evenly spread; the best one's weights are the student.
        checkpoints: Resumable checkpoints in all, evenly spread.
    """

    epochs: int = 4
    epoch_queries: int = 0
    batch_queries: int = 64
    micro_tokens: int = 4096
    learning_rate: float = 3e-4
    warmup: float = 0.05
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluations: int = 8
    checkpoints: int = 8

    def __post_init__(self) -> None:
        """Refuse schedules that cannot run."""
        for name in ("epochs", "batch_queries", "micro_tokens", "evaluations", "checkpoints"):
            _require(getattr(self, name) >= 1, f"schedule.{name}: {getattr(self, name)} must be at least 1")
        _require(self.epoch_queries >= 0, f"schedule.epoch_queries: {self.epoch_queries} must not be negative")
        _require(0 < self.learning_rate < 1, f"schedule.learning_rate: {self.learning_rate} is not in (0, 1)")
        _require(0 <= self.warmup < 1, f"schedule.warmup: {self.warmup} is not in [0, 1)")
        _require(self.weight_decay >= 0, f"schedule.weight_decay: {self.weight_decay} must not be negative")
        _require(self.clip > 0, f"schedule.clip: {self.clip} must be above 0")


@dataclass(frozen=True)
class ExportSpec:
    """The parity gate between torch and ONNX.

    Attributes:
        max_abs_error: Largest difference of any vector entry.
        min_overlap: Least mean share of equal documents in the top ten.
        max_ndcg_change: Largest change of nDCG@10, either way.
    """

    max_abs_error: float = 1e-5
    min_overlap: float = 0.999
    max_ndcg_change: float = 0.001

    def __post_init__(self) -> None:
        """Refuse gates that nothing or everything passes."""
        _require(0 < self.max_abs_error < 1, f"export.max_abs_error: {self.max_abs_error} is not in (0, 1)")
        _require(0 <= self.min_overlap <= 1, f"export.min_overlap: {self.min_overlap} is not in [0, 1]")
        _require(0 <= self.max_ndcg_change < 1, f"export.max_ndcg_change: {self.max_ndcg_change} is not in [0, 1)")


@dataclass(frozen=True)
class IndexSpec:
    """How the corpus is searched.

    Attributes:
        kind: ``flat`` compares with every document; ``hnsw`` walks a graph.
        neighbours: Links of each node of the graph (HNSW's M).
        ef_construction: Candidates looked at while a node is linked.
        ef_search: Candidates looked at while searching.
    """

    kind: Literal["flat", "hnsw"] = "flat"
    neighbours: int = 32
    ef_construction: int = 200
    ef_search: int = 128

    def __post_init__(self) -> None:
        """Refuse graphs that cannot be built."""
        _require(2 <= self.neighbours <= 512, f"index.neighbours: {self.neighbours} is not in 2..512")
        for name in ("ef_construction", "ef_search"):
            _require(getattr(self, name) >= 1, f"index.{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class EvaluationSpec:
    """What the report measures.

    Attributes:
        split: The split reported; never the one tuned on.
        measures: ir_measures names.
        depth: Documents retrieved for each query.
        rerank_depth: Documents of BM25's run the teacher reranks.
    """

    split: str = "test"
    measures: tuple[str, ...] = ("nDCG@10", "RR@10", "R@100")
    depth: int = 100
    rerank_depth: int = 100

    def __post_init__(self) -> None:
        """Refuse depths that measure nothing."""
        _require(self.depth >= 1, f"evaluation.depth: {self.depth} must be at least 1")
        _require(
            1 <= self.rerank_depth <= self.depth,
            f"evaluation.rerank_depth: {self.rerank_depth} must lie in 1..depth ({self.depth})",
        )


@dataclass(frozen=True)
class Recipe:
    """A whole distillation.

    Attributes:
        name: The recipe's name.
        about: One sentence for ``rkd recipes``.
        source: The paper or thread it descends from.
        follows: Where paper and released code differ, which one this follows.
        seed: Seed of every draw.
    """

    name: str
    about: str
    source: str
    follows: str = ""
    seed: int = 13
    collection: CollectionSpec = CollectionSpec()
    encoder: EncoderSpec = EncoderSpec()
    candidates: CandidatesSpec = CandidatesSpec()
    teacher: TeacherSpec = TeacherSpec()
    student: StudentSpec = StudentSpec()
    losses: tuple[LossSpec, ...] = ()
    schedule: ScheduleSpec = ScheduleSpec()
    export: ExportSpec = ExportSpec()
    index: IndexSpec = IndexSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    def __post_init__(self) -> None:
        """Refuse a recipe that would train nothing."""
        _require(len(self.losses) > 0, f"recipe {self.name}: losses is empty; name at least one")
