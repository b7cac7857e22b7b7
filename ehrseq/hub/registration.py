"""Makes transformers know the package: Auto classes and pipelines.

`import ehrseq` asks for `register_all` behind the import of transformers, whichever comes first
(`ehrseq/_on_import.py`); the tables that it works through are `ehrseq/hub/families.py`.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from ehrseq.hub.families import FAMILIES, PIPELINES, Family, RegisteredPipeline


class NamedInCheckpoint(PreTrainedConfig):
    """Key under which tokenizers are registered; no checkpoint has this config.

    A checkpoint of the package names its tokenizer class, and that name is enough to find a registered class.
    Registered under the model's config, the class would lose against the checkpoint's own code as soon as somebody
    passes `trust_remote_code=True` (AutoTokenizer takes such a registration for one of transformers' own).
    """

    model_type = "ehrseq_tokenizer"


class _UnfinishedError(Exception):
    """Another thread is in the middle of importing a class's module; behind that import all is registered again."""


def register_all() -> None:
    """Register every family and every pipeline. Safe to call twice, and by several threads."""
    for model_type, family in FAMILIES.items():
        try:
            _register_family(model_type, family)
        except _UnfinishedError:
            continue
    for task, entry in PIPELINES.items():
        try:
            _register_pipeline(task, entry)
        except _UnfinishedError:
            continue


def load(path: str) -> Any:
    """The object at `module:name` under the package."""
    module_name, name = path.split(":")
    module = import_module(f"ehrseq.{module_name}")
    if not hasattr(module, name) and getattr(module.__spec__, "_initializing", False):
        raise _UnfinishedError(path)
    return getattr(module, name)


def _register_family(model_type: str, family: Family) -> None:
    config_class = load(family.config)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    _push_with_card(config_class)
    for auto_name, path in family.models.items():
        model_class = load(path)
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
        _push_with_card(model_class)
    if family.tokenizer is not None:
        tokenizer_class = load(family.tokenizer)
        AutoTokenizer.register(NamedInCheckpoint, tokenizer_class, exist_ok=True)
        _push_with_card(tokenizer_class)
    if family.feature_extractor is not None:
        extractor_class = load(family.feature_extractor)
        AutoFeatureExtractor.register(config_class, extractor_class, exist_ok=True)
        _push_with_card(extractor_class)


def _register_pipeline(task: str, entry: RegisteredPipeline) -> None:
    if task in PIPELINE_REGISTRY.supported_tasks:
        return
    pipeline_class = load(entry.pipeline)
    auto_models = tuple(getattr(transformers, name) for name in entry.auto_models)
    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model=auto_models, type="multimodal")
    # With this attribute `pipe.save_pretrained` would leave `custom_pipelines` on the model's config, and transformers
    # would ask for trust from then on. The model writes that field itself, for whoever lacks the package
    # (modeling/hub_mixin.py).
    if "_registered_impl" in vars(pipeline_class):
        del pipeline_class._registered_impl
    _push_with_card(pipeline_class)


def _push_with_card(pushed_class: Any) -> None:
    """Let `push_to_hub` of a class carry the package's card where transformers would write its generic one."""
    upload = pushed_class._upload_modified_files
    if hasattr(upload, "carries_card") and "_upload_modified_files" in vars(pushed_class):
        return

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from ehrseq.hub.cards import ensure_card

        ensure_card(working_dir, self, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_card.carries_card = True  # type: ignore[attr-defined]
    pushed_class._upload_modified_files = upload_with_card
