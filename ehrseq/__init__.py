"""ehrseq: risks from a patient's whole record.

With the package imported, transformers knows its models, its tokenizer and `pipeline("ehr-risk")`, in whichever order
the two are imported. The import itself loads neither torch nor transformers: everything is loaded when it is first
used.

Example:
    ```python
    import ehrseq
    from transformers import pipeline

    risk = pipeline("ehr-risk", model="my-checkpoint")
    risk({"subject_id": 1, "events": [{"time": "2150-03-01T08:00", "code": "DIAGNOSIS//ICD10CM//I10"}]})
    ```
"""

import os
from typing import TYPE_CHECKING

from ehrseq._lazy import lazy_exports
from ehrseq._on_import import CallsAfterImport
from ehrseq.hub.families import registered_classes
from ehrseq.hub.registration import registrations
from ehrseq.version import __version__

if TYPE_CHECKING:
    from ehrseq.data import (
        ConversionReport,
        EventDataset,
        load_events,
        patient_from_bundle,
        read_fhir,
        read_meds,
        write_dataset,
    )
    from ehrseq.data.simulate.cohort import simulate
    from ehrseq.hub.cards import EhrModelCard
    from ehrseq.hub.convert_odyssey import convert_odyssey_checkpoint
    from ehrseq.hub.push import push_to_hub
    from ehrseq.modeling.configuration_cehrbert import CehrBertConfig
    from ehrseq.modeling.configuration_ehr_bigbird import EhrBigBirdConfig
    from ehrseq.modeling.configuration_ehr_lstm import EhrLstmConfig
    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_cehrbert import (
        CehrBertForMaskedLM,
        CehrBertForSequenceClassification,
        CehrBertModel,
    )
    from ehrseq.modeling.modeling_ehr_bigbird import (
        EhrBigBirdForMaskedLM,
        EhrBigBirdForSequenceClassification,
        EhrBigBirdModel,
    )
    from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification, EhrLstmModel
    from ehrseq.modeling.modeling_ehrmamba import (
        EhrMambaForCausalLM,
        EhrMambaForSequenceClassification,
        EhrMambaModel,
    )
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining, HyMaTEForSequenceClassification, HyMaTEModel
    from ehrseq.pipelines.ehr_forecast import EhrForecastPipeline
    from ehrseq.pipelines.ehr_risk import EhrRiskPipeline
    from ehrseq.tasks import label_events, list_tasks, load_task
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

# Name -> module that defines it. `TYPE_CHECKING` above says the same to type checkers and editors.
_EXPORTS = {
    "ConversionReport": "data",
    "EventDataset": "data",
    "load_events": "data",
    "patient_from_bundle": "data",
    "read_fhir": "data",
    "read_meds": "data",
    "write_dataset": "data",
    "simulate": "data.simulate.cohort",
    "EhrModelCard": "hub.cards",
    "push_to_hub": "hub.push",
    "convert_odyssey_checkpoint": "hub.convert_odyssey",
    "label_events": "tasks",
    "list_tasks": "tasks",
    "load_task": "tasks",
    **{name: module for module, _, name in (path.partition(":") for path in registered_classes())},
}
_SUBPACKAGES = (
    *("audit", "baselines", "batches", "benchmark", "data", "encode", "evaluation", "hub", "interpretability"),
    *("modeling", "pipelines", "prediction", "prepare", "stats", "tasks", "tokenization", "training"),
)

__all__ = [
    "CehrBertConfig",
    "CehrBertForMaskedLM",
    "CehrBertForSequenceClassification",
    "CehrBertModel",
    "ConversionReport",
    "EhrBigBirdConfig",
    "EhrBigBirdForMaskedLM",
    "EhrBigBirdForSequenceClassification",
    "EhrBigBirdModel",
    "EhrForecastPipeline",
    "EhrLstmConfig",
    "EhrLstmForSequenceClassification",
    "EhrLstmModel",
    "EhrMambaConfig",
    "EhrMambaForCausalLM",
    "EhrMambaForSequenceClassification",
    "EhrMambaModel",
    "EhrModelCard",
    "EhrRiskPipeline",
    "EhrTokenizer",
    "EventDataset",
    "HyMaTEConfig",
    "HyMaTEFeatureExtractor",
    "HyMaTEForPreTraining",
    "HyMaTEForSequenceClassification",
    "HyMaTEModel",
    "__version__",
    "convert_odyssey_checkpoint",
    "label_events",
    "list_tasks",
    "load_events",
    "load_task",
    "patient_from_bundle",
    "push_to_hub",
    "read_fhir",
    "read_meds",
    "simulate",
    "write_dataset",
]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS, _SUBPACKAGES)

# OpenMP reads it when torch is loaded: threads that wait for others then sleep. Spinning beside a busy neighbour, they
# hold the core that the thread they wait for needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CallsAfterImport(registrations()).install()
