"""Configuration of the CEHR-BERT baseline."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_ehr_events import EhrEventConfig


@strict
class EventTransformerConfig(EhrEventConfig):
    r"""Base of the configurations of the transformer baselines; read by transformers' own layers.

    Vocabulary, width, embedding layer, tasks and classification head are the fields of `EhrEventConfig`.

    Args:
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of attention heads; divides hidden_size.
        intermediate_size: Width of the feed-forward part.
        hidden_act: Its activation.
        attention_probs_dropout_prob: Dropout of the attention weights.
        pooling: The token that the classifier reads: "first" ([CLS], with a prompt the task's token in its place; the
            paper's choice) or "last".
        initializer_range: Standard deviation of linear layers and embeddings at initialisation.
    """

    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float = 0.1
    pooling: str = "first"
    initializer_range: float = 0.02

    # What transformers' layers ask of any configuration.
    chunk_size_feed_forward: int = 0
    is_decoder: ClassVar[bool] = False
    add_cross_attention: ClassVar[bool] = False

    def _check_values(self) -> None:
        super()._check_values()
        self.check_positive("num_hidden_layers num_attention_heads intermediate_size")
        self.check_probabilities("attention_probs_dropout_prob")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: expected a divisor of hidden_size={self.hidden_size}."
            )
        if self.pooling not in ("first", "last"):
            raise ValueError(f'pooling={self.pooling!r}: expected "first" or "last".')


@strict
class CehrBertConfig(EventTransformerConfig):
    r"""Configuration of `CehrBertModel` and its heads; the defaults are those of EhrMamba's comparison.

    Six layers, eight heads, a feed-forward width of 3,072 and a context of 512 tokens, all in `EventTransformerConfig`.
    """

    model_type = "cehrbert"

    max_position_embeddings: int = 512


__all__ = ["CehrBertConfig", "EventTransformerConfig"]
