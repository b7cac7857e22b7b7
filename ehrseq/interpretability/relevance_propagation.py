"""Relevance propagation: each token's part of the log-odds, by one backward pass through a locally rewritten network.

    R_i = sum_d x_(i,d) dF'/dx_(i,d)        at the output of the embedding layer,

where F' is the model with every layer as [J(x)]_const x (relevance_rules.py has the rules and their sources). F' has
the model's own output. With biases off sum_i R_i is the log-odds, and so is the same sum at the output of every layer;
what biases add is told as the remainder. For Mamba this is MambaLRP (arXiv:2406.07592).

It says what the model made of a token where it stood, its context held as it is: not what the risk would be without it
(occlusion), nor when it rose (prefix deltas). A task token and marks of visits have relevance as all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ehrseq.interpretability.explanation import Attribution, Explanation
from ehrseq.interpretability.relevance_hymate import hymate_network
from ehrseq.interpretability.relevance_mamba import ehrmamba_network
from ehrseq.interpretability.relevance_network import Relevance, RewrittenNetwork, propagate
from ehrseq.interpretability.relevance_transformers import bigbird_network, cehrbert_network

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

NETWORKS: dict[str, Callable[[Any, Mapping[str, Tensor]], RewrittenNetwork]] = {
    "ehrmamba": ehrmamba_network,
    "hymate": hymate_network,
    "cehrbert": cehrbert_network,
    "ehr_bigbird": bigbird_network,
}
"""Families that have relevance, by `config.model_type`. A bi-LSTM has none: its gates would need rules of their own."""


def relevance(question: Question, displays: Mapping[str, str] | None = None) -> Explanation:
    """Explain a risk by relevance propagation: what each token (triplet) adds to its log-odds, in one backward pass.

    The values start from 0, and from what training's sampling shifted the log-odds by: relevance compares with no other
    record. Of HyMaTE they start from what reaches the log-odds past the triplets' embeddings (static values, summaries
    of variables), told one by one in `settings["beside"]`. The remainder is what the network's biases add. A model in
    half precision is read in float32; how its own rounding differs is in the remainder as well.

    Args:
        question: What is asked.
        displays: Code -> description.

    Raises:
        ValueError: As in `token_relevance`.
    """
    model = question.checkpoint.model
    check_has_rules(model)
    name = "relevance"
    if not question.has_answer:
        return Explanation.of(question, None, method=name, baseline_name="")
    found = token_relevance(model, question.inputs)
    beside = {part: float(numbers[0]) for part, numbers in found.parts.items()}
    shift = float(question.log_odds_of(found.log_odds.new_zeros(1, 2)))
    if is_narrow(model):
        with torch.no_grad():
            log_odds = float(question.log_odds()[0])
    else:
        log_odds = shift + float(found.log_odds[0])
    attribution = Attribution(
        values=found.tokens[0].cpu().numpy().astype(np.float64),
        log_odds=log_odds,
        baseline=shift + sum(beside.values()),
    )
    return Explanation.of(
        question,
        attribution,
        method=name,
        baseline_name="the model without its triplets' embeddings" if beside else "the model without its tokens",
        settings={"beside": beside} if beside else {},
        displays=displays,
    )


def token_relevance(model: Any, inputs: Mapping[str, Tensor]) -> Relevance:
    """Relevance of every token (or triplet) of a batch, in one backward pass.

    Args:
        model: A risk classifier of a family in `NETWORKS`; float64, float32, or half precision, which is computed by a
            copy in float32. Dropout is off, whatever its mode.
        inputs: Channels as its `forward` takes them (labels are ignored): padded on either side, or packed.

    Returns:
        Relevance in log-odds, logit 1 - logit 0 as the model gives them (training's shift is still in them).

    Raises:
        ValueError: A family without relevance, another number of classes than two, or inputs that the model refuses.
    """
    check_has_rules(model)
    check_two_classes("relevance", model)
    model = at_least_single(model)
    with torch.inference_mode(False), without_dropout(model):
        return propagate(NETWORKS[model.config.model_type](model, inputs))


def check_has_rules(model: Any) -> None:
    """Raise a ValueError unless relevance can be propagated through a model of this family."""
    family = getattr(model.config, "model_type", None)
    if family not in NETWORKS:
        raise ValueError(
            f"relevance: {family!r} has no rules of relevance propagation, which {', '.join(NETWORKS)} have: take "
            "prefix deltas, occlusion or integrated gradients."
        )


def check_two_classes(method: str, model: Any) -> None:
    """Raise a ValueError unless the model has the two classes that log-odds are of."""
    if int(model.config.num_labels or 2) != 2:
        raise ValueError(
            f"{method}: the model has {model.config.num_labels} classes, expected 2: what is explained is the log-odds "
            "of class 1."
        )


def is_narrow(model: Any) -> bool:
    """Whether any weights are in half precision."""
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def at_least_single(model: Any) -> Any:
    """The model, or a copy in float32 where weights are narrower."""
    return copy.deepcopy(model).float() if is_narrow(model) else model


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "NETWORKS",
    "at_least_single",
    "check_has_rules",
    "check_two_classes",
    "is_narrow",
    "relevance",
    "token_relevance",
    "without_dropout",
]
