"""The carried state of the full models: exact over any cut of a history, and saved, restored, batched, reordered."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehrmamba_cache import EhrMambaCache
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaForSequenceClassification
from tests.modeling.common import assert_close, collate
from tests.properties import examples


def make_model(kind, layers=4, width=40, **changes):
    torch.manual_seed(0)
    config = EhrMambaConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=16,
        time_embeddings_size=8,
        max_num_visits=32,
        **changes,
    )
    return {"causal": EhrMambaForCausalLM, "classifier": EhrMambaForSequenceClassification}[kind](config).eval()


MODELS = {kind: make_model(kind) for kind in ("causal", "classifier")}


def make_patient(length, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(high):
        return torch.randint(0, high, (length,), generator=generator)

    times = torch.rand(length, generator=generator).cumsum(0) * 5 + 300 * seed
    return {
        "input_ids": 1 + integers(49),
        "token_type_ids": integers(13),
        "times": times,
        "ages": 40 + times / 52,
        "visit_orders": integers(32),
        "visit_segments": integers(3),
    }


def part(patient, start, stop):
    return {name: values[start:stop] for name, values in patient.items()}


def prefill(model, *patients, side="right"):
    with torch.no_grad():
        return model(**collate(list(patients), side), use_cache=True).cache_params


# -- exactness ---------------------------------------------------------------------------------------------------------


@examples(30, derandomize=True)
@given(st.data())
def test_a_history_cut_anywhere_and_padded_anyhow_equals_the_whole_pass(data):
    """Several patients, each cut into pieces of any size, 0 and 1 included; every call pads on a side of its own."""
    model = MODELS["causal"]
    rows = data.draw(st.integers(1, 3), "rows")
    calls = data.draw(st.integers(1, 5), "calls")
    sizes = [[data.draw(st.sampled_from([0, 1, 1, 2, 5, 16, 17, 40])) for _ in range(rows)] for _ in range(calls)]
    sizes.append([1] * rows)
    patients = [make_patient(sum(call[row] for call in sizes), 10 + row) for row in range(rows)]
    cache, logits, starts = None, [[] for _ in patients], [0] * rows
    with torch.no_grad():
        for call in sizes:
            side = data.draw(st.sampled_from(["left", "right"]), "side")
            pieces = [part(p, s, s + size) for p, s, size in zip(patients, starts, call, strict=True)]
            batch = collate(pieces, side, length=max(1, *call) + data.draw(st.sampled_from([0, 3]), "more"))
            outputs = model(**batch, cache_params=cache, use_cache=True)
            cache = outputs.cache_params
            for row, size in enumerate(call):
                logits[row].append(outputs.logits[row][batch["attention_mask"][row] == 1])
                starts[row] += size
        for row, patient in enumerate(patients):
            whole = model(**collate([patient]), use_cache=True)
            assert_close(torch.cat(logits[row]), whole.logits[0], 1e-5, f"logits of row {row}")
            for name in ("conv_states", "ssm_states", "last_times"):
                own = getattr(cache.select([row]), name)
                assert_close(own, getattr(whole.cache_params, name), 1e-5, f"{name} of row {row}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_thirty_two_blocks_stay_exact(side):
    """The paper's depth: rounding must not add up over the blocks."""
    model = make_model("causal", layers=32, width=32)
    patients = [make_patient(90, 1), make_patient(61, 2)]
    cuts = [(0, 50), (50, 57), *((n, n + 1) for n in range(57, 61)), (61, 90)]
    cache, logits = None, [[], []]
    with torch.no_grad():
        whole = model(**collate(patients, side), use_cache=True)
        for start, stop in cuts:
            batch = collate([part(patient, start, stop) for patient in patients], side)
            outputs = model(**batch, cache_params=cache, use_cache=True)
            cache = outputs.cache_params
            for row in range(2):
                logits[row].append(outputs.logits[row][batch["attention_mask"][row] == 1])
        real = collate(patients, side)["attention_mask"].bool()
    for row in range(2):
        assert_close(torch.cat(logits[row]), whole.logits[row][real[row]], 1e-5, f"logits of row {row}")
    assert_close(cache.ssm_states, whole.cache_params.ssm_states, 1e-5, "states")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_risk_after_a_cached_history_is_that_of_the_whole(side):
    model, patients = MODELS["classifier"], [make_patient(33, 1), make_patient(20, 2), make_patient(7, 3)]
    cache = prefill(model, *(part(p, 0, len(p["input_ids"]) - 3) for p in patients), side=side)
    new = collate([part(p, len(p["input_ids"]) - 3, None) for p in patients])
    with torch.no_grad():
        continued = model(**new, cache_params=cache).logits
        assert_close(continued, model(**collate(patients, side)).logits, 1e-5, "logits")


# -- saved and restored ------------------------------------------------------------------------------------------------


