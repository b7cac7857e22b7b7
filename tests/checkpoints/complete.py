"""A whole checkpoint from a committed one: its code is the package's as it is now."""

from pathlib import Path

from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, AutoTokenizer

import ehrseq  # noqa: F401  (registers the classes)


def complete_checkpoint(model_type: str, folder: Path) -> Path:
    """Save a committed checkpoint into `folder` as training does: with the code that loads it without the package.

    Args:
        model_type: `ehrmamba`, `ehr_lstm`, `cehrbert`, `ehr_bigbird` or `hymate`.
        folder: Where to.
    """
    committed = Path(__file__).parent / model_type
    AutoModelForSequenceClassification.from_pretrained(committed).save_pretrained(folder)
    encoder = AutoFeatureExtractor if model_type == "hymate" else AutoTokenizer
    encoder.from_pretrained(committed).save_pretrained(folder)
    return folder
