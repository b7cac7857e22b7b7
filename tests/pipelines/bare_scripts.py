"""What an interpreter without the package runs on a folder: every Auto class, the pipeline, and what is refused."""

EHRMAMBA_SCORES = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(given["model"], **trusted)
tokenizer = AutoTokenizer.from_pretrained(given["model"], **trusted)
model = AutoModelForSequenceClassification.from_pretrained(given["model"], **trusted)
backbone = AutoModel.from_pretrained(given["model"], **trusted)
inputs = tokenizer(given["patients"], task="mortality_30d", padding=True, return_tensors="pt")
hidden = backbone(**inputs).last_hidden_state

risk = pipeline("ehr-risk", model=given["model"], device="cpu", **trusted)
answers = risk(given["patients"], batch_size=4)
explained = risk(given["patients"], batch_size=4, explain=True)
last = given["patients"][0]["events"]
dead = risk({"events": [*last, {"time": last[-1]["time"], "code": "MEDS_DEATH"}]})
refusals = {}
for name, build in {
    "untrusted": lambda: pipeline("ehr-risk", model=given["model"], trust_remote_code=False),
    "bundle": lambda: risk({"resourceType": "Bundle", "entry": []}),
    "table": lambda: tokenizer.encode_table(None),
    "coverage": lambda: tokenizer.coverage(None),
    "train": lambda: type(tokenizer).train(None),
    "method": lambda: risk(given["patients"], explain="integrated_gradients"),
}.items():
    try:
        build()
    except Exception as error:
        refusals[name] = f"{type(error).__name__}: {error}"
risk.save_pretrained(given["saved"])
loaded = ("ehrseq", "polars", "pyarrow", "pandas", "datasets", "sklearn")
print(json.dumps({
    "answers": answers,
    "explained": explained,
    "dead": dead,
    "scores": model.risk_scores(model(**inputs).logits, inputs["input_ids"].new_zeros(len(given["patients"]))).tolist(),
    "modules": [type(part).__module__ for part in (config, tokenizer, model, backbone, risk)],
    "shape": list(hidden.shape),
    "refusals": refusals,
    "forbidden": [name for name in loaded if name in sys.modules],
}))
"""

HYMATE_SCORES = """
import sys
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, pipeline
from transformers import AutoModelForSequenceClassification

trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(given["model"], **trusted)
extractor = AutoFeatureExtractor.from_pretrained(given["model"], **trusted)
model = AutoModelForSequenceClassification.from_pretrained(given["model"], **trusted)
backbone = AutoModel.from_pretrained(given["model"], **trusted)
pretraining = AutoModelForPreTraining.from_pretrained(given["model"], **trusted)
inputs = extractor(given["patients"], padding=True, return_tensors="pt")
risk = pipeline("ehr-risk", model=given["model"], device="cpu", **trusted)
answers = risk(given["patients"], batch_size=2)
first = given["patients"][0]["events"]
dead = [risk({"events": [*first, {"time": time, "code": "MEDS_DEATH"}]}) for time in (None, first[-1]["time"])]
explained = risk(given["patients"], batch_size=2, explain="prefix_deltas")
risk.save_pretrained(given["saved"])
loaded = ("ehrseq", "polars", "pyarrow", "pandas", "datasets", "sklearn")
parts = (config, extractor, model, backbone, pretraining, risk)
print(json.dumps({
    "answers": answers,
    "dead": dead,
    "explained": explained,
    "scores": model.risk_scores(model(**inputs).logits).tolist(),
    "modules": [type(part).__module__ for part in parts],
    "forbidden": [name for name in loaded if name in sys.modules],
}))
"""

EHRMAMBA_FORECASTS = """
import sys
from transformers import pipeline

trusted = {"trust_remote_code": True}
forecast = pipeline("ehr-forecast", model=given["model"], device="cpu", **trusted)
answers = forecast(given["patients"], n=3, horizon="60d", trajectories=True)
last = given["patients"][0]["events"]
dead = forecast({"events": [*last, {"time": last[-1]["time"], "code": "MEDS_DEATH"}]})
refusals = {}
for name, call in {
    "bundle": lambda: forecast({"resourceType": "Bundle", "entry": []}),
    "outcome": lambda: forecast(given["patients"], outcomes="VISIT_START//INP"),
}.items():
    try:
        call()
    except Exception as error:
        refusals[name] = f"{type(error).__name__}: {error}"
forecast.save_pretrained(given["saved"])
loaded = ("ehrseq", "polars", "pyarrow", "pandas", "datasets", "sklearn")
print(json.dumps({
    "answers": answers,
    "dead": dead,
    "modules": [type(part).__module__ for part in (forecast, forecast.model, forecast.tokenizer)],
    "refusals": refusals,
    "forbidden": [name for name in loaded if name in sys.modules],
}))
"""

HYMATE_FORECASTS = """
import sys
from transformers import pipeline

forecast = pipeline("ehr-forecast", model=given["model"], device="cpu", trust_remote_code=True)
answers = forecast(given["patients"])
forecast.save_pretrained(given["saved"])
again = pipeline("ehr-forecast", model=given["saved"], device="cpu", trust_remote_code=True)
loaded = ("ehrseq", "polars", "pyarrow", "pandas", "datasets", "sklearn")
print(json.dumps({
    "answers": answers,
    "again": again(given["patients"]),
    "modules": [type(part).__module__ for part in (forecast, forecast.model, forecast.feature_extractor)],
    "forbidden": [name for name in loaded if name in sys.modules],
}))
"""
