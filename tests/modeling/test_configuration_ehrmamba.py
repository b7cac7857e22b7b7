import json

import pytest

from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig


def test_defaults_are_the_papers():
    config = EhrMambaConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.state_size, config.conv_kernel) == (768, 32, 16, 4)
    assert (config.expand, config.time_step_rank, config.intermediate_size) == (2, 48, 1536)
    assert (config.max_position_embeddings, config.time_embeddings_size, config.max_num_visits) == (2048, 32, 512)
    assert config.num_labels == 2
    assert config.tasks == []


def test_paper_size_has_137_million_parameters():
    import torch

    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM

    with torch.device("meta"):
        model = EhrMambaForCausalLM(EhrMambaConfig(vocab_size=10_000, type_vocab_size=9))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(137.1, abs=0.1)


def test_survives_saving(tmp_path):
    config = EhrMambaConfig(
        vocab_size=50,
        hidden_size=40,
        tasks=[{"name": "mortality_30d", "token": "[MOR_1M]", "log_odds_shift": 0.7}],
        class_weights=[1.0, 2.0],
        special_token_ids={"[VS]": 3},
    )
    config.set_token_types([0] * 10 + [5] * 40)
    config.save_pretrained(tmp_path)
    again = EhrMambaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.time_step_rank == 3
    assert again.token_types() == [0] * 10 + [5] * 40
    assert json.loads((tmp_path / "config.json").read_text())["token_type_runs"] == [[0, 0], [10, 5]]


def test_token_types_are_unknown_until_given():
    assert EhrMambaConfig().token_types() is None


def test_log_odds_shifts_add_sampling_and_class_weights():
    tasks = [{"name": "a", "log_odds_shift": 0.5}, {"name": "b"}]
    assert EhrMambaConfig(tasks=tasks).log_odds_shifts() == [0.5, 0.0]
    weighted = EhrMambaConfig(tasks=tasks, class_weights=[1.0, 2.718281828459045])
    assert weighted.log_odds_shifts() == pytest.approx([1.5, 1.0])


def test_interval_tokens_stand_for_the_middle_of_their_interval():
    """The tokens of design.md: weeks 0-3, months 0-12, long term."""
    assert len(INTERVAL_DAYS) == 4 + 13 + 1
    assert (INTERVAL_DAYS["[W_0]"], INTERVAL_DAYS["[W_3]"]) == (3.5, 24.5)
    assert (INTERVAL_DAYS["[M_0]"], INTERVAL_DAYS["[M_1]"], INTERVAL_DAYS["[M_12]"]) == (29.0, 45.0, 375.0)
    assert INTERVAL_DAYS["[LT]"] == 547.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: expected an integer of at least 1"),
        ({"conv_kernel": 0}, "conv_kernel=0"),
        ({"time_step_rank": "full"}, "time_step_rank='full'"),
        ({"time_step_rank": 0}, "time_step_rank=0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0: expected a probability in \[0, 1\)"),
        ({"classifier_dropout": -0.1}, "classifier_dropout=-0.1"),
        ({"time_step_min": 0.5}, "0 < time_step_min <= time_step_max"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"pad_token_id": 10_000}, "pad_token_id=10000"),
        ({"class_weights": [1.0]}, "class_weights has 1 values for num_labels=2"),
        ({"class_weights": [1.0, 0.0]}, "expected positive weights"),
        ({"tasks": [{"token": "[C0]"}]}, "has no 'name'"),
        ({"tasks": [{"name": "a", "log_odds_shift": float("inf")}]}, "log_odds_shift=inf of 'a'"),
        ({"token_type_runs": [[1, 2]]}, "the first one at id 0"),
        ({"token_type_runs": [[0, 2], [0, 3]]}, "rising ids"),
    ],
)
def test_refuses_values_no_model_could_be_built_from(fields, message):
    with pytest.raises(ValueError, match=message):
        EhrMambaConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "768"}, {"vocab_size": 1.5}, {"residual_in_fp32": "yes"}, {"hidden_act": "gelu"}]
)
def test_refuses_values_of_the_wrong_type_by_name(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        EhrMambaConfig(**fields)


@pytest.mark.parametrize(
    ("types", "message"),
    [([0] * 9, "got 9 types for vocab_size=10"), ([0] * 9 + [13], "types run from 0 to 13, expected 0 .. 12")],
)
def test_set_token_types_refuses(types, message):
    with pytest.raises(ValueError, match=message):
        EhrMambaConfig(vocab_size=10).set_token_types(types)
