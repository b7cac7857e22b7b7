"""`HyMaTEFeatureExtractor`: a stay's triplets -> the channels that HyMaTE reads, with the Hugging Face contract.

    table = build_triplets(events, PHYSIONET2012, labels)                 # ehrseq.encode.triplets
    extractor = HyMaTEFeatureExtractor.fit(table.of_subjects(train))      # training stays only
    inputs = extractor(patient, return_tensors="pt")                      # one patient or stay, or many
    rows = TripletRows(table, extractor)                                  # whole tables, ehrseq.batches.triplet_rows

Values are clipped to the training stays' 0.1 and 99.9 percentiles before they are standardised: a single pH of 735
would widen its standard deviation 62 times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, logging

from .ehr_anchors import REASONS_AGAINST, UNANSWERABLE, reasons_against
from .ehr_codes import kind_reader
from .ehr_sequence import Event, parse_time, patient_of_table, read_patient, subjects_digest
from .triplet_numbers import checked_numbers, checked_percentiles, clipped_moments, flat_numbers
from .triplet_sources import StayRows
from .triplet_stays import Stay, TripletSpec, choose_triplets, in_order, read_stay

logger = logging.get_logger(__name__)

TRIPLET_CHANNELS = ("variable_ids", "times", "values", "attention_mask")
"""Channels of a stay's length; `static_values` has one entry a static column."""

TRUNCATIONS = ("recent", "random")
STAY_KEYS = frozenset({"subject_id", "times", "variables", "values", "static", "label", "labels"})


