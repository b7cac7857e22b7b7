"""A checkpoint that was never trained: of what is predicted only that it is the same everywhere is of interest."""

import pytest

from ehrseq.hub.checkpoints import save_checkpoint
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.tasks import load_task
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.trainer import model_config


@pytest.fixture(scope="module")
def checkpoint(request, events, tmp_path_factory):
    """An EhrMamba of the test module's `TASKS`, its tokenizer fitted on the module's `events`."""
    tasks = [load_task(name).to_config() for name in request.module.TASKS]
    tokenizer = EhrTokenizer.train(events, tasks=tasks, model_max_length=64)
    config = model_config(tokenizer, tasks=tasks, hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, EhrMambaForSequenceClassification(config), tokenizer)
    return folder
