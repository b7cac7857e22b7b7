import pytest

from ehrseq.modeling.configuration_hymate import HyMaTEConfig


def test_defaults_are_those_of_the_paper_and_its_sources():
    config = HyMaTEConfig()
    assert (config.num_variables, config.num_static, config.max_position_embeddings) == (37, 9, 1497)
    assert (config.num_mamba_layers, config.num_attention_layers, config.num_attention_heads) == (2, 1, 4)
    assert (config.state_size, config.conv_kernel, config.expand, config.time_step_rank) == (16, 4, 2, 2)
    assert (config.embedding_mode, config.classifier_head, config.num_horizons) == ("sum", "direct", 1)
    assert (config.hidden_dropout_prob, config.num_labels, config.tasks) == (0.2, 2, [])
    beyond_the_paper = (config.value_change_embedding, config.time_gap_embedding, config.auxiliary_outcomes)
    assert beyond_the_paper == (False, False, [])
    assert (config.variable_summaries, config.additive_summaries, config.forecast_from_last_value) == (False,) * 3


def test_derived_sizes():
    config = HyMaTEConfig(hidden_size=64)
    assert (config.intermediate_size, config.pooled_size, config.time_step_rank) == (128, 128, 4)
    assert config.num_hidden_layers == 3
    assert HyMaTEConfig(num_static=0).pooled_size == 32
    assert HyMaTEConfig(variable_summaries=True).pooled_size == 96
    assert HyMaTEConfig(variable_summaries=True, num_static=0).pooled_size == 64
    assert HyMaTEConfig(forecast_from_last_value=True).pooled_size == 64
    assert HyMaTEConfig(additive_summaries=True).pooled_size == 64


def test_survives_saving(tmp_path):
    config = HyMaTEConfig(
        num_variables=11,
        hidden_size=40,
        tasks=[{"name": "in_hospital_mortality", "log_odds_shift": 0.7}],
        class_weights=[1.0, 6.0],
        auxiliary_outcomes=[{"name": "length_of_stay", "mean": 13.0, "std": 12.0}, {"name": "saps1"}],
        embedding_mode="concat",
        variable_summaries=True,
        forecast_from_last_value=True,
    )
    config.save_pretrained(tmp_path)
    again = HyMaTEConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.variable_summaries, again.forecast_from_last_value) == (True, True)
    assert again.auxiliary_outcomes[1] == {"name": "saps1", "mean": 0.0, "std": 1.0}
    assert again.log_odds_shifts() == pytest.approx([0.7 + 1.791759])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_variables": 0}, "num_variables=0: expected an integer of at least 1"),
        ({"num_static": -1}, "num_static=-1: expected an integer of at least 0"),
        ({"num_mamba_layers": -1}, "num_mamba_layers=-1"),
        ({"hidden_size": 30}, "hidden_size=30 is no multiple of num_attention_heads=4"),
        ({"time_step_rank": "full"}, "time_step_rank='full'"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0: expected a probability in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1"),
        ({"additive_dropout": 1.0}, r"additive_dropout=1.0: expected a probability in \[0, 1\)"),
        ({"time_step_min": 0.5}, "0 < time_step_min <= time_step_max"),
        ({"embedding_mode": "binned", "time_gap_embedding": True}, "embedding_mode='binned' has no triplets"),
        ({"num_bins": 0}, "num_bins=0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"class_weights": [1.0]}, "class_weights has 1 values for num_labels=2"),
        ({"class_weights": [1.0, 0.0]}, "expected positive weights"),
        ({"tasks": [{"token": "[C0]"}]}, "has no 'name'"),
        ({"auxiliary_outcomes": [{"mean": 1.0}]}, "expected dicts with a name"),
        ({"auxiliary_outcomes": [{"name": "saps1", "std": 0.0}]}, "a positive std"),
        ({"auxiliary_loss_weight": -1.0}, "auxiliary_loss_weight=-1.0"),
    ],
)
def test_refuses_values_no_model_could_be_built_from(fields, message):
    with pytest.raises(ValueError, match=message):
        HyMaTEConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "32"},
        {"num_variables": 1.5},
        {"embedding_mode": "mean"},
        {"shuffle_order": "yes"},
        {"variable_summaries": "last"},
        {"additive_summaries": 0.5},
        {"forecast_from_last_value": 1.0},
    ],
)
def test_refuses_values_of_the_wrong_type_by_name(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        HyMaTEConfig(**fields)
