import math

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers import initialization as init

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehr_embeddings import segment_starts, time_differences
from ehrseq.modeling.ehrmamba_cache import EhrMambaCache
from ehrseq.modeling.modeling_ehrmamba import (
    EhrMambaForCausalLM,
    EhrMambaForSequenceClassification,
    EhrMambaModel,
)
from tests.modeling.common import ModelCommonTests, assert_close, collate, gradients, pack
from tests.modeling.naive_ehrmamba import naive_hidden_states

CHANNELS = ("input_ids", "token_type_ids", "times", "ages", "visit_orders", "visit_segments")


def tiny_config(**changes):
    fields = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "state_size": 5,
        "time_embeddings_size": 6,
        "max_num_visits": 16,
    }
    return EhrMambaConfig(**{**fields, **changes})


def random_patient(length, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high):
        return torch.randint(low, high, (length,), generator=generator)

    times = torch.rand(length, generator=generator).cumsum(0) * 3 + 100 * seed
    return {
        "input_ids": integers(1, 40),
        "token_type_ids": integers(0, 13),
        "times": times,
        "ages": 40 + times / 52,
        "visit_orders": integers(0, 16),
        "visit_segments": integers(0, 3),
    }


def lists(patient):
    return {
        name: values.double().tolist() if values.is_floating_point() else values.tolist()
        for name, values in patient.items()
    }


class TestEhrMamba(ModelCommonTests):
    model_classes = {
        "base": EhrMambaModel,
        "causal": EhrMambaForCausalLM,
        "classifier": EhrMambaForSequenceClassification,
    }

    def config(self, **changes):
        return tiny_config(**changes)

    def patients(self):
        return [random_patient(length, seed) for seed, length in enumerate([7, 1, 13, 4, 2])]


def model_of(kind="base", **changes):
    return TestEhrMamba().model(kind, **changes)


# -- against the naive twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 2}, {"expand": 1}, {"conv_kernel": 6, "state_size": 1}])
def test_equals_the_naive_float64_loop(changes):
    model = model_of(**changes)
    for patient in (random_patient(19, 3), random_patient(1, 4)):
        with torch.no_grad():
            actual = model(**collate([patient])).last_hidden_state[0]
        expected = naive_hidden_states(model.state_dict(), model.config, lists(patient))
        assert_close(actual, expected, 2e-5, "hidden states")


def test_float64_equals_the_naive_loop_to_rounding():
    model, patient = model_of().double(), random_patient(30, 5)
    patient = {name: v.double() if v.is_floating_point() else v for name, v in patient.items()}
    with torch.no_grad():
        actual = model(**collate([patient])).last_hidden_state[0]
    assert_close(actual, naive_hidden_states(model.state_dict(), model.config, lists(patient)), 1e-12, "float64")


def test_gradients_equal_those_of_the_naive_loop():
    model, patient = model_of().double(), random_patient(9, 6)
    patient = {name: v.double() if v.is_floating_point() else v for name, v in patient.items()}
    probe = torch.randn(9, 24, dtype=torch.float64)
    actual = gradients(model, (model(**collate([patient])).last_hidden_state[0] * probe).sum())
    naive_weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    (naive_hidden_states(naive_weights, model.config, lists(patient)) * probe).sum().backward()
    for name, weight in naive_weights.items():
        assert_close(actual[name], weight.grad, 1e-9, name)


