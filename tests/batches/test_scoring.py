"""Scores against a model whose answers can be counted: order, batches, tasks, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq.batches.scoring import RiskModel, config_task_ids, score

TASKS = [{"name": "one"}, {"name": "two"}]


class CountingModel:
    """The log-odds of a row are the sum of its tokens, less the shift of its task; it keeps what it was given."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="counting", tasks=TASKS, max_position_embeddings=8)
    shifts = torch.tensor([0.0, 2.0])

    def __init__(self):
        self.training, self.batches = True, []

    def eval(self):
        self.training = False

    def __call__(self, input_ids, task_ids=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(input_ids.shape))
        sums = input_ids.sum(dim=1).float()
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(sums), sums], dim=1))

    def risk_scores(self, logits, task_ids=None):
        shift = 0.0 if task_ids is None else self.shifts[task_ids]
        return torch.sigmoid(logits[:, 1] - logits[:, 0] - shift)

    def untrained_weights(self):
        return []


class Rows:
    """Rows of numbers of different lengths; each says a task and a label that scoring must not read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        assert type(row) is int
        return {"input_ids": self.rows[row], "labels": 1, "task_ids": 7}

    @property
    def lengths(self):
        return np.array([len(row) for row in self.rows])


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": torch.ones(len(rows)), "task_ids": torch.full((len(rows),), 7)}


ROWS = Rows([[1], [-1, 1, 2], [3, -4], [0], [1, 1, 1, -2], [2, -5, 1]])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_scores_stand_in_the_order_of_the_rows(batch_size):
    model = CountingModel()
    scores = score(model, ROWS, collate, batch_size=batch_size)
    np.testing.assert_allclose(scores, sigmoid([sum(row) for row in ROWS.rows]), rtol=1e-6)
    widths = [width for _, width in model.batches]
    assert widths == sorted(widths)  # rows of about one length share a batch
    assert sum(rows for rows, _ in model.batches) == len(ROWS)


def test_the_shift_of_each_row_is_that_of_its_task_in_the_config():
    tasks = [0, 1, 1, 0, 0, 1]
    scores = score(CountingModel(), ROWS, collate, task_ids=tasks, batch_size=4)
    sums = [sum(row) - 2 * task for row, task in zip(ROWS.rows, tasks, strict=True)]
    np.testing.assert_allclose(scores, sigmoid(sums), rtol=1e-6)


def test_no_rows_have_no_scores():
    assert score(CountingModel(), Rows([]), collate).shape == (0,)


def test_tasks_are_counted_as_the_config_does():
    assert config_task_ids(CountingModel(), ["two", "one"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"lack the tokenizer's \['three'\]: they belong apart"):
        config_task_ids(CountingModel(), ["one", "three"])


def test_a_risk_model_is_known_by_what_it_can_do():
    assert isinstance(CountingModel(), RiskModel)
    assert not isinstance(torch.nn.Linear(1, 1), RiskModel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"batch_size": size}, "batch_size got") for size in (0, -3, 2.5, True, "8", None)),
        ({"task_ids": [0, 1]}, r"task_ids got shape \[2\]; expected one for each of 6 rows"),
    ],
)
def test_bad_input_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        score(CountingModel(), ROWS, collate, **change)
