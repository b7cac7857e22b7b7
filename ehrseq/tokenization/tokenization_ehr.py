"""`EhrTokenizer`: a patient's events -> the channels that EhrMamba reads, with the full Hugging Face contract.

    tokenizer = EhrTokenizer.train(events, tasks=["mortality_30d"])
    inputs = tokenizer(patient, task="mortality_30d", return_tensors="pt")     # one patient or many
    table = tokenizer.encode_table(events, labels={"mortality_30d": labels})   # whole tables, columnar

The single-patient path (`ehr_sequence.py`) and the columnar one (`ehrseq.encode`) give identical rows. Tables need the
package, a patient does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import PaddingStrategy, logging

from .ehr_anchors import REASONS_AGAINST, UNANSWERABLE, reasons_against
from .ehr_forecast_prompts import REASONS_AGAINST_FORECAST, RecordToForecast, close_lapsed, record_to_forecast
from .ehr_forecast_questions import ForecastQuestion, TokenMeaning, read_forecast_question, token_meanings
from .ehr_histories import EncodedHistories
from .ehr_plans import CHANNEL_DTYPES, CHANNELS, check_context
from .ehr_prompts import PatientPrompts
from .ehr_rows import HistoryRows, lay_out
from .ehr_sequence import parse_time, patient_of_table, patient_rows, read_patient
from .ehr_vocabulary import PAPER_TASK_TOKENS, SPECIAL_TOKENS, TABLES_NEED_PACKAGE, TYPE_CLS, EventVocabulary

if TYPE_CHECKING:
    try:  # guarded, or transformers would ask for them before it loads this file from a checkpoint
        import polars as pl
        import pyarrow as pa

        from ehrseq.encode.counts import EventCounts
        from ehrseq.encode.encoder import Encoder
    except ImportError:
        pass

logger = logging.get_logger(__name__)

NO_LIMIT = 10**12  # transformers' `model_max_length` of a tokenizer without a context length is larger


class EhrTokenizer(TokenizersBackend):
    """Tokenizer of EHR events. Build it with `train`, load it with `from_pretrained` or `AutoTokenizer`.

    Everything beyond the token ids (value bins, code map, token types, tasks, settings) is one JSON object,
    `event_vocabulary` in `tokenizer_config.json`.
    """

    _auto_class = "AutoTokenizer"  # so that what saves it carries its code

    # No __init__ here: transformers would rebuild the backend from the bare vocabulary, as BPE, when the tokenizer is
    # loaded.
    model_input_names = list(CHANNELS)
    padding_side = "right"
    task_reasons = REASONS_AGAINST
    unanswerable_reasons = UNANSWERABLE
    forecast_reasons = REASONS_AGAINST_FORECAST

    # -- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        events: pl.DataFrame,
        *,
        num_value_bins: int = 5,
        min_count: int = 1,
        min_text_subjects: int = 5,
        max_vocab_size: int | None = None,
        tasks: Sequence[str | Mapping[str, Any]] = (),
        input_kinds: str | Iterable[str] | None = None,
        code_map: Sequence[Sequence[str]] | None = None,
        max_num_visits: int = 512,
        model_max_length: int = 2048,
    ) -> EhrTokenizer:
        """Fit the vocabulary and the value bins on a table of events: training subjects only (splits pretrain and
        train).

        Args:
            events: Event table; its subjects' digest is stored, so that an audit can tell whether held-out subjects
                were among them.
            num_value_bins: Quantile bins of each (code, unit) with numeric values; the outer ones are open.
            min_count: Rows a token needs; a rarer code falls back to its parents.
            min_text_subjects: Subjects a text result needs: rare free text may identify a patient.
            max_vocab_size: Bound on the number of tokens, the most frequent stay.
            tasks: Task names of the paper, or mappings with "name" and "token" (`Task.to_config()`), in the order of
                their ids.
            input_kinds: What enters a sequence: a preset (`all`, `paper`) or a list of kinds.
            code_map: [regular expression, kind] pairs for foreign codes, see `ehr_codes.DEFAULT_CODE_MAP`.
            max_num_visits: Visit orders are clamped below it, as the model's embedding asks.
            model_max_length: Context length that `truncation=True` cuts to by default.

        Raises:
            ValueError: An empty table, missing columns, a setting out of range, an unknown or repeated task.
        """
        settings: dict[str, Any] = {
            "num_value_bins": num_value_bins,
            "min_count": min_count,
            "min_text_subjects": min_text_subjects,
            "max_vocab_size": max_vocab_size,
            "tasks": tasks,
            "max_num_visits": max_num_visits,
            "model_max_length": model_max_length,
        }
        counts = _tables().count_events(events, settings, input_kinds=input_kinds, code_map=code_map)
        return cls.from_counts(counts, **settings)

    @classmethod
    def from_counts(
        cls,
        counts: EventCounts,
        *,
        num_value_bins: int = 5,
        min_count: int = 1,
        min_text_subjects: int = 5,
        max_vocab_size: int | None = None,
        tasks: Sequence[str | Mapping[str, Any]] = (),
        max_num_visits: int = 512,
        model_max_length: int = 2048,
    ) -> EhrTokenizer:
        """The tokenizer of counts that were taken block by block; arguments as of `train`.

        Where a (code, unit) had more distinct values than the counts keep, its bins are approximate: the setting
        `bin_rank_error` of the event vocabulary says by how much at most, as a share of its values.

        Raises:
            ValueError: No events were counted, or what `train` refuses.
        """
        return cls(
            **_tables().fitted_settings(
                counts,
                num_value_bins=num_value_bins,
                min_count=min_count,
                min_text_subjects=min_text_subjects,
                max_vocab_size=max_vocab_size,
                tasks=tasks,
                max_num_visits=max_num_visits,
                model_max_length=model_max_length,
            )
        )

    # -- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: Any, pretrained_model_name_or_path: Any, *args: Any, **kw: Any
    ) -> Any:
        # transformers has looked for the files and would make a tokenizer of whatever is there.
        needed = {"tokenizer.json": "tokenizer_file", "tokenizer_config.json": "tokenizer_config_file"}
        missing = [file for file, key in needed.items() if not (resolved_vocab_files or {}).get(key)]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no whole EhrTokenizer: {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Save the tokenizer that the model was trained with "
                "into the same folder (tokenizer.save_pretrained(folder)); another one's ids mean other codes."
            )
        load: Any = super()._from_pretrained  # untyped
        tokenizer = load(resolved_vocab_files, pretrained_model_name_or_path, *args, **kw)
        _ = tokenizer._stored  # or says what it lacks
        return tokenizer

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> EventVocabulary:
        """Rows to token ids; built once from what is saved."""
        vocabulary = self.__dict__.get("_event_vocabulary")
        if vocabulary is None or len(vocabulary.token_ids) != len(self):
            stored = self._stored
            reserved = frozenset([*SPECIAL_TOKENS, *self.task_tokens.values()])
            vocabulary = EventVocabulary(
                self.get_vocab(), stored["value_bins"], stored["kinds"], stored["code_map"], reserved
            )
            self.__dict__["_event_vocabulary"] = vocabulary
        return vocabulary

    @property
    def _stored(self) -> dict[str, Any]:
        stored = self.init_kwargs.get("event_vocabulary")
        needed = {"value_bins", "kinds", "code_map", "token_types", "tasks"}
        if not isinstance(stored, dict) or not needed <= set(stored):
            raise ValueError(
                "this EhrTokenizer has no whole event vocabulary; build one with EhrTokenizer.train(events) or load a "
                "saved one."
            )
        return stored

    @property
    def task_tokens(self) -> dict[str, str]:
        """Task name -> token, in the order of `task_ids`."""
        return dict(self._stored["tasks"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of `task_ids`."""
        return list(self.task_tokens)

    @property
    def token_types(self) -> list[int]:
        """Token type of every id."""
        return list(self._stored["token_types"])

    @property
    def max_num_visits(self) -> int:
        """Visit orders lie below it."""
        number: int = self._stored["max_num_visits"]
        return number

    @property
    def fitted_subjects_digest(self) -> str:
        """SHA-256 over the sorted ids of the subjects that the vocabulary and the bins were fitted on, see
        `subjects_digest`.
        """
        digest: str = self._stored["fitted_subjects_digest"]
        return digest

    @property
    def fitted(self) -> dict[str, Any]:
        """What it was fitted on: `subjects` (their number), `subjects_digest`; and `bin_rank_error`: how far the rank
        of a bin's edge can be off, as a share of the values, 0 where all are exact.
        """
        return {
            "subjects": self._stored.get("num_fitted_subjects"),
            "subjects_digest": self.fitted_subjects_digest,
            "bin_rank_error": self._stored.get("bin_rank_error", 0.0),
        }

    def add_task(self, name: str, token: str | None = None) -> str:
        """Add a task, so that a trained model can learn it by its token alone (resize the model's embeddings
        afterwards).

        Args:
            name: The task's name.
            token: Its token; default: the paper's, or the name in brackets.

        Returns:
            The token.

        Raises:
            ValueError: The name or the token is taken.
        """
        tasks = self.task_tokens
        token = token or PAPER_TASK_TOKENS.get(name, f"[{name.upper()}]")
        if name in tasks or token in self.get_vocab():
            raise ValueError(
                f"task {name!r} with token {token!r} cannot be added: the tasks are {tasks}, and no token may stand "
                "twice."
            )
        self.add_tokens([token], special_tokens=True)
        self._stored["token_types"] = [*self.token_types, TYPE_CLS]
        self._stored["tasks"] = [*self._stored["tasks"], [name, token]]
        return token

    # -- one patient or many -----------------------------------------------------------------------------------------

    def remove_task(self, name: str) -> None:
        """Forget a task; its token keeps its id, so that weights and encoded rows still fit.

        Raises:
            ValueError: An unknown task.
        """
        if name not in self.tasks:
            raise ValueError(f"unknown task {name!r}; this tokenizer knows {self.tasks}.")
        self._stored["tasks"] = [task for task in self._stored["tasks"] if task[0] != name]

    def __call__(
        self,
        patients: Any,
        *,
        task: str | None = None,
        prediction_time: Any = None,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **unknown: Any,
    ) -> BatchEncoding:
        """Channels of one patient, or of a list of patients.

        Args:
            patients: `{"subject_id", "events": [{"time", "code", "numeric_value"?, "text_value"?, "visit_id"?,
                "unit"?}], "prediction_time"?}`, a table of one subject's rows, or a list of either. Rows may stand in
                any order.
            task: Name of the task to prompt for; None = no prompt.
            prediction_time: Rows later than it are left out before anything else; default: the patient's own
                "prediction_time", else the last row's time. Every form of a row's time is taken.
            padding: As everywhere in transformers; every channel is padded with 0.
            truncation: As everywhere in transformers; by default a row is cut where `max_length` is given. The most
                recent tokens stay, with [CLS] (or the task's token) and the [VS] of a visit that was cut.
            max_length: Context length, default `model_max_length`.
            pad_to_multiple_of: As everywhere in transformers.
            padding_side: As everywhere in transformers.
            return_tensors: "pt" or "np".
            unknown: Nothing else is taken.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids`, `times` (weeks), `ages` (years), `visit_orders`,
            `visit_segments`: lists of the row's length for one patient, lists of lists for a list; tensors
            [batch, length] with `return_tensors`.

        Raises:
            ValueError: No patient, no events, a field of the wrong type, an unknown task, a context that holds no
                event.
        """
        if unknown:
            raise ValueError(
                f"EhrTokenizer got {sorted(unknown)}; it takes task, prediction_time, padding, truncation, max_length, "
                "pad_to_multiple_of, padding_side and return_tensors."
            )
        many = isinstance(patients, (list, tuple))
        if many and not patients:
            raise ValueError("EhrTokenizer got an empty list; give at least one patient.")
        limit = self._limit(truncation, max_length, padding)
        rows = [self.encode_patient(p, task, prediction_time, limit) for p in (patients if many else [patients])]
        wants_tensors = return_tensors is not None
        batch = {name: [row[name].tolist() for row in rows] for name in CHANNELS}
        if not many and not wants_tensors and not padding:
            return BatchEncoding({name: values[0] for name, values in batch.items()})
        encoded = self.pad(
            batch if many or wants_tensors else {name: values[0] for name, values in batch.items()},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=None,
        )
        return _to_tensors(encoded, return_tensors)

    def encode_patient(
        self, patient: Any, task: str | None = None, prediction_time: Any = None, max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Channels of one patient as numpy arrays, the single-patient path; arguments as in `__call__`, `max_length`
        already decided.
        """
        return self.encode_prompts(patient, [task], prediction_time, max_length)[0]

    def encode_prompts(
        self, patient: Any, tasks: Sequence[str | None], prediction_time: Any = None, max_length: int | None = None
    ) -> list[dict[str, np.ndarray]]:
        """One row for each task, as `encode_patient` makes it; the patient is read once."""
        rows = self.sourced_rows(patient, tasks, prediction_time, max_length)
        return [rows.row(number) for number in range(len(rows))]

    def sourced_rows(
        self,
        patient: Any,
        tasks: Sequence[str | None],
        prediction_time: Any = None,
        max_length: int | None = None,
        closing: Callable[[HistoryRows, int | None], HistoryRows] | None = None,
    ) -> PatientPrompts:
        """The rows of `encode_prompts` before they are made, which know the event behind each of their tokens.

        `closing`, given the rows that take part and the prediction time, says which visits are over by then.
        """
        if max_length is not None:
            check_context(max_length)
        events, own_time = read_patient(_as_patient(patient))
        if not events:
            raise ValueError(
                "a patient without events has no history to read; give at least one event, or leave the patient out."
            )
        cut = parse_time(prediction_time, "prediction_time")
        cut = own_time if cut is None else cut
        vocabulary = self.vocabulary
        rows = patient_rows(events, vocabulary, cut)
        if closing is not None:
            rows = closing(rows, cut)
        if cut is not None and not len(rows.time):
            logger.warning_once(
                f"prediction_time lies before every timed event of patient {_subject(patient)} (and maybe of others): "
                "their rows hold static tokens only."
            )
        tasks_known = self.task_tokens
        history = EncodedHistories(
            vocabulary=vocabulary,
            task_names=list(tasks_known),
            task_token_ids=np.asarray([vocabulary.token_ids[token] for token in tasks_known.values()], np.int64),
            max_num_visits=self.max_num_visits,
            **lay_out(rows, vocabulary),
        )
        asked = [None if task is None else _position(task, history.task_names) for task in tasks]
        return PatientPrompts(events, cut, rows, history, history.plan_patient(asked, cut, max_length))

    def forecast_prompt(
        self, patient: Any, prediction_time: Any = None, max_length: int | None = None
    ) -> RecordToForecast:
        """One patient's record as a pretrained model continues it; arguments as in `encode_patient`.

        A visit that has lapsed by the prediction time (`ehr_visits.py`) is closed, although no row came to close it.
        """
        patient = _as_patient(patient)
        prompts = self.sourced_rows(patient, [None], prediction_time, max_length, close_lapsed)
        return record_to_forecast(prompts, self.vocabulary.kind, _subject(patient))

    def forecast_question(self, horizon: Any, outcomes: Any = None, **more: Any) -> ForecastQuestion:
        """What is asked of a forecast, as tokens; arguments as of `ehr_forecast_questions.read_forecast_question`."""
        return read_forecast_question(self.vocabulary, horizon, outcomes, **more)

    def token_meanings(self) -> dict[int, TokenMeaning]:
        """Token id -> code, range of values and unit, of every token that an event can become."""
        return token_meanings(self.vocabulary)

    def reasons_against(
        self, patient: Any, tasks: Sequence[Mapping[str, Any]], prediction_time: Any = None
    ) -> list[str | None]:
        """Why each of some tasks (entries of a model's `config.tasks`) cannot be asked about a patient at a time, None
        where it can; the reasons are the keys of `task_reasons`, and where one is in `unanswerable_reasons` there is
        nothing to foretell (`ehr_anchors.py`). Other arguments as in `__call__`.
        """
        events, own_time = read_patient(_as_patient(patient))
        cut = parse_time(prediction_time, "prediction_time")
        return reasons_against(events, self.vocabulary.kind, tasks, own_time if cut is None else cut)

    def _limit(
        self, truncation: bool | str | None, max_length: int | None, padding: bool | str | PaddingStrategy
    ) -> int | None:
        if max_length is not None:
            check_context(max_length)
        if truncation is None:
            truncation = max_length is not None and padding not in ("max_length", PaddingStrategy.MAX_LENGTH)
        if truncation in (False, "do_not_truncate"):
            return None
        limit = self.model_max_length if max_length is None else max_length
        return None if limit > NO_LIMIT else check_context(limit)

    def _pad(
        self,
        encoded_inputs: dict[str, Any] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pad every channel with 0, on either side (the base class knows only ids, mask and types)."""
        length = len(encoded_inputs["input_ids"])
        if "attention_mask" not in encoded_inputs and return_attention_mask is not False:
            encoded_inputs["attention_mask"] = [1] * length
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = length
        if max_length is not None and pad_to_multiple_of:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        if padding_strategy == PaddingStrategy.DO_NOT_PAD or max_length is None or max_length <= length:
            return dict(encoded_inputs)
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side got {side!r}; expected 'left' or 'right'.")
        for name in CHANNELS:
            if name in encoded_inputs:
                zeros = [0.0 if CHANNEL_DTYPES[name] is np.float32 else 0] * (max_length - length)
                values = list(encoded_inputs[name])
                encoded_inputs[name] = zeros + values if side == "left" else values + zeros
        return dict(encoded_inputs)

    # -- whole tables ------------------------------------------------------------------------------------------------

    def encode_histories(self, events: pl.DataFrame) -> EncodedHistories:
        """Every patient of an event table, encoded once; prompts and windows are cut from it without copies.

        Args:
            events: Event table, rows in any order.
        """
        return self.encoder().encode(events)

    def encoder(self) -> Encoder:
        """What encodes event tables; shares nothing with the tokenizer that changes."""
        result: Encoder = _tables().encoder(self)
        return result

    def encode_table(
        self, events: pl.DataFrame, labels: Mapping[str, pl.DataFrame] | None = None, max_length: int | None = None
    ) -> pa.Table:
        """Rows of a whole table, ready for `datasets` or Parquet.

        Args:
            events: Event table.
            labels: Task name -> label table. None: pretraining rows, each history in consecutive windows cut at visit
                boundaries (every event is in exactly one), or as one row where `max_length` is None.
            max_length: Context length; None = no limit.

        Returns:
            `subject_id`, with labels `prediction_time`, `task`, `label`, and one list column a channel.

        Raises:
            ValueError: A context too short for an event, an unknown task, missing columns.
        """
        return _tables().encode_table(self, events, labels, max_length)

    def coverage(self, events: pl.DataFrame) -> dict[str, Any]:
        """How a table's rows are mapped: exactly, by a fallback (a parent code, or the code without its result), or
        lost to [UNK].

        Returns:
            Shares `exact`, `fallback`, `lost` of the rows that make a token, and the counts `events` (such rows),
            `exact_events`, `fallback_events`, `lost_events`, `visit_boundaries`, `not_used` (births, and kinds that
            are not in `input_kinds`) and `lapsed_encounters` (taken as over for want of an end, see `ehr_visits`).
        """
        values: dict[str, Any] = _tables().coverage(self, events)
        return values


def _position(task: str, known: list[str]) -> int:
    if task not in known:
        raise ValueError(
            f"unknown task {task!r}; this tokenizer knows {known}. Add one with tokenizer.add_task(name, token)."
        )
    return known.index(task)


def _subject(patient: Any) -> Any:
    return patient.get("subject_id", "?") if isinstance(patient, Mapping) else "?"


def _as_patient(patient: Any) -> Any:
    """A one-subject table (polars, pandas, pyarrow) as a patient dict; anything else but text as it is."""
    if isinstance(patient, (str, bytes)):
        raise ValueError(
            "EhrTokenizer reads patients, not text: give a dict with 'events', a one-subject table, or a list of them."
        )
    return patient_of_table(patient)


def _to_tensors(encoded: BatchEncoding, return_tensors: str | None) -> BatchEncoding:
    """Tensors of the right type: BatchEncoding's own conversion would make times of whole weeks integers."""
    if return_tensors is None:
        return encoded
    lengths = {len(row) for row in encoded["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(
            f"rows of the lengths {sorted(lengths)} make no tensor; pass padding=True, and truncation=True for a "
            "fixed context."
        )
    arrays = {name: np.asarray(encoded[name], dtype=CHANNEL_DTYPES[name]) for name in CHANNELS}
    return BatchEncoding(arrays, tensor_type=return_tensors)


def _tables() -> ModuleType:
    """What reads whole tables: it stays in the package, a checkpoint travels without it."""
    try:
        from ehrseq.encode import tokenizer
    except ImportError as error:
        raise ImportError(TABLES_NEED_PACKAGE) from error
    return tokenizer