def test_hidden_states_are_embeddings_then_blocks_then_the_normed_end():
    model = model_of()
    outputs = model(**collate([random_patient(5, 1)]), output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.mark.parametrize(("wide", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_of_a_bfloat16_model_stays_float32_if_asked(wide, dtype):
    model = model_of(residual_in_fp32=wide).to(torch.bfloat16)
    outputs = model(**collate([random_patient(5, 1)]), output_hidden_states=True)
    assert {states.dtype for states in outputs.hidden_states[1:-1]} == {dtype}
    assert outputs.last_hidden_state.dtype == torch.bfloat16


# -- time differences --------------------------------------------------------------------------------------------------


def test_time_differences_start_at_zero_under_either_padding():
    times = torch.tensor([[5.0, 7.0, 10.0, 0.0, 0.0], [0.0, 0.0, 5.0, 7.0, 10.0]])
    real = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    differences = time_differences(times, real)
    assert differences[0, :3].tolist() == differences[1, 2:].tolist() == [0.0, 2.0, 3.0]


def test_time_differences_restart_with_every_packed_sequence():
    segments = torch.tensor([[1, 1, 2, 2, 2, 3, 0]])
    times = torch.tensor([[5.0, 7.0, 1.0, 2.0, 4.0, 9.0, 0.0]])
    differences = time_differences(times, segments > 0, segment_starts(segments))
    assert differences[0, :6].tolist() == [0.0, 2.0, 0.0, 1.0, 2.0, 0.0]


def test_time_differences_go_on_from_the_last_time_of_each_row():
    times = torch.tensor([[5.0, 7.0], [5.0, 7.0]])
    differences = time_differences(times, last_times=torch.tensor([4.0, float("nan")]))
    assert differences.tolist() == [[1.0, 2.0], [0.0, 2.0]]


def test_integer_times_are_weeks_too():
    assert time_differences(torch.tensor([[3, 4213]])).tolist() == [[0.0, 4210.0]]


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 17, [16, 1], [1, 16], [5, 1, 1, 7, 3], [2, 15], [17]])
def test_any_chunks_equal_the_whole_pass(chunks):
    model, patient = model_of(), random_patient(17, 7)
    batch = collate([patient, random_patient(17, 8)])
    with torch.no_grad():
        whole = model(**batch, use_cache=True)
        cache, parts, start = None, [], 0
        for size in chunks:
            piece = {name: values[:, start : start + size] for name, values in batch.items()}
            outputs = model(**piece, cache_params=cache, use_cache=True)
            cache, start = outputs.cache_params, start + size
            parts.append(outputs.last_hidden_state)
    assert_close(torch.cat(parts, dim=1), whole.last_hidden_state, 1e-5, "outputs")
    assert_same_state(cache, whole.cache_params)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_chunks_equal_whole_passes(side):
    """Each call brings another number of new events a row, padded on either side, and for some rows none."""
    model = model_of()
    patients = [random_patient(length, seed) for seed, length in enumerate([9, 4, 12])]
    counts = [[3, 0, 5], [0, 1, 1], [4, 2, 0], [2, 1, 6]]
    cache, outputs = None, [[], [], []]
    starts = [0, 0, 0]
    with torch.no_grad():
        for sizes in counts:
            new = [
                {name: v[start : start + size] for name, v in patient.items()}
                for patient, start, size in zip(patients, starts, sizes, strict=True)
            ]
            batch = collate(new, side)
            result = model(**batch, cache_params=cache, use_cache=True)
            cache = result.cache_params
            for row, size in enumerate(sizes):
                outputs[row].append(result.last_hidden_state[row][batch["attention_mask"][row] == 1])
                starts[row] += size
        for row, patient in enumerate(patients):
            whole = model(**collate([patient]), use_cache=True)
            assert_close(torch.cat(outputs[row]), whole.last_hidden_state[0], 1e-5, f"row {row}")
            assert_same_state(cache.select([row]), whole.cache_params)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prefill_keeps_the_state_at_the_last_real_token(side):
    model = model_of()
    patients = [random_patient(length, seed) for seed, length in enumerate([6, 1, 11, 2])]
    with torch.no_grad():
        padded = model(**collate(patients, side, length=14), use_cache=True).cache_params
        for row, patient in enumerate(patients):
            assert_same_state(padded.select([row]), model(**collate([patient]), use_cache=True).cache_params)


def test_padding_tokens_leave_a_state_exactly_as_it_is():
    model, patient = model_of(), random_patient(6, 2)
    with torch.no_grad():
        cache = model(**collate([patient]), use_cache=True).cache_params
        before = cache.clone()
        nothing = {name: torch.zeros(1, 4, dtype=values.dtype) for name, values in patient.items()}
        model(**nothing, attention_mask=torch.zeros(1, 4), cache_params=cache, use_cache=True)
    assert torch.equal(cache.ssm_states, before.ssm_states)
    assert torch.equal(cache.conv_states, before.conv_states)
    assert torch.equal(cache.last_times, before.last_times)


def test_the_state_does_not_grow_with_the_history():
    model = model_of()
    sizes = set()
    for length in (1, 5, 60):
        cache = model(**collate([random_patient(length, 1)]), use_cache=True).cache_params
        sizes.add((cache.conv_states.shape, cache.ssm_states.shape, cache.last_times.shape))
    assert sizes == {((3, 1, 48, 3), (3, 1, 48, 5), (1,))}


def test_caches_can_be_selected_batched_and_cloned():
    model = model_of()
    patients = [random_patient(length, seed) for seed, length in enumerate([5, 8, 3])]
    new = collate([random_patient(2, seed + 20) for seed in range(3)])
    with torch.no_grad():
        single = [model(**collate([patient]), use_cache=True).cache_params for patient in patients]
        merged = EhrMambaCache.batch(single)
        kept = merged.clone()
        together = model(**new, cache_params=merged, use_cache=True).last_hidden_state
        for row, cache in enumerate(single):
            alone = model(**{k: v[row : row + 1] for k, v in new.items()}, cache_params=cache, use_cache=True)
            assert_close(together[row], alone.last_hidden_state[0], 1e-5, f"row {row}")
        twisted = kept.select([2, 0, 0])
        order = torch.tensor([2, 0, 0])
        again = model(**{k: v[order] for k, v in new.items()}, cache_params=twisted).last_hidden_state
    assert_close(again, together[order], 1e-5, "selected rows")


def test_without_use_cache_a_given_state_is_read_but_not_moved():
    model, patient = model_of("classifier"), random_patient(6, 2)
    first = {name: v[:5] for name, v in patient.items()}
    prompt = collate([{name: v[5:] for name, v in patient.items()}])
    with torch.no_grad():
        cache = model(**collate([first]), use_cache=True).cache_params
        scores = [model(**prompt, cache_params=cache).logits for _ in range(2)]
        assert torch.equal(*scores)
        assert_close(scores[0], model(**collate([patient])).logits, 1e-5, "logits")


def test_a_bfloat16_model_keeps_the_scan_state_in_float32():
    model = model_of().to(torch.bfloat16)
    cache = model(**collate([random_patient(4, 1)]), use_cache=True).cache_params
    assert cache.ssm_states.dtype == cache.last_times.dtype == torch.float32
    assert cache.conv_states.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.select([3]), "rows must lie in 0 .. 1"),
        (lambda cache: cache.select([[0]]), "flat list"),
        (lambda cache: EhrMambaCache.batch([]), "at least one"),
        (lambda cache: EhrMambaCache.batch([cache, EhrMambaCache(tiny_config(state_size=4), 1)]), "different sizes"),
    ],
)
def test_cache_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(EhrMambaCache(tiny_config(), 2))


