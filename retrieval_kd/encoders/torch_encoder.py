"""The encoder that trains: a transformer or a token table, pooling, an optional projection, unit length."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from retrieval_kd.artifacts import atomic_write
from retrieval_kd.batching import length_sorted_batches, pad
from retrieval_kd.encoders.base import TOKENIZER, TextTokenizer, Vectors, load_tokenizer
from retrieval_kd.encoders.card import CARD, EncoderCard, Pooling, Role, Side
from retrieval_kd.encoders.layout import PROJECTION, Layout, read_layout, write_layout
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.static import ARCHITECTURE, StaticBody, read_static, without_special_tokens
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.recipes.schema import EncoderSpec

WEIGHTS = "model.safetensors"
BATCH_TOKENS = 1024
"""Padded tokens in one forward pass: activations of larger batches leave the CPU's caches."""

_TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")


class TorchEncoder(nn.Module):
    """Turns token ids into vectors, with gradients.

    Attributes:
        body: The transformers model, without the pooler of BERT, which no vector here passes through; or
            the token table of a static encoder.
        projection: Linear map after pooling, or None.
        tokenizer: Texts to token ids, by the card's prefix and length.
        tokenizer_files: Name to bytes of the files that a saved copy carries.
    """

    def __init__(
        self, body: nn.Module, projection: nn.Linear | None, tokenizer_files: Mapping[str, bytes], card: EncoderCard
    ) -> None:
        """Assemble an encoder; the card's count and hashes are made true by :meth:`refresh_card`."""
        super().__init__()
        self.body = body
        self.projection = projection
        self.tokenizer_files = dict(tokenizer_files)
        self.tokenizer = TextTokenizer(Tokenizer.from_buffer(self.tokenizer_files[TOKENIZER]), card)
        self._card = card

    @property
    def card(self) -> EncoderCard:
        """Return the identity; after the weights have changed, :meth:`refresh_card` first."""
        return self._card

    @property
    def device(self) -> torch.device:
        """Return where the weights lie."""
        return next(self.parameters()).device

    @classmethod
    def load(cls, spec: EncoderSpec) -> TorchEncoder:
        """Read a published model as a symmetric encoder of its own space.

        Raises:
            RecipeError: there is no such model, or it has fewer positions than ``spec.max_length``.
            ArtifactError: the folder is not a supported sentence-transformers model; names the file.
        """
        folder = resolve_model(spec.model)
        layout = read_layout(folder)
        body, projection = _read_weights(layout)
        positions = _positions(body)
        if spec.max_length > positions:
            raise RecipeError(
                f"encoder.max_length: {spec.max_length} is more than the {positions} positions of {spec.model!r}"
            )
        files = _read_tokenizer(layout)
        architecture, layers = _family(body)
        card = EncoderCard(
            name=Path(spec.model).name,
            architecture=architecture,
            layers=layers,
            parameters=0,
            pooling=layout.pooling,
            normalize=layout.normalize,
            dimensions=(projection.out_features if projection else width_of(body),),
            max_length=spec.max_length,
            query_prefix=spec.query_prefix,
            document_prefix=spec.document_prefix,
            similarity=layout.similarity,
            tokenizer_hash="",
            weights_hash="",
        )
        encoder = cls(body, projection, files, card)
        encoder.refresh_card()
        return encoder.eval()

    @classmethod
    def open(cls, folder: Path) -> TorchEncoder:
        """Read an encoder that :meth:`save` wrote.

        Raises:
            ArtifactError: no card, or weights, tokenizer or layout are not those the card describes;
                names the file.
        """
        card = EncoderCard.load(folder)
        layout = read_layout(folder)
        if (layout.pooling, layout.normalize, layout.similarity) != (card.pooling, card.normalize, card.similarity):
            raise ArtifactError(f"{folder}: its modules are not those of {CARD}; save the encoder again")
        files = _read_tokenizer(layout)
        if hashlib.sha256(files[TOKENIZER]).hexdigest() != card.tokenizer_hash:
            raise ArtifactError(f"{folder / TOKENIZER}: not the tokenizer of {CARD}; save the encoder again")
        body, projection = _read_weights(layout)
        encoder = cls(body, projection, files, card)
        if encoder._weights_hash() != card.weights_hash:
            raise ArtifactError(f"{folder / WEIGHTS}: not the weights of {CARD}; save the encoder again")
        return encoder.eval()

    def save(self, folder: Path) -> None:
        """Write the encoder as a sentence-transformers folder with a card, which comes last.

        ``SentenceTransformer(folder).encode`` gives the same vectors. The card is refreshed first.
        """
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        # Without its card the folder does not open: a save that is cut short leaves nothing to mistake.
        (folder / CARD).unlink(missing_ok=True)
        card = self.refresh_card()
        static = isinstance(self.body, StaticBody)
        files = {**self.tokenizer_files, WEIGHTS: save(_contiguous(self.body), metadata={"format": "pt"})}
        if not static:
            config = cast("Any", self.body.config)
            config.architectures = [type(self.body).__name__]
            files["config.json"] = config.to_json_string().encode()
        if self.projection is not None:
            linear = {f"linear.{name}": tensor for name, tensor in _contiguous(self.projection).items()}
            files[f"{PROJECTION}/{WEIGHTS}"] = save(linear, metadata={"format": "pt"})
        for name, content in files.items():
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
        # Without this option sentence-transformers would draw a pooler at random and report it as missing.
        poolable = "add_pooling_layer" in inspect.signature(type(self.body)).parameters
        write_layout(
            folder,
            card,
            width=width_of(self.body),
            static=static,
            projected=self.projection is not None,
            body_options={"add_pooling_layer": False} if poolable else {},
        )
        card.save(folder)

    def refresh_card(self) -> EncoderCard:
        """Bring the card's parameter count and hashes up to the present weights and tokenizer, and return it."""
        self._card = replace(
            self._card,
            tokenizer_hash=hashlib.sha256(self.tokenizer_files[TOKENIZER]).hexdigest(),
            parameters=sum(tensor.numel() for tensor in self.state_dict().values()),
            weights_hash=self._weights_hash(),
        )
        return self._card

    def move_to_space_of(self, other: EncoderCard, role: Role) -> None:
        """Say that the encoder has been trained into another's space, and which side it encodes there."""
        self._card = self._card.in_space_of(other, role)
        self.tokenizer = TextTokenizer(Tokenizer.from_buffer(self.tokenizer_files[TOKENIZER]), self._card)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Turn token ids into vectors.

        Args:
            input_ids: int64 ``[B, L]``.
            attention_mask: int64 ``[B, L]``, 1 on tokens, 0 on padding.

        Returns:
            ``[B, d]``, of unit length if the card says so.
        """
        if isinstance(self.body, StaticBody):
            states = self.body(input_ids)
        else:
            states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self._vectors(states, attention_mask)

    def with_layers(self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Turn token ids into vectors, and each of the chosen layers' states into one vector too.

        Args:
            input_ids: int64 ``[B, L]``.
            attention_mask: int64 ``[B, L]``, 1 on tokens, 0 on padding.
            layers: Layer numbers, 0-based.

        Returns:
            The vectors of :meth:`forward`, ``[B, d]``, and ``[B, len(layers), width]``: the states after each layer,
            pooled and scaled to unit length as the vectors are, but not projected.

        Raises:
            RecipeError: a layer that the body does not have.
        """
        if isinstance(self.body, StaticBody):
            raise RecipeError(f"{self._card.name!r} is a table of token vectors and has no layers")
        output = self.body(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = output.hidden_states[1:]
        if not 0 <= min(layers) <= max(layers) < len(states):
            raise RecipeError(f"layers {list(layers)}: {self._card.name!r} has layers 0 to {len(states) - 1}")
        pooled = [_pool(states[number], attention_mask, self._card.pooling) for number in layers]
        if self._card.normalize:
            pooled = [_unit(vectors) for vectors in pooled]
        return self._vectors(output.last_hidden_state, attention_mask), torch.stack(pooled, dim=1)

    def _vectors(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        vectors = _pool(states, attention_mask, self._card.pooling)
        if self.projection is not None:
            vectors = self.projection(vectors)
        return _unit(vectors) if self._card.normalize else vectors

    def encode(self, texts: Sequence[str], side: Side) -> Vectors:
        """Return float32 ``[len(texts), d]`` without dropout or gradients, rows in the order of ``texts``."""
        rows = self.tokenizer(texts, side)
        vectors = np.empty((len(rows), self._card.dimension), dtype=np.float32)
        with evaluating(self), torch.inference_mode():
            for batch in length_sorted_batches([len(row) for row in rows], BATCH_TOKENS):
                ids, mask = pad([rows[i] for i in batch])
                output = self(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device))
                vectors[batch] = output.float().cpu().numpy()
        return vectors

    def _weights_hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            values = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
            digest.update(values.data)
        return digest.hexdigest()


def width_of(body: nn.Module) -> int:
    """Return the width of a body's token states."""
    if isinstance(body, StaticBody):
        return body.width
    width: int = cast("Any", body.config).hidden_size
    return width


def empty_linear(width: int, dimension: int) -> nn.Linear:
    """Return a linear map whose values are to be set; nothing is drawn from torch's global generator."""
    return nn.Linear(width, dimension, device="meta").to_empty(device="cpu")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and reports off standard error while the block runs."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# Pooling and length are matrix products, not reductions: onnxruntime sums a lone row in another order than
# the same row in a batch, and then a text's vector would depend on its company.
def _pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "cls":
        return states[:, 0]
    counts = mask.to(states.dtype)
    weights = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights.unsqueeze(1) @ states).squeeze(1)


