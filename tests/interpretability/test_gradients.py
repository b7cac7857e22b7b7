"""Integrated gradients and gradient x input: their equations in float64 on small random models of every family, against
finite differences, and what must not change them: padding, packing, kernel backends, batches of points.
"""

import builtins
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ehrseq.hub.checkpoints import Checkpoint, load_checkpoint
from ehrseq.interpretability import gradient_times_input, integrated_gradients, random_contributions, read_question
from ehrseq.interpretability.gradient_integrals import integrate_gradients, with_noise
from ehrseq.interpretability.gradients import (
    EVENT_BASELINES,
    Line,
    event_line,
    gradient_times_way,
    ready_for_gradients,
    row_log_odds,
    stay_line,
)
from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay
from tests.interpretability.small_models import batch, packed, packed_parts, patients, real_parts, small_model
from tests.modeling.test_modeling_ehr_lstm import tiny_config

FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird", "hymate")
CASES = [
    *((family, {}) for family in FAMILIES),
    ("hymate", {"variable_summaries": True, "additive_summaries": True}),
    ("hymate", {"value_change_embedding": True, "time_gap_embedding": True, "embedding_mode": "concat"}),
    ("hymate", {"embedding_mode": "binned", "num_bins": 5}),
    ("hymate", {"forecast_from_last_value": True, "classifier_head": "via_forecast"}),
]
UNKNOWN = 1
TYPES = [0, 11, *[2] * 5, *[5, 6, 7, 9] * 8, 1]  # of the ids of a vocabulary of 40


def model_of(family, dtype=torch.float64, **changes):
    """A random classifier; one of events minds its codes as a trained one does, not as a new one."""
    if family == "ehr_lstm":
        torch.manual_seed(0)
        model = EhrLstmForSequenceClassification(tiny_config(**changes)).eval()
    else:
        model = small_model(family, torch.float32, **changes)
    if family != "hymate":
        with torch.no_grad():
            model.get_input_embeddings().weight[1:] *= 20
            for parameter in model.classifier.parameters():
                parameter *= 8
    return model.to(dtype)


def line_of(family, model, inputs, baseline="padding", parts=("values",)):
    if family == "hymate":
        return stay_line(model, inputs, parts)
    moves = inputs["token_type_ids"] % 3 > 0  # some tokens are held
    return event_line(model, inputs, moves, baseline, TYPES, UNKNOWN)


def contributions(family, model, inputs, nodes=64, **options):
    with ready_for_gradients("test", model) as ready:
        line = line_of(family, ready, inputs)
        return integrate_gradients(ready, line, 0, nodes, **options)


def differences(model, line):
    """F(x) - F(x') of each row."""
    with torch.no_grad():
        end, start = (row_log_odds(model, {**part, **line.held}, 0) for part in (line.end, line.start))
    return end - start


# -- completeness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_contributions_sum_to_the_difference_and_the_remainder_falls_with_the_nodes(family, changes):
    model = model_of(family, **changes)
    inputs = batch(family, patients(family, (23, 11)))
    errors = {}
    with ready_for_gradients("test", model):
        line = line_of(family, model, inputs)
        difference = differences(model, line)
        assert float(difference.abs().min()) > 1e-3
        for nodes in (1, 4, 16, 64):
            total = integrate_gradients(model, line, 0, nodes).sum(1)
            errors[nodes] = float(((total - difference) / difference).abs().max())
    assert errors[64] <= 0.01, errors
    assert errors[64] < errors[4] < errors[1], errors


@pytest.mark.parametrize("baseline", EVENT_BASELINES)
def test_every_baseline_is_met(baseline):
    model = model_of("ehrmamba")
    inputs = batch("ehrmamba", patients("ehrmamba", (23,)))
    line = line_of("ehrmamba", model, inputs, baseline)
    with ready_for_gradients("test", model):
        values = integrate_gradients(model, line, 0, 64)
    assert_close(values.sum(1), differences(model, line), rtol=1e-3, atol=1e-6)
    moves = inputs["token_type_ids"] % 3 > 0
    assert (values[~moves] == 0).all()
    assert (values[moves] != 0).all()