def assert_equal(actual, expected):
    for name in ("conv_states", "ssm_states", "last_times"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
    assert actual.seen_tokens == expected.seen_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_state_is_restored_bit_for_bit(tmp_path, dtype):
    model = make_model("causal").to(dtype)
    cache = prefill(model, make_patient(9, 1), make_patient(4, 2))
    cache.select([1, 0]).save(tmp_path / "new" / "state.safetensors")  # a view in another order
    assert_equal(EhrMambaCache.load(tmp_path / "new" / "state.safetensors", model.config), cache.select([1, 0]))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["state.safetensors"]


def test_a_restored_state_goes_on_where_it_stopped(tmp_path):
    model, patient = MODELS["causal"], make_patient(30, 1)
    prefill(model, part(patient, 0, 21)).save(tmp_path / "state.safetensors")
    cache = EhrMambaCache.load(tmp_path / "state.safetensors")
    with torch.no_grad():
        continued = model(**collate([part(patient, 21, 30)]), cache_params=cache, use_cache=True).logits[0]
        assert_close(continued, model(**collate([patient])).logits[0, 21:], 1e-5, "logits")


def test_a_row_without_tokens_keeps_its_unknown_time(tmp_path):
    cache = EhrMambaCache(MODELS["causal"].config, 2)
    cache.save(tmp_path / "empty")
    assert EhrMambaCache.load(tmp_path / "empty").last_times.isnan().all()


def test_the_file_is_as_large_after_a_long_history_as_after_a_short_one(tmp_path):
    sizes = set()
    for length in (1, 12, 300):
        prefill(MODELS["causal"], make_patient(length, 1)).save(tmp_path / "state")
        sizes.add(os.path.getsize(tmp_path / "state") // 64)  # the number of tokens stands in the header
    assert len(sizes) == 1


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    cache = prefill(MODELS["causal"], make_patient(5, 1))
    cache.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ehrseq.modeling.ehrmamba_cache.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        prefill(MODELS["causal"], make_patient(9, 1)).save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_many_patients_states_join_split_and_change_places(tmp_path):
    """As a ward would: one state a patient on disk, all advanced at once, each put back."""
    model, patients = MODELS["causal"], [make_patient(length, seed) for seed, length in enumerate([11, 3, 26, 8], 1)]
    for number, patient in enumerate(patients):
        prefill(model, part(patient, 0, -1 + len(patient["input_ids"]))).save(tmp_path / str(number))
    ward = EhrMambaCache.batch([EhrMambaCache.load(tmp_path / str(number)) for number in range(4)])
    ward.reorder_cache(torch.tensor([2, 0, 3, 1]))
    newest = collate([part(patients[number], -1 + len(patients[number]["input_ids"]), None) for number in (2, 0, 3, 1)])
    with torch.no_grad():
        logits = model(**newest, cache_params=ward, use_cache=True).logits[:, -1]
        for row, number in enumerate((2, 0, 3, 1)):
            whole = model(**collate([patients[number]]), use_cache=True)
            assert_close(logits[row], whole.logits[0, -1], 1e-5, f"patient {number}")
            assert_close(ward.select([row]).ssm_states, whole.cache_params.ssm_states, 1e-5, f"state {number}")


# -- bad input ---------------------------------------------------------------------------------------------------------


def write_damaged(file):
    EhrMambaCache(MODELS["causal"].config, 1).save(file)
    file.write_bytes(file.read_bytes()[:-40])


def write_mismatched(file):
    tensors = {"conv_states": torch.zeros(2, 1, 8, 3), "ssm_states": torch.zeros(2, 2, 8, 4)}
    save_file(tensors | {"last_times": torch.zeros(1)}, file, metadata={"format": "ehrmamba-cache-1"})


BAD_FILES = {
    "absent": (lambda file: None, FileNotFoundError, "There is no file"),
    "text": (lambda file: file.write_text("hello"), ValueError, "damaged or no safetensors"),
    "empty": (lambda file: file.write_bytes(b""), ValueError, "damaged or no safetensors"),
    "cut": (write_damaged, ValueError, "damaged or no safetensors"),
    "weights": (lambda file: save_file({"a": torch.zeros(2)}, file), ValueError, r"holds \['a'\] in format None"),
    "tensors of two states": (write_mismatched, ValueError, "do not belong together"),
}


@pytest.mark.parametrize(("write", "error", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_hold_no_state(tmp_path, write, error, message):
    write(tmp_path / "state")
    with pytest.raises(error, match=message):
        EhrMambaCache.load(tmp_path / "state")


def test_a_state_of_another_model_is_refused(tmp_path):
    other = make_model("causal", layers=3, width=48)
    cache = EhrMambaCache(other.config, 1)
    cache.save(tmp_path / "state")
    message = r"num_hidden_layers 3 \(the model has 4\), intermediate_size 96 \(the model has 80\)"
    with pytest.raises(ValueError, match=message):
        EhrMambaCache.load(tmp_path / "state", MODELS["causal"].config)
    with pytest.raises(ValueError, match=message):
        MODELS["causal"](**collate([make_patient(2, 1)]), cache_params=cache)
    with pytest.raises(ValueError, match="models of different sizes"):
        EhrMambaCache.batch([cache, EhrMambaCache(MODELS["causal"].config, 1)])
    with pytest.raises(ValueError, match="differ in dtype or device"):
        EhrMambaCache.batch([cache, cache.to(dtype=torch.bfloat16)])