def assert_same_state(actual, expected):
    assert_close(actual.ssm_states, expected.ssm_states, 1e-5, "ssm_states")
    assert_close(actual.conv_states, expected.conv_states, 1e-5, "conv_states")
    assert torch.equal(actual.last_times, expected.last_times)


# -- initialisation ----------------------------------------------------------------------------------------------------


def paper_model():
    return EhrMambaForCausalLM(tiny_config(hidden_size=96, vocab_size=300, max_num_visits=100, num_hidden_layers=2))


def check_paper_initialisation(model):
    embeddings, d = model.model.embeddings, model.config.hidden_size
    assert not embeddings.word_embeddings.weight[0].any()
    for weight in (
        embeddings.word_embeddings.weight[1:],
        embeddings.visit_order_embeddings.weight,
        model.lm_head.weight,
    ):
        assert weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert embeddings.projection.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not embeddings.projection.bias.any()
    k = model.config.time_embeddings_size
    for part in (embeddings.time_embeddings.w, embeddings.age_embeddings.phi):
        assert 0 < part.abs().max().item() <= math.sqrt(6 / (1 + k))
    for block in model.model.layers:
        mixer = block.mixer
        e = mixer.D.shape[0]
        for weight, fan_in in ((mixer.in_proj.weight, d), (mixer.x_proj.weight, e), (mixer.out_proj.weight, e)):
            bound = 1 / math.sqrt(fan_in)  # Kaiming-uniform with a = sqrt(5)
            assert weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        step = torch.nn.functional.softplus(mixer.dt_proj.bias)
        assert 0.001 * 0.999 <= step.min().item() < 0.005
        assert 0.03 < step.max().item() <= 0.1 * 1.001
        expected = torch.arange(1.0, model.config.state_size + 1).log().expand(e, -1)
        torch.testing.assert_close(mixer.A_log.data, expected)
        assert torch.equal(mixer.D.data, torch.ones(e))
        assert torch.equal(block.norm.weight.data, torch.ones(d))


