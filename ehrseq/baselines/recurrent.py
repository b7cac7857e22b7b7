"""A GRU over the hours of a stay: the recurrent baseline of HyMaTE, with the tuning budget of the other baselines.

    model = HourlyGRU(seed=0).fit(train)                       # a TripletTable with labels
    risks = model.predict_proba(test)[:, 1]
    model.tried                                                # every configuration with its scores on the tuning stays

The rule: a fifth of the training stays is held out, the one that HyMaTE's recipes are tuned on
(`hold_out_stays(table)`, whatever the seed). At most eight configurations are trained on the rest; the epoch with the
largest AUROC + AUPRC on the held-out fifth is kept of each, and of these the configuration with the largest sum, as it
was trained: it is not fitted again on all stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ehrseq.baselines.summary_models import MAX_CONFIGURATIONS
from ehrseq.batches.triplet_rows import TripletRows
from ehrseq.encode.triplets import TripletTable, hold_out_stays
from ehrseq.evaluation import auroc, average_precision
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.hymate_embeddings import BinnedEmbeddings
from ehrseq.modeling.hymate_layout import TripletLayout
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "hidden_size": 64,
    "learning_rate": 1e-3,
    "dropout": 0.2,
    "variable_dropout": 0.2,
    "weight_decay": 0.01,
}
"""What a configuration leaves open. `dropout` is before and within the head; `variable_dropout` is the share of a
stay's variables that look as if never measured, as in HyMaTE's recipes; `weight_decay` is AdamW's."""

GRU_GRID: tuple[dict[str, Any], ...] = tuple(
    {"hidden_size": size, "learning_rate": rate, "dropout": dropout}
    for size in (32, 64)
    for rate in (5e-4, 2e-3)
    for dropout in (0.2, 0.5)
)

_BLOCK = 512  # stays scored at a time