def _unit(vectors: Tensor) -> Tensor:
    squares = (vectors.unsqueeze(1) @ vectors.unsqueeze(2)).squeeze(2)
    return vectors / squares.clamp(min=1e-24).sqrt()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off while the block runs."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _family(body: nn.Module) -> tuple[str, int]:
    """Return a body's architecture and its number of layers."""
    if isinstance(body, StaticBody):
        return ARCHITECTURE, 0
    config = cast("Any", body.config)
    return config.model_type, config.num_hidden_layers


def _read_weights(layout: Layout) -> tuple[nn.Module, nn.Linear | None]:
    body = read_static(layout.body / WEIGHTS) if layout.static else read_body(layout.body)
    return body, None if layout.projection is None else _read_projection(layout.projection)


def read_body(folder: Path) -> nn.Module:
    """Read a transformer without its pooler, whole and in float32.

    Raises:
        ArtifactError: it cannot be read, or a weight is missing; names the folder.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        # A pooler that the folder lacks is drawn from the global generator, whose state belongs to the caller.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            body, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: cannot read the transformer ({reason}); save the model again") from None
    # What is missing, transformers draws at random and only reports.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ArtifactError(f"{folder / WEIGHTS}: weight {missing[0]!r} is missing; save the model again")
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return cast("nn.Module", body)


def _read_projection(folder: Path) -> nn.Linear:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
        weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot read the projection ({error}); save the model again") from None
    projection = empty_linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return projection


def _read_tokenizer(layout: Layout) -> dict[str, bytes]:
    folder = layout.body
    load_tokenizer(folder)  # says what is wrong with the file, if anything
    if layout.static:
        return {TOKENIZER: without_special_tokens((folder / TOKENIZER).read_bytes())}
    return {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}


def _positions(body: nn.Module) -> float:
    """Return the longest input a body can take; RoBERTa's family numbers positions after its padding id."""
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return math.inf
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
