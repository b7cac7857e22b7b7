"""The registry of models: one entry a family, from which the Auto classes, the package's exports and its tests follow.

A new family of models is one more entry of `FAMILIES`, a new pipeline one more of `PIPELINES`; nothing else has to
change. Nothing heavy is imported here: `import ehrseq` reads these tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

STARTER = Path(__file__).with_name("starter")
"""Folder of the checkpoint that comes with the package (`ehrseq.hub.starter`)."""
STARTER_FORECAST = Path(__file__).with_name("starter_forecast")
"""Its pretrained twin, which forecasts."""


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

    @property
    def encoder(self) -> str:
        """The class that turns records into rows of these models; the baselines share EhrMamba's tokenizer."""
        return self.feature_extractor or self.tokenizer or "tokenization.tokenization_ehr:EhrTokenizer"


@dataclass(frozen=True)
class RegisteredPipeline:
    """A pipeline class, written `module:Class`, the Auto classes that load its model, and its model by default."""

    pipeline: str
    default: str
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
    "ehr-risk": RegisteredPipeline("pipelines.ehr_risk:EhrRiskPipeline", default=str(STARTER)),
    "ehr-forecast": RegisteredPipeline(
        "pipelines.ehr_forecast:EhrForecastPipeline",
        default=str(STARTER_FORECAST),
        auto_models=("AutoModelForPreTraining",),
    ),
}


def registered_classes() -> Iterator[str]:
    """Every class of the tables, written `module:Class` under the package; each once."""
    paths: list[str | None] = []
    for family in FAMILIES.values():
        paths += [family.config, *family.models.values(), family.tokenizer, family.feature_extractor]
    paths += [entry.pipeline for entry in PIPELINES.values()]
    yield from dict.fromkeys(path for path in paths if path is not None)


def load_class(path: str) -> Any:
    """The class at `module:Class` under the package."""
    module, name = path.split(":")
    return getattr(import_module(f"ehrseq.{module}"), name)
