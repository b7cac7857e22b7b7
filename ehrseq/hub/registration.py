"""Makes transformers know the package: Auto classes and pipelines.

`import ehrseq` asks for `register_all` behind the import of transformers, whichever comes first
(`ehrseq/_on_import.py`); the tables that it works through are `ehrseq/hub/families.py`.
"""

from __future__ import annotations

import threading
from functools import partial, wraps
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from ehrseq.hub.families import FAMILIES, PIPELINES, Family, RegisteredPipeline, load_class


class NamedInCheckpoint(PreTrainedConfig):
    """Key under which tokenizers are registered; no checkpoint has this config.

    A checkpoint of the package names its tokenizer class, and that name is enough to find a registered class.
    Registered under the model's config, the class would lose against the checkpoint's own code as soon as somebody
    passes `trust_remote_code=True` (AutoTokenizer takes such a registration for one of transformers' own).
    """

    model_type = "ehrseq_tokenizer"


_TABLES = threading.Lock()  # held while tables are changed, never while anything is imported


def register_all() -> None:
    """Register every family and every pipeline. Safe to call twice, and by several threads.

    Raises:
        ImportError, AttributeError, RuntimeError: A class could not be imported; all others are registered.
    """
    errors: list[Exception] = []
    families = [partial(_register_family, *item) for item in FAMILIES.items()]
    pipelines = [partial(_register_pipeline, *item) for item in PIPELINES.items()]
    for register in (*families, *pipelines):
        try:
            register()
        except (ImportError, AttributeError, RuntimeError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _register_family(model_type: str, family: Family) -> None:
    # 1. Imports.
    config = load_class(family.config)
    models = [(getattr(transformers, auto), load_class(path)) for auto, path in family.models.items()]
    tokenizer = None if family.tokenizer is None else load_class(family.tokenizer)
    extractor = None if family.feature_extractor is None else load_class(family.feature_extractor)
    # 2. Tables.
    with _TABLES:
        AutoConfig.register(model_type, config, exist_ok=True)
        for auto, model in models:
            auto.register(config, model, exist_ok=True)
        if tokenizer is not None:
            AutoTokenizer.register(NamedInCheckpoint, tokenizer, exist_ok=True)
        if extractor is not None:
            AutoFeatureExtractor.register(config, extractor, exist_ok=True)
        for pushed in (config, *(model for _, model in models), tokenizer, extractor):
            if pushed is not None:
                _push_with_card(pushed)


def _register_pipeline(task: str, entry: RegisteredPipeline) -> None:
    pipeline = load_class(entry.pipeline)
    auto_models = tuple(getattr(transformers, name) for name in entry.auto_models)
    with _TABLES:
        if task in PIPELINE_REGISTRY.supported_tasks:
            return
        default = {"model": (entry.default, None)}  # a folder has no revision
        PIPELINE_REGISTRY.register_pipeline(task, pipeline, pt_model=auto_models, default=default, type="multimodal")
        # With this attribute `pipe.save_pretrained` would leave `custom_pipelines` on the model's config, and
        # transformers would ask for trust from then on. The model writes that field itself, for whoever lacks the
        # package (modeling/hub_mixin.py).
        del pipeline._registered_impl
        _push_with_card(pipeline)


def _push_with_card(pushed_class: Any) -> None:
    """Let `push_to_hub` of a class carry the package's card where transformers would write its generic one."""
    upload = pushed_class._upload_modified_files
    if hasattr(upload, "carries_card") and "_upload_modified_files" in vars(pushed_class):
        return

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from ehrseq.hub.push import ensure_card

        ensure_card(working_dir, self, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_card.carries_card = True  # type: ignore[attr-defined]
    pushed_class._upload_modified_files = upload_with_card
