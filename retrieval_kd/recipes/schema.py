"""The recipe: one description of a whole distillation, as frozen dataclasses.

A field's name is its key in YAML, its type and ``__post_init__`` say what values it takes. The loader
(``retrieval_kd.recipes.loader``) is strict: an unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from retrieval_kd.errors import RecipeError, did_you_mean

DEMO_COLLECTION = "python-docs"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
Needs = Literal["encoder", "judgements", "scores", "preferences"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _require_schedule(where: str, epochs: int, batch_queries: int, learning_rate: float, warmup: float) -> None:
    _require(epochs >= 1, f"{where}.epochs: {epochs} must be at least 1")
    _require(batch_queries >= 1, f"{where}.batch_queries: {batch_queries} must be at least 1")
    _require(0 < learning_rate < 1, f"{where}.learning_rate: {learning_rate} is not in (0, 1)")
    _require(0 <= warmup < 1, f"{where}.warmup: {warmup} is not in [0, 1)")


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
class SourceSpec:
    """A first stage whose run is pooled.

    Attributes:
        kind: ``bm25``; ``dense``, the nearest neighbours by an encoder; ``student``, those by the student that a
            stage starts from, so that negatives are refreshed; ``run``, a run over the training queries, TREC's or
            MS MARCO's.
        encoder: Of ``dense``: any encoder; the recipe's own when not named.
        stage: Of ``student``: the earlier stage whose result ranks; the student as the present stage starts when
            not named.
        path: Of ``run``: the file.
    """

    kind: Literal["bm25", "dense", "student", "run"]
    encoder: EncoderSpec | None = None
    stage: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        _require((self.kind == "run") == bool(self.path), "candidates.sources: run, and only run, takes a path")
        _require(not self.stage or self.kind == "student", f"candidates.sources: {self.kind} takes no stage")
        _require(self.encoder is None or self.kind == "dense", f"candidates.sources: {self.kind} takes no encoder")

    @property
    def name(self) -> str:
        """Return what reports call it, such as ``bm25`` or ``student warmup``."""
        named = (self.kind, self.encoder.model if self.encoder else "", self.stage, self.path)
        return " ".join(part for part in named if part)


@dataclass(frozen=True)
class FilterSpec:
    """Which pooled documents the teacher finds too relevant to be negatives; all bounds given must hold.

    Scores are the teacher's over the pool, as the recipe combines them; raw logits where ``teacher.normalise`` is
    ``none``. The positive that bounds are relative to is the worst scored one of the list.

    Attributes:
        max_score: Highest score.
        margin: A negative lies at least this far below the positive.
        ratio: Highest share of the positive's score, as in NV-Retriever (arXiv 2407.15831); below a positive with a
            negative score by ``(1 - ratio)`` of its size, so that the bound always lies below the positive.
        percentiles: Lowest and highest percentile of the pool's own scores, 0 to 100.
    """

    max_score: float | None = None
    margin: float | None = None
    ratio: float | None = None
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse filters that bound nothing or everything."""
        bounds = (self.max_score, self.margin, self.ratio, self.percentiles)
        _require(any(bound is not None for bound in bounds), "candidates.filter: empty; give a bound or leave it out")
        _require(self.margin is None or self.margin >= 0, f"candidates.filter.margin: {self.margin} is negative")
        _require(self.ratio is None or 0 < self.ratio <= 1, f"candidates.filter.ratio: {self.ratio} is not in (0, 1]")
        if self.percentiles is not None:
            low, high = self.percentiles
            _require(
                0 <= low < high <= 100,
                f"candidates.filter.percentiles: [{low}, {high}] must lie in 0..100, first before last",
            )


@dataclass(frozen=True)
class CandidatesSpec:
    """Which documents the teacher scores for each training query.

    Attributes:
        sources: First stages whose runs are pooled.
        queries: Mine for at most this many training queries, chosen by a hash of their ids; for all when 0.
        depth: Ranks each source keeps.
        window: First and last rank (1-based, inclusive) that negatives are drawn from.
        filter: What the teacher's scores leave out of the pool.
        negatives: Negatives drawn for each query.
        positives: At most this many judged positives in a list.
        strategy: ``random`` draws from the pool, ``top`` takes its best ranks, ``stratified`` draws one from each of
            ``negatives`` equal parts of the pool in the order of the teacher's scores.
    """

    sources: tuple[SourceSpec, ...] = (SourceSpec("bm25"), SourceSpec("dense"))
    queries: int = 0
    depth: int = 100
    window: tuple[int, int] = (1, 30)
    filter: FilterSpec | None = None
    negatives: int = 3
    positives: int = 1
    strategy: Literal["random", "top", "stratified"] = "random"

    def __post_init__(self) -> None:
        """Refuse windows that hold no candidate."""
        _require(len(self.sources) > 0, "candidates.sources: empty; name bm25, dense, student or run")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"candidates.sources: {names} names one twice")
        _require(self.queries >= 0, f"candidates.queries: {self.queries} must not be negative")
        _require(self.depth >= 1, f"candidates.depth: {self.depth} must be at least 1")
        _require(self.negatives >= 1, f"candidates.negatives: {self.negatives} must be at least 1")
        _require(self.positives >= 1, f"candidates.positives: {self.positives} must be at least 1")
        first, last = self.window
        _require(
            1 <= first <= last <= self.depth,
            f"candidates.window: [{first}, {last}] must lie in 1..depth ({self.depth}), first before last",
        )

    @property
    def needs_scores(self) -> bool:
        """Return whether the pool has to be scored before negatives are drawn."""
        return self.filter is not None or self.strategy == "stratified"


