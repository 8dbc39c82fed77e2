"""Refuses signals and stage values that do not mean what their names say, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Size, Tensor

from trl_stare.interfaces import Signals


def check_names(task: str, reads: Collection[str], known: Collection[str]) -> None:
    """Raise unless all signals that a plan reads exist.

    Raises:
        ValueError: names the missing signals and lists the known ones.
    """
    missing = [name for name in reads if name not in known]
    if missing:
        raise ValueError(
            f"`signals` must contain what the plan of {task!r} reads, but {missing} are missing; known are "
            f"{sorted(known)}. Add them to the task's signals, or read others."
        )


def check_signals(task: str, reads: Collection[str], signals: Signals) -> Size:
    """Raise unless the signals that a plan reads exist, share one leading shape and are finite.

    Returns:
        `torch.Size`: the leading shape, which is that of `"success"`.

    Raises:
        ValueError: names the signal, and its shape or the index of the first value that is not finite.
    """
    check_names(task, reads, signals)
    if signals["success"].dtype != torch.bool:
        raise ValueError(f"`signals['success']` must be bool, got {signals['success'].dtype}. Convert it in the task.")
    lead = signals["success"].shape
    for name in reads:
        value = signals[name]
        if value.shape[: len(lead)] != lead or value.ndim > len(lead) + 1:
            raise ValueError(
                f"`signals[{name!r}]` must have the shape of 'success', {[*lead]}, and at most one dimension more, "
                f"got {[*value.shape]}."
            )
        finite = torch.isfinite(value)
        if not finite.all():
            index = tuple(torch.nonzero(~finite)[0].tolist())
            raise ValueError(
                f"`signals[{name!r}]` of task {task!r} must be finite, got {value[index].item()} at index "
                f"{list(index)}. Void that episode."
            )
    return lead


def check_episode(task: str, reads: Collection[str], signals: Signals, *, where: str) -> None:
    """Raise unless `signals` are those of one whole trajectory that a plan can read. `where` says which one.

    Raises:
        ValueError: names the trajectory and the signal, and the step at which a value is not finite.
    """
    missing = [name for name in reads if name not in signals]
    if missing:
        raise ValueError(f"`{where}` must contain all that the plan of {task!r} reads, but {missing} are missing.")
    for name in reads:
        value = signals[name]
        if value.ndim == 0 or value.shape[:1] != signals["success"].shape or len(value) < 2:
            raise ValueError(
                f"`{where}[{name!r}]` must be of one trajectory of one or more steps, [T + 1] or [T + 1, D] like "
                f"'success', {[*signals['success'].shape]}, got {[*value.shape]}."
            )
    check_finite(task, {name: signals[name] for name in reads}, where=where)


def check_finite(task: str, signals: Signals, *, where: str, first_step: int = 0) -> None:
    """Raise unless all rows of `signals` (name -> `[T]` or `[T, D]`) are finite. Row 0 is step `first_step` of `where`.

    Raises:
        ValueError: names the first signal that is not, the step, the value and `where` it comes from.
    """
    for name, value in signals.items():
        rows = torch.nonzero(~torch.isfinite(value))
        if len(rows):
            index = tuple(rows[0].tolist())
            raise ValueError(
                f"`signals[{name!r}]` of task {task!r} must be finite, got {value[index].item()} at step "
                f"{first_step + index[0]} of {where}. Leave that episode out, and look at what the simulator did there."
            )


def check_shape(task: str, stage: str, what: str, value: Tensor, lead: Size) -> Tensor:
    """Return `value` if it has the signals' leading shape. `what` is the field of the stage it came from.

    Raises:
        ValueError: otherwise; the usual cause is `signals[name] > x` with a `[..., 1]` signal.
    """
    if value.shape != lead:
        raise ValueError(
            f"`{what}` of stage {stage!r} of {task!r} must return shape {[*lead]}, got {[*value.shape]}. "
            f"Index the last dimension of signals with values, e.g. `signals['object_lift'][..., 0]`."
        )
    return value