class HourlyGRU:
    """One GRU layer over the hourly grid of a stay; a small network reads its last state and the static values.

    An hour holds three numbers of each variable: its value, 0 or 1 for whether it was measured, and the time since it
    was (see `hourly_grid`). Every stay is read to the end of its window, measured or not. The loss is binary
    cross-entropy with positives weighted by negatives / positives, as in STraTS; scores are probabilities all the same,
    since the shift of the log-odds that this causes is taken back.

    Args:
        grid: At most eight configurations, each with some of the keys of `DEFAULTS`; default `GRU_GRID`.
        seed: Of weights, order and dropout: of each configuration anew, so that its place in `grid` does not matter.
        num_threads: Threads of torch while it trains and predicts.

    Attributes:
        tried: One entry a configuration: its settings, `auroc` and `auprc` of the tuning stays, `best_epoch`, `epochs`.
        chosen: Settings of the kept model, and its `best_epoch`.

    Raises:
        ValueError: No configuration, more than eight, one with an unknown key or a value out of range; a seed or a
            number of threads that is none.
    """

    max_epochs = 50
    patience = 10
    batch_size = 64
    max_grad_norm = 1.0

    def __init__(self, *, grid: Any = None, seed: int = 0, num_threads: int = 1) -> None:
        self.grid = GRU_GRID if grid is None else tuple(dict(settings) for settings in grid)
        if not 1 <= len(self.grid) <= MAX_CONFIGURATIONS:
            raise ValueError(f"grid got {len(self.grid)} configurations; expected 1 to {MAX_CONFIGURATIONS}.")
        for settings in self.grid:
            _check_settings(settings)
        for name, value, least in (("seed", seed, 0), ("num_threads", num_threads, 1)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} got {value!r}; expected an integer of at least {least}.")
        self.seed = int(seed)
        self.num_threads = int(num_threads)
        self.tried: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] = {}
        self._extractor: HyMaTEFeatureExtractor | None = None
        self._network: _Network | None = None
        self._log_odds_shift = 0.0

    def fit(self, table: TripletTable) -> HourlyGRU:
        """Train every configuration on four fifths of the stays and keep the best on the last fifth.

        Args:
            table: Training stays with labels. Nothing else is looked at. Their grids are held in memory: 12 bytes a
                stay, hour and variable.

        Returns:
            The model itself.

        Raises:
            ValueError: No labels, or too few subjects of a class to hold a fifth of them out.
        """
        if table.labels is None:
            raise ValueError("the training stays have no labels; build them with build_triplets(events, spec, labels).")
        parts = hold_out_stays(table)
        extractor = HyMaTEFeatureExtractor.fit(parts[0])
        labels = [np.asarray(part.labels, np.int64) for part in parts]
        negatives, positives = np.bincount(labels[0], minlength=2)
        weight = torch.tensor(negatives / positives, dtype=torch.float32)
        with _threads(self.num_threads):
            train, tuning = (_read(part, extractor) for part in parts)
            tried: list[dict[str, Any]] = []
            networks: list[_Network] = []
            for settings in self.grid:
                network, reached = self._train({**DEFAULTS, **settings}, train, tuning, labels, weight)
                networks.append(network)
                tried.append({**settings, **reached})
                logger.info(f"GRU configuration {len(tried)} of {len(self.grid)}: {tried[-1]}")
        best = int(np.argmax([entry["auroc"] + entry["auprc"] for entry in tried]))
        self.tried = tried
        self.chosen = {**self.grid[best], "best_epoch": tried[best]["best_epoch"]}
        self._extractor = extractor
        self._network = networks[best]
        self._log_odds_shift = math.log(negatives / positives)
        return self

    def predict_proba(self, table: TripletTable) -> NDArray[np.float64]:
        """`[s, 2]` probabilities of the negative and the positive outcome.

        Raises:
            ValueError: The model is not fitted, or the table holds other triplets.
        """
        if self._network is None or self._extractor is None:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit(training stays) first.")
        if table.spec != self._extractor.spec:
            raise ValueError(
                f"the table has {len(table.spec.variables)} variables and {len(table.spec.static_columns)} static "
                f"columns that are not the {self._extractor.num_variables} and {self._extractor.num_static} of the "
                "training stays; build it with the same TripletSpec."
            )
        logits = np.empty(len(table), np.float64)
        with _threads(self.num_threads):
            for first in range(0, len(table), _BLOCK):
                stays = np.arange(first, min(first + _BLOCK, len(table)))
                logits[stays] = _logits(self._network, *_read(table.subset(stays), self._extractor))
        risks = 1 / (1 + np.exp(self._log_odds_shift - logits))
        return np.stack([1 - risks, risks], axis=1)

    def _train(
        self,
        settings: Mapping[str, Any],
        train: tuple[Tensor, Tensor],
        tuning: tuple[Tensor, Tensor],
        labels: list[NDArray[np.int64]],
        weight: Tensor,
    ) -> tuple[_Network, dict[str, Any]]:
        """Train one configuration: the network of its best epoch, and what that reached."""
        (grid, static), targets = train, torch.from_numpy(labels[0]).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _Network(grid.shape[2] // 3, static.shape[1], settings)
            optimizer = torch.optim.AdamW(
                network.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
            )
            best: dict[str, Any] = {}
            weights: dict[str, Tensor] = {}
            for epoch in range(1, self.max_epochs + 1):
                network.train()
                for batch in torch.randperm(len(targets)).split(self.batch_size):
                    logits = network(grid[batch], static[batch])
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[batch], pos_weight=weight)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
                    optimizer.step()
                scores = _logits(network, *tuning)
                reached = {"auroc": auroc(labels[1], scores), "auprc": average_precision(labels[1], scores)}
                if not best or sum(reached.values()) > best["auroc"] + best["auprc"]:
                    best = {**reached, "best_epoch": epoch}
                    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
                elif epoch - best["best_epoch"] >= self.patience:
                    break
        network.load_state_dict(weights)
        return network, {**best, "epochs": epoch}


