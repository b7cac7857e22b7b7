"""Next-token prediction on the patients of pretrain (and train), by the unmodified Trainer.

    python examples/02_pretrain.py --data runs/data --output_dir runs/pretrain --max_steps 300 --learning_rate 3e-3
    torchrun --nproc_per_node 2 examples/02_pretrain.py --data runs/data ...

Run the same command again to resume. `--packing` spares the padding. The paper's size: --hidden_size 768
--num_layers 32 --context 2048. A dataset of any size: `--data` is what `ehrseq tokenize` wrote; with `--stream` every
process reads files of its own.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# First: it registers the classes, and torch's threads then sleep while they wait.
import ehrseq  # noqa: F401  # isort: skip

from transformers import AutoTokenizer, EarlyStoppingCallback, HfArgumentParser, Trainer, TrainingArguments, set_seed

from ehrseq.batches.packing import DataCollatorForPackedNextToken, PackableRows
from ehrseq.data.dataset import EventDataset
from ehrseq.encode import EncodedDataset, is_encoded
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.tasks import load_task
from ehrseq.training.trainer import last_checkpoint, leave_process_group, model_config, use_paper_recipe


@dataclass
class Arguments:
    """Options beside Trainer's own."""

    data: str = field(metadata={"help": "Folder that 01_prepare_data.py wrote, or `ehrseq tokenize`."})
    hidden_size: int = field(default=64, metadata={"help": "Width (paper: 768)."})
    num_layers: int = field(default=2, metadata={"help": "Mamba blocks (paper: 32)."})
    context: int = field(default=256, metadata={"help": "Context length in tokens (paper: 2048)."})
    splits: list[str] = field(default_factory=lambda: ["pretrain", "train"], metadata={"help": "Splits to learn from."})
    packing: bool = field(default=False, metadata={"help": "Put several patients into a row, instead of padding."})
    stream: bool = field(default=False, metadata={"help": "Read encoded files one by one; needs --max_steps."})
    patience: int = field(default=0, metadata={"help": "Evaluations without progress before stopping; 0 = never."})


def main() -> None:
    """Pretrain, then save the model with its tokenizer."""
    arguments, args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    context, splits = arguments.context, arguments.splits
    if is_encoded(arguments.data):
        data = EncodedDataset(arguments.data)
        tokenizer, train, tuning = data.tokenizer, data.windows(context, splits), data.windows(context, "tuning")
    else:
        folder = Path(arguments.data)
        dataset, tokenizer = EventDataset(folder / "dataset"), AutoTokenizer.from_pretrained(folder / "tokenizer")
        train = tokenizer.encode_histories(dataset.events(splits)).windows(context)
        tuning = tokenizer.encode_histories(dataset.events("tuning")).windows(context)

    config = model_config(
        tokenizer,
        tasks=[load_task(name).to_config() for name in tokenizer.tasks],
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        max_position_embeddings=context,
    )
    use_paper_recipe(args, len(train))
    args.label_names, args.prediction_loss_only = ["labels"], True
    if arguments.packing:
        train = PackableRows(train)
    if arguments.stream:
        args.accelerator_config.dispatch_batches = False  # no process reads for the others
        train = data.stream(context, splits, seed=args.seed, packable=arguments.packing)
    trainer = Trainer(
        model=EhrMambaForCausalLM(config),
        args=args,
        train_dataset=train,
        eval_dataset=tuning,
        data_collator=DataCollatorForPackedNextToken(tokenizer, context),  # pads what is not to be packed
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(arguments.patience)] if arguments.patience else None,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.log_metrics("tuning", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    leave_process_group()