def test_starts_from_the_papers_initialisation():
    check_paper_initialisation(paper_model())


def weight_of_history(model):
    """Spread of the last hidden state, beside its size, over patients whose last eight tokens are the same."""
    torch.manual_seed(3)
    input_ids = torch.randint(1, 300, (32, 60))
    input_ids[:, -8:] = 7
    with torch.no_grad():
        last = model.eval()(input_ids=input_ids).last_hidden_state[:, -1]
    return (last.std(0).square().mean() / last.square().mean()).sqrt().item()


def test_history_first_starts_from_the_history():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1}
    steps = {"time_step_min": 0.03, "time_step_max": 0.3}
    model = EhrMambaModel(tiny_config(initialization="history_first", **sizes, **steps))
    assert weight_of_history(model) > 50 * weight_of_history(EhrMambaModel(tiny_config(**sizes)))
    assert not model.embeddings.word_embeddings.weight[0].any()
    with pytest.raises(Exception, match="initialization"):
        tiny_config(initialization="random")


def test_history_first_lets_concepts_move_fast_and_time_stay_quiet():
    torch.manual_seed(0)
    config = tiny_config(initialization="history_first", vocab_size=3000, hidden_size=64, initializer_range=0.05)
    embeddings = EhrMambaModel(config).embeddings
    concepts, projection = embeddings.word_embeddings.weight[1:], embeddings.projection.weight
    assert concepts.std().item() == pytest.approx(0.05, rel=0.05)
    assert projection[:, :64].std().item() == pytest.approx(1.0, rel=0.05)
    assert projection[:, 64:].std().item() == pytest.approx(0.005, rel=0.1)


def test_history_first_leaves_a_checkpoint_alone(tmp_path):
    model = EhrMambaForCausalLM(tiny_config(initialization="history_first"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = EhrMambaForSequenceClassification.from_pretrained(tmp_path)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name


def test_weights_that_a_checkpoint_lacks_are_initialised_not_left_as_garbage(tmp_path):
    model = paper_model()
    model.save_pretrained(tmp_path, state_dict={"model.norm_f.weight": torch.full((96,), 3.0)})
    loaded = EhrMambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm_f.weight.data, torch.full((96,), 3.0))
    check_paper_initialisation(loaded)


def test_loaded_weights_survive_a_second_initialisation():
    model = paper_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with init.guard_torch_init_functions():
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


# -- heads and losses --------------------------------------------------------------------------------------------------


def test_next_token_loss_leaves_padding_out_and_honours_num_items():
    model, patients = model_of("causal"), [random_patient(6, 1), random_patient(3, 2)]
    losses = []
    for patient in patients:
        logits = model(**collate([patient])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], patient["input_ids"][1:], reduction="sum"))
    batch = collate(patients)
    total = sum(losses)
    assert_close(model(**batch, labels=batch["input_ids"]).loss, total / 7, 1e-6, "mean over the 5 + 2 targets")
    marked = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert_close(model(**batch, labels=marked).loss, total / 7, 1e-6, "labels of -100")
    assert_close(model(**batch, labels=marked, num_items_in_batch=28).loss, total / 28, 1e-6, "num_items_in_batch")


