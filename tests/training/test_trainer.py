"""The paper's recipe through the unmodified Trainer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import TrainerCallback

from ehrseq.batches.scoring import score_rows
from ehrseq.training.trainer import (
    count_training_steps,
    last_checkpoint,
    leave_process_group,
    paper_schedule,
    use_paper_recipe,
)


def _rates(steps: int, peak: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = paper_schedule(steps)
    scheduler = get_scheduler(
        schedule["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=schedule["warmup_steps"],
        num_training_steps=steps,
        scheduler_specific_kwargs=schedule["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_schedule_is_the_reference_implementations(reference_fixtures):
    truth = json.loads((reference_fixtures / "odyssey-ehrmamba" / "lr_schedule.json").read_text())["linear_ehrmamba"]
    assert _rates(len(truth), 5e-5) == pytest.approx(truth, rel=1e-9)


def test_the_schedule_rises_from_one_percent_and_falls_back_to_it():
    rates = _rates(200, 1.0)
    assert rates[0] == pytest.approx(0.01)
    assert rates[20] == pytest.approx(1.0)
    assert rates.index(max(rates)) == 20
    assert rates[10] == pytest.approx(0.01 + 0.99 * 0.5)
    assert rates[110] == pytest.approx(0.01 + 0.99 * 0.5)
    assert rates[-1] == pytest.approx(0.01 + 0.99 / 180)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_very_short_runs_have_a_schedule(steps):
    rates = _rates(steps, 1.0)
    assert all(0.01 <= rate <= 1.0 for rate in rates)


class _Rows(Dataset):
    def __len__(self):
        return 37

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        inputs = torch.randn(4, generator=generator)
        return {"inputs": inputs, "labels": inputs.sum()}


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs, labels):
        return {"loss": ((self.linear(inputs).squeeze(-1) - labels) ** 2).mean()}


class _Record(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2, "per_device_train_batch_size": 4},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 3, "per_device_train_batch_size": 8, "dataloader_drop_last": True},
        {"max_steps": 11, "per_device_train_batch_size": 4},
    ],
)
def test_trainer_itself_follows_the_schedule(tmp_path, options):
    args = TrainingArguments(tmp_path, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-3, **options)
    use_paper_recipe(args, len(_Rows()))
    record = _Record()
    trainer = Trainer(_Model(), args, train_dataset=_Rows(), callbacks=[record])
    trainer.train()
    steps = count_training_steps(len(_Rows()), args)
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert record.rates == pytest.approx(_rates(steps, 1e-3))
    assert args.max_grad_norm == 1.0
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


def test_another_schedule_that_was_asked_for_is_kept(tmp_path):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, lr_scheduler_type="cosine", warmup_steps=3)
    use_paper_recipe(args, 100)
    assert args.lr_scheduler_type == "cosine"
    assert args.warmup_steps == 3
    assert args.label_names == ["labels", "task_ids"]


def test_the_last_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 9, 11, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()  # killed before its last file
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"epoch": 1.')  # and within it
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")


@pytest.mark.parametrize("bad", [{"num_training_steps": 0}, {"warmup_share": 1.5}, {"floor": -0.1}])
def test_impossible_schedules_are_clear_errors(bad):
    with pytest.raises(ValueError, match="num_training_steps >= 1"):
        paper_schedule(**({"num_training_steps": 10} | bad))


@pytest.mark.parametrize("batch_size", [0, -2, 1.5, True, "8", None])
def test_scoring_needs_rows_in_a_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size got {batch_size!r}; expected a whole number of at least 1"):
        score_rows(None, None, None, batch_size=batch_size)


def test_the_process_group_is_left_where_there_is_one(tmp_path):
    leave_process_group()  # nothing to leave
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    leave_process_group()
    assert not torch.distributed.is_initialized()
