"""A model as relevance propagation sees it: embedded tokens, layers, a head that gives log-odds; and the pass itself.

Glossary: b batch, l length (tokens or triplets), S packed sequences of a row, d width, K layers. "Rows" are the
patients of a batch: [b], or [b, S] for packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewrittenNetwork:
    """A classifier by the rules of relevance_rules.py.

    Attributes:
        embedded: x^0, what the embedding layer gives to the first layer, [..., T, d] in the layout of the family.
        layers: x^(k-1) -> x^k, the residual stream before and after each layer.
        head: x^K -> log-odds of class 1 (logit 1 - logit 0), [b] or [b, S].
        restore: Numbers of tokens in the layout of the family [..., T] -> [b, l], 0 at padding (of Mamba's families
            also [..., T, more] -> [b, l, more]).
        ends: The last token of each sequence, bool [..., T].
        segment_ids: Of packed rows, [b, l], 0 = padding; None without packing.
        parts: What reaches the log-odds past the embedded tokens, by name, [b] or [b, S].
    """

    embedded: Tensor
    layers: tuple[Callable[[Tensor], Tensor], ...]
    head: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]
    ends: Tensor
    segment_ids: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Relevance:
    """What `propagate` finds, in log-odds (logit 1 - logit 0, training's shift still in them).

    Attributes:
        tokens: Relevance of each token at the output of the embedding layer, [b, l], 0 at padding.
        log_odds: Of each row, by the rewritten network, [b] or [b, S]; 0 for a packed sequence that a row lacks.
        parts: What reaches them past the embedded tokens, by name, [b] or [b, S].
        layers: Sum over a row's tokens at the output of the embedding layer and of each layer, [K + 1, b] or
            [K + 1, b, S]. log_odds - sum(parts) - layers[k] is what the biases above layer k add.
    """

    tokens: Tensor
    log_odds: Tensor
    parts: dict[str, Tensor]
    layers: Tensor

    @property
    def remainder(self) -> Tensor:
        """What biases add: no token's, [b] or [b, S]."""
        return self.log_odds - sum(self.parts.values(), start=torch.zeros_like(self.log_odds)) - self.layers[0]


def propagate(network: RewrittenNetwork) -> Relevance:
    """Gradient x input at every layer, by one backward pass from the log-odds to the embedded tokens.

    The forward keeps the residual stream alone; the backward computes each layer once more, but for the last, whose
    graph is still there. Memory is that of K residual streams and of one layer's activations, linear in length, and
    rows that do not see each other (a batch, packed sequences) share the pass.
    """
    # 1. Forward: the residual stream, x^0 .. x^(K-1).
    streams = [network.embedded.detach()]
    with torch.no_grad():
        for layer in network.layers[:-1]:
            streams.append(layer(streams[-1]))

    # 2. The last layer and the head, and from the log-odds to x^K and x^(K-1). A row's log-odds depends on its own
    # tokens only, so that their sum may be differentiated.
    with torch.enable_grad():
        below = streams.pop().requires_grad_()
        top = network.layers[-1](below) if network.layers else below
        log_odds = _present(network.head(top), network.segment_ids)
        gradients = torch.autograd.grad(log_odds.sum(), [top, below] if network.layers else [top])
    relevance = [(x.detach() * grad).sum(-1) for x, grad in zip((top, below), gradients, strict=False)]
    gradient = gradients[-1]
    del top  # and with it the graph

    # 3. From x^k to x^(k-1), layer by layer.
    for layer in reversed(network.layers[:-1]):
        with torch.enable_grad():
            below = streams.pop().requires_grad_()
            (gradient,) = torch.autograd.grad(layer(below), below, gradient)
        relevance.append((below.detach() * gradient).sum(-1))

    tokens = [network.restore(numbers) for numbers in reversed(relevance)]
    num_segments = log_odds.shape[-1]
    sums = [sum_of_rows(numbers, network.segment_ids, num_segments) for numbers in tokens]
    parts = {name: _present(numbers, network.segment_ids) for name, numbers in network.parts.items()}
    return Relevance(tokens[0], log_odds.detach(), parts, torch.stack(sums))


def _present(numbers: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Numbers of packed sequences [b, S] with 0 for those that a row does not have: the head gives some to any."""
    if segment_ids is None:
        return numbers
    order = torch.arange(1, numbers.shape[-1] + 1, device=numbers.device)
    return numbers.masked_fill(order > segment_ids.amax(1, keepdim=True), 0.0)


def sum_of_rows(numbers: Tensor, segment_ids: Tensor | None, num_segments: int) -> Tensor:
    """Sums over the tokens of each row, numbers [b, l] -> [b], or of each packed sequence, [b, S]."""
    if segment_ids is None:
        return numbers.sum(-1)
    sums = numbers.new_zeros(numbers.shape[0], num_segments + 1)
    return sums.scatter_add(1, segment_ids, numbers)[:, 1:]


def log_odds_of(logits: Tensor) -> Tensor:
    """Logit 1 - logit 0, [..., 2] -> [...]."""
    return logits[..., 1] - logits[..., 0]


__all__ = ["Relevance", "RewrittenNetwork", "log_odds_of", "propagate", "sum_of_rows"]
