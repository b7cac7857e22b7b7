"""Makes transformers know the package: Auto classes and pipelines.

`import ehrseq` runs `register_all`. A new family of models is one more entry of `FAMILIES`, a new pipeline one more of
`PIPELINES`; nothing else has to change.
"""

from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from typing import Any

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY


@dataclass(frozen=True)
class Family:
    """The classes of one `model_type`, each written `module:Class` under the package.

    Attributes:
        config: The configuration class.
        models: Auto class -> model class. A class under two Auto classes is saved under the first.
        tokenizer: Tokenizer class, or None.
        feature_extractor: Feature extractor class, or None.
    """

    config: str
    models: dict[str, str]
    tokenizer: str | None = None
    feature_extractor: str | None = None


@dataclass(frozen=True)
class RegisteredPipeline:
    """A pipeline class, written `module:Class`, and the Auto classes that load its model."""

    pipeline: str
    auto_models: tuple[str, ...] = field(default=("AutoModelForSequenceClassification",))


FAMILIES: dict[str, Family] = {
    "ehrmamba": Family(
        config="modeling.configuration_ehrmamba:EhrMambaConfig",
        models={
            "AutoModel": "modeling.modeling_ehrmamba:EhrMambaModel",
            "AutoModelForCausalLM": "modeling.modeling_ehrmamba:EhrMambaForCausalLM",
            "AutoModelForPreTraining": "modeling.modeling_ehrmamba:EhrMambaForCausalLM",
            "AutoModelForSequenceClassification": "modeling.modeling_ehrmamba:EhrMambaForSequenceClassification",
        },
        tokenizer="tokenization.tokenization_ehr:EhrTokenizer",
    ),
    "ehr_lstm": Family(
        config="modeling.configuration_ehr_lstm:EhrLstmConfig",
        models={
            "AutoModel": "modeling.modeling_ehr_lstm:EhrLstmModel",
            "AutoModelForSequenceClassification": "modeling.modeling_ehr_lstm:EhrLstmForSequenceClassification",
        },
    ),
    "cehrbert": Family(
        config="modeling.configuration_cehrbert:CehrBertConfig",
        models={
            "AutoModel": "modeling.modeling_cehrbert:CehrBertModel",
            "AutoModelForMaskedLM": "modeling.modeling_cehrbert:CehrBertForMaskedLM",
            "AutoModelForPreTraining": "modeling.modeling_cehrbert:CehrBertForMaskedLM",
            "AutoModelForSequenceClassification": "modeling.modeling_cehrbert:CehrBertForSequenceClassification",
        },
    ),
    "ehr_bigbird": Family(
        config="modeling.configuration_ehr_bigbird:EhrBigBirdConfig",
        models={
            "AutoModel": "modeling.modeling_ehr_bigbird:EhrBigBirdModel",
            "AutoModelForMaskedLM": "modeling.modeling_ehr_bigbird:EhrBigBirdForMaskedLM",
            "AutoModelForPreTraining": "modeling.modeling_ehr_bigbird:EhrBigBirdForMaskedLM",
            "AutoModelForSequenceClassification": "modeling.modeling_ehr_bigbird:EhrBigBirdForSequenceClassification",
        },
    ),
    "hymate": Family(
        config="modeling.configuration_hymate:HyMaTEConfig",
        models={
            "AutoModel": "modeling.modeling_hymate:HyMaTEModel",
            "AutoModelForPreTraining": "modeling.modeling_hymate:HyMaTEForPreTraining",
            "AutoModelForSequenceClassification": "modeling.modeling_hymate:HyMaTEForSequenceClassification",
        },
        feature_extractor="tokenization.feature_extraction_hymate:HyMaTEFeatureExtractor",
    ),
}

PIPELINES: dict[str, RegisteredPipeline] = {
    "ehr-risk": RegisteredPipeline("pipelines.ehr_risk:EhrRiskPipeline"),
}


class NamedInCheckpoint(PreTrainedConfig):
    """Key under which tokenizers are registered; no checkpoint has this config.

    A checkpoint of the package names its tokenizer class, and that name is enough to find a registered class.
    Registered under the model's config, the class would lose against the checkpoint's own code as soon as somebody
    passes `trust_remote_code=True` (AutoTokenizer takes such a registration for one of transformers' own).
    """

    model_type = "ehrseq_tokenizer"


def register_all() -> None:
    """Register every family and every pipeline. Safe to call twice."""
    for model_type, family in FAMILIES.items():
        _register_family(model_type, family)
    for task, entry in PIPELINES.items():
        _register_pipeline(task, entry)


def load(path: str) -> Any:
    """The object at `module:name` under the package."""
    module, name = path.split(":")
    return getattr(import_module(f"ehrseq.{module}"), name)


def _register_family(model_type: str, family: Family) -> None:
    config_class = load(family.config)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    # `register_for_auto_class` is what makes `save_pretrained` copy the code and write `auto_map`.
    config_class.register_for_auto_class()
    _push_with_card(config_class)

    saved_under: set[type] = set()
    for auto_name, path in family.models.items():
        model_class = load(path)
        getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
        if model_class not in saved_under:
            model_class.register_for_auto_class(auto_name)
            _push_with_card(model_class)
            saved_under.add(model_class)

    if family.tokenizer is not None:
        tokenizer_class = load(family.tokenizer)
        AutoTokenizer.register(NamedInCheckpoint, tokenizer_class, exist_ok=True)
        tokenizer_class.register_for_auto_class()
        _push_with_card(tokenizer_class)
    if family.feature_extractor is not None:
        extractor_class = load(family.feature_extractor)
        AutoFeatureExtractor.register(config_class, extractor_class, exist_ok=True)
        extractor_class.register_for_auto_class()
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
    del pipeline_class._registered_impl
    _push_with_card(pipeline_class)


def _push_with_card(pushed_class: Any) -> None:
    """Let `push_to_hub` of a class carry the package's card where transformers would write its generic one."""
    upload = pushed_class._upload_modified_files
    if hasattr(upload, "carries_card") and "_upload_modified_files" in vars(pushed_class):
        return

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from ehrseq.hub import ensure_card

        ensure_card(working_dir, self, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_card.carries_card = True  # type: ignore[attr-defined]
    pushed_class._upload_modified_files = upload_with_card
