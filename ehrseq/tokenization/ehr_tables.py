"""Tables are optional: a checkpoint scores a patient dict where neither polars nor pyarrow is installed.

Imported by name because transformers refuses to load a checkpoint's code while any package that the code imports
outright is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(package: str) -> Any:
    """The module `polars` or `pyarrow`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"tables of events need {package}, which is not installed: pip install {package}. "
            "One patient as a dict works without it."
        ) from error