def test_logits_to_keep_computes_only_the_end():
    model, batch = model_of("causal"), collate([random_patient(6, 1)])
    whole, kept = model(**batch).logits, model(**batch, logits_to_keep=2).logits
    # The last bit may differ: matrices of another height are multiplied in another order on some CPUs.
    torch.testing.assert_close(kept, whole[:, -2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_trainer_accumulates_gradients_to_those_of_one_batch(kind, tmp_path):
    """Rows of different length: the causal loss must be divided by all targets, the classifier's by all rows."""
    patients = [random_patient(length, seed) for seed, length in enumerate([9, 3, 6, 2])]
    rows = [{name: v[row] for name, v in collate(patients).items()} for row in range(4)]
    for row, values in enumerate(rows):
        ids, mask = values["input_ids"], values["attention_mask"]
        values["labels"] = ids.masked_fill(mask == 0, -100) if kind == "causal" else torch.tensor(row % 2)
        values["task_ids"] = torch.tensor(row)
    weights = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = model_of(kind, hidden_dropout_prob=0.0, classifier_dropout=0.0)
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            label_names=["labels", "task_ids"],
        )
        Trainer(model=model, args=args, train_dataset=rows).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    start = dict(model_of(kind).named_parameters())
    for name, weight in weights[0].items():
        assert_close(weights[1][name] - start[name], weight - start[name], 1e-3, name)


def test_classifier_loss_is_cross_entropy_and_ignores_task_ids():
    model, batch = model_of("classifier"), collate([random_patient(6, 1), random_patient(3, 2)])
    labels = torch.tensor([1, 0])
    plain = model(**batch, labels=labels)
    log_odds = plain.logits[:, 1] - plain.logits[:, 0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, labels.float())
    assert_close(plain.loss, expected, 1e-6, "binary cross-entropy of the difference")
    assert torch.equal(model(**batch, labels=labels, task_ids=torch.tensor([4, 0])).loss, plain.loss)
    assert torch.equal(model(**batch, labels=labels.bool()).loss, plain.loss)


def test_class_weights_weigh_the_loss_and_shift_the_scores_back():
    batch, labels = collate([random_patient(6, 1), random_patient(3, 2)]), torch.tensor([1, 0])
    model = model_of("classifier", class_weights=[1.0, 4.0])
    outputs = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 4.0]))
    assert_close(outputs.loss, expected, 1e-6, "loss")
    odds = torch.exp(outputs.logits[:, 1] - outputs.logits[:, 0]) / 4.0
    assert_close(model.risk_scores(outputs.logits), odds / (1 + odds), 1e-5, "scores")


def test_risk_scores_take_back_each_tasks_shift():
    tasks = [{"name": "a", "log_odds_shift": 0.0}, {"name": "b", "log_odds_shift": 1.5}, {"name": "c"}]
    model = EhrMambaForSequenceClassification(tiny_config(tasks=tasks))
    logits = torch.tensor([[0.2, 1.2], [0.2, 1.2], [0.0, 0.0]])
    scores = model.risk_scores(logits, torch.tensor([0, 1, 2]))
    expected = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(0.5)), 0.5]
    assert scores.tolist() == pytest.approx(expected)
    packed = model.risk_scores(logits[None], torch.tensor([[0, 1, -100]]))
    assert packed[0, :2].tolist() == pytest.approx(expected[:2])


