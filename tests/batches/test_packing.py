"""Packed batches: who is where, and that packing changes no output, no gradient, no training step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from ehrseq.batches.collation import DataCollatorForNextToken, DataCollatorForPrompts
from ehrseq.batches.packing import (
    DataCollatorForPackedNextToken,
    DataCollatorForPackedPrompts,
    PackableRows,
    evaluation_order,
    pack_channels,
    pack_lengths,
)
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaForSequenceClassification
from tests.properties import examples

CHANNELS = ["input_ids", "attention_mask", "token_type_ids", "times", "ages", "visit_orders", "visit_segments"]
TOKENIZER = SimpleNamespace(model_input_names=CHANNELS, padding_side="right")
CONTEXT = 16


def make_row(length, seed):
    rng = np.random.default_rng(seed)
    times = rng.random(length).cumsum().astype(np.float32) + 10 * seed
    return {
        "input_ids": rng.integers(1, 40, length),
        "attention_mask": np.ones(length, np.int64),
        "token_type_ids": rng.integers(0, 13, length),
        "times": times,
        "ages": 40 + times / 52,
        "visit_orders": rng.integers(0, 16, length),
        "visit_segments": rng.integers(0, 3, length),
        "labels": np.int64(seed % 2),
        "task_ids": np.int64(seed % 3),
    }


ROWS = [make_row(length, seed) for seed, length in enumerate([5, 14, 1, 7, 3, 9, 16, 2])]


def make_model(kind):
    torch.manual_seed(0)
    config = EhrMambaConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        time_embeddings_size=6,
        max_num_visits=16,
        hidden_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    return {"causal": EhrMambaForCausalLM, "classifier": EhrMambaForSequenceClassification}[kind](config)


COLLATORS = {
    "causal": (DataCollatorForNextToken(TOKENIZER), DataCollatorForPackedNextToken(TOKENIZER, CONTEXT)),
    "classifier": (DataCollatorForPrompts(TOKENIZER), DataCollatorForPackedPrompts(TOKENIZER, CONTEXT)),
}


# -- the plan ----------------------------------------------------------------------------------------------------------


@examples(200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(60, 200))
def test_every_sequence_stands_in_one_row_that_holds_it(lengths, max_length):
    plan = pack_lengths(lengths, max_length)
    assert sorted(position for row in plan for position in row) == list(range(len(lengths)))
    loads = [sum(lengths[position] for position in row) for row in plan]
    assert max(loads) <= max_length
    assert all(row == sorted(row) for row in plan)
    assert [row[0] for row in plan] == sorted(row[0] for row in plan)
    # First fit leaves at most one row half empty.
    assert len(plan) <= max(1, np.ceil(2 * sum(lengths) / max_length))


@pytest.mark.parametrize(
    ("lengths", "max_length", "plan"),
    [
        ([4], 4, [[0]]),
        ([4, 4, 4], 4, [[0], [1], [2]]),
        ([1, 2, 3, 4], 10, [[0, 1, 2, 3]]),
        ([10, 2, 2], 12, [[0], [1, 2]]),  # even rows, where first-fit makes one of 12 and one of 2
        ([5, 5, 4, 3, 3], 10, [[0, 1], [2, 3, 4]]),  # even rows would hold 9 and 11
    ],
)
def test_plans_worked_out_by_hand(lengths, max_length, plan):
    assert pack_lengths(lengths, max_length) == plan


def test_rows_of_a_usual_batch_are_full():
    """Lognormal lengths, median 200, mean 336, as of real histories: next to no padding."""
    rng, filled, tokens = np.random.default_rng(0), 0, 0
    for _ in range(50):
        lengths = np.clip(np.exp(np.log(200) + 1.02 * rng.standard_normal(32)), 8, 2048).astype(int)
        plan = pack_lengths(lengths, 2048)
        filled += len(plan) * max(int(lengths[row].sum()) for row in plan)
        tokens += int(lengths.sum())
    assert tokens / filled > 0.95


# -- the batches -------------------------------------------------------------------------------------------------------


def test_packed_channels_hold_each_row_once_and_nothing_else():
    rows = [PackableRows(ROWS)[row] for row in range(len(ROWS))]
    batch = DataCollatorForPackedPrompts(TOKENIZER, CONTEXT, pad_to_multiple_of=8)(rows)
    plan = pack_lengths([len(row["input_ids"]) for row in ROWS], CONTEXT)
    assert batch["input_ids"].shape == (len(plan), 16)
    assert batch["labels"].shape == batch["task_ids"].shape == (len(plan), max(map(len, plan)))
    for number, positions in enumerate(plan):
        for segment, position in enumerate(positions, start=1):
            here = batch["segment_ids"][number] == segment
            for name in CHANNELS:
                assert torch.equal(batch[name][number, here], torch.as_tensor(ROWS[position][name])), name
            assert batch["labels"][number, segment - 1] == ROWS[position]["labels"]
            assert batch["task_ids"][number, segment - 1] == ROWS[position]["task_ids"]
        nobody = batch["segment_ids"][number] == 0
        assert all(not batch[name][number, nobody].any() for name in CHANNELS)
        assert (batch["labels"][number, len(positions) :] == -100).all()
    dtypes = {name: batch[name].dtype for name in batch}
    assert dtypes.pop("times") == dtypes.pop("ages") == torch.float32
    assert set(dtypes.values()) == {torch.int64}


def test_targets_are_counted_as_in_padded_batches():
    """Trainer divides by the labels that are not -100, from the second column on."""
    padded, packed = (collate(list(PackableRows(ROWS))) for collate in COLLATORS["causal"])
    expected = sum(len(row["input_ids"]) - 1 for row in ROWS)
    assert int(padded["labels"][:, 1:].ne(-100).sum()) == int(packed["labels"][:, 1:].ne(-100).sum()) == expected


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_rows_without_the_mark_are_padded_as_ever(kind):
    padding, packing = COLLATORS[kind]
    expected, actual = padding(ROWS), packing(ROWS)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_packed_outputs_and_gradients_equal_padded_ones(kind):
    padding, packing = COLLATORS[kind]
    model, results = make_model(kind), []
    padded, packed = padding(ROWS), packing(list(PackableRows(ROWS)))
    for batch in (padded, packed):
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        results.append((outputs, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (by_padding, expected), (by_packing, actual) = results
    torch.testing.assert_close(by_packing.loss, by_padding.loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for number, positions in enumerate(pack_lengths([len(row["input_ids"]) for row in ROWS], CONTEXT)):
        for segment, position in enumerate(positions, start=1):
            if kind == "classifier":
                found, wanted = by_packing.logits[number, segment - 1], by_padding.logits[position]
            else:
                found = by_packing.logits[number, packed["segment_ids"][number] == segment]
                wanted = by_padding.logits[position, : len(found)]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# -- under the unmodified Trainer --------------------------------------------------------------------------------------


def arguments(folder, kind, **options):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        label_names=["labels"] if kind == "causal" else ["labels", "task_ids"],
        **options,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_trainer_makes_the_same_steps_and_evaluations_with_packing(kind, accumulation, tmp_path):
    ends, evaluations = [], []
    for collator in COLLATORS[kind]:
        seen = []
        trainer = Trainer(
            model=make_model(kind),
            args=arguments(tmp_path, kind, max_steps=3, gradient_accumulation_steps=accumulation),
            train_dataset=PackableRows(ROWS) if collator is COLLATORS[kind][1] else ROWS,
            eval_dataset=ROWS[:5],
            data_collator=collator,
            compute_metrics=lambda prediction, seen=seen: seen.append(prediction) or {},
        )
        trainer.train()
        evaluations.append((trainer.evaluate()["eval_loss"], seen[0].predictions, seen[0].label_ids))
        ends.append(dict(trainer.model.named_parameters()))
    start = dict(make_model(kind).named_parameters())
    for name, weight in ends[0].items():
        moved, expected = ends[1][name] - start[name], weight - start[name]
        assert (moved - expected).abs().max() <= 1e-3 * expected.abs().max(), name
    (loss, logits, labels), (other_loss, other_logits, other_labels) = evaluations
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert np.asarray(other_logits).shape == np.asarray(logits).shape
    assert np.array_equal(np.asarray(other_labels), np.asarray(labels))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_order_of_evaluation_is_trainers_own(strategy, tmp_path):
    lengths = [len(row["input_ids"]) for row in ROWS]
    seen = []
    trainer = Trainer(
        model=make_model("classifier"),
        args=arguments(tmp_path, "classifier", train_sampling_strategy=strategy, max_steps=1),
        train_dataset=ROWS,
        eval_dataset=[row | {"task_ids": position} for position, row in enumerate(ROWS)],
        data_collator=COLLATORS["classifier"][0],
        processing_class=SimpleNamespace(model_input_names=CHANNELS),
        compute_metrics=lambda prediction: seen.append(prediction.label_ids[1]) or {},
    )
    trainer.evaluate()
    assert evaluation_order(lengths, trainer.args).tolist() == seen[0].tolist()
    assert (strategy == "random") == (seen[0].tolist() == list(range(len(ROWS))))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "max_length", "message"),
    [
        ([3, 11], 10, "11 at position 1"),
        ([3, 0], 10, "0 at position 1"),
        ([[3, 4]], 10, r"shape \[1, 2\]"),
        ([3], 0, "max_length must be at least 1"),
    ],
)
def test_lengths_that_cannot_be_packed(lengths, max_length, message):
    with pytest.raises(ValueError, match=message):
        pack_lengths(lengths, max_length)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PackableRows(ROWS)[0], ROWS[1]], "1 of 2 rows are marked as packable"),
        ([{**ROWS[0], "segment_ids": np.array([1, 1, 2, 2, 2])}], "row 0 is packed already"),
        ([{**PackableRows(ROWS)[0], "times": [0.0]}], "channel 'times' has length 1, input_ids has 5"),
        ([{k: v for k, v in PackableRows(ROWS)[0].items() if k != "ages"}], "lacks the channel 'ages'"),
        ([PackableRows([make_row(17, 0)])[0]], "17 at position 0"),
    ],
)
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_rows_that_cannot_be_packed(kind, rows, message):
    with pytest.raises(ValueError, match=message):
        COLLATORS[kind][1](rows)


def test_packing_needs_no_attention_mask():
    rows = [{name: values for name, values in row.items() if name != "attention_mask"} for row in ROWS[:2]]
    batch = pack_channels(rows, CHANNELS, [[0, 1]])
    assert batch["attention_mask"].all()
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 14]