def test_the_baselines_are_what_they_say():
    model = model_of("ehrmamba")
    inputs = batch("ehrmamba", patients("ehrmamba", (23,)))
    weight = model.get_input_embeddings().weight.detach()
    events = [i for i, kind in enumerate(TYPES) if kind >= 5 and i != UNKNOWN]
    stands = {"padding": weight[0], "unknown": weight[1], "mean": weight[events].mean(0)}
    for place in range(23):
        kind = int(inputs["token_type_ids"][0, place])
        same = [i for i in events if TYPES[i] == kind]
        own = weight[same].mean(0) if same else weight[events].mean(0)
        for baseline in EVENT_BASELINES:
            start = line_of("ehrmamba", model, inputs, baseline).start["inputs_embeds"][0, place]
            if kind % 3 == 0:
                assert_close(start, weight[inputs["input_ids"][0, place]])
            else:
                assert_close(start, {**stands, "structure": own}[baseline])


def test_times_of_triplets_may_be_moved_as_well():
    model = model_of("hymate")
    inputs = batch("hymate", patients("hymate", (23, 9)))
    line = line_of("hymate", model, inputs, parts=("values", "times"))
    assert set(line.start) == {"values", "times"}
    with ready_for_gradients("test", model):
        values = integrate_gradients(model, line, 0, 64)
    assert_close(values.sum(1), differences(model, line), rtol=1e-4, atol=1e-6)


def test_a_channel_that_a_model_does_not_read_contributes_nothing():
    model = model_of("hymate", embedding_mode="value")
    inputs = batch("hymate", patients("hymate", (9,)))
    with ready_for_gradients("test", model):
        values = integrate_gradients(model, line_of("hymate", model, inputs, parts=("times",)), 0, 8)
    assert (values == 0).all()


# -- against finite differences ----------------------------------------------------------------------------------------


def naive_gradients(model, line, share, step=1e-6):
    """(x - x') . dF/dx of every token at one point of the line, one coordinate after the other."""
    found = torch.zeros(line.shape, dtype=torch.float64)
    for name, end in line.end.items():
        way = end - line.start[name]
        point = line.start[name] + share * way
        flat = point.flatten()
        for place in way.flatten().nonzero().flatten().tolist():
            sides = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[place] += sign * step
                others = {n: line.start[n] + share * (e - line.start[n]) for n, e in line.end.items()}
                with torch.no_grad():
                    inputs = {**others, name: moved.view(point.shape), **line.held}
                    sides.append(float(row_log_odds(model, inputs, 0)[0]))
            slope = (sides[0] - sides[1]) / (2 * step)
            token = place // (way[0, 0].numel() if way.dim() > 2 else 1)
            found[0, token] += way.flatten()[place] * slope
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_at_the_nodes_give_the_same(family):
    small = {"hidden_size": 8} if family != "hymate" else {}
    model = model_of(family, **small)
    inputs = batch(family, patients(family, (6,)))
    line = line_of(family, model, inputs)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    expected = sum(w / 2 * naive_gradients(model, line, (1 + x) / 2) for x, w in zip(nodes, weights, strict=True))
    with ready_for_gradients("test", model):
        assert_close(integrate_gradients(model, line, 0, 3), expected, rtol=1e-5, atol=1e-8)
        assert_close(gradient_times_way(model, line, 0), naive_gradients(model, line, 1.0), rtol=1e-5, atol=1e-8)
    assert float(expected.abs().max()) > 1e-4


