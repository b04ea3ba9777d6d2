"""Every loss by name, what it needs, where it comes from; and binding a recipe's options to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from retrieval_kd.errors import DataError, RecipeError, did_you_mean
from retrieval_kd.losses.bank import MemoryBank, contrastive_kd
from retrieval_kd.losses.checks import check_options, option_types
from retrieval_kd.losses.contrastive import info_nce, soft_nearest_neighbour, tct
from retrieval_kd.losses.documents import adaptive_margin, passage_centric
from retrieval_kd.losses.embedding import embedding_regression
from retrieval_kd.losses.inputs import Inputs
from retrieval_kd.losses.joint import joint_listwise
from retrieval_kd.losses.lambdarank import lambdarank
from retrieval_kd.losses.listwise import cross_entropy, listwise_kl
from retrieval_kd.losses.margins import in_batch_margin_mse, margin_mse
from retrieval_kd.losses.pairwise import pair_distill, ranknet
from retrieval_kd.losses.plackett_luce import list_mle, partial_plackett_luce, plackett_luce
from retrieval_kd.losses.pointwise import pointwise_mse
from retrieval_kd.losses.progressive import learning_without_forgetting, prod
from retrieval_kd.losses.relational import relational_angle, relational_distance
from retrieval_kd.losses.scaled import denoised_info_nce, scaled_listwise_kl
from retrieval_kd.losses.stacks import layer_alignment, self_distillation
from retrieval_kd.losses.state import LossState
from retrieval_kd.losses.taid import TaidState, taid

Kind = Literal["scores", "pairs", "in_batch", "embeddings", "stacks"]


@dataclass(frozen=True)
class LossInfo:
    """A loss and what the training loop must give it.

    Attributes:
        name: Its name in recipes.
        function: Pure function of the tensors in ``needs`` and keyword-only options, to a scalar.
        kind: Which dataclass of ``retrieval_kd.losses.inputs`` it reads.
        needs: The fields it takes, in the order of its positional parameters; those with a default only where wanted.
        source: Paper or code it follows.
        state: Makes what the loss remembers between steps; None for most.
        any_width: Whether student and teacher vectors may differ in width; of kind ``embeddings`` only.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    needs: tuple[str, ...]
    source: str
    state: Callable[..., LossState] | None = None
    any_width: bool = False

    def arguments(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return the tensors the function takes, in order.

        Raises:
            DataError: The batch does not provide one of them.
        """
        found = tuple(getattr(inputs, need, None) for need in self.needs)
        for need, tensor in zip(self.needs, found, strict=True):
            if tensor is None:
                raise DataError(f"losses: {self.name} needs {need!r} ({self.kind}), which this batch does not provide")
        return found  # type: ignore[return-value]


def _info(
    kind: Kind,
    function: Callable[..., Tensor],
    source: str,
    state: Callable[..., LossState] | None = None,
    any_width: bool = False,
) -> LossInfo:
    parameters = inspect.signature(function).parameters.values()
    needs = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)
    return LossInfo(function.__name__, function, kind, needs, source, state, any_width)


LOSSES: Mapping[str, LossInfo] = {
    info.name: info
    for info in (
        _info("scores", margin_mse, "Margin-MSE, arXiv 2010.02666"),
        _info("scores", listwise_kl, "Hinton et al. 2015; PairDistill, DiSCo, Translate-Distill, DKRR"),
        _info("scores", cross_entropy, "softmax cross-entropy of the positive in its list"),
        _info("scores", ranknet, "Burges et al. 2005; Instruction Distillation, arXiv 2311.01555"),
        _info("scores", lambdarank, "Burges et al. 2006; LambdaLoss, Wang et al. 2018"),
        _info("scores", list_mle, "ListMLE, Xia et al. 2008"),
        _info("scores", plackett_luce, "PLD, Plackett-Luce distillation, 2025"),
        _info("scores", pointwise_mse, "DSE, arXiv 1908.05161"),
        _info("scores", scaled_listwise_kl, "Tamber et al., arXiv 2502.19712; CADET, arXiv 2505.19274"),
        _info("scores", joint_listwise, "RocketQAv2, arXiv 2110.07367"),
        _info("scores", prod, "PROD, arXiv 2209.13335"),
        _info("scores", learning_without_forgetting, "PROD, arXiv 2209.13335; Li and Hoiem 2016"),
        _info("scores", taid, "TAID, arXiv 2501.16937", TaidState),
        _info("pairs", pair_distill, "PairDistill, Huang and Chen 2024"),
        _info("in_batch", info_nce, "InfoNCE, arXiv 1807.03748"),
        _info("in_batch", denoised_info_nce, "Tamber et al., arXiv 2502.19712; CADET, arXiv 2505.19274"),
        _info("in_batch", soft_nearest_neighbour, "Syntriever stage 1, Kim and Baek 2025"),
        _info("in_batch", partial_plackett_luce, "Syntriever stage 2, Kim and Baek 2025"),
        _info("in_batch", in_batch_margin_mse, "TAS-B, arXiv 2104.06967"),
        _info("in_batch", tct, "TCT-ColBERT, arXiv 2010.11386"),
        _info("in_batch", passage_centric, "PAIR, arXiv 2108.06027"),
        _info("in_batch", adaptive_margin, "Adaptive relevance margins, arXiv 2407.21515"),
        _info("embeddings", embedding_regression, "LEAF, arXiv 2509.12539"),
        _info("embeddings", contrastive_kd, "DistilCSE, arXiv 2112.05638", MemoryBank),
        _info("embeddings", relational_distance, "Relational KD, arXiv 1904.05068", any_width=True),
        _info("embeddings", relational_angle, "Relational KD, arXiv 1904.05068", any_width=True),
        _info("stacks", layer_alignment, "LEAD, arXiv 2212.05225"),
        _info("stacks", self_distillation, "BGE-M3, arXiv 2402.03216"),
    )
}


def _moved(info: LossInfo) -> LossInfo:
    """Return the entry of TAID around a loss that takes a blend after all else."""
    return replace(info, name="taid", needs=(*info.needs, "blend"), source=LOSSES["taid"].source, state=TaidState)


_TAID_OF: Mapping[str, LossInfo] = {
    "listwise_kl": LOSSES["taid"],
    **{name: _moved(LOSSES[name]) for name in ("prod", "scaled_listwise_kl", "tct")},
}


def loss_info(name: str, options: Mapping[str, Any]) -> LossInfo:
    """Return a loss's entry; of ``taid``, that around the loss that ``of`` names.

    Raises:
        RecipeError: No such loss, or none that ``taid`` can move the target of.
    """
    if name not in LOSSES:
        raise RecipeError(f"losses: no loss {name!r}{did_you_mean(name, LOSSES)}")
    if name != "taid" or "of" not in options:
        return LOSSES[name]
    of = str(options["of"])
    if of not in _TAID_OF:
        raise RecipeError(f"losses: taid cannot be of {of!r}; name one of {', '.join(_TAID_OF)}")
    return _TAID_OF[of]


def bind(name: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return the named loss with a recipe's options fixed; call it with ``info.arguments(inputs)``.

    Raises:
        RecipeError: No such loss, no such option, or a value the option does not take.
    """
    info = _checked(name, options)
    return functools.partial(info.function, **_belonging(info.function, options))


def bind_state(name: str, options: Mapping[str, Any]) -> LossState | None:
    """Return a fresh state for the named loss, from the same options; None for a loss that remembers nothing.

    Raises:
        RecipeError: As ``bind``.
    """
    info = _checked(name, options)
    if info.state is None:
        return None
    try:
        return info.state(**_belonging(info.state, options))
    except DataError as error:
        raise RecipeError(f"{error} (loss {name})") from None


def _belonging(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option in option_types(function)}


def _checked(name: str, options: Mapping[str, Any]) -> LossInfo:
    info = loss_info(name, options)
    takers = [info.function] + ([info.state] if info.state else [])
    known = {option for taker in takers for option in option_types(taker)} | ({"of"} if name == "taid" else set())
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) if known else "; it takes none"
            raise RecipeError(f"losses: {name} has no option {option!r}{hint}")
    try:
        for taker in takers:
            check_options(taker, **options)
    except DataError as error:
        raise RecipeError(f"{error} (loss {name})") from None
    return info