class HyMaTEFeatureExtractor(SequenceFeatureExtractor):
    """Feature extractor of HyMaTE. Build it with `fit`, load it with `from_pretrained` or `AutoFeatureExtractor`.

    Args:
        triplets: What becomes triplets, `TripletSpec.to_dict()`.
        value_means: Mean of each variable's clipped values.
        value_deviations: Standard deviation of each variable's clipped values (1 where they do not vary).
        value_lower: Values below are raised to it.
        value_upper: Values above are lowered to it.
        value_counts: Training triplets of each variable. Triplets of a variable without any are left out, counted.
        static_means: As for the values, of each static column; unknown ones become 0, the mean.
        static_deviations: The same.
        static_lower: The same.
        static_upper: The same.
        clip_percentiles: Which percentiles the bounds are.
        num_fitted_stays: Stays that it was fitted on.
        num_fitted_subjects: Their subjects.
        fitted_subjects_digest: SHA-256 over their sorted ids, as the tokenizer's.
        padding_side: "right" or "left"; every channel is padded with 0.
        code_map: [regular expression, kind] pairs that tell deaths and visits, for reasons against a question; default
            `ehr_codes.DEFAULT_CODE_MAP`.
        kwargs: As in every feature extractor.
    """

    _auto_class = "AutoFeatureExtractor"  # so that what saves it carries its code

    model_input_names = [*TRIPLET_CHANNELS, "static_values"]
    task_reasons = REASONS_AGAINST
    unanswerable_reasons: Collection[str] = UNANSWERABLE

    def __init__(
        self,
        triplets: Mapping[str, Any] | None = None,
        value_means: Sequence[float] = (),
        value_deviations: Sequence[float] = (),
        value_lower: Sequence[float] = (),
        value_upper: Sequence[float] = (),
        value_counts: Sequence[int] = (),
        static_means: Sequence[float] = (),
        static_deviations: Sequence[float] = (),
        static_lower: Sequence[float] = (),
        static_upper: Sequence[float] = (),
        clip_percentiles: Sequence[float] = (0.1, 99.9),
        num_fitted_stays: int = 0,
        num_fitted_subjects: int = 0,
        fitted_subjects_digest: str = "",
        padding_side: str = "right",
        code_map: Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        if triplets is None:
            raise ValueError(
                "a HyMaTEFeatureExtractor without triplets reads nothing; build one with "
                "HyMaTEFeatureExtractor.fit(build_triplets(events, spec)), or load a saved one."
            )
        spec = TripletSpec.from_dict(triplets)
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side got {padding_side!r}; expected 'right' or 'left'.")
        for name in ("feature_size", "sampling_rate", "padding_value"):  # the base class saves them as well
            kwargs.pop(name, None)
        super().__init__(len(spec.variables), 1, 0.0, padding_side=padding_side, **kwargs)
        self.triplets = spec.to_dict()
        self.value_means = checked_numbers("value_means", value_means, len(spec.variables))
        self.value_deviations = checked_numbers("value_deviations", value_deviations, len(spec.variables), least=1e-30)
        self.value_lower = checked_numbers("value_lower", value_lower, len(spec.variables))
        self.value_upper = checked_numbers("value_upper", value_upper, len(spec.variables))
        self.value_counts = [
            int(n) for n in checked_numbers("value_counts", value_counts, len(spec.variables), least=0)
        ]
        columns = len(spec.static_columns)
        self.static_means = checked_numbers("static_means", static_means, columns)
        self.static_deviations = checked_numbers("static_deviations", static_deviations, columns, least=1e-30)
        self.static_lower = checked_numbers("static_lower", static_lower, columns)
        self.static_upper = checked_numbers("static_upper", static_upper, columns)
        self.clip_percentiles = list(clip_percentiles)
        self.num_fitted_stays = num_fitted_stays
        self.num_fitted_subjects = num_fitted_subjects
        self.fitted_subjects_digest = fitted_subjects_digest
        kind_reader(code_map)  # refuses what are no pairs
        self.code_map = None if code_map is None else [list(pair) for pair in code_map]
        # What follows is made of the above and not saved.
        self._spec = spec
        self._reported: set[str] = set()

    # -- fitting -----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        table: Any,
        *,
        clip_percentiles: Sequence[float] = (0.1, 99.9),
        padding_side: str = "right",
        code_map: Sequence[Sequence[str]] | None = None,
    ) -> HyMaTEFeatureExtractor:
        """Fit bounds, means and deviations on training stays.

        Args:
            table: `build_triplets(...)` of the training stays alone; their subjects' digest is stored, so that an audit
                can tell whether reported stays were among them.
            clip_percentiles: Percentiles of each variable that its values are clipped to.
            padding_side: "right" or "left".
            code_map: [regular expression, kind] pairs that tell deaths and visits, where the dataset has its own.

        Raises:
            ValueError: No stays, no triplets, percentiles or pairs that are none.
        """
        low, high = checked_percentiles(clip_percentiles)
        if len(table) == 0 or len(table.values) == 0:
            raise ValueError("the table holds no triplet; give build_triplets(...) of the training stays.")
        spec: TripletSpec = table.spec
        order = np.argsort(table.variable_ids, kind="stable")
        counts = np.bincount(table.variable_ids, minlength=len(spec.variables))
        groups = np.split(np.asarray(table.values, np.float64)[order], np.cumsum(counts)[:-1])
        values = np.array([clipped_moments(group, low, high) for group in groups])
        numeric = [flag for feature in spec.static_features for flag in feature.is_numeric]
        columns = [column[~np.isnan(column)] for column in np.asarray(table.static, np.float64).T]
        static = np.array(
            [
                clipped_moments(column, *((low, high) if flag else (0, 100)))
                for column, flag in zip(columns, numeric, strict=True)
            ]
        ).reshape(len(columns), 4)
        subjects = np.unique(table.subject_ids).tolist()
        fitted: dict[str, Any] = {"value_counts": counts.tolist()}
        for position, name in enumerate(("means", "deviations", "lower", "upper")):
            fitted[f"value_{name}"] = values[:, position].tolist()
            fitted[f"static_{name}"] = static[:, position].tolist()
        return cls(
            spec.to_dict(),
            **fitted,
            clip_percentiles=[low, high],
            num_fitted_stays=len(table),
            num_fitted_subjects=len(subjects),
            fitted_subjects_digest=subjects_digest(subjects),
            padding_side=padding_side,
            code_map=code_map,
        )

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> TripletSpec:
        """What becomes triplets."""
        return self._spec

    @property
    def variables(self) -> list[str]:
        """Names of the variables; the position is the variable id."""
        return self._spec.variable_names

    @property
    def num_variables(self) -> int:
        """Number of variables, V."""
        return len(self._spec.variables)

    @property
    def static_columns(self) -> list[str]:
        """Names of the static columns."""
        return self._spec.static_columns

    @property
    def num_static(self) -> int:
        """Number of static columns, D."""
        return len(self.static_columns)

    @property
    def window_minutes(self) -> float:
        """Length of the window: minute m is the time m / window_minutes * 2 - 1."""
        return self._spec.window_minutes

    def to_dict(self) -> dict[str, Any]:
        """What is saved: plain JSON types."""
        saved = {name: value for name, value in super().to_dict().items() if not name.startswith("_")}
        if saved.get("code_map") is None:
            saved.pop("code_map", None)
        return saved

    # -- when a question can be asked --------------------------------------------------------------------------------

    @property
    def kind_of(self) -> Callable[[str], tuple[str, str | None]]:
        """What tells a code's kind and encounter class, by the code map."""
        return kind_reader(self.code_map)

    def reasons_against(
        self, patient: Any, tasks: Sequence[Mapping[str, Any]], prediction_time: Any = None
    ) -> list[str | None]:
        """Why each of some tasks (entries of a model's `config.tasks`) cannot be asked about a patient at a time, None
        where it can; see `EhrTokenizer.reasons_against`, whose rules these are. A stay of triplets has no dates, and
        nothing that could speak against a task.
        """
        if _is_stay(patient):
            return [None] * len(tasks)
        events, own_time = read_patient(patient_of_table(patient))
        cut = parse_time(prediction_time, "prediction_time")
        return reasons_against(events, self.kind_of, tasks, own_time if cut is None else cut)

    # -- numbers -----------------------------------------------------------------------------------------------------

    def normalise(self, variable_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Values clipped and standardised, float32."""
        ids = np.asarray(variable_ids)
        clipped = np.clip(values, np.asarray(self.value_lower)[ids], np.asarray(self.value_upper)[ids])
        array: np.ndarray = (
            (clipped - np.asarray(self.value_means)[ids]) / np.asarray(self.value_deviations)[ids]
        ).astype(np.float32)
        return array

    def denormalise(self, variable_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Standardised values in the variables' own units, float64."""
        ids = np.asarray(variable_ids)
        array: np.ndarray = (
            np.asarray(values, np.float64) * np.asarray(self.value_deviations)[ids] + np.asarray(self.value_means)[ids]
        )
        return array

    def normalise_static(self, static: np.ndarray) -> np.ndarray:
        """Static values `[..., D]` clipped and standardised, float32; unknown ones (NaN) become 0."""
        clipped = np.clip(static, self.static_lower, self.static_upper)
        scaled = (clipped - np.asarray(self.static_means)) / np.asarray(self.static_deviations)
        array: np.ndarray = np.nan_to_num(scaled, nan=0.0).astype(np.float32)
        return array

    def scale_times(self, minutes: np.ndarray) -> np.ndarray:
        """Minutes since the window's start as times in [-1, 1], float32."""
        return (np.asarray(minutes, np.float64) / self.window_minutes * 2 - 1).astype(np.float32)

    def minutes_of(self, times: np.ndarray) -> np.ndarray:
        """The inverse of `scale_times`, float64, to a thousandth of a minute where the window is up to a week."""
        return (np.asarray(times, np.float64) + 1) / 2 * self.window_minutes

    def was_fitted(self, variable_ids: np.ndarray) -> np.ndarray:
        """Whether the training stays held a triplet of each id's variable."""
        array: np.ndarray = np.asarray(self.value_counts)[np.asarray(variable_ids)] > 0
        return array

    # -- one stay or many --------------------------------------------------------------------------------------------

    def __call__(
        self,
        stays: Any,
        *,
        prediction_time: Any = None,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        variable_dropout: float = 0.0,
        seed: int | None = None,
        return_tensors: str | None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Channels of one stay, or of a list of stays.

        Args:
            stays: A patient (`{"subject_id", "events": [{"time", "code", "numeric_value"?}], "prediction_time"?}`), a
                table of one subject's rows, or a stay (`{"times": minutes since the window's start, "variables": ids or
                names, "values", "static": values of the static columns or a mapping by their names}`), or a list of
                them. Rows may stand in any order.
            prediction_time: Patients only: nothing later is read; default: the patient's own, else the last row's time.
            padding: As everywhere in transformers; every channel is padded with 0.
            truncation: False; True or "recent": the most recent triplets stay; "random": random ones stay, in order. By
                default a stay is cut where `max_length` is given.
            max_length: Triplets of a stay at most.
            pad_to_multiple_of: As everywhere in transformers.
            variable_dropout: For training: the share of variables whose triplets are removed, drawn for each stay.
            seed: Of the random truncation and the dropout, which need one.
            return_tensors: "pt" or "np".
            unknown: Nothing else is taken.

        Returns:
            `variable_ids` (int64), `times` (float32), `values` (float32), `attention_mask` (int64) `[n]` and
            `static_values` (float32) `[D]` as arrays for one stay, lists of arrays for a list; with `return_tensors`
            or padding `[b, n]` and `[b, D]`.

        Raises:
            ValueError: No stays, a stay without a triplet, a field of the wrong type, lengths that make no tensor.
        """
        if unknown:
            raise ValueError(
                f"HyMaTEFeatureExtractor got {sorted(unknown)}; it takes prediction_time, padding, truncation, "
                "max_length, pad_to_multiple_of, variable_dropout, seed and return_tensors."
            )
        many = isinstance(stays, list | tuple)
        if many and not stays:
            raise ValueError("HyMaTEFeatureExtractor got an empty list; give at least one stay.")
        pads = padding not in (False, "do_not_pad", PaddingStrategy.DO_NOT_PAD)
        to_length = padding in ("max_length", PaddingStrategy.MAX_LENGTH)
        how = self._truncation(truncation, max_length, to_length)
        rng = None
        if how == "random" or variable_dropout:
            if seed is None:
                raise ValueError(
                    "random truncation and variable_dropout need a seed; give one, or truncation='recent'."
                )
            rng = np.random.default_rng(seed)
        skipped: Counter[str] = Counter()
        unknown_rows: Counter[str] = Counter()
        rows = []
        for stay in stays if many else [stays]:
            read, _, _ = self._read(stay, prediction_time)
            skipped.update(read.skipped)
            unknown_rows.update(read.unknown)
            kept = choose_triplets(
                read.variable_ids, max_length if how else None, how or "recent", variable_dropout, rng
            )
            rows.append(self.stay_channels(read, kept))
        self.report_left_out(skipped, unknown_rows, sum(len(row["times"]) for row in rows))
        if not many and not pads and return_tensors is None:
            return BatchFeature(rows[0])
        batch = {name: [row[name] for row in rows] for name in self.model_input_names}
        if not pads and return_tensors is None:
            return BatchFeature(batch)
        lengths = {len(row["times"]) for row in rows}
        if not pads and len(lengths) > 1:
            raise ValueError(f"stays of the lengths {sorted(lengths)} make no tensor; pass padding=True.")
        return self.pad(
            BatchFeature(batch),
            padding=padding if pads else False,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors or "np",
        )

    def sourced_rows(
        self, patient: Any, tasks: Any = (), prediction_time: Any = None, max_length: int | None = None
    ) -> StayRows:
        """The row of one stay, the same for each task, which knows the event behind each of its triplets.

        Arguments as in `__call__`. What was left out is told by its `notes`, not by a warning.
        """
        self._truncation(None, max_length, False)  # or says what is wrong with it
        stay, events, cut = self._read(patient, prediction_time)
        kept = choose_triplets(stay.variable_ids, max_length, "recent", 0.0, None)
        if events is None:
            numbers = np.asarray(patient["variables"]).tolist()
            names = [self.variables[name] if isinstance(name, int) else name for name in numbers]
            events = [Event(None, *pair) for pair in zip(names, map(float, patient["values"]), strict=True)]
        return StayRows(events, cut, stay, kept, self.stay_channels(stay, kept), self)

    def _truncation(self, truncation: bool | str | None, max_length: int | None, to_length: bool) -> str | None:
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < 1
        ):
            raise ValueError(f"max_length got {max_length!r}; expected an integer of at least 1 triplet.")
        if truncation is None:
            truncation = max_length is not None and not to_length
        if truncation is False:
            return None
        how = "recent" if truncation is True else truncation
        if how not in TRUNCATIONS:
            raise ValueError(f"truncation got {truncation!r}; expected True, False, 'recent' or 'random'.")
        if max_length is None:
            raise ValueError(f"truncation={truncation!r} needs max_length; give the number of triplets that stay.")
        return how

    def stay_channels(self, stay: Stay, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Channels of some of a stay's triplets (positions)."""
        ids = stay.variable_ids[kept]
        return {
            "variable_ids": ids,
            "times": self.scale_times(stay.minutes[kept]),
            "values": self.normalise(ids, stay.values[kept]),
            "attention_mask": np.ones(len(ids), np.int64),
            "static_values": self.normalise_static(stay.static),
        }

    def stay_of_events(self, events: Sequence[Event], cut: int | None) -> Stay:
        """The stay of a record: triplets in order, those of variables never seen in training left out.

        Args:
            events: The patient's events.
            cut: Nothing later than this instant (microseconds) is read; None = the whole record.

        Raises:
            ValueError: No window begins in it.
        """
        return self._fitted_part(read_stay(events, self._spec, cut))

    def _read(self, record: Any, prediction_time: Any) -> tuple[Stay, list[Event] | None, int | None]:
        """A stay of any form, as `stay_of_events` makes it; and the events and the prediction time of a patient."""
        events, cut = None, None
        if _is_stay(record):
            if prediction_time is not None:
                raise ValueError("a stay of triplets has no dates; give prediction_time with patients (events) only.")
            stay = self._fitted_part(self._read_triplets(record))
        else:
            events, own_time = read_patient(patient_of_table(record))
            cut = parse_time(prediction_time, "prediction_time")
            cut = own_time if cut is None else cut
            stay = self.stay_of_events(events, cut)
        if not len(stay.minutes):
            subject = record.get("subject_id", "?") if isinstance(record, Mapping) else "?"
            raise ValueError(
                f"the stay of subject {subject} holds no triplet of a known variable "
                f"({dict(stay.skipped) | {'of unknown variables': sum(stay.unknown.values())}}); leave such stays out."
            )
        return stay, events, cut

    def _fitted_part(self, stay: Stay) -> Stay:
        """The same stay without triplets of variables that were never seen in training; they are counted in it."""
        fitted = self.was_fitted(stay.variable_ids)
        for number in np.unique(stay.variable_ids[~fitted]):
            stay.unknown[self.variables[number]] += int((stay.variable_ids == number).sum())
        stay.minutes, stay.variable_ids, stay.values, stay.sources = (
            part[fitted] for part in (stay.minutes, stay.variable_ids, stay.values, stay.sources)
        )
        return stay

    def _read_triplets(self, stay: Mapping[str, Any]) -> Stay:
        unread = sorted(map(str, set(stay) - STAY_KEYS))
        missing = sorted({"times", "variables", "values"} - set(stay))
        if unread or missing:
            raise ValueError(
                f"a stay has the keys {sorted(map(str, stay))}; expected times, variables, values, static and "
                "subject_id, or a patient with events."
            )
        minutes, values = (flat_numbers(name, stay[name]) for name in ("times", "values"))
        names = np.asarray(stay["variables"])
        if not len(names):
            names = names.astype(np.int64)
        if not len(minutes) == len(values) == len(names) or names.ndim != 1:
            raise ValueError(
                f"times, variables and values of a stay must be of one length; got {len(minutes)}, {len(names)} and "
                f"{len(values)}."
            )
        skipped: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        if names.dtype.kind in "iu":
            if len(names) and (names.min() < 0 or names.max() >= self.num_variables):
                raise ValueError(
                    f"variable ids must lie in 0..{self.num_variables - 1}, got {names.min()}..{names.max()}."
                )
            ids = names.astype(np.int64)
        elif names.dtype.kind in "UO" and all(isinstance(name, str) for name in names.tolist()):
            known = {name: number for number, name in enumerate(self.variables)} | self._spec.code_ids
            ids = np.asarray([known.get(name, -1) for name in names.tolist()], np.int64)
            unknown.update(name for name, number in zip(names.tolist(), ids, strict=True) if number < 0)
        else:
            raise ValueError(f"variables of a stay must be ids or names, got {names.dtype}.")
        finite = np.isfinite(values)
        inside = (minutes >= 0) & (minutes <= self.window_minutes)
        for reason, count in (
            ("values that are NaN or infinite", (~finite).sum()),
            ("triplets outside of the window", (finite & ~inside).sum()),
            ("triplets earlier than the one before them, sorted", (np.diff(minutes) < 0).sum()),
        ):
            if count:
                skipped[reason] += int(count)
        kept = finite & inside & (ids >= 0)
        sources = kept.nonzero()[0]
        minutes, ids, values = minutes[kept], ids[kept], values[kept]
        order, repeated = in_order(minutes, ids, values)
        if repeated.any():
            skipped["repeated triplets"] += int(repeated.sum())
        order = order[~repeated]
        static = self._static_vector(stay.get("static"))
        return Stay(minutes[order], ids[order], values[order], static, skipped, unknown, sources[order])

    def _static_vector(self, values: Any) -> np.ndarray:
        """Static values `[D]`; of a mapping by column, what it lacks is unknown and flagged so."""
        columns = self.static_columns
        if values is not None and not isinstance(values, Mapping):
            static = flat_numbers("static", values)
            if len(static) != len(columns):
                raise ValueError(f"static got {len(static)} values; expected one for each of {columns}.")
            return static
        named = dict(values or {})
        unread = sorted(map(str, set(named) - set(columns)))
        if unread:
            raise ValueError(f"static has the unknown columns {unread}; expected {columns}.")
        static = np.array([np.nan if named.get(name) is None else float(named[name]) for name in columns], np.float64)
        for feature in self._spec.static_features:
            flag = f"{feature.name} missing"
            if feature.missing_flag and flag not in named:
                static[columns.index(flag)] = np.isnan(static[columns.index(feature.columns[0])])
        return static

    def report_left_out(self, skipped: Counter[str], unknown: Counter[str], known: int) -> None:
        """One warning a call for what was left out; unknown codes are named once."""
        new = {name: count for name, count in unknown.items() if name not in self._reported}
        if new:
            self._reported.update(new)
            first = ", ".join(f"{name} ({count})" for name, count in Counter(new).most_common(5))
            more = " ..." if len(new) > 5 else ""
            logger.warning(
                f"{sum(unknown.values())} numeric rows are of {len(unknown)} codes that this feature extractor does "
                f"not know and leaves out, beside {known} triplets that it reads: {first}{more}. Named once."
            )
        if skipped:
            logger.warning(f"Left out or mended: {dict(skipped)}.")

    # -- padding and truncation of rows that are channels already (Trainer's collator, `pad`) ------------------------

    def _pad(
        self,
        processed_features: dict[str, np.ndarray] | BatchFeature,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pad every channel with 0, on either side (the base class pads the first channel and the mask only)."""
        length = len(processed_features["variable_ids"])
        if return_attention_mask is not False and "attention_mask" not in processed_features:
            processed_features["attention_mask"] = np.ones(length, np.int64)
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = length
        if max_length is not None and pad_to_multiple_of:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        if padding_strategy == PaddingStrategy.DO_NOT_PAD or max_length is None or max_length <= length:
            return dict(processed_features)
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side got {self.padding_side!r}; expected 'left' or 'right'.")
        width = (max_length - length, 0) if self.padding_side == "left" else (0, max_length - length)
        for name in TRIPLET_CHANNELS:
            if name in processed_features:
                processed_features[name] = np.pad(processed_features[name], width)
        return dict(processed_features)

    def _truncate(
        self,
        processed_features: dict[str, np.ndarray] | BatchFeature,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | None = None,
    ) -> dict[str, np.ndarray] | BatchFeature:
        """Keep the most recent triplets (the base class keeps the first, of the first channel only)."""
        if not truncation:
            return processed_features
        if max_length is None:
            raise ValueError("truncation=True needs max_length; give the number of triplets that stay.")
        for name in TRIPLET_CHANNELS:
            if name in processed_features:
                processed_features[name] = processed_features[name][-max_length:]
        return processed_features


def _is_stay(record: Any) -> bool:
    """Whether this is a stay of triplets, not a patient."""
    return isinstance(record, Mapping) and "times" in record