# -- bad input ---------------------------------------------------------------------------------------------------------


def with_(**changes):
    def change(batch):
        return {**batch, **{name: value(batch) if callable(value) else value for name, value in changes.items()}}

    return change


def put(name, value):
    def changed(batch):
        values = batch[name].clone()
        values[0, 2] = value
        return values

    return with_(**{name: changed})


BAD_INPUTS = {
    "a short channel": (with_(times=lambda b: b["times"][:, :-1]), r"times has shape \[2, 5\], expected \[2, 6\]"),
    "a mask of one row": (with_(attention_mask=torch.ones(1, 6)), r"attention_mask has shape \[1, 6\]"),
    "an unknown token": (put("input_ids", 40), "input_ids holds values from .* to 40, expected 0 .. 39"),
    "a negative token": (put("input_ids", -1), "input_ids holds values from -1"),
    "an unknown type": (put("token_type_ids", 13), "type_vocab_size=13"),
    "a visit too many": (put("visit_orders", 16), "max_num_visits=16"),
    "a segment too many": (put("visit_segments", 3), "visit_segment_size=3"),
    "a time that is not a number": (put("times", float("nan")), "times holds NaN or infinite"),
    "an infinite age": (put("ages", float("inf")), "ages holds NaN or infinite"),
    "neither ids nor embeddings": (with_(input_ids=None), "exactly one of input_ids and inputs_embeds"),
    "both ids and embeddings": (with_(inputs_embeds=torch.zeros(2, 6, 24)), "exactly one of"),
    "no tokens": (lambda b: {"input_ids": b["input_ids"][:, :0]}, "no tokens"),
    "flat ids": (lambda b: {"input_ids": b["input_ids"][0]}, r"expected \[batch, tokens\]"),
    "segments in the wrong order": (with_(segment_ids=torch.tensor([[2, 2, 1, 1, 0, 0]] * 2)), r"segment_ids of row 0"),
    "a segment in two pieces": (
        with_(segment_ids=torch.tensor([[1, 1, 2, 2, 1, 1]] * 2)),
        "each sequence in one piece",
    ),
    "a state of another batch": (with_(cache_params=EhrMambaCache(tiny_config(), 3)), "holds 3 rows, the inputs 2"),
    "packing with a state": (
        with_(segment_ids=torch.ones(2, 6, dtype=torch.long), cache_params=EhrMambaCache(tiny_config(), 2)),
        "no single state",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_model_refuses(change, message):
    batch = collate([random_patient(6, 1), random_patient(4, 2)])
    with pytest.raises(ValueError, match=message):
        model_of()(**change(batch))


def test_classifier_refuses_rows_without_a_token_and_labels_that_do_not_fit():
    model, batch = model_of("classifier"), collate([random_patient(6, 1), random_patient(4, 2)])
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ValueError, match=r"Rows \[1\] hold padding only"):
        model(**{**batch, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"labels have shape \[3\]"):
        model(**batch, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="packs 2 sequences, labels have room for 1"):
        model(**pack([random_patient(2, 1), random_patient(3, 2)]), labels=torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("logits", "task_ids", "message"),
    [
        (torch.zeros(2, 3), None, "got 3 classes"),
        (torch.zeros(2, 2), None, "give task_ids"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "task id 2, but config.tasks has 2"),
        (torch.zeros(2, 2), torch.tensor([0]), "do not match rows"),
    ],
)
def test_risk_scores_refuse(logits, task_ids, message):
    tasks = [{"name": "a", "log_odds_shift": 0.0}, {"name": "b", "log_odds_shift": 1.0}]
    model = EhrMambaForSequenceClassification(tiny_config(tasks=tasks))
    with pytest.raises(ValueError, match=message):
        model.risk_scores(logits, task_ids)
