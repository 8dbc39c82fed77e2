"""The statistics that scale a checkpoint's actions: read from its config, checked, and applied as OpenVLA applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = {"quantiles": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}
"""How actions are scaled, and the two statistics each way needs. Published OpenVLA checkpoints use the quantiles."""


def select_statistics(norm_stats: Mapping[str, Any], unnorm_key: str | None) -> str:
    """The key of the statistics to use: `unnorm_key`, or the only one.

    Raises:
        ValueError: there are none, several to choose from, or not this one.
    """
    if not norm_stats:
        raise ValueError(
            "`norm_stats` must hold action statistics, got none. Is this checkpoint a VLA? Compute them from demonstrations."
        )
    if unnorm_key is None and len(norm_stats) == 1:
        return next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        raise ValueError(f"`unnorm_key` must be one of {sorted(norm_stats)}, got {unnorm_key!r}.")
    return unnorm_key


@dataclass(frozen=True)
class ActionStatistics:
    """Affine map between robot units and `[-1, 1]`: `robot = offset + scale * normalised` where `mask`, unchanged elsewhere.

    A dimension with an empty range (or a std of 0) never moves: it becomes 0, and whatever the model gives its constant.

    Attributes:
        kind (`str`): `"quantiles"`, `"bounds"` or `"normal"`.
        first (`Tensor`), second (`Tensor`): `[A]` float64, the two statistics of `kind`.
        mask (`Tensor`): `[A]` bool, dimensions that are scaled at all (OpenVLA's gripper is not).

    Raises:
        ValueError: other sizes, values that are not finite, a range or a std below 0.

    Example: q01 = -2 and q99 = 2 map 1 robot unit to 0.5.
    """

    kind: str
    first: Tensor
    second: Tensor
    mask: Tensor

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {sorted(KINDS)}, got {self.kind!r}.")
        names = KINDS[self.kind]
        for name, value in (*zip(names, (self.first, self.second), strict=True), ("mask", self.mask)):
            if value.ndim != 1 or value.shape != self.first.shape:
                raise ValueError(f"`{name}` must hold {len(self.first)} values, got shape {[*value.shape]}.")
            if not torch.isfinite(value.double()).all():
                raise ValueError(f"`{name}` must be finite, got {value.tolist()}. Compute the statistics again.")
        if (self._spread[self.mask] < 0).any():
            rule = "at least 0" if self.kind == "normal" else f"at least `{names[0]}`"
            raise ValueError(
                f"`{names[1]}` must be {rule} wherever the mask is true, got {self.first.tolist()} and "
                f"{self.second.tolist()}. Compute the statistics again."
            )

    @classmethod
    def of_checkpoint(
        cls,
        norm_stats: Mapping[str, Any],
        unnorm_key: str | None = None,
        *,
        kind: str | None = None,
        action_dim: int | None = None,
    ) -> ActionStatistics:
        """Read `norm_stats[unnorm_key]["action"]`, as it stands in a checkpoint's config.

        Args:
            norm_stats (`Mapping`): `{key: {"action": {"q01": [A], "q99": [A], "mask": [A]}}}`, any of `KINDS`.
            unnorm_key (`str`, *optional*): may be left out where there is only one.
            kind (`str`, *optional*): which of `KINDS`; by default the first one that is there.
            action_dim (`int`, *optional*): `A` that the caller needs.

        Raises:
            ValueError: an unknown key (lists the known ones), or statistics that are missing or make no sense.
        """
        key = select_statistics(norm_stats, unnorm_key)
        stats = norm_stats[key].get("action", {})
        kinds = [name for name, (first, second) in KINDS.items() if first in stats and second in stats]
        if not kinds or (kind is not None and kind not in kinds):
            needed = KINDS if kind is None else {kind: KINDS[kind]}
            raise ValueError(
                f"`norm_stats[{key!r}]['action']` must hold {' or '.join(map(str, needed.values()))}, got {sorted(stats)}."
            )
        kind = kind or kinds[0]
        first, second = (torch.tensor(stats[name], dtype=torch.float64) for name in KINDS[kind])
        mask = torch.tensor(stats.get("mask", [True] * len(first)), dtype=torch.bool)
        if action_dim is not None and len(first) != action_dim:
            raise ValueError(f"`norm_stats[{key!r}]['action']` must hold {action_dim} values, got {len(first)}.")
        return cls(kind, first, second, mask)

    @property
    def action_dim(self) -> int:
        """`A`."""
        return len(self.first)

    def normalize(self, actions: Tensor) -> Tensor:
        """`[..., A]` robot units -> `[..., A]` float64; quantiles and bounds are clipped to [-1, 1] where scaled."""
        actions, moves = actions.double(), self._spread > 0
        scaled = (actions - self.first) / self._spread.where(moves, torch.ones_like(self.first))
        if self.kind != "normal":
            scaled = (2 * scaled - 1).clamp(-1, 1)
        return torch.where(self.mask, scaled.where(moves, torch.zeros_like(scaled)), actions)

    def unnormalize(self, values: Tensor) -> Tensor:
        """`[..., A]` normalised -> `[..., A]` float64 robot units (`predict_action` of the published OpenVLA)."""
        values = values.double()
        shares = values if self.kind == "normal" else 0.5 * (values + 1)
        return torch.where(self.mask, shares * self._spread + self.first, values)

    @property
    def _spread(self) -> Tensor:
        """`[A]`, robot units."""
        return self.second if self.kind == "normal" else self.second - self.first


def quantile_statistics(values: Tensor) -> dict[str, list]:
    """Statistics of demonstrations as a checkpoint's config holds them: `q01`, `q99`, and `mask`, which is true everywhere.

    Of what moves in less than one step of a hundred (a gripper that hardly ever closes) they are the smallest and largest value.

    Args:
        values (`Tensor`): `[T, D]`, actions (as the checkpoint's convention has them) or proprioception.

    Example: values 0 to 100 and a constant give `{"q01": [1.0, 7.0], "q99": [99.0, 7.0], "mask": [True, True]}`.
    """
    # numpy's, as OpenVLA's data code: torch's refuses more than 2^24 values
    values = values.double().numpy()
    low, high, least, most = np.quantile(values, (0.01, 0.99, 0.0, 1.0), axis=0)
    seldom = low == high
    low, high = np.where(seldom, least, low), np.where(seldom, most, high)
    return {"q01": low.tolist(), "q99": high.tolist(), "mask": [True] * len(low)}


class BinnedActions:
    """OpenVLA's bins: `num_bins` edges over [-1, 1], whose `num_bins - 1` intervals decode to their centres.

    The last edge is a bin of its own: the last two bins decode to the same centre, so 254 and 255 are one action.
    Source: `prismatic/vla/action_tokenizer.py`.

    Args:
        statistics ([`ActionStatistics`]): between robot units and [-1, 1].
        num_bins (`int`): at least 2; 256 in published checkpoints.

    Example: 5 bins have their edges at -1, -0.5, 0, 0.5, 1 and their centres at -0.75, -0.25, 0.25, 0.75, 0.75.
    """

    def __init__(self, statistics: ActionStatistics, num_bins: int = 256):
        if num_bins < 2:
            raise ValueError(f"`num_bins` must be at least 2, got {num_bins}.")
        self.statistics, self.num_bins, self.action_dim = statistics, num_bins, statistics.action_dim
        # numpy's edges, as in the source: torch's differ in the last bit
        self.edges = torch.from_numpy(np.linspace(-1, 1, num_bins))
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2

    def encode(self, actions: Tensor) -> Tensor:
        """`[..., A]` robot units -> `[..., A]` bins; values beyond the range go to the outermost bin."""
        values = self.statistics.normalize(actions).clamp(-1, 1)
        # right=True is numpy's digitize: edges[i] <= value < edges[i + 1]
        return torch.bucketize(values, self.edges, right=True) - 1

    def decode(self, bins: Tensor) -> Tensor:
        """`[..., A]` bins -> `[..., A]` float64 robot units."""
        return self.statistics.unnormalize(self.centers[bins.clamp(max=self.num_bins - 2)])