@dataclass(frozen=True)
class FineTuneSpec:
    """How ``rkd teach`` makes a ranker from an encoder.

    A cross-encoder learns a listwise softmax over one positive and its negatives, a pairwise ranker which of the
    two documents of each (positive, negative) pair is the positive, in both orders.

    Attributes:
        start: The encoder whose body the ranker starts from.
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
        _require_schedule("teacher.fine_tune", self.epochs, self.batch_queries, self.learning_rate, self.warmup)


@dataclass(frozen=True)
class CompressionStage:
    """One stage of making a cross-encoder smaller.

    Attributes:
        target: What the smaller model learns of the larger one: ``hidden``, the states of every token after the
            embeddings and after each layer that was kept, or ``logits``, the score itself.
        epochs: Passes over the lists.
        batch_queries: Lists in one step.
        learning_rate: Peak rate of AdamW, linear warm-up and decay.
        warmup: Share of the steps that warms up.
    """

    target: Literal["hidden", "logits"]
    epochs: int = 1
    batch_queries: int = 16
    learning_rate: float = 1e-4
    warmup: float = 0.1

    def __post_init__(self) -> None:
        """Refuse schedules that cannot run."""
        _require_schedule("teacher.compress.stages", self.epochs, self.batch_queries, self.learning_rate, self.warmup)


@dataclass(frozen=True)
class CompressSpec:
    """How ``rkd teach`` makes a cross-encoder smaller: some of its layers, taught by all of them.

    Attributes:
        layers: Layers of the larger cross-encoder that the smaller one keeps, 0-based, increasing.
        queries: Train on at most this many queries; all when 0.
        negatives: Mined negatives beside each positive.
        stages: What is learned, in this order; the representation first, as in "Understanding BERT Rankers Under
            Distillation" (arXiv 2007.11088).
    """

    layers: tuple[int, ...] = (0, 2, 5)
    queries: int = 0
    negatives: int = 7
    stages: tuple[CompressionStage, ...] = (CompressionStage("hidden"), CompressionStage("logits"))

    def __post_init__(self) -> None:
        """Refuse a smaller model without layers or without lessons."""
        _require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            f"teacher.compress.layers: {list(self.layers)} must be increasing layer numbers, the first layer being 0",
        )
        _require(self.queries >= 0, f"teacher.compress.queries: {self.queries} must not be negative")
        _require(self.negatives >= 1, f"teacher.compress.negatives: {self.negatives} must be at least 1")
        _require(len(self.stages) > 0, "teacher.compress.stages: empty; name hidden, logits or both")


@dataclass(frozen=True)
class MemberSpec:
    """One ranker of a teacher.

    Attributes:
        kind: ``cross_encoder`` reads query and document together; ``pairwise`` reads a query and two documents;
            ``late_interaction`` compares token vectors (MaxSim); ``bi_encoder`` compares one vector a text; ``run``
            is a TREC run; ``scores`` is a score store's folder or a Parquet or TSV file of scores.
        model: A local folder or hub id. Empty: a cross-encoder is made by ``fine_tune``, a bi-encoder is the
            recipe's encoder.
        path: The file or folder of ``run`` and ``scores``; of ``pairwise``, preferences that are there already.
        weight: Its share of the mean; only the ratio of the members' weights matters.
        max_length: Longest input in tokens: a pair, a triple, or one text for the encoders.
        template: The prompt of a model that needs one, with ``{query}`` and ``{document}``; of a pairwise model with
            ``{query}``, ``{first}`` and ``{second}``. Empty: the tokenizer's own pair.
        activation: From stored logit to score: ``identity``; ``sigmoid``; ``logit_difference`` for a classifier of
            two labels, the second label's logit minus the first's (its sigmoid is the second label's probability).
        aggregation: From preferences to the scores of a list; see :func:`retrieval_kd.scores.preferences.aggregated`.
        comparisons: Pairs of documents compared in each list, drawn at random, or as many as it has documents where
            these are more, so that each is compared with two others; all when 0.
        query_prefix: Text put before every query.
        document_prefix: Text put before every document.
        fine_tune: How to make the model when none is named.
        compress: Make the cross-encoder smaller, and let the smaller one be the member.
    """

    kind: Literal["cross_encoder", "pairwise", "late_interaction", "bi_encoder", "run", "scores"]
    model: str = ""
    path: str = ""
    weight: float = 1.0
    max_length: int = 192
    template: str = ""
    activation: Literal["identity", "sigmoid", "logit_difference"] = "identity"
    aggregation: Literal["mean", "bradley_terry", "copeland"] = "mean"
    comparisons: int = 0
    query_prefix: str = ""
    document_prefix: str = ""
    fine_tune: FineTuneSpec | None = None
    compress: CompressSpec | None = None

    def __post_init__(self) -> None:
        """Refuse members that cannot score, and keys that their kind would ignore."""
        where = f"teacher.members ({self.kind})"
        read = _MEMBER_KEYS[self.kind]
        for key in fields(self):
            if key.name not in ("kind", "weight", *read):
                _require(
                    getattr(self, key.name) == key.default, f"{where}: {key.name} is not read; it takes {sorted(read)}"
                )
        if "fine_tune" in read and not (self.model or self.path) and self.fine_tune is None:
            object.__setattr__(self, "fine_tune", FineTuneSpec())
        _require(
            (bool(self.model) + bool(self.path) + bool(self.fine_tune)) <= 1,
            f"{where}: give only one of {', '.join(sorted(read & {'model', 'path', 'fine_tune'}))}",
        )
        _require(self.kind != "late_interaction" or bool(self.model), f"{where}: name its model")
        _require(self.kind not in ("run", "scores") or bool(self.path), f"{where}: name the path of its scores")
        _require(
            self.kind != "scores" or self.activation != "logit_difference",
            f"{where}: activation logit_difference needs two logits, a file has one score; use identity or sigmoid",
        )
        _require(self.weight > 0, f"{where}: weight {self.weight} must be above 0")
        _require(8 <= self.max_length <= 8192, f"{where}: max_length {self.max_length} is not in 8..8192")
        _require(self.comparisons >= 0, f"{where}: comparisons {self.comparisons} must not be negative")
        names = ("query", "first", "second") if self.kind == "pairwise" else ("query", "document")
        _require(
            not self.template or all(self.template.count(f"{{{name}}}") == 1 for name in names),
            f"{where}: template must hold each of {', '.join(f'{{{name}}}' for name in names)} once",
        )


_MEMBER_KEYS: Mapping[str, frozenset[str]] = {
    "cross_encoder": frozenset({"model", "max_length", "template", "activation", "fine_tune", "compress"}),
    "pairwise": frozenset({"model", "path", "max_length", "template", "aggregation", "comparisons", "fine_tune"}),
    "late_interaction": frozenset({"model", "max_length", "query_prefix", "document_prefix"}),
    "bi_encoder": frozenset({"model", "max_length", "query_prefix", "document_prefix"}),
    "run": frozenset({"path"}),
    "scores": frozenset({"path", "activation"}),
}


# Logits of cross-encoders are alike; what a file's scores are, whoever names it knows.
_RAW_SCALES = frozenset({"cross_encoder", "run", "scores"})


@dataclass(frozen=True)
class TeacherSpec:
    """The ranker whose scores the student learns, or the mean of several.

    The keys but ``normalise`` and ``members`` are the short form of the usual ensemble: a cross-encoder and the
    recipe's encoder.

    Attributes:
        model: Cross-encoder: a local folder or hub id; empty to make one by ``fine_tune``.
        max_length: Longest (query, document) pair in tokens.
        fine_tune: How to make the cross-encoder; its defaults where neither it nor ``model`` is given.
        compress: Make the cross-encoder smaller first.
        normalise: Named normalisation of each member's scores before they are averaged, see
            :mod:`retrieval_kd.scores.normalise`; ``none`` averages raw scores, as Margin-MSE's teacher does, and of
            several members allows cross-encoders, runs and files of scores only.
        cross_encoder_weight: Weight of the cross-encoder in the average.
        encoder_weight: Weight of the document encoder's own scores; above 0 makes an ensemble of two.
        members: Any rankers, instead of the short form.
    """

    model: str = ""
    max_length: int = 192
    fine_tune: FineTuneSpec | None = None
    compress: CompressSpec | None = None
    normalise: Literal["none", "zscore", "minmax", "percentile", "rank"] = "zscore"
    cross_encoder_weight: float = 0.5
    encoder_weight: float = 0.5
    members: tuple[MemberSpec, ...] = ()

    def __post_init__(self) -> None:
        """Refuse ensembles without a member or on different scales."""
        if self.members:
            short = [key for key in fields(self) if key.name not in ("normalise", "members")]
            both = [key.name for key in short if getattr(self, key.name) != key.default]
            _require(not both, f"teacher: give either members or the short form ({', '.join(both)}), not both")
            pairwise = sum(member.kind == "pairwise" for member in self.members)
            _require(pairwise <= 1, f"teacher.members: {pairwise} are pairwise; at most one can be")
        elif not self.model and self.fine_tune is None:
            object.__setattr__(self, "fine_tune", FineTuneSpec())
        _require(not (self.model and self.fine_tune), "teacher: give either model or fine_tune, not both")
        _require(8 <= self.max_length <= 8192, f"teacher.max_length: {self.max_length} is not in 8..8192")
        weights = (self.cross_encoder_weight, self.encoder_weight)
        _require(
            min(weights) >= 0 and max(weights) > 0,
            f"teacher: weights {weights} must not be negative, and one must be above 0",
        )
        other = sorted({member.kind for member in self.ensemble} - _RAW_SCALES)
        _require(
            self.normalise != "none" or len(self.ensemble) == 1 or not other,
            f"teacher.normalise: none averages raw scores, and {', '.join(other)} has a scale of its own; use zscore",
        )

    @property
    def ensemble(self) -> tuple[MemberSpec, ...]:
        """Return the members, those of the short form written out."""
        if self.members:
            return self.members
        members = []
        if self.cross_encoder_weight > 0:
            members.append(
                MemberSpec(
                    "cross_encoder",
                    model=self.model,
                    weight=self.cross_encoder_weight,
                    max_length=self.max_length,
                    fine_tune=self.fine_tune,
                    compress=self.compress,
                )
            )
        if self.encoder_weight > 0:
            members.append(MemberSpec("bi_encoder", weight=self.encoder_weight))
        return tuple(members)


@dataclass(frozen=True)
class VocabularySpec:
    """Which tokens the student knows.

    Attributes:
        keep: ``all`` of the encoder's; ``corpus`` keeps those of the collection's documents and training
            queries, special tokens, and single characters, of which every other text is made.
        limit: Keep at most this many of the collection's tokens, the most frequent; all when 0.
    """

    keep: Literal["all", "corpus"] = "all"
    limit: int = 0

    def __post_init__(self) -> None:
        """Refuse limits on nothing."""
        _require(self.limit >= 0, f"student.vocabulary.limit: {self.limit} must not be negative")
        _require(
            self.limit == 0 or self.keep == "corpus",
            "student.vocabulary.limit: only a collection tells which tokens are frequent; set keep: corpus",
        )


@dataclass(frozen=True)
class StudentSpec:
    """The small encoder that is trained.

    Attributes:
        mode: ``asymmetric`` trains a query tower against the frozen document vectors of ``encoder``;
            ``symmetric`` trains both sides.
        towers: In symmetric mode, ``shared`` has one encoder for both sides; ``separate`` starts as two equal ones
            and trains a query and a document encoder in a space that the two share.
        kind: ``transformer`` keeps layers of ``encoder``; ``static`` keeps none: each token has one vector, at
            first ``encoder``'s own of that token alone, and a text is their mean, weighted by how rare they are
            in the collection.
        start: An encoder whose layers a transformer keeps in place of ``encoder``'s, such as a small one where
            ``encoder`` is too large to be cut; its prefixes and length are the student's. A linear map leads into
            ``encoder``'s space, at first the one that fits the training queries best.
        layers: Layers of ``encoder``, or of ``start``, that a transformer keeps, 0-based, increasing.
        pooling: How token states become one vector.
        projection: Add a linear map to the document encoder's width (always added when widths differ).
        dropout: Dropout while training.
        matryoshka: Widths below the full one at which the leading numbers of a vector are a vector too,
            decreasing; the losses are to be trained at each (arXiv 2205.13147).
        vocabulary: Which tokens the student knows; fewer tokens are fewer weights, and no other vectors for
            texts of kept tokens.
    """

    mode: Literal["asymmetric", "symmetric"] = "asymmetric"
    towers: Literal["shared", "separate"] = "shared"
    kind: Literal["transformer", "static"] = "transformer"
    start: EncoderSpec | None = None
    layers: tuple[int, ...] = (0, 2, 5)
    pooling: Literal["mean", "cls"] = "mean"
    projection: bool = False
    dropout: float = 0.0
    matryoshka: tuple[int, ...] = ()
    vocabulary: VocabularySpec = VocabularySpec()

    def __post_init__(self) -> None:
        """Refuse layers and widths that name no student."""
        _require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            f"student.layers: {list(self.layers)} must be increasing layer numbers, the first layer being 0",
        )
        _require(0 <= self.dropout < 1, f"student.dropout: {self.dropout} is not in [0, 1)")
        _require(
            list(self.matryoshka) == sorted(set(self.matryoshka), reverse=True)
            and min(self.matryoshka, default=1) >= 1,
            f"student.matryoshka: {list(self.matryoshka)} must be distinct and decreasing widths, the last at least 1",
        )
        _require(
            self.towers == "shared" or self.mode == "symmetric",
            "student.towers: asymmetric mode has a document encoder already; leave separate out or set mode: symmetric",
        )
        if self.kind == "static":
            _require(self.pooling == "mean", "student.pooling: a static student has no first token to take; use mean")
            _require(not self.projection, "student.projection: a static student's vectors need none; drop it")
            _require(self.dropout == 0, "student.dropout: a static student has no layer that drops; use 0")
            _require(
                self.start is None, "student.start: a static student starts from encoder's view of each token; drop it"
            )

    @property
    def shape(self) -> dict[str, Any]:
        """Return what makes the student what it is, beside the weights that it starts from."""
        return {name: value for name, value in asdict(self).items() if name != "start"}


@dataclass(frozen=True)
class LossSpec:
    """One term of the training loss.

    Attributes:
        name: A loss of ``retrieval_kd.losses.registry``.
        weight: Its factor in the sum.
        teacher: Whose scores it learns: ``scores``, the recipe's teacher, which knows each query's own list;
            ``encoder``, the document encoder itself, which knows every query of the batch against every document;
            ``late_interaction``, the teacher's member of this kind, which scores every query against every document
            as the batch comes.
        options: Its hyper-parameters, checked against the loss's own keyword arguments.
    """

    name: str
    weight: float = 1.0
    teacher: Literal["scores", "encoder", "late_interaction"] = "scores"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse terms that would push the wrong way."""
        _require(self.weight > 0, f"losses: {self.name} has weight {self.weight}; it must be above 0")

    @property
    def compares_documents(self) -> bool:
        """Return whether the term sets documents' similarity to each other against that of query and document."""
        margin = self.name == "adaptive_margin" and self.options.get("target") != "static"
        return margin or self.name == "passage_centric"


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
        gradient_cache: Keep no activations of a batch and run its micro-batches again for their gradients: memory
            then depends on ``micro_tokens`` alone, for one more forward pass.
        activation_checkpointing: Keep the activations of layer borders only and compute the rest again.
        precision: Arithmetic of the encoders' matrix products; weights, scores and losses stay in fp32.
        average: Averages of the weights along the way that are measured and kept in place of the weights:
            ``uniform`` over the steps from ``average_from`` on, ``ema`` with the older ones forgotten.
        average_decay: What ``ema`` keeps of the average at each step.
        average_from: Share of the steps after which averaging begins.
        size_weights: Weight in the loss of each width of the student's vectors, the full one first and then
            ``student.matryoshka`` in order; 1 for each when empty.
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
    gradient_cache: bool = False
    activation_checkpointing: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    average: Literal["none", "ema", "uniform"] = "none"
    average_decay: float = 0.99
    average_from: float = 0.5
    size_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse schedules that cannot run."""
        for name in ("epochs", "batch_queries", "micro_tokens", "evaluations", "checkpoints"):
            _require(getattr(self, name) >= 1, f"schedule.{name}: {getattr(self, name)} must be at least 1")
        _require(self.epoch_queries >= 0, f"schedule.epoch_queries: {self.epoch_queries} must not be negative")
        _require(0 < self.learning_rate < 1, f"schedule.learning_rate: {self.learning_rate} is not in (0, 1)")
        _require(0 <= self.warmup < 1, f"schedule.warmup: {self.warmup} is not in [0, 1)")
        _require(self.weight_decay >= 0, f"schedule.weight_decay: {self.weight_decay} must not be negative")
        _require(self.clip > 0, f"schedule.clip: {self.clip} must be above 0")
        _require(0 < self.average_decay < 1, f"schedule.average_decay: {self.average_decay} is not in (0, 1)")
        _require(
            all(weight >= 0 for weight in self.size_weights) and (not self.size_weights or max(self.size_weights) > 0),
            f"schedule.size_weights: {list(self.size_weights)} must not be negative, and one must be above 0",
        )
        _require(0 <= self.average_from < 1, f"schedule.average_from: {self.average_from} is not in [0, 1)")

    def steps(self, queries: int) -> int:
        """Return how many steps a training on so many queries takes."""
        return self.epochs * math.ceil(min(queries, self.epoch_queries or queries) / self.batch_queries)


@dataclass(frozen=True)
class SelectionSpec:
    """Which of a stage's candidate lists it trains on.

    Attributes:
        kind: ``all``, or ``disagreement``: the lists whose best positive the teacher ranks well and the student, as
            the stage starts, does not (PROD's data-progressive stage, arXiv 2209.13335).
        teacher_rank: Worst rank (1-based) of that positive by the teacher.
        student_ranks: First and last rank (inclusive) of it by the student.
    """

    kind: Literal["all", "disagreement"] = "all"
    teacher_rank: int = 1
    student_ranks: tuple[int, int] = (2, 15)

    def __post_init__(self) -> None:
        """Refuse ranks that no list has."""
        first, last = self.student_ranks
        _require(self.teacher_rank >= 1, f"selection.teacher_rank: {self.teacher_rank} must be at least 1")
        _require(1 <= first <= last, f"selection.student_ranks: [{first}, {last}] must start at 1 or later, in order")


@dataclass(frozen=True)
class ExtraTextsSpec:
    """Texts beside the training queries, which embedding losses read too; no judgement of theirs is used.

    Attributes:
        batch: Texts beside the queries of each step, encoded as queries; none when 0.
        collections: Collections whose train queries are such texts.
        phrases: Take phrases of the documents of these collections and of the recipe's own, as long as queries are.
    """

    batch: int = 0
    collections: tuple[str, ...] = ()
    phrases: bool = True

    def __post_init__(self) -> None:
        """Refuse a source that would be ignored, and batches without a source."""
        _require(self.batch >= 0, f"extra_texts.batch: {self.batch} must not be negative")
        _require(self.batch > 0 or not self.collections, "extra_texts.batch: 0 reads no collection; set it above 0")
        _require(
            self.batch == 0 or self.phrases or bool(self.collections),
            "extra_texts: neither collections nor phrases; name a source or set batch to 0",
        )


@dataclass(frozen=True)
class JointSpec:
    """A teacher that learns along with the student (RocketQAv2, arXiv 2110.07367).

    The teacher's cross-encoder scores each batch as it is, with gradients; both are checkpointed, and the trained
    cross-encoder is saved in ``reranker`` beside the student.

    Attributes:
        learning_rate: Its peak rate; the schedule's shape is the student's.
    """

    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse rates that cannot train."""
        _require(0 < self.learning_rate < 1, f"joint.learning_rate: {self.learning_rate} is not in (0, 1)")


@dataclass(frozen=True)
class StageSpec:
    """One stage of training; it starts from the best weights of the stage before it.

    What a stage does not name it has from the recipe's own keys of the same names: ``candidates`` and ``schedule``
    key by key, the others as a whole.

    Attributes:
        name: Its name, of letters, digits, ``_`` and ``-``.
        candidates: Its lists.
        teacher: Whose scores it learns.
        losses: The terms of its loss.
        schedule: How long and how fast.
        selection: Which lists it trains on.
        extra_texts: What embedding losses read besides.
        joint: Train the teacher too.
        frozen_documents: In symmetric mode, learn against the large encoder's vectors of the documents, as asymmetric
            mode does: a step then costs the queries alone. A later stage trains on both sides.
    """

    name: str
    candidates: CandidatesSpec = CandidatesSpec()
    teacher: TeacherSpec = TeacherSpec()
    losses: tuple[LossSpec, ...] = ()
    schedule: ScheduleSpec = ScheduleSpec()
    selection: SelectionSpec = SelectionSpec()
    extra_texts: ExtraTextsSpec = ExtraTextsSpec()
    joint: JointSpec | None = None
    frozen_documents: bool = False

    def __post_init__(self) -> None:
        """Refuse stages that could not be named on the command line, or would not train what they name."""
        _require(
            re.fullmatch(r"[A-Za-z][\w-]*", self.name) is not None,
            f"name: {self.name!r} must be letters, digits, _ and -, a letter first",
        )
        _require(len(self.losses) > 0, "losses is empty; name at least one")
        live = [loss.name for loss in self.losses if loss.teacher == "late_interaction"]
        _require(
            not live or sum(member.kind == "late_interaction" for member in self.teacher.ensemble) == 1,
            f"losses: {', '.join(live)} learn from a late-interaction model; name one in teacher.members",
        )
        if self.joint is not None:
            _require(
                [member.kind for member in self.teacher.ensemble] == ["cross_encoder"],
                "joint: the teacher must be one cross-encoder; set teacher.encoder_weight to 0",
            )
            teachers = [loss.teacher for loss in self.losses if loss.name == "joint_listwise"]
            _require(bool(teachers), "joint: no loss teaches the teacher; name joint_listwise")
            _require(
                set(teachers) <= {"scores"},
                "joint: joint_listwise teaches the cross-encoder whose scores it reads; set its teacher to scores",
            )


@dataclass(frozen=True)
class ExportSpec:
    """The precision of the exported query encoder, and the gates that it has to pass.

    Attributes:
        precision: ``fp32``; ``int8-dynamic`` (queries one by one) and ``int8-static`` (ranges of activations
            measured on training queries) are for queries alone; ``fp16`` is for a GPU.
        max_abs_error: At fp32, largest difference from torch of any vector entry.
        min_overlap: At fp32, least mean share of torch's documents in the top ten.
        max_ndcg_change: At fp32, largest change of nDCG@10, either way.
        max_ndcg_loss: Below fp32, largest share of nDCG@10 on dev that may be lost.
    """

    precision: Literal["fp32", "int8-dynamic", "int8-static", "fp16"] = "fp32"
    max_abs_error: float = 1e-5
    min_overlap: float = 0.999
    max_ndcg_change: float = 0.001
    max_ndcg_loss: float = 0.005

    def __post_init__(self) -> None:
        """Refuse gates that nothing or everything passes."""
        _require(0 < self.max_abs_error < 1, f"export.max_abs_error: {self.max_abs_error} is not in (0, 1)")
        _require(0 <= self.min_overlap <= 1, f"export.min_overlap: {self.min_overlap} is not in [0, 1]")
        _require(0 <= self.max_ndcg_change < 1, f"export.max_ndcg_change: {self.max_ndcg_change} is not in [0, 1)")
        _require(0 <= self.max_ndcg_loss < 1, f"export.max_ndcg_loss: {self.max_ndcg_loss} is not in [0, 1)")


IndexKind = Literal[
    "auto",
    "exact",
    "fastscan",
    "ivf",
    "ivf-pq",
    "ivf-rabitq",
    "hnsw",
    "hnsw-sq8",
    "gpu-exact",
    "gpu-ivf-pq",
    "gpu-cagra",
]


@dataclass(frozen=True)
class IndexSpec:
    """How the corpus is searched; a number that is 0 is chosen by the size of the corpus.

    Attributes:
        kind: ``exact`` compares with every document; the others propose documents that are then scored
            exactly: ``fastscan`` by codes, ``ivf*`` by lists, ``hnsw*`` by a graph, ``gpu-*`` on a GPU.
            ``auto`` builds some on a sample, measures them with held-out queries and takes the fastest that will do.
        storage: How vectors are kept: ``float32``, ``float16``, or ``sq8``, one byte a number.
        dimension: Leading numbers of each vector that are kept, one of the encoder's Matryoshka sizes; 0 keeps all.
        neighbours: Links of each node of a graph (HNSW's M).
        ef_construction: Candidates looked at while a node is linked.
        ef_search: Candidates looked at while a graph is searched.
        lists: Lists of ``ivf*``.
        probes: Lists opened while searching.
        oversample: Candidates scored for each document wanted, by ``fastscan`` and ``ivf*``.
        target_recall: Share of the exact ten best that is to be found; where held-out queries are given,
            ``ef_search``, ``probes`` and ``oversample`` are set to the least that reaches it.
        memory_mib: What the index's files may take, for ``auto``; 0 is no limit.
    """

    kind: IndexKind = "exact"
    storage: Literal["float32", "float16", "sq8"] = "float32"
    dimension: int = 0
    neighbours: int = 32
    ef_construction: int = 200
    ef_search: int = 128
    lists: int = 0
    probes: int = 0
    oversample: int = 10
    target_recall: float = 0.99
    memory_mib: int = 0

    def __post_init__(self) -> None:
        """Refuse indexes that cannot be built."""
        _require(0 < self.target_recall <= 1, f"index.target_recall: {self.target_recall} is not in (0, 1]")
        _require(2 <= self.neighbours <= 512, f"index.neighbours: {self.neighbours} is not in 2..512")
        for name in ("ef_construction", "ef_search", "oversample"):
            _require(getattr(self, name) >= 1, f"index.{name}: {getattr(self, name)} must be at least 1")
        for name in ("dimension", "lists", "probes", "memory_mib"):
            _require(getattr(self, name) >= 0, f"index.{name}: {getattr(self, name)} must not be negative")


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
        """Refuse what measures nothing, or less than a measure's name says."""
        _require(self.depth >= 1, f"evaluation.depth: {self.depth} must be at least 1")
        _require(
            1 <= self.rerank_depth <= self.depth,
            f"evaluation.rerank_depth: {self.rerank_depth} must lie in 1..depth ({self.depth})",
        )
        _require(len(self.measures) > 0, "evaluation.measures: empty; name at least one, such as nDCG@10")
        for measure in self.measures:
            cutoff = measure.rpartition("@")[2]
            _require(
                not (cutoff.isdecimal() and int(cutoff) > self.depth),
                f"evaluation.measures: {measure} needs a depth of at least {cutoff}, evaluation.depth is {self.depth}",
            )


@dataclass(frozen=True)
class Recipe:
    """A whole distillation.

    Attributes:
        name: The recipe's name.
        about: One sentence for ``rkd recipes``.
        source: The paper or thread it descends from.
        follows: Where paper and released code differ, which one this follows.
        needs: What it reads beside the collection's texts: ``encoder``, vectors and scores of the large encoder alone;
            ``judgements``, which document answers which query; ``scores``, a teacher's of each candidate;
            ``preferences``, a pairwise teacher's between candidates.
        published: The figure of the source that says what to hope for; on its own data, with its own models.
        seed: Seed of every draw.
        stages: The stages of training, in order; the recipe's own ``candidates``, ``teacher``, ``losses``,
            ``schedule``, ``selection``, ``extra_texts``, ``joint`` and ``frozen_documents`` are what a stage does not
            name, and the only stage where there are none. A teacher is fine-tuned on the recipe's own candidates,
            whichever names it.
    """

    name: str
    about: str
    source: str
    follows: str = ""
    published: str = ""
    needs: Needs = "scores"
    seed: int = 13
    collection: CollectionSpec = CollectionSpec()
    encoder: EncoderSpec = EncoderSpec()
    candidates: CandidatesSpec = CandidatesSpec()
    teacher: TeacherSpec = TeacherSpec()
    student: StudentSpec = StudentSpec()
    losses: tuple[LossSpec, ...] = ()
    schedule: ScheduleSpec = ScheduleSpec()
    selection: SelectionSpec = SelectionSpec()
    extra_texts: ExtraTextsSpec = ExtraTextsSpec()
    joint: JointSpec | None = None
    frozen_documents: bool = False
    stages: tuple[StageSpec, ...] = ()
    export: ExportSpec = ExportSpec()
    index: IndexSpec = IndexSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    def __post_init__(self) -> None:
        """Refuse a seed no generator takes, a recipe that would train nothing, and a stage not there when needed."""
        # What both NumPy's and PyTorch's generators take.
        _require(0 <= self.seed < 1 << 63, f"seed: {self.seed} is not in 0..{(1 << 63) - 1}")
        if not self.stages:
            _require(len(self.losses) > 0, f"recipe {self.name}: losses is empty; name at least one")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"stages: {names} has two of one name; give each its own")
        _require_done("", self.candidates, (), names)
        for i, stage in enumerate(self.stages):
            _require_done(f"stage {stage.name!r}: ", stage.candidates, names[:i], names)
        if any(stage.frozen_documents for stage in self.training):
            _require(
                (self.student.mode, self.student.towers) == ("symmetric", "shared"),
                "frozen_documents: only a symmetric student with shared towers has documents to freeze; leave it out",
            )
        if self.student.start is not None:
            _require(
                not any(loss.name == "layer_alignment" for stage in self.training for loss in stage.losses),
                "student.start: layer_alignment compares the student's layers with those of encoder that they were; "
                "drop one of the two",
            )
        if self.student.towers == "separate":
            twins = [loss.name for stage in self.training for loss in stage.losses if loss.compares_documents]
            _require(
                not twins,
                f"student.towers: {', '.join(twins)} compares documents by the queries' encoder; set it to shared",
            )

    @property
    def training(self) -> tuple[StageSpec, ...]:
        """Return the stages of training: ``stages``, or the one that the recipe's own keys describe."""
        if self.stages:
            return self.stages
        shared = {part.name for part in fields(StageSpec)} - {"name"}
        return (StageSpec("train", **{name: getattr(self, name) for name in shared}),)


def _require_done(where: str, candidates: CandidatesSpec, done: Sequence[str], names: Sequence[str]) -> None:
    """Refuse sources that are the result of no stage, or of one that is not ``done`` when they rank."""
    for source in candidates.sources:
        if source.stage and source.stage not in names:
            raise RecipeError(
                f"{where}candidates.sources: no stage {source.stage!r}{did_you_mean(source.stage, names)}"
            )
        _require(
            not source.stage or source.stage in done,
            f"{where}candidates.sources: stage {source.stage!r} is not done by then; name an earlier one",
        )