class _Network(nn.Module):
    """Grid [b, B, 3V] and static values [b, D] -> logits [b]."""

    unmeasured: Tensor

    def __init__(self, num_variables: int, num_static: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        size = settings["hidden_size"]
        self.variable_dropout = settings["variable_dropout"]
        self.gru = nn.GRU(3 * num_variables, size, batch_first=True)
        self.head = nn.Sequential(
            nn.Dropout(settings["dropout"]),
            nn.Linear(size + num_static, size),
            nn.ReLU(),
            nn.Dropout(settings["dropout"]),
            nn.Linear(size, 1),
        )
        # An hour in which nothing was ever measured: values and masks of 0, gaps of 1.
        self.register_buffer("unmeasured", torch.arange(3 * num_variables).ge(2 * num_variables).float())

    def forward(self, grid: Tensor, static: Tensor) -> Tensor:
        if self.training and self.variable_dropout:
            dropped = torch.rand(len(grid), 1, grid.shape[2] // 3) < self.variable_dropout
            grid = torch.where(dropped.repeat(1, 1, 3), self.unmeasured, grid)
        last = self.gru(grid)[1][-1]  # [b, hidden_size]
        logits: Tensor = self.head(torch.cat([last, static], dim=1)).squeeze(1)
        return logits


def hourly_grid(rows: TripletRows) -> Tensor:
    """The hourly grid of stays, as HyMaTE's ablation without triplets reads it.

    Args:
        rows: The stays, normalised: values clipped to the training percentiles and z-scored.

    Returns:
        `[s, B, 3V]` float32, B the hours of the window (rounded to a whole number of steps of equal length), each
        beginning with its first minute; the window's last minute belongs to the last. V columns each of: the mean in
        the hour, else in the last hour that has one, else 0; 1 where it was measured in this hour; the hours since it
        was as a share of B, 1 where it never was.
    """
    spec, table = rows.extractor.spec, rows.table
    bins = max(1, round(spec.window_hours))
    config = HyMaTEConfig(num_variables=len(spec.variables), num_bins=bins, embedding_mode="binned")
    with torch.device("meta"):  # without weights: only its grid is wanted
        binned = BinnedEmbeddings(config)
    hours = np.minimum(np.floor(table.minutes * bins / spec.window_minutes), bins - 1)
    # Each triplet in the middle of its hour, lest rounding move what was measured on the hour to the hour before.
    times = torch.from_numpy(((hours + 0.5) / bins * 2 - 1).astype(np.float32))
    layout = TripletLayout(
        owner=torch.from_numpy(table.stay_ids)[None], num_sequences=len(table), shape=(1, len(table.minutes))
    )
    return binned.grid(torch.from_numpy(table.variable_ids), times, torch.from_numpy(rows.values), layout)[0]


def _read(table: TripletTable, extractor: HyMaTEFeatureExtractor) -> tuple[Tensor, Tensor]:
    """Grid and normalised static values of stays."""
    rows = TripletRows(table, extractor)
    if rows.dropped:
        logger.warning(f"Left out: {rows.dropped} triplets of variables that the training stays do not hold.")
    return hourly_grid(rows), torch.from_numpy(rows.static_values)


@torch.no_grad()
def _logits(network: _Network, grid: Tensor, static: Tensor) -> NDArray[np.float64]:
    network.eval()
    parts = [network(*part) for part in zip(grid.split(_BLOCK), static.split(_BLOCK), strict=True)]
    return torch.cat(parts).double().numpy()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where a configuration has a key or a value that no GRU has."""
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"a configuration has {unknown}; expected keys out of {list(DEFAULTS)}.")
    for name, value in settings.items():
        is_size = name == "hidden_size"
        is_number = isinstance(value, int if is_size else int | float) and not isinstance(value, bool)
        if is_size:
            fits, wanted = is_number and value >= 1, "an integer of at least 1"
        elif name.endswith("dropout"):
            fits, wanted = is_number and 0 <= value < 1, "a probability from 0 to below 1"
        elif name == "learning_rate":
            fits, wanted = is_number and 0 < value < math.inf, "a finite number above 0"
        else:
            fits, wanted = is_number and 0 <= value < math.inf, "a finite number of at least 0"
        if not fits:
            raise ValueError(f"{name} of a configuration got {value!r}; expected {wanted}.")
