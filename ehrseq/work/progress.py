"""Progress bars that are hidden where transformers' bars are: `transformers.utils.logging.disable_progress_bar()`."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def bars_are_shown() -> bool:
    """Whether the user wants progress bars. What never loaded transformers has not switched its bars off."""
    logging = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())


def progress_bar(*args: Any, disable: bool = False, **options: Any) -> tqdm:
    """A bar as `tqdm.auto.tqdm` makes it. Only ever switched off here: tqdm's own TQDM_DISABLE keeps its say."""
    hidden = {"disable": True} if disable or not bars_are_shown() else {}
    return tqdm(*args, **options, **hidden)
