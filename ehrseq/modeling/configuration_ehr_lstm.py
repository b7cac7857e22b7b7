"""Configuration of the bi-LSTM baseline."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.

from huggingface_hub.dataclasses import strict

from .configuration_ehr_events import EhrEventConfig


@strict
class EhrLstmConfig(EhrEventConfig):
    r"""Configuration of `EhrLstmModel` and its classifier; the defaults are the paper's (six layers, 384 a direction).

    Vocabulary, width, embedding layer, tasks and classification head are the fields of `EhrEventConfig`. Each direction
    is half as wide as the embeddings, so that both together have their width.

    Args:
        num_hidden_layers: Number of bidirectional layers.
        lstm_dropout: Dropout between the layers.
    """

    model_type = "ehr_lstm"

    num_hidden_layers: int = 6
    lstm_dropout: float = 0.1

    def _check_values(self) -> None:
        super()._check_values()
        self.check_positive("num_hidden_layers")
        self.check_probabilities("lstm_dropout")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size}: expected an even number, half of it for each direction.")

    @property
    def direction_size(self) -> int:
        """Width of each direction."""
        return self.hidden_size // 2


__all__ = ["EhrLstmConfig"]
