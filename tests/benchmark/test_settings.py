"""Budgets and systems: what a table is made of."""

import pytest
import yaml

from ehrseq.benchmark.budget import BUDGETS, Budget
from ehrseq.benchmark.systems import SYSTEMS, choose_systems
from tests.benchmark.cohorts import FIELDS, write_budget

PAPER_ROWS = {"xgboost", "lstm", "cehrbert", "bigbird", "multibird", "ehrmamba"}


class Tokenizer:
    """As much of a tokenizer as a configuration asks for."""

    token_types = [0, 1, 2, 3, 8, *[5] * 20]
    pad_token_id = 0

    def __len__(self):
        return len(self.token_types)

    def get_vocab(self):
        return {"[PAD]": 0, "[CLS]": 1, "[VS]": 2, "[VE]": 3, "[REG]": 4}


def test_every_row_of_the_papers_table_is_there():
    assert set(SYSTEMS) >= PAPER_ROWS
    assert not SYSTEMS["bigbird"].multitask
    assert SYSTEMS["multibird"].multitask
    assert SYSTEMS["ehrmamba"].multitask
    assert {SYSTEMS[name].objective for name in ("xgboost", "lstm")} == {None}
    assert {SYSTEMS[name].objective for name in ("cehrbert", "bigbird", "multibird")} == {"mlm"}


def test_the_full_budget_has_the_papers_sizes():
    budget = Budget.read("full")
    made = {name: SYSTEMS[name].config(budget, Tokenizer(), []) for name in SYSTEMS if SYSTEMS[name].neural}
    assert {config.hidden_size for config in made.values()} == {768}
    assert {name: config.num_hidden_layers for name, config in made.items()} == {
        "lstm": 6,
        "cehrbert": 6,
        "bigbird": 6,
        "multibird": 6,
        "ehrmamba_single": 32,
        "ehrmamba": 32,
    }
    assert made["cehrbert"].max_position_embeddings == 512
    assert {made[name].max_position_embeddings for name in made if name != "cehrbert"} == {2048}
    assert (made["cehrbert"].num_attention_heads, made["cehrbert"].intermediate_size) == (8, 3072)
    assert (made["bigbird"].num_attention_heads, made["bigbird"].intermediate_size) == (12, 3072)
    assert (made["ehrmamba"].state_size, made["ehrmamba"].initialization) == (16, "paper")
    assert made["lstm"].direction_size == 384
    assert budget.finetune_splits == ("train",)


@pytest.mark.parametrize("name", BUDGETS)
def test_packaged_budgets_are_readable_and_can_be_written(name):
    budget = Budget.read(name)
    assert budget.name == name
    assert yaml.safe_load(yaml.safe_dump(budget.to_dict()))["finetune_rates"] == list(budget.finetune_rates)


def test_a_file_is_a_budget(tmp_path):
    budget = Budget.read(write_budget(tmp_path))
    assert (budget.name, budget.num_trials, budget.finetune_splits) == ("tiny", 1, ("pretrain", "train"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size got 0"),
        ({"num_layers": 1.5}, "num_layers got 1.5"),
        ({"context": 8}, "context got 8; expected a whole number of at least 16"),
        ({"finetune_tokens": True}, "finetune_tokens got True"),
        ({"max_rows_per_task": 0}, "max_rows_per_task got 0"),
        ({"pretrain_rate": 2}, "learning rates got"),
        ({"finetune_rates": []}, "learning rates got"),
        ({"finetune_rates": [0.01] * 9}, "at most 8 are tried"),
        ({"finetune_splits": ["held_out"]}, "finetune_splits got"),
        ({"depth": 3}, r"unknown \['depth'\]"),
    ],
)
def test_refuses_budgets_that_are_none(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Budget.read(write_budget(tmp_path, **change))


def test_refuses_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="budget got 'large'; expected one of"):
        Budget.read("large")
    file = tmp_path / "b.yaml"
    file.write_text("hidden_size: [")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        Budget.read(file)
    file.write_text(yaml.safe_dump({name: value for name, value in FIELDS.items() if name != "context"}))
    with pytest.raises(ValueError, match=r"fields missing \['context'\]"):
        Budget.read(file)


@pytest.mark.parametrize("names", [["gru"], [], ["lstm", "lstm"]])
def test_refuses_systems_that_are_none(names):
    with pytest.raises(ValueError, match="models got"):
        choose_systems(names)
