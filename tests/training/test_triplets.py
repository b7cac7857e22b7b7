"""HyMaTE's recipe on simulated stays: forecasting, the outcome, scores; stages that were stopped or are done."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification

from ehrseq.batches.scoring import score_stays
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.evaluation import auroc
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.training import Stage, TripletRecipe, finetune, hold_out_stays, pretrain

RECIPE = TripletRecipe(
    name="tiny",
    model={"hidden_size": 16, "num_mamba_layers": 1, "state_size": 4},
    pretrain=Stage(epochs=2, learning_rate=3e-3, batch_size=16),
    finetune=Stage(epochs=3, learning_rate=3e-3, batch_size=16),
)


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    """(training, tuning, other stays, extractor) of 240 simulated stays."""
    folder = tmp_path_factory.mktemp("stays")
    simulate_stays(240, seed=3).write(folder)
    loaded = load_physionet2012(folder)
    table = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    rest, other = hold_out_stays(table, 0.25, seed=1)
    train, tuning = hold_out_stays(rest, 0.25, seed=1)
    return train, tuning, other, HyMaTEFeatureExtractor.fit(train)


@pytest.fixture(scope="module")
def trained(stays, tmp_path_factory):
    """Folder of both stages, and what they say they reached."""
    train, tuning, _, extractor = stays
    folder = tmp_path_factory.mktemp("trained")
    forecast = pretrain(RECIPE, extractor, train, tuning, folder / "forecast", seed=5)
    outcome = finetune(RECIPE, extractor, train, tuning, folder / "outcome", pretrained=folder / "forecast", seed=5)
    return folder, forecast, outcome


def test_the_recipe_goes_from_stays_to_risks(stays, trained):
    _, tuning, other, extractor = stays
    folder, forecast, outcome = trained
    assert len(forecast["curve"]) == 2
    assert forecast["curve"][1] < forecast["curve"][0]
    assert forecast["forecast_mse"] == min(forecast["curve"])
    assert 0 < forecast["last_value_mse"] < forecast["mean_mse"] * 2
    model = AutoModelForSequenceClassification.from_pretrained(folder / "outcome")
    assert AutoFeatureExtractor.from_pretrained(folder / "outcome").to_dict() == extractor.to_dict()
    # What the stage says of its tuning stays is true of the checkpoint that it wrote.
    assert auroc(tuning.labels, score_stays(model, extractor, tuning)) == pytest.approx(outcome["auroc"])
    scores = score_stays(model, extractor, other)
    assert ((scores > 0) & (scores < 1)).all()
    assert not list(folder.glob("*/steps"))


def test_pretrained_weights_are_taken_over(stays, trained, tmp_path):
    train, tuning, _, extractor = stays
    still = replace(RECIPE, finetune=Stage(epochs=1, learning_rate=0.0))
    finetune(still, extractor, train, tuning, tmp_path / "out", pretrained=trained[0] / "forecast", seed=1)
    from safetensors.numpy import load_file

    before = load_file(trained[0] / "forecast" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    shared = [name for name in after if name.startswith("model.")]
    assert len(shared) > 10
    assert all(np.array_equal(before[name], after[name]) for name in shared)


def test_scores_are_probabilities_though_classes_are_weighed(stays, trained):
    """The mean score stays near the prevalence: the shift of the class weights is taken back."""
    model = AutoModelForSequenceClassification.from_pretrained(trained[0] / "outcome")
    train, _, _, extractor = stays
    prevalence, weight = train.labels.mean(), model.config.class_weights[1]
    assert weight == pytest.approx((1 - prevalence) / prevalence)
    assert abs(score_stays(model, extractor, train).mean() - prevalence) < 0.1


def test_batches_change_no_score(stays, trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained[0] / "outcome")
    _, _, other, extractor = stays
    one = score_stays(model, extractor, other.subset(np.arange(7)), batch_size=1)
    np.testing.assert_allclose(score_stays(model, extractor, other)[:7], one, atol=1e-6)


def test_a_stage_that_is_done_is_not_trained_again(stays, trained):
    train, tuning, _, extractor = stays
    folder, forecast, _ = trained
    before = (folder / "forecast" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(RECIPE, extractor, train, tuning, folder / "forecast", seed=5) == json.loads(json.dumps(forecast))
    assert (folder / "forecast" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="trained otherwise"):
        pretrain(RECIPE, extractor, train, tuning, folder / "forecast", seed=6)


@pytest.mark.parametrize("name", ["pretrained", "task", "auxiliary", "digests"])
def test_a_stage_that_is_done_is_that_of_its_own_data_and_weights_only(stays, trained, name):
    """Otherwise a run without pretraining would be told the results of the one with it."""
    train, tuning, _, extractor = stays
    options = {"pretrained": trained[0] / "forecast", "seed": 5}
    other = {
        "pretrained": {"pretrained": None},
        "task": {"task": {"name": "another"}},
        "auxiliary": {"auxiliary": {"days": np.arange(len(train))}},
        "digests": {},
    }[name]
    if name == "digests":  # as many stays, other labels
        train = replace(train, labels=train.labels[::-1].copy())
    with pytest.raises(ValueError, match=f"got another {name}"):
        finetune(RECIPE, extractor, train, tuning, trained[0] / "outcome", **{**options, **other})


def test_pretrained_weights_of_other_variables_are_refused(stays, trained, tmp_path):
    train, tuning, _, _ = stays
    spec = replace(PHYSIONET2012, variables=PHYSIONET2012.variables[::-1])
    tables = [replace(table, spec=spec, variable_ids=36 - table.variable_ids) for table in (train, tuning)]
    extractor = HyMaTEFeatureExtractor.fit(tables[0])
    with pytest.raises(ValueError, match="pretrained on other triplets"):
        finetune(RECIPE, extractor, *tables, tmp_path / "out", pretrained=trained[0] / "forecast")


@pytest.mark.parametrize(("schedule", "last"), [("constant", 3e-3), ("cosine", 0.0)])
def test_a_schedule_ends_where_it_says(stays, tmp_path, monkeypatch, schedule, last):
    from ehrseq.training import stages

    made = []
    make = stages.quiet_trainer
    monkeypatch.setattr(stages, "quiet_trainer", lambda **options: made.append(make(**options)) or made[-1])
    train, tuning, _, extractor = stays
    stage = Stage(epochs=2, learning_rate=3e-3, batch_size=16, schedule=schedule)
    pretrain(replace(RECIPE, pretrain=stage), extractor, train, tuning, tmp_path)
    assert made[0].lr_scheduler.get_last_lr()[0] == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_epoch_or_the_last_is_kept(stays, tmp_path, monkeypatch, keep):
    """The score is how far the weights are from where they began: the first epoch is the best one on any machine."""
    from ehrseq.training import stages

    make = stages.quiet_trainer

    def make_scored(*, model, compute_metrics, **options):
        begun = [weights.detach().clone() for weights in model.parameters()]

        def moved(prediction):
            pairs = zip(model.parameters(), begun, strict=True)
            distance = sum(float((now.detach() - then).square().sum()) for now, then in pairs)
            return compute_metrics(prediction) | {"forecast_mse": distance}

        return make(model=model, compute_metrics=moved, **options)

    monkeypatch.setattr(stages, "quiet_trainer", make_scored)
    train, tuning, _, extractor = stays
    stage = Stage(epochs=4, learning_rate=3e-3, batch_size=16, patience=1, keep=keep)
    result = pretrain(replace(RECIPE, pretrain=stage), extractor, train, tuning, tmp_path, seed=5)
    assert result["kept"] == keep
    assert result["best_epoch"] == 1
    assert result["curve"] == sorted(result["curve"])
    if keep == "best":  # and patience ends it
        assert (result["forecast_mse"], result["epochs"]) == (result["curve"][0], 2)
    else:
        assert (result["forecast_mse"], result["epochs"]) == (result["curve"][-1], 4)


def test_a_stage_that_was_stopped_has_no_more_patience_than_before(stays, tmp_path, monkeypatch):
    """Nothing is learnt at a rate of 0: it stops after the first epoch and two more, resumed or not."""
    from transformers import Trainer

    train, tuning, _, extractor = stays
    recipe = replace(RECIPE, pretrain=Stage(epochs=6, learning_rate=0.0, patience=2))
    save, saved = Trainer._save_checkpoint, []

    def stop_after_the_second(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", stop_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, extractor, train, tuning, tmp_path, seed=5)
    other = replace(recipe, model={**recipe.model, "state_size": 8})
    with pytest.raises(ValueError, match="got another recipe"):
        pretrain(other, extractor, train, tuning, tmp_path, seed=5)
    result = pretrain(recipe, extractor, train, tuning, tmp_path, seed=5)
    assert (result["epochs"], result["resumed"]) == (3, True)


def test_what_reads_a_checkpoint_cuts_stays_where_training_did(stays, tmp_path):
    train, tuning, _, extractor = stays
    short = replace(RECIPE, max_length=40, finetune=Stage(epochs=1))
    reached = finetune(short, extractor, train, tuning, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == 40
    scores = score_stays(model, extractor, tuning, max_length=40)
    assert auroc(tuning.labels, scores) == pytest.approx(reached["auroc"])


def test_a_stage_that_was_stopped_ends_with_the_same_weights(stays, trained, tmp_path, monkeypatch):
    """Stopped after its first epoch and started again."""
    from transformers import Trainer

    train, tuning, _, extractor = stays
    save, saved = Trainer._save_checkpoint, []

    def stop_after_saving(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            pretrain(RECIPE, extractor, train, tuning, tmp_path / "forecast", seed=5)
    assert saved
    assert not (tmp_path / "forecast" / "training.json").exists()
    result = pretrain(RECIPE, extractor, train, tuning, tmp_path / "forecast", seed=5)
    assert result["resumed"]
    assert result["curve"] == trained[1]["curve"]
    weights = [(each / "forecast" / "model.safetensors").read_bytes() for each in (tmp_path, trained[0])]
    assert weights[0] == weights[1]


def test_auxiliary_outcomes_are_learnt_in_their_own_units(stays, tmp_path):
    train, tuning, _, extractor = stays
    days = np.where(np.arange(len(train)) % 3, 5.0, np.nan)
    once = replace(RECIPE, finetune=Stage(epochs=1))
    finetune(once, extractor, train, tuning, tmp_path / "out", auxiliary={"days": days})
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.auxiliary_outcomes == [{"name": "days", "mean": 5.0, "std": 1.0}]
    nothing = np.full(len(train), np.nan)
    with pytest.raises(ValueError, match="unknown of every training stay"):
        finetune(once, extractor, train, tuning, tmp_path / "none", auxiliary={"days": nothing})


def test_held_out_stays_keep_the_share_of_positives_and_no_subject_is_on_both_sides(stays):
    train = stays[0]
    kept, held = hold_out_stays(train, 0.3, seed=2)
    assert not set(kept.subject_ids) & set(held.subject_ids)
    assert len(kept) + len(held) == len(train)
    assert held.labels.sum() == round(0.3 * train.labels.sum())
    assert not np.array_equal(held.subject_ids, hold_out_stays(train, 0.3, seed=3)[1].subject_ids)


def test_a_recipe_is_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {hidden_size: 8}\npretrain: null\nfinetune: {epochs: 2}\nhorizons: [60, 120]\n")
    recipe = TripletRecipe.read(file)
    assert (recipe.name, recipe.pretrain, recipe.finetune.epochs, recipe.horizons) == ("mine", None, 2, (60, 120))
    assert TripletRecipe.from_dict(recipe.to_dict()) == recipe
    assert TripletRecipe.from_dict(RECIPE.to_dict()) == RECIPE


def test_a_recipe_on_a_base_says_only_what_differs(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "first.yaml").write_text(
        "model: {hidden_size: 8, state_size: 4}\npretrain: {epochs: 3}\nfinetune: {epochs: 5, patience: 2}\n"
    )
    (tmp_path / "second.yaml").write_text("base: first.yaml\nfinetune: {epochs: 7}\nhorizons: [60]\n")
    (tmp_path / "inner" / "third.yaml").write_text("base: ../second.yaml\nmodel: {state_size: 2}\npretrain: null\n")
    second, third = (TripletRecipe.read(tmp_path / name) for name in ("second.yaml", "inner/third.yaml"))
    assert (second.name, second.model) == ("second", {"hidden_size": 8, "state_size": 4})
    assert (second.pretrain.epochs, second.finetune.epochs, second.finetune.patience) == (3, 7, 2)
    assert (third.name, third.model, third.pretrain) == ("third", {"hidden_size": 8, "state_size": 2}, None)
    assert (third.finetune, third.horizons) == (second.finetune, (60,))


def test_bases_in_a_circle_or_nowhere_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml has itself as its base"):
        TripletRecipe.read(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"no recipe .*nowhere\.yaml"):
        TripletRecipe.read(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {hidden_size: 8}", "modle"),
        ("finetune: {epoch: 2}", "finetune has .*epoch"),
        ("finetune: 3", "finetune has 3"),
        ("finetune: {schedule: linear}", "schedule got 'linear'"),
        ("finetune: {keep: first}", "keep got 'first'"),
        ("- a", "holds list"),
        ("a: [", "is no YAML"),
        ("", "holds NoneType"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TripletRecipe.read(tmp_path / "recipe.yaml")


def test_what_cannot_be_trained_is_refused(stays, trained, tmp_path):
    train, tuning, other, extractor = stays
    with pytest.raises(ValueError, match="no recipe"):
        TripletRecipe.read(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="has no pretraining"):
        pretrain(replace(RECIPE, pretrain=None), extractor, train, tuning, tmp_path / "a")
    with pytest.raises(ValueError, match=r"has \['hiden_size'\]; expected fields of HyMaTEConfig"):
        pretrain(replace(RECIPE, model={"hiden_size": 8}), extractor, train, tuning, tmp_path / "a")
    living = train.subset(train.labels == 0)
    with pytest.raises(ValueError, match="train holds 0 positive"):
        finetune(RECIPE, extractor, living, tuning, tmp_path / "b")
    with pytest.raises(ValueError, match="have no labels"):
        hold_out_stays(replace(train, labels=None))
    with pytest.raises(ValueError, match="cannot be split"):
        hold_out_stays(train, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(trained[0] / "outcome")
    with pytest.raises(ValueError, match="batch_size"):
        score_stays(model, extractor, other, batch_size=0)
