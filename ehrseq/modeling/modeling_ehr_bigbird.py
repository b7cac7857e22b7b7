"""The BigBird and MultiBird baselines of EhrMamba's table: block-sparse attention over events (arXiv:2007.14062).

Glossary: b batch, l length (tokens), d hidden_size, n sequences (rows, or packed ones), m tokens of the longest, s
block_size, B blocks, r num_random_blocks. The input channels are those of `EhrTokenizer`, all [b, l]: see
ehr_embeddings.py.

    x^0 = e + position                           the embeddings, and a learned one of the place in the sequence
    x^k = BigBird layer(x^(k-1))                 transformers' own; block i sees blocks 0, i-1, i, i+1 and r drawn ones,
                                                 block 0 sees all
    r   = x^K at the first token                 with a prompt, the task's

MultiBird is this model finetuned with multitask prompts. Three habits of transformers' `BigBirdModel` are not kept,
because each makes a score depend on the patients beside it or on the mode: it turns to dense attention for good when it
meets a short batch; it draws other random blocks for each padded length, in training only (from numpy's global state),
while in evaluation the first block is counted r more times; and its last block, which sees all, is wherever the padding
ends. Here attention is always sparse, the drawn blocks belong to the model, and the last block is always padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdLayer, BigBirdModel

from .configuration_ehr_bigbird import EhrBigBirdConfig
from .event_encoder import EventEncoderModel, EventForMaskedLM, EventForSequenceClassification, EventPreTrainedModel
from .modeling_cehrbert import PositionEmbedding, TransformerForSequenceClassification

FEWEST_BLOCKS = 5  # the first, its neighbour, one between, the last but one, the last
# transformers follows an older plan of random blocks at these lengths, and does not tell it which one is meant.
OLD_PLAN_LENGTHS = (1024, 3072, 4096)


class PlannedBlockSparseAttention(BigBirdBlockSparseAttention):
    """transformers' block-sparse attention with random blocks that neither mode nor padding changes."""

    def __init__(self, config: EhrBigBirdConfig, layer_idx: int):
        super().__init__(config, seed=layer_idx)
        draw = np.random.default_rng([config.random_blocks_seed, layer_idx])
        num_blocks = -(-config.max_position_embeddings // config.block_size) + 2
        self._plan = draw_blocks(draw, config.num_attention_heads, num_blocks, config.num_random_blocks)

    def train(self, mode: bool = True) -> PlannedBlockSparseAttention:
        """Stay as in evaluation: training would seed numpy's global generator, and has no other meaning here."""
        return super().train(False)

    def _bigbird_block_rand_mask_with_head(self, from_seq_length: int, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """The drawn blocks of each head, [B - 2, r]; those beyond the sequence become the last block, padding."""
        last = from_seq_length // self.block_size - 1
        return list(np.minimum(self._plan[:, : last - 1], last))


def draw_blocks(draw: np.random.Generator, num_heads: int, num_blocks: int, num_random_blocks: int) -> np.ndarray:
    """Random blocks of the blocks 1 .. num_blocks - 2, none of which sees one twice.

    Args:
        draw: Generator of random numbers.
        num_heads: Heads, each with blocks of its own.
        num_blocks: Blocks of the longest padded sequence; the last of them is padding.
        num_random_blocks: Drawn blocks of each.

    Returns:
        Block numbers, int64 [num_heads, num_blocks - 2, num_random_blocks]. Where fewer can be drawn, the number of the
        last block, which is masked, stands for the others.
    """
    plan = np.full((num_heads, num_blocks - 2, num_random_blocks), num_blocks - 1, dtype=np.int64)
    everything = np.arange(1, num_blocks - 1)
    for head in range(num_heads):
        for block in range(1, num_blocks - 1):
            others = draw.permutation(everything[abs(everything - block) > 1])[:num_random_blocks]
            plan[head, block - 1, : len(others)] = others
    return plan


class EhrBigBirdPreTrainedModel(EventPreTrainedModel):
    """What the Trainer and the Hub ask of every class of the family."""

    config: EhrBigBirdConfig
    config_class = EhrBigBirdConfig
    auto_classes = {
        "AutoModel": "EhrBigBirdModel",
        "AutoModelForMaskedLM": "EhrBigBirdForMaskedLM",
        "AutoModelForPreTraining": "EhrBigBirdForMaskedLM",
        "AutoModelForSequenceClassification": "EhrBigBirdForSequenceClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["BigBirdLayer"]


class EhrBigBirdModel(EhrBigBirdPreTrainedModel, EventEncoderModel):
    """The EHR embedding layer with places, and BigBird's layers."""

    _auto_class = "AutoModel"  # so that what saves it carries its code

    def __init__(self, config: EhrBigBirdConfig):
        super().__init__(config)
        self.positions = PositionEmbedding(config)
        layers: list[Any] = [BigBirdLayer(config, seed=i) for i in range(config.num_hidden_layers)]
        for i, layer in enumerate(layers):
            layer.attention.self = PlannedBlockSparseAttention(config, i)
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def encode(
        self, tokens: Tensor, lengths: Tensor, output_attentions: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The layers, on sequences padded to whole blocks, the last of which holds no token."""
        # 1. Padding.
        tokens = self.positions(tokens)
        length = tokens.shape[1]
        tokens = F.pad(tokens, (0, 0, 0, padded_length(length, self.config.block_size) - length))
        # 2. transformers' masks of blocks.
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(tokens.device, tokens.dtype)
        blocks, band, queries, keys = BigBirdModel.create_masks_for_block_sparse_attn(real, self.config.block_size)
        masks = {"band_mask": band, "from_mask": queries, "to_mask": keys}
        # 3. The layers.
        layers: Any = self.layers
        for layer in layers:
            if output_attentions:
                mixed, weights = layer.attention(tokens, from_blocked_mask=blocks, to_blocked_mask=blocks, **masks)
                tokens = layer.feed_forward_chunk(mixed)
                yield tokens[:, :length], weights[:, :, :length, :length]
            else:
                tokens = layer(tokens, blocked_encoder_mask=blocks, **masks)
                yield tokens[:, :length], None


def padded_length(length: int, block_size: int) -> int:
    """Tokens of sequences of this length with padding: whole blocks, and one more that holds no token."""
    padded = max(-(-length // block_size) + 1, FEWEST_BLOCKS) * block_size
    return padded + block_size if padded in OLD_PLAN_LENGTHS else padded


class EhrBigBirdForMaskedLM(EhrBigBirdPreTrainedModel, EventForMaskedLM):
    """Masked events foretold from both sides."""

    _auto_class = "AutoModelForMaskedLM"  # so that what saves it carries its code

    def __init__(self, config: EhrBigBirdConfig):
        EventForMaskedLM.__init__(self, config, EhrBigBirdModel(config))


class EhrBigBirdForSequenceClassification(EhrBigBirdPreTrainedModel, TransformerForSequenceClassification):
    """The clinical head on BigBird; with prompts of several tasks it is MultiBird."""

    _auto_class = "AutoModelForSequenceClassification"  # so that what saves it carries its code

    def __init__(self, config: EhrBigBirdConfig):
        EventForSequenceClassification.__init__(self, config, EhrBigBirdModel(config))


__all__ = [
    "EhrBigBirdForMaskedLM",
    "EhrBigBirdForSequenceClassification",
    "EhrBigBirdModel",
    "EhrBigBirdPreTrainedModel",
    "PlannedBlockSparseAttention",
    "draw_blocks",
    "padded_length",
]
