"""Histories with the prompts of all their labels: each prompt is its MPF row, and knows nothing of what comes after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehrseq.batches.packing import DataCollatorForPackedPrompts, PackableRows
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.shared_prompts import (
    DataCollatorForSharedPrompts,
    SharedEncodedPrompts,
    SharedPromptDataset,
    shared_prompts,
)
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode import EncodedDataset, tokenize_dataset
from ehrseq.encode.rows import PromptedDataset
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.modeling.risk_tasks import IGNORED_LABEL
from ehrseq.tasks import label_events, load_task
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.trainer import ClassifierOfPrompts, model_config, quiet_trainer, training_arguments
from ehrseq.work.engine import get_engine

TASKS = ("mortality_30d", "long_stay_7d", "readmission_30d", "hypertension")
LONG = 4096  # no patient here has as many tokens


@pytest.fixture(scope="module")
def made():
    cohort = simulate(30, seed=3, progress=False)
    events, tasks = cohort.events(), [load_task(name) for name in TASKS]
    labels = dict(label_events(events, tasks, end_of_data=cohort.end_of_data).labels)
    tokenizer = EhrTokenizer.train(events, tasks=[task.to_config() for task in tasks], model_max_length=64)
    histories = tokenizer.encode_histories(events)
    return tokenizer, histories, histories.index_labels(labels)


def _asked(dataset):
    """(window, position of the task token, task token, label) of every prompt."""
    for number in range(len(dataset)):
        item = dataset[number]
        for place in np.flatnonzero(item["labels"] != IGNORED_LABEL):
            yield item, int(place), int(item["input_ids"][place]), int(item["labels"][place])


@pytest.mark.parametrize("context", [40, 128, LONG])
def test_every_label_is_asked_once(made, context):
    _, histories, index = made
    dataset = SharedPromptDataset(histories, index, context)
    asked = [(token, label) for _, _, token, label in _asked(dataset)]
    tokens = histories.task_token_ids[index.task]
    assert sorted(asked) == sorted(zip(tokens.tolist(), index.label.tolist(), strict=True))
    assert dataset.num_labels == len(index)


def test_each_prompt_ends_what_its_own_row_holds(made):
    """Without the other prompts, the tokens up to a task token are its MPF row's (but for the front token)."""
    tokenizer, histories, index = made
    dataset, rows = SharedPromptDataset(histories, index, LONG), PromptedDataset(histories, index, LONG)
    truth = {}
    for number in range(len(rows)):
        row = rows[number]
        names = [*tokenizer.model_input_names]
        key = tuple(tuple(np.round(np.asarray(row[name][1:], float), 3)) for name in names)
        truth[key] = int(row["labels"])
    task_tokens, end = set(histories.task_token_ids.tolist()), tokenizer.convert_tokens_to_ids("[VE]")
    for item, place, _, label in _asked(dataset):
        kept = np.ones(place + 1, bool)
        for other in range(place):
            if item["labels"][other] == IGNORED_LABEL:
                continue
            kept[other] = False
            # The [VE] in front of another time's first task token belongs to that prompt.
            first_of_its_time = item["input_ids"][other - 1] not in task_tokens
            same_time = item["labels"][other:place].min() > IGNORED_LABEL
            if first_of_its_time and not same_time and item["input_ids"][other - 1] == end:
                kept[other - 1] = False
        key = tuple(
            tuple(np.round(np.asarray(item[name][: place + 1][kept][1:], float), 3))
            for name in tokenizer.model_input_names
        )
        assert truth[key] == label