# -- what must not change them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_packing_and_batch_change_nothing(family):
    model, rows = model_of(family), patients(family)
    alone = [contributions(family, model, batch(family, [row]), 8)[0] for row in rows]
    for side in ("right", "left"):
        found = contributions(family, model, batch(family, rows, side, length=27), 8)
        for part, one in zip(real_parts(found, rows, side), alone, strict=True):
            assert_close(part, one, rtol=1e-7, atol=1e-10)
    found = contributions(family, model, packed(family, rows), 8)
    for part, one in zip(packed_parts(found, rows), alone, strict=True):
        assert_close(part, one, rtol=1e-7, atol=1e-10)
    in_pieces = contributions(family, model, packed(family, rows), 8, tokens_at_once=1)
    assert_close(in_pieces, found, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", ["ehrmamba", "hymate"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 5e-4)])
def test_every_kernel_backend_gives_the_same(family, dtype, tolerance, monkeypatch):
    from ehrseq.kernels import cpu_library

    rows, found = patients(family), {}
    for backend in ("naive", "torch", "cpp"):
        if backend == "cpp" and cpu_library.why_no_library():
            continue
        monkeypatch.setenv("EHRSEQ_BACKEND", backend)
        found[backend] = contributions(family, model_of(family, dtype), packed(family, rows, dtype), 4)
    scale = float(found["naive"].abs().max())
    for backend, values in found.items():
        assert_close(values, found["naive"], rtol=tolerance, atol=tolerance * scale, msg=backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_computed_in_float32_and_the_model_stays_as_it_was(family):
    rows = patients(family)
    half = model_of(family, torch.bfloat16)
    same = copy.deepcopy(half).float()
    inputs = batch(family, rows, dtype=torch.float32)
    expected = contributions(family, same, inputs, 4)
    half.train()
    found = contributions(family, half, inputs, 4)
    assert found.dtype == torch.float32
    assert_close(found, expected)
    assert half.training
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.bfloat16 for p in half.parameters())


# -- of questions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints():
    folder = Path(__file__).parents[1] / "checkpoints"
    return {family: load_checkpoint(folder / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def question(request, checkpoints):
    return question_of(checkpoints[request.param])


def question_of(checkpoint, **changes):
    model = checkpoint.model
    patient = make_stay(1) if model.config.model_type == "hymate" else make_patient(3)
    return read_question(checkpoint, patient, model.config.tasks[0]["name"], **changes)


def test_an_explanation_names_events_and_adds_up(question):
    told = integrated_gradients(question)
    assert told.log_odds == pytest.approx(question.log_odds().item(), abs=1e-5)
    assert abs(told.remainder) <= 0.01 * abs(told.log_odds - told.baseline) + 1e-5
    table = told.contributions
    of_events = table["event"].is_not_null()
    assert of_events.any()
    assert (table.filter(~of_events)["contribution"] == 0).all()
    assert told.settings["nodes"] >= 64
    assert told.method == "integrated_gradients"


def test_a_cliff_on_the_way_is_met_by_more_nodes(checkpoints):
    question = read_question(checkpoints["ehr_lstm"], make_patient(4), "mortality_30d")
    shares = {}
    for tolerance in (None, 0.01):
        told = integrated_gradients(question, tolerance=tolerance)
        shares[told.settings["nodes"]] = abs(told.remainder / (told.log_odds - told.baseline))
    assert shares[64] > 0.1
    assert shares.pop(max(shares)) <= 0.01
    assert len(shares) == 1


def test_several_baselines_are_averaged(checkpoints):
    question = question_of(checkpoints["ehrmamba"])
    names = list(EVENT_BASELINES)
    each = [integrated_gradients(question, name, nodes=8) for name in names]
    mean = integrated_gradients(question, names, nodes=8)
    expected = np.mean([one.contributions["contribution"].to_numpy() for one in each], axis=0)
    np.testing.assert_allclose(mean.contributions["contribution"], expected, atol=1e-6)
    assert mean.baseline == pytest.approx(np.mean([one.baseline for one in each]))
    assert all(EVENT_BASELINES[name] in mean.baseline_name for name in names)


def test_marks_of_visits_contribute_where_they_are_asked_for(checkpoints):
    question = question_of(checkpoints["ehrmamba"])
    table = integrated_gradients(question, over=("events", "structure"), nodes=8).contributions
    marks = table.filter(kind="structure")["contribution"]
    assert len(marks) > 0
    assert (marks != 0).any()
    assert (table.filter(kind="question")["contribution"] == 0).all()


def test_noise_is_drawn_by_its_seed_and_told(question):
    one, same, other = (integrated_gradients(question, noise=3, seed=seed, nodes=4) for seed in (1, 1, 2))
    assert one.contributions.equals(same.contributions)
    assert not one.contributions.equals(other.contributions)
    assert one.settings["seed"] == 1
    assert one.settings["noise"] == 3
    quiet = integrated_gradients(question, noise=2, noise_share=1e-7, nodes=4)
    still = integrated_gradients(question, nodes=4)
    np.testing.assert_allclose(quiet.contributions["contribution"], still.contributions["contribution"], atol=1e-4)


def test_noise_has_the_size_of_its_share():
    start = {"inputs_embeds": torch.zeros(1, 400, 8, dtype=torch.float64)}
    end = {"inputs_embeds": torch.ones(1, 400, 8, dtype=torch.float64) * 2}
    end["inputs_embeds"][:, 200:] = 0.0  # these are held
    noisy = with_noise(Line(start, end, {}), 0.25, torch.Generator().manual_seed(0))
    moved = noisy.end["inputs_embeds"] - end["inputs_embeds"]
    assert (moved[:, 200:] == 0).all()
    assert float(moved[:, :200].std()) == pytest.approx(0.5, rel=0.05)


def test_random_contributions_sum_to_the_risk_and_depend_on_the_seed(question):
    one, same, other = (random_contributions(question, seed=seed) for seed in (0, 0, 1))
    assert abs(one.remainder) < 1e-5
    assert one.contributions.equals(same.contributions)
    assert not one.contributions.equals(other.contributions)


def test_gradient_times_input_has_no_sum(question):
    told = gradient_times_input(question)
    assert told.contributions["contribution"].is_finite().all()
    assert (told.contributions["contribution"] != 0).any()
    assert told.remainder == pytest.approx(told.log_odds - told.baseline - told.total)


@pytest.mark.parametrize("method", [integrated_gradients, gradient_times_input, random_contributions])
def test_where_the_task_does_not_apply_there_is_a_reason_and_nothing_else(method, checkpoints):
    question = replace(question_of(checkpoints["ehrmamba"]), reason="died_before_prediction")
    told = method(question)
    assert told.reason == "died_before_prediction"
    assert np.isnan(told.score)
    assert told.contributions.is_empty()


@pytest.mark.parametrize("method", [integrated_gradients, gradient_times_input, random_contributions])
def test_a_question_of_inference_mode_can_be_explained(method, checkpoints):
    with torch.inference_mode():
        inside = method(question_of(checkpoints["ehrmamba"]))
    outside = method(question_of(checkpoints["ehrmamba"]))
    np.testing.assert_allclose(inside.contributions["contribution"], outside.contributions["contribution"], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("ehrmamba", {"baseline": "zero"}, "baseline got 'zero'; .* has .*'unknown', 'mean', 'structure'"),
        ("ehrmamba", {"baseline": ()}, r"baseline got \(\)"),
        ("ehrmamba", {"baseline": ("mean", "mean")}, "each at most once"),
        ("hymate", {"baseline": "padding"}, r"has \['mean'\]"),
        ("ehrmamba", {"over": "values"}, r"over got 'values'; .* has \['events', 'structure'\]"),
        ("hymate", {"over": ("events",)}, r"has \['values', 'times'\]"),
        ("hymate", {"over": ()}, "name at least one"),
        ("ehrmamba", {"nodes": 0}, "nodes got 0; expected a whole number of at least 1"),
        ("ehrmamba", {"nodes": 2.5}, "nodes got 2.5"),
        ("ehrmamba", {"noise": -1}, "noise got -1"),
        ("ehrmamba", {"noise": True}, "noise got True"),
        ("ehrmamba", {"noise_share": 0.0}, "noise_share got 0.0; expected a number above 0"),
        ("ehrmamba", {"tolerance": 0.0}, "tolerance got 0.0"),
        ("ehrmamba", {"seed": -3}, "seed got -3"),
    ],
)
def test_bad_settings_are_told(family, settings, message, checkpoints):
    with pytest.raises(ValueError, match=message):
        integrated_gradients(question_of(checkpoints[family]), **settings)


@pytest.mark.parametrize("method", [integrated_gradients, gradient_times_input, random_contributions])
def test_more_classes_than_two_are_told(method, checkpoints):
    question = question_of(checkpoints["ehrmamba"])
    model = copy.deepcopy(question.checkpoint.model)
    model.config.num_labels = 3
    with pytest.raises(ValueError, match="has 3 classes, expected 2"):
        method(replace(question, checkpoint=Checkpoint(model, question.checkpoint.encoder)))


def test_without_captum_the_error_names_the_extra(checkpoints, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "ehrseq\[explain\]"'):
        integrated_gradients(question_of(checkpoints["ehrmamba"]))
