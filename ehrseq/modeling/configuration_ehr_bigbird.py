"""Configuration of the BigBird and MultiBird baselines."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_cehrbert import EventTransformerConfig


@strict
class EhrBigBirdConfig(EventTransformerConfig):
    r"""Configuration of `EhrBigBirdModel` and its heads; the defaults are those of EhrMamba's comparison.

    Six layers, twelve heads, a feed-forward width of 3,072, block-sparse attention, a context of 2,048 tokens.
    MultiBird is the same model finetuned with multitask prompts.

    Args:
        block_size: Tokens of an attention block.
        num_random_blocks: Blocks, drawn once for a model, that each block sees beside its neighbours and the first.
        random_blocks_seed: Seed of that draw.
    """

    model_type = "ehr_bigbird"

    num_attention_heads: int = 12
    block_size: int = 64
    num_random_blocks: int = 3
    random_blocks_seed: int = 0

    # What transformers' BigBird layers ask of a configuration.
    attention_type: ClassVar[str] = "block_sparse"
    use_bias: ClassVar[bool] = True

    def _check_values(self) -> None:
        super()._check_values()
        self.check_positive("block_size num_random_blocks")


__all__ = ["EhrBigBirdConfig"]