@pytest.mark.parametrize("context", [48, 96])
def test_cut_histories_keep_to_their_length(made, context):
    _, histories, index = made
    dataset = SharedPromptDataset(histories, index, context, min_history=context // 2)
    for number in range(len(dataset)):
        item = dataset[number]
        asked = item["labels"] != IGNORED_LABEL
        history = len(asked) - asked.sum()
        assert history <= context + asked.sum()  # each inner prompt brings at most a [VE]
        assert item["input_ids"][0] == histories.vocabulary.token_ids["[CLS]"]


def test_labels_near_a_cut_are_asked_in_the_window_before(made):
    _, histories, index = made
    dataset = SharedPromptDataset(histories, index, 48, min_history=20)
    whole = {len(PromptedDataset(histories, index, LONG)[number]["input_ids"]) for number in range(len(index))}
    assert max(whole) > 200  # there is something to cut
    for number in range(len(dataset)):
        item = dataset[number]
        asked = np.flatnonzero(item["labels"] != IGNORED_LABEL)
        cut = item["times"][item["token_type_ids"] == 2][0] > 0  # the first visit of a whole history starts at 0
        early = asked[asked < 20]
        # Only what the window was made for may stand so near to a cut: its last prediction time.
        assert not cut or not len(early) or np.unique(item["times"][asked]).size == 1


def test_a_batch_is_packed_and_padding_asks_nothing(made):
    tokenizer, histories, index = made
    dataset = SharedPromptDataset(histories, index, 64)
    items = [dataset[number] for number in range(6)]
    batch = DataCollatorForSharedPrompts(tokenizer, max_length=200)(items)
    assert (batch["labels"][batch["segment_ids"] == 0] == IGNORED_LABEL).all()
    assert int((batch["labels"] != IGNORED_LABEL).sum()) == sum((item["labels"] >= 0).sum() for item in items)
    assert batch["input_ids"].shape[1] <= 200
    assert batch["input_ids"].shape[0] < 6


def test_the_unmodified_trainer_trains_the_classifier(made, tmp_path):
    tokenizer, histories, index = made
    config = model_config(tokenizer, tasks=[{"name": name} for name in TASKS], hidden_size=16, num_hidden_layers=1)
    config.class_weights = [1.0, 2.0]
    args = training_arguments(tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True)
    classifier = EhrMambaForSequenceClassification(config)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    trainer = quiet_trainer(
        model=ClassifierOfPrompts(classifier),
        args=args,
        train_dataset=SharedPromptDataset(histories, index, 64),
        data_collator=DataCollatorForSharedPrompts(tokenizer),
    )
    trainer.train()
    changed = [name for name, value in classifier.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("classifier.") for name in changed)
    assert any("mixer" in name for name in changed)


@pytest.mark.parametrize("class_weights", [None, [1.0, 3.0]])
def test_a_history_with_one_label_is_its_row_to_the_model(made, class_weights):
    """One label a history, and the task token put in front: logits and loss are the classifier's own."""
    tokenizer, histories, index = made
    config = model_config(
        tokenizer,
        tasks=[{"name": name} for name in TASKS],
        hidden_size=16,
        num_hidden_layers=2,
        class_weights=class_weights,
        num_labels=2,
    )
    model = EhrMambaForSequenceClassification(config).eval()
    chosen = np.unique(index.history, return_index=True)[1][:6]
    few = index.subset(chosen)
    shared, rows = SharedPromptDataset(histories, few, 64), PromptedDataset(histories, few, 64)
    items = [shared[number] for number in range(len(shared))]
    for item in items:
        item["input_ids"][0] = item["input_ids"][-1]
    order = [int(np.flatnonzero(few.history == history)[0]) for history in np.unique(few.history)]
    packed = DataCollatorForPackedPrompts(tokenizer, 64)([PackableRows(rows)[number] for number in order])
    with torch.no_grad():
        ours, truth = ClassifierOfPrompts(model)(**DataCollatorForSharedPrompts(tokenizer, 64)(items)), model(**packed)
    torch.testing.assert_close(ours["loss"], truth.loss)
    torch.testing.assert_close(ours["logits"], truth.logits[packed["labels"] >= 0], atol=1e-5, rtol=1e-5)


def test_no_labels_make_no_histories(made):
    _, histories, index = made
    dataset = SharedPromptDataset(histories, index.subset(np.empty(0, np.int64)), 64)
    assert (len(dataset), dataset.num_labels) == (0, 0)


@pytest.mark.parametrize("least", [-1, 64, 100])
def test_impossible_histories_are_a_clear_error(made, least):
    _, histories, index = made
    with pytest.raises(ValueError, match="min_history must lie between 0 and max_length - 1 = 63"):
        SharedPromptDataset(histories, index, 64, min_history=least)


def test_windows_beyond_the_end_are_an_index_error(made):
    _, histories, index = made
    dataset = SharedPromptDataset(histories, index, 64)
    with pytest.raises(IndexError, match="outside"):
        dataset[len(dataset)]
    assert np.array_equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])


def test_encoded_files_hold_the_same_windows(tmp_path):
    """Up to the order of the tasks of one prompt, which is drawn for each patient."""
    folder = tmp_path / "dataset"
    events = simulate(40, 2, progress=False).events()
    write_dataset(events, folder, dataset_name="few")
    labels = label_events(events, [load_task(name) for name in TASKS], end_of_data=None).labels
    tokenize_dataset(folder, tasks=[load_task(name).to_config() for name in TASKS], engine=get_engine(num_workers=1))
    encoded = EncodedDataset(folder / "encoded")
    for max_length in (48, 256):
        prompts = encoded.prompts(labels, max_length)
        files = shared_prompts(prompts, max_length, seed=1)
        plain = prompted_dataset(encoded.tokenizer, EventDataset(folder).events(), labels, max_length)
        memory = shared_prompts(plain, max_length, seed=1)
        assert isinstance(files, SharedEncodedPrompts)
        assert len(files) == len(memory) > 40
        assert files.num_labels == memory.num_labels == len(prompts)
        tasks = [encoded.tokenizer.convert_tokens_to_ids(token) for token in encoded.tokenizer.task_tokens.values()]
        for number in range(len(files)):
            first, second = files[number], memory[number]
            assert len(first["labels"]) == len(second["labels"])
            asked = np.isin(first["input_ids"], tasks) & (first["labels"] != -100)
            np.testing.assert_array_equal(first["input_ids"][~asked], second["input_ids"][~asked])
            np.testing.assert_array_equal(first["times"], second["times"])
            answers = [zip(item["input_ids"][asked], item["labels"][asked], strict=True) for item in (first, second)]
            assert sorted(answers[0]) == sorted(answers[1])
