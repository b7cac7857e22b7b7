"""What the processes of the Hub round trip run: one pushes, one with the package and one without it load."""

_REFUSAL = """
def refusal(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
"""

PUSH = (
    _REFUSAL
    + """
import runpy, sys
import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline
import ehrseq
from ehrseq.hub import DataDescription, EhrModelCard, push_to_hub, use_card

model = AutoModelForSequenceClassification.from_pretrained(given["model"])
tokenizer = AutoTokenizer.from_pretrained(given["model"])
data = DataDescription("tiny simulated patients", simulated=True, counts={"patients": 40})
card = EhrModelCard("tiny-ehrmamba", data=data, training={"optimizer steps": 12})

# 1. The folder in one commit; then changed weights, on main and on a branch.
first = push_to_hub(given["model"], "user/whole", card=card)
with torch.no_grad():
    model.classifier.out_proj.bias.add_(torch.tensor([0.0, 1.0]))
second = push_to_hub(model, "user/whole", tokenizer=tokenizer, commit_message="Second push")
with torch.no_grad():
    model.classifier.out_proj.bias.add_(torch.tensor([0.0, 1.0]))
push_to_hub(model, "user/whole", tokenizer=tokenizer, revision="experiment")

# 2. transformers' own ways, one part at a time.
model = AutoModelForSequenceClassification.from_pretrained(given["model"])
model.push_to_hub("user/parts")
tokenizer.push_to_hub("user/parts")
tokenizer.push_to_hub("user/tokenizer-only")
pipeline("ehr-risk", model=given["model"], device="cpu").push_to_hub("user/pipe")
model.save_pretrained(given["saved"], push_to_hub=True, repo_id="user/saved", max_shard_size="20KB")
model.config.push_to_hub("user/config-only")

# 3. Trainer, with its own card and with ours.
arguments = TrainingArguments(given["run"], hub_model_id="user/trainer", report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, processing_class=tokenizer)
use_card(trainer, card)
trainer.push_to_hub()

# 4. A card that somebody wrote stays, unless a card is given.
api = HfApi()
own = "---\\nlicense: mit\\n---\\n# My own words\\n"
api.upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="user/pipe")
model.push_to_hub("user/pipe")
push_to_hub(model, "user/pipe", tokenizer=tokenizer)
kept = open(hf_hub_download("user/pipe", "README.md", force_download=True)).read()
push_to_hub(model, "user/pipe", tokenizer=tokenizer, card=card)

# 5. Sharded weights give way to a single file.
push_to_hub(model, "user/saved", tokenizer=tokenizer)

# 6. A private repository.
push_to_hub(model, "user/private", tokenizer=tokenizer, private=True)

# 7. The example, with a table of scores.
sys.argv = given["example"]
runpy.run_path(sys.argv[0], run_name="__main__")

# 8. What goes wrong.
refusals = {
    "bad token": refusal(lambda: push_to_hub(given["model"], "user/whole", token="hf_wrong")),
    "bad token, model": refusal(lambda: model.push_to_hub("user/whole", token="hf_wrong")),
    "no tokenizer": refusal(lambda: push_to_hub(model, "user/half")),
    "no folder": refusal(lambda: push_to_hub(given["model"] + "/nowhere", "user/half")),
}
print(json.dumps({"first": first.oid, "second": second.oid, "kept": kept, "refusals": refusals}))
"""
)

LOAD = (
    _REFUSAL
    + """
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
if given["package"]:
    import ehrseq

def score(repository, explain=False, **options):
    trust = {} if given["package"] else {"trust_remote_code": True}
    risk = pipeline("ehr-risk", model=repository, device="cpu", **trust, **options)
    return risk(given["patients"], batch_size=4, explain=explain)

# Before anything is in the cache, from which transformers would answer.
locked_out = refusal(lambda: AutoModelForSequenceClassification.from_pretrained("user/private", token=False))
answers = {repository: score(repository) for repository in given["repositories"]}
answers["first"] = score("user/whole", revision=given["first"])
answers["experiment"] = score("user/whole", revision="experiment")
answers["snapshot"] = score(snapshot_download("user/parts"))
answers["private"] = score("user/private")
answers["explained"] = score("user/parts", explain=True)
refusals = {
    "missing repository": refusal(lambda: AutoModelForSequenceClassification.from_pretrained("user/nowhere")),
    "missing revision": refusal(lambda: AutoTokenizer.from_pretrained("user/whole", revision="v9")),
    "missing file": refusal(lambda: hf_hub_download("user/whole", "nowhere.json")),
    "no tokenizer": refusal(lambda: score("user/config-only")),
    "private, no token": locked_out,
}
print(json.dumps({"answers": answers, "refusals": refusals}))
"""
)

HYMATE_PUSH = """
from huggingface_hub import hf_hub_download
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, pipeline
import ehrseq
from ehrseq.hub import DataDescription, EhrModelCard, push_to_hub

model = AutoModelForSequenceClassification.from_pretrained(given["model"])
extractor = AutoFeatureExtractor.from_pretrained(given["model"])
card = EhrModelCard("tiny-hymate", data=DataDescription("tiny simulated stays", simulated=True))
push_to_hub(given["model"], "user/hymate-whole", card=card)
model.push_to_hub("user/hymate-parts")
extractor.push_to_hub("user/hymate-parts")
pipeline("ehr-risk", model=given["model"], device="cpu").push_to_hub("user/hymate-pipe")
try:
    push_to_hub(model, "user/hymate-half")
except ValueError as error:
    refusal = str(error)
names = ("user/hymate-whole", "user/hymate-parts", "user/hymate-pipe")
cards = {name: open(hf_hub_download(name, "README.md")).read() for name in names}
print(json.dumps({"cards": cards, "refusal": refusal}))
"""

HYMATE_LOAD = """
from transformers import pipeline
if given["package"]:
    import ehrseq
trust = {} if given["package"] else {"trust_remote_code": True}
print(json.dumps({
    name: pipeline("ehr-risk", model=name, device="cpu", **trust)(given["patients"], batch_size=2)
    for name in ("user/hymate-whole", "user/hymate-parts", "user/hymate-pipe")
}))
"""

BASELINES_LOAD = """
from transformers import AutoModel, pipeline
loaded = {}
for family, model in given["models"].items():
    risk = pipeline("ehr-risk", model=model, device="cpu", trust_remote_code=True)
    backbone = AutoModel.from_pretrained(model, trust_remote_code=True)
    loaded[family] = {"answers": risk(given["patients"], batch_size=4), "backbone": type(backbone).__name__}
print(json.dumps(loaded))
"""
