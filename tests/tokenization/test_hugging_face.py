"""The Hugging Face contract: saving, Auto classes, padding, collation, decoding, adding tasks."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding, DataCollatorWithPadding, Trainer, TrainingArguments

import ehrseq  # registers the class
from ehrseq.tokenization.ehr_plans import CHANNEL_DTYPES, CHANNELS
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.tokenization.timelines import at, event, fitted, table

LAB = "LAB//LOINC//1"
PATIENTS = [
    [event(-9000, "MEDS_BIRTH"), event(0, "VISIT_START//IMP", "a"), event(168, LAB, "a", numeric_value=1.0, unit="g")],
    [event(None, "GENDER//F"), event(0, LAB, numeric_value=2.0, unit="g"), event(400, "DIAGNOSIS//ICD10CM//I10.1")],
    [event(0, LAB)],
]
DICTS = [{"subject_id": k, "events": events} for k, events in enumerate(PATIENTS)]
TASKS = [{"name": "zeta", "token": "[Z]"}, {"name": "alpha", "token": "[A]"}]  # not in alphabetical order


@pytest.fixture(scope="module")
def tokenizer() -> EhrTokenizer:
    return fitted(*PATIENTS, tasks=TASKS, model_max_length=64, max_num_visits=16)


def same(one: EhrTokenizer, other: EhrTokenizer) -> None:
    """Equal in everything that decides about a row."""
    assert other.get_vocab() == one.get_vocab()
    assert list(other.task_tokens.items()) == list(one.task_tokens.items())
    assert other.tasks == one.tasks
    assert other.token_types == one.token_types
    assert other.model_max_length == one.model_max_length
    assert other.fitted_subjects_digest == one.fitted_subjects_digest
    assert other.special_tokens_map == one.special_tokens_map
    assert other.all_special_ids == one.all_special_ids
    for task in (None, *one.tasks):
        assert other(DICTS, task=task) == one(DICTS, task=task)
    assert other.encode_table(table(*PATIENTS)) == one.encode_table(table(*PATIENTS))


def test_a_saved_tokenizer_is_the_same(tokenizer: EhrTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert type(loaded) is EhrTokenizer
    same(tokenizer, loaded)
    loaded.save_pretrained(tmp_path / "second")
    same(tokenizer, EhrTokenizer.from_pretrained(tmp_path / "second"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = (json.loads((tmp_path / k / name).read_text()) for k in ("first", "second"))
        volatile = ("name_or_path", "is_local", "local_files_only")
        assert {k: v for k, v in first.items() if k not in volatile} == {
            k: v for k, v in second.items() if k not in volatile
        }


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((), "tokenizer.json and tokenizer_config.json are missing"),
        (("tokenizer.json",), "tokenizer_config.json is missing"),
        (("tokenizer_config.json",), "tokenizer.json is missing"),
    ],
)
def test_a_checkpoint_without_its_whole_tokenizer_says_what_is_missing(
    tokenizer: EhrTokenizer, tmp_path: Path, present: tuple[str, ...], message: str
) -> None:
    ehrseq.EhrMambaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "checkpoint")
    assert "tokenizer_class" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path / "whole")
    for name in present:
        (tmp_path / "checkpoint" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    for load in (AutoTokenizer.from_pretrained, EhrTokenizer.from_pretrained):
        with pytest.raises(ValueError, match=rf"checkpoint holds no whole EhrTokenizer: {message}. Save the tokenizer"):
            load(tmp_path / "checkpoint")


def test_what_is_saved_names_no_subject(tokenizer: EhrTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())["event_vocabulary"]
    assert not {"subjects", "subject_ids"} & set(stored)
    assert len(stored["fitted_subjects_digest"]) == 64


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"]
)
def test_copies(tokenizer: EhrTokenizer, duplicate) -> None:
    same(tokenizer, duplicate(tokenizer))


def test_special_token_attributes(tokenizer: EhrTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.cls_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert {"[VS]", "[VE]", "[REG]", "[LT]", "[Z]", "[A]"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.model_input_names == CHANNELS
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token is None


def test_decoding(tokenizer: EhrTokenizer) -> None:
    ids = tokenizer(DICTS[2])["input_ids"]
    assert tokenizer.decode(ids) == f"[CLS] [VS] {LAB} [VE] [REG]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == LAB
    assert tokenizer.batch_decode([ids]) == [tokenizer.decode(ids)]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    assert tokenizer.convert_tokens_to_ids("NO//SUCH") == tokenizer.unk_token_id


# -- padding and tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_every_channel_is_padded_with_zero(tokenizer: EhrTokenizer, side: str, kind: str) -> None:
    plain = tokenizer(DICTS)
    padded = tokenizer(DICTS, padding=True, padding_side=side, pad_to_multiple_of=8, return_tensors=kind)
    assert isinstance(padded, BatchEncoding)
    longest = max(map(len, plain["input_ids"]))
    width = -(-longest // 8) * 8
    for name in CHANNELS:
        values = np.asarray(padded[name])
        assert values.dtype == CHANNEL_DTYPES[name], name
        assert values.shape == (3, width)
        for row, raw in zip(values, plain[name], strict=True):
            body, rest = (row[width - len(raw) :], row[: width - len(raw)]) if side == "left" else (
                row[: len(raw)], row[len(raw) :]
            )  # fmt: skip
            np.testing.assert_array_equal(body, np.asarray(raw, values.dtype))
            assert not rest.any()
    assert np.asarray(padded["attention_mask"]).sum() == sum(map(len, plain["input_ids"]))


def test_one_patient_is_a_row_and_a_list_is_a_batch(tokenizer: EhrTokenizer) -> None:
    alone = tokenizer(DICTS[0])
    assert isinstance(alone["input_ids"][0], int)
    assert tokenizer([DICTS[0]])["input_ids"] == [alone["input_ids"]]
    assert tokenizer(DICTS[0], return_tensors="pt")["input_ids"].shape == (1, len(alone["input_ids"]))


def test_padding_to_a_fixed_length(tokenizer: EhrTokenizer) -> None:
    padded = tokenizer(DICTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    assert padded["times"].shape == (3, 20)
    assert padded["times"].dtype == torch.float32
    assert tokenizer(DICTS[0], padding="max_length", truncation=True)["input_ids"][-1] == 0
    assert len(tokenizer(DICTS[0], padding="max_length", truncation=True)["input_ids"]) == 64


def test_truncation_defaults_to_the_model_length() -> None:
    events = [event(k, LAB, "a") for k in range(100)]
    tokenizer = fitted(events, model_max_length=32)
    assert len(tokenizer({"events": events})["input_ids"]) == 104
    assert len(tokenizer({"events": events}, truncation=True)["input_ids"]) == 32
    assert len(tokenizer({"events": events}, max_length=16)["input_ids"]) == 16
    assert len(tokenizer({"events": events}, max_length=16, truncation=False)["input_ids"]) == 104


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_collator(tokenizer: EhrTokenizer, side: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    rows = [{**tokenizer(patient), "labels": k % 2, "task_ids": k} for k, patient in enumerate(DICTS)]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    expected = tokenizer(DICTS, padding=True, return_tensors="pt")
    for name in CHANNELS:
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["task_ids"].tolist() == [0, 1, 2]


def test_lazy_rows_go_through_the_collator(tokenizer: EhrTokenizer) -> None:
    import polars as pl

    labels = pl.DataFrame(
        {"subject_id": [1, 2, 3], "prediction_time": [at(500)] * 3, "boolean_value": [True, False, True]}
    )
    histories = tokenizer.encode_histories(table(*PATIENTS))
    index = histories.index_labels({"alpha": labels})
    batch = DataCollatorWithPadding(tokenizer)([histories.prompted_row(index, k, 64) for k in range(3)])
    expected = tokenizer(DICTS, task="alpha", prediction_time=at(500), padding=True, return_tensors="pt")
    for name in CHANNELS:
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["task_ids"].tolist() == [1, 1, 1]


def test_trainer_chooses_the_padding_collator(tokenizer: EhrTokenizer, tmp_path: Path) -> None:
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_keep_their_order(tokenizer: EhrTokenizer) -> None:
    assert tokenizer.tasks == ["zeta", "alpha"]
    assert tokenizer.task_tokens == {"zeta": "[Z]", "alpha": "[A]"}
    assert tokenizer.convert_tokens_to_ids(["[Z]", "[A]"]) == [len(tokenizer) - 2, len(tokenizer) - 1]


def test_the_order_of_tasks_survives_saving_and_loading_twice(tokenizer: EhrTokenizer, tmp_path: Path) -> None:
    grown = copy.deepcopy(tokenizer)
    for name in ("omega", "beta", "mid"):  # neither ascending nor descending
        grown.add_task(name)
    order = [("zeta", "[Z]"), ("alpha", "[A]"), ("omega", "[OMEGA]"), ("beta", "[BETA]"), ("mid", "[MID]")]
    loaded = grown
    for folder in ("first", "second"):
        loaded.save_pretrained(tmp_path / folder)
        # transformers sorts the keys of what it writes: the order must not stand in the keys of a mapping.
        stored = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())["event_vocabulary"]["tasks"]
        assert stored == [list(pair) for pair in order]
        loaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert list(loaded.task_tokens.items()) == order
        assert loaded.convert_tokens_to_ids([token for _, token in order]) == sorted(
            loaded.convert_tokens_to_ids(token) for _, token in order
        )


def test_a_task_can_be_added_later(tokenizer: EhrTokenizer, tmp_path: Path) -> None:
    grown = copy.deepcopy(tokenizer)
    before = len(grown)
    assert grown.add_task("beta") == "[BETA]"
    assert grown.add_task("gamma", "[G]") == "[G]"
    assert len(grown) == before + 2 == len(grown.token_types)
    assert grown.tasks == ["zeta", "alpha", "beta", "gamma"]
    assert grown(DICTS[2], task="gamma")["input_ids"][-1] == before + 1
    assert grown(DICTS[2])["input_ids"] == tokenizer(DICTS[2])["input_ids"]
    assert tokenizer.tasks == ["zeta", "alpha"], "a copy stands on its own"
    grown.save_pretrained(tmp_path)
    same(grown, AutoTokenizer.from_pretrained(tmp_path))
    for name, token in (("beta", "[B]"), ("delta", "[G]"), ("delta", "[CLS]"), ("delta", LAB)):
        with pytest.raises(ValueError, match="cannot be added"):
            grown.add_task(name, token)
