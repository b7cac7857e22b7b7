"""Recipes by name and by file: what is packaged, what `--set` changes, what is refused early."""

from __future__ import annotations

import json

import pytest

from ehrseq.benchmark import Budget
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.modeling.ehr_time_head import DEFAULT_TIME_EDGES
from ehrseq.training import PromptRecipe, Stage, TripletRecipe, list_recipes, read_recipe
from ehrseq.training.prompts import context_of, rows_to_see


@pytest.mark.parametrize("name", [name for name, _, _ in list_recipes()])
def test_every_named_recipe_can_be_trained(name):
    recipe = read_recipe(name)
    family = {entry[0]: entry[1] for entry in list_recipes()}[name]
    assert isinstance(recipe, {"ehrmamba": PromptRecipe, "hymate": TripletRecipe}[family])
    assert recipe.description
    assert type(recipe).from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("budget", ["quick", "simulated", "simulated_long", "full"])
def test_the_recipes_of_the_benchmark_are_its_budgets(budget):
    """Model and tokens of `ehrseq benchmark`'s EhrMamba, which this recipe trains alone."""

    class Tokenizer:
        vocabulary = None

        def __len__(self) -> int:
            return 100

    known, recipe = Budget.read(budget), read_recipe(f"ehrmamba_{budget}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ehrseq.modeling.configuration_ehrmamba.EhrMambaConfig.update_from_tokenizer", lambda *_: None)
        config = SYSTEMS["ehrmamba"].config(known, Tokenizer(), [])
    for name, value in recipe.model.items():
        assert getattr(config, name) == value, name
    assert recipe.pretrain.tokens == known.pretrain_tokens
    assert recipe.shared.tokens + recipe.finetune.tokens == known.finetune_tokens
    assert (recipe.pretrain.learning_rate, recipe.finetune.learning_rate) == (
        known.pretrain_rate,
        known.finetune_rates[0],
    )
    assert (recipe.pretrain.batch_size, recipe.shared.batch_size) == (known.batch_rows, known.batch_rows // 4)
    assert recipe.finetune_splits == known.finetune_splits
    assert recipe.max_rows_per_task == known.max_rows_per_task


def test_a_file_stands_on_a_named_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\nmodel: {hidden_size: 32}\nfinetune: {learning_rate: 1e-4}\n")
    recipe, demo = read_recipe(tmp_path / "mine.yaml"), read_recipe("demo")
    assert recipe.name == "mine"
    assert (recipe.model["hidden_size"], recipe.model["state_size"]) == (32, demo.model["state_size"])
    assert recipe.finetune.learning_rate == 1e-4  # YAML takes it for a word
    assert recipe.finetune.rows == demo.finetune.rows


def test_values_are_set_one_by_one():
    changes = ["finetune.learning_rate=1e-4", "finetune.gradient_accumulation_steps=2", "shared=null", "weight_decay=0"]
    changes += ["finetune.num_train_epochs=3", "tasks=[mortality_30d]", "model.num_hidden_layers=2"]
    recipe = read_recipe("demo", changes)
    assert recipe.finetune.learning_rate == 1e-4
    assert recipe.finetune.arguments == {"gradient_accumulation_steps": 2}
    assert recipe.finetune.epochs == 3
    assert recipe.shared is None
    assert (recipe.pretrain.weight_decay, recipe.finetune.weight_decay) == (0, 0)
    assert recipe.tasks == ("mortality_30d",)
    assert recipe.model["num_hidden_layers"] == 2
    assert read_recipe("demo").tasks is None


@pytest.mark.parametrize(
    ("limits", "rows"),
    [({}, 100), ({"epochs": 2}, 200), ({"epochs": 6, "rows": 90}, 90), ({"tokens": 500}, 50), ({"epochs": 0.5}, 50)],
)
def test_a_stage_ends_at_its_nearest_limit(limits, rows):
    class Rows:
        lengths = [10] * 100

        def __len__(self) -> int:
            return 100

    assert rows_to_see(Stage(**{"epochs": None, **limits}), Rows()) == rows
    assert rows_to_see(Stage(**{"epochs": None, **limits}, arguments={"max_steps": 1}), Rows()) == min(rows, 32)


def test_the_context_is_the_models():
    assert context_of(read_recipe("demo")) == 96
    assert context_of(PromptRecipe("plain")) == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["pretrain_splits=[held_out]"], "pretrain_splits got"),
        (["finetune.rows=0"], "rows got 0; expected a whole number of at least 1"),
        (["max_rows_per_task=some"], "max_rows_per_task got 'some'"),
        (["finetune.output_dir=x"], "the command names the folder"),
        (["model=x"], r"model\.KEY"),
        (["model.hidden_size=-1"], "model of the recipe 'demo'"),
        (["finetune.learning_rate={"], "which is no value"),
        (["time_head=3"], "time_head got 3; expected true or false"),
        (["model.time_edges=[1, 2]"], "time_edges"),
        (["follow_up=soon"], "'soon' is no ISO 8601"),
        (["follow_up=3"], "follow_up got 3"),
    ],
)
def test_what_no_recipe_has_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("demo", changes)


def test_a_time_head_and_the_end_of_the_data_are_asked_for_by_name():
    plain = read_recipe("demo")
    assert (plain.time_head, plain.follow_up) == (False, None)
    assert plain.model_fields == dict(plain.model)
    recipe = read_recipe("demo", ["time_head=true", "follow_up=2024-12-31"])
    assert recipe.follow_up == "2024-12-31"  # YAML takes it for a date
    assert recipe.model_fields["time_edges"] == list(DEFAULT_TIME_EDGES)
    assert PromptRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert read_recipe("demo", ["time_head=true", "model.time_edges=[0, 1, 7]"]).model_fields["time_edges"] == [0, 1, 7]
    assert read_recipe("demo", ["follow_up=labels"]).follow_up == "labels"


def test_hymate_counts_epochs():
    with pytest.raises(ValueError, match="counted in epochs"):
        read_recipe("hymate_quick", ["pretrain.rows=3"])
