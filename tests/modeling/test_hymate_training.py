"""HyMaTE under the unmodified Trainer: accumulation, resuming, evaluation, and the two phases one after the other."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.modeling.common import assert_close
from tests.modeling.hymate_stays import CLASSES, VARIABLES, collate, random_stays, tiny_config

OUTCOMES = [{"name": "length_of_stay", "mean": 10.0, "std": 5.0}]


def rows_of(kind, count=8):
    """Rows of one length, as a collator without padding takes them."""
    batch = collate(random_stays([3 + i % 5 for i in range(count)]))
    rows = [{name: values[row] for name, values in batch.items()} for row in range(count)]
    for number, row in enumerate(rows):
        if kind == "forecast":
            row["labels"] = torch.randn(VARIABLES)
            row["label_mask"] = torch.ones(VARIABLES, dtype=torch.long)  # as many in each row: means of means agree
        else:
            row["labels"] = torch.tensor(number % 2)
            row["task_ids"] = torch.tensor(0)
            row["auxiliary_targets"] = torch.tensor([float(number)])
    return rows


def trainer_of(kind, folder, rows, **arguments):
    torch.manual_seed(0)
    model = CLASSES[kind](tiny_config(auxiliary_outcomes=OUTCOMES if kind == "classifier" else None))
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
    }
    args = TrainingArguments(folder, **{**defaults, **arguments})
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("kind", ["forecast", "classifier"])
def test_accumulated_gradients_are_those_of_one_batch(kind, tmp_path):
    rows, weights = rows_of(kind), []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_of(
            kind,
            tmp_path,
            rows,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights.append({name: p.detach() - start[name] for name, p in trainer.model.named_parameters()})
    scale = max(float(change.abs().max()) for change in weights[0].values())
    for name, change in weights[0].items():
        assert float((weights[1][name] - change).abs().max()) <= 1e-3 * max(float(change.abs().max()), 0.01 * scale)


@pytest.mark.parametrize("kind", ["forecast", "classifier"])
def test_a_resumed_run_ends_where_the_whole_one_does(kind, tmp_path):
    rows = rows_of(kind)
    whole = trainer_of(kind, tmp_path / "whole", rows, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(kind, tmp_path / "resumed", rows, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        assert_close(resumed.model.state_dict()[name], weight, 1e-5, name)


def test_evaluation_gives_losses_and_answers(tmp_path):
    forecast = trainer_of("forecast", tmp_path, rows_of("forecast")).predict(rows_of("forecast"))
    assert forecast.predictions.shape == (8, VARIABLES)
    assert np.isfinite(forecast.metrics["test_loss"])
    trainer = trainer_of("classifier", tmp_path, rows_of("classifier"), label_names=["labels", "task_ids"])
    answers = trainer.predict(rows_of("classifier"))
    assert answers.predictions.shape == (8, 2)  # auxiliary predictions stay out of it
    assert answers.label_ids[0].tolist() == [0, 1] * 4
    assert np.isfinite(answers.metrics["test_loss"])


def test_pretraining_then_finetuning(tmp_path):
    pretrainer = trainer_of("forecast", tmp_path / "pretrained", rows_of("forecast"))
    pretrainer.train()
    pretrainer.save_model()
    model = CLASSES["classifier"].from_pretrained(tmp_path / "pretrained")
    args = TrainingArguments(tmp_path / "out", max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    rows = [{name: v for name, v in row.items() if name != "auxiliary_targets"} for row in rows_of("classifier")]
    assert model.untrained_weights()
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert model.untrained_weights() == []
