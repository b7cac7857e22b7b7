"""What an explanation costs: prefix deltas of EhrMamba against one pass over the same record.

The record holds 2,048 events in 50 visits; the model has 32 blocks, 768 wide, float32. The ways take turns; figures are
CPU seconds, medians over rounds, and ratios to one pass.

    visit      the risk after every visit
    event      the risk after every event
    whole      the risk after every visit with a row of its own for each, as models without a state need it; from a
               tenth of the visits, times ten

    OMP_NUM_THREADS=2 python -m benchmarks.speed.bench_explanations --output runs/bench/explanations.json
    python -m benchmarks.speed.bench_explanations --quick
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import torch
from transformers.utils import logging

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.interpretability import Question, prefix_deltas, read_question
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.modeling.risk_prefixes import whole_prefix_logits
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

TASK = "mortality_30d"
CODES = 500


def record(events: int, visits: int) -> dict[str, Any]:
    """A patient whose visits are a month apart, with as many events each."""
    rows = []
    for number in range(events):
        visit = number * visits // events
        time = datetime(2150, 1, 1) + timedelta(days=30 * visit, minutes=10 * (number % (events // visits)))
        rows.append({"time": time, "code": f"DIAGNOSIS//LOCAL//{number * 7919 % CODES}", "visit_id": str(visit)})
    return {"subject_id": 1, "events": rows}


def question(events: int, visits: int, layers: int, width: int) -> Question:
    """The record, asked of a random model."""
    patient = record(events, visits)
    table = pl.DataFrame(patient["events"]).with_columns(subject_id=pl.lit(1, pl.Int64))
    tokenizer = EhrTokenizer.train(table, tasks=[TASK])
    sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers}
    model = EhrMambaForSequenceClassification(EhrMambaConfig(**sizes, tasks=[{"name": TASK}]))
    return read_question((model, tokenizer), patient, TASK, max_length=2 * events)


def a_row_each(asked: Question, share: int) -> Callable[[], torch.Tensor]:
    """A function that asks after some of the visits, each prefix as a row."""
    prefixes = asked.prefixes.by("visit")
    some = slice(None, None, share)
    tails = {name: torch.from_numpy(tail[some]) for name, tail in prefixes.tails.items()}
    ends, lengths = torch.from_numpy(prefixes.ends[some]), torch.from_numpy(prefixes.tail_lengths[some])
    return lambda: whole_prefix_logits(asked.checkpoint.model, asked.inputs, ends, tails, lengths)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--only", nargs="*", choices=["visit", "event", "whole"], default=["visit", "event", "whole"])
    parser.add_argument("--quick", action="store_true", help="2 blocks, 64 wide, a short record: does it run?")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    events, visits, layers, width = (120, 6, 2, 64) if options.quick else (2_048, 50, 32, 768)
    share = 1 if options.quick else 10
    asked = question(events, visits, layers, width)
    ways: dict[str, Callable[[], object]] = {
        "visit": lambda: prefix_deltas(asked, "visit"),
        "event": lambda: prefix_deltas(asked, "event"),
        "whole": a_row_each(asked, share),
    }
    chosen = {"pass": asked.log_odds, **{name: ways[name] for name in options.only}}
    costs = in_turns(chosen, options.repeats, warm_up=1)
    scale = {"whole": share}
    result = {
        "events": events,
        "visits": visits,
        "tokens": len(asked.event_of),
        "layers": layers,
        "width": width,
        "pass_seconds": round(costs["pass"].cpu, 3),
        "passes": {name: round(costs[name].cpu / costs["pass"].cpu * scale.get(name, 1), 2) for name in options.only},
        "passes_wall": {
            name: round(costs[name].wall / costs["pass"].wall * scale.get(name, 1), 2) for name in options.only
        },
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
