"""What a stage is, what a plan of stages is, and what a plan says about one moment.

A plan cuts an episode at *events*, not at fixed times: stage `k` is entered where the event of stage `k - 1` holds and
ends where its own event holds. The last event is the environment's own success. Stages are counted from 0, `K` is
their number.

Everything here looks at single moments and forgets the past: a dropped object falls back to an earlier stage, so
potentials are functions of the state. The other reading, with memory, is [`segment`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.measures import succeeded
from trl_stare.stages.validation import check_names, check_shape, check_signals

POTENTIAL_FORMS = ("staged", "literal")
"""`staged` is our default, `literal` the formula as the paper states it (`StagePlan.potential`)."""

_SIGMOID_OF_ONE = 1.0 / (1.0 + math.exp(-1.0))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a task.

    Args:
        name (`str`): e.g. `"Reach"`.
        done (`Callable[[Signals], Tensor]`): the event that ends the stage, `[...]` bool, true as long as it holds. Of
            the last stage it must be [`succeeded`].
        distance (`Callable[[Signals], Tensor]`): `[...]`, how far the stage is from its end, >= 0.
        scale (`float`): `L_k`, in units of `distance`: the distance at which progress is `sigmoid(0) / sigmoid(1)`,
            about 0.68.
        reads (`tuple[str, ...]`): names of the signals that `done` and `distance` read. They are given no others.
        cost_scale (`float`, *optional*): what `distance` is divided by in costs; `scale` where it is not given.

    Raises:
        ValueError: if `done` or `distance` is no function, `reads` no tuple of names, or a scale not positive and finite.
    """

    name: str
    done: Callable[[Signals], Tensor]
    distance: Callable[[Signals], Tensor]
    scale: float
    reads: tuple[str, ...]
    cost_scale: float | None = None

    def __post_init__(self):
        for field in ("done", "distance"):
            if not callable(getattr(self, field)):
                raise ValueError(
                    f"`{field}` of stage {self.name!r} must be a function of signals, got {getattr(self, field)!r}. "
                    f"Without it the stage {'has no exit' if field == 'done' else 'cannot tell how far its exit is'}."
                )
        if (
            not isinstance(self.reads, tuple)
            or not self.reads
            or not all(isinstance(name, str) for name in self.reads)
        ):
            raise ValueError(
                f"`reads` of stage {self.name!r} must be a tuple of signal names, got {self.reads!r}. Write ('success',)."
            )
        for field in ("scale", "cost_scale"):
            value = getattr(self, field)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"`{field}` of stage {self.name!r} must be positive and finite, got {value}.")


def _event_name(done: Callable) -> str:
    if not isinstance(done, partial):
        return getattr(done, "__name__", type(done).__name__)
    given = [*map(repr, done.args), *(f"{name}={value!r}" for name, value in done.keywords.items())]
    return f"{_event_name(done.func)}({', '.join(given)})"


class _Declared(dict):
    """The signals one stage has declared: an undeclared one is a mistake even where the environment offers it."""

    def __init__(self, stage: Stage, signals: Signals):
        super().__init__({name: signals[name] for name in stage.reads})
        self._stage = stage

    def __missing__(self, name: str):
        stage = self._stage
        raise ValueError(f"`reads` of stage {stage.name!r} must contain {name!r}, got {stage.reads}. Add it.")


@dataclass(frozen=True)
class StagePlan:
    """The stages of one task, in order.

    Args:
        task (`str`): registered task name.
        stages (`tuple[Stage, ...]`): two or more, with different names; the last one ends with [`succeeded`].

    All methods take signals of any leading shape, and raise `ValueError` naming the signal if one is missing, not
    finite or of another leading shape.

    Example: with stages Reach, Grasp, Transport, Stack, a cube held in the air has `current_stage` 2 (Transport), and
    a potential between 0.5 and 0.75. Dropped on the table, with the hand above it, `current_stage` is 0 again.
    """

    task: str
    stages: tuple[Stage, ...]

    def __post_init__(self):
        given = self.stages if isinstance(self.stages, tuple) else ()
        if len(given) < 2 or not all(isinstance(stage, Stage) for stage in given):
            raise ValueError(f"`stages` of {self.task!r} must be a tuple of two or more stages, got {self.stages}.")
        names = [stage.name for stage in given]
        if len(set(names)) < len(names):
            raise ValueError(f"`stages` of {self.task!r} must have different names, got {names}.")
        if self.stages[-1].done is not succeeded or "success" not in self.stages[-1].reads:
            raise ValueError(
                f"`done` of the last stage of {self.task!r} ({names[-1]!r}) must be `trl_stare.stages.succeeded`, "
                f"with 'success' in `reads`: only the environment says what success is."
            )

    def __len__(self) -> int:
        """`K`."""
        return len(self.stages)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names, in order."""
        return tuple(stage.name for stage in self.stages)

    @property
    def event_names(self) -> dict[str, str]:
        """Stage -> its event by name and thresholds, in order: what tells results under one plan from results under another.

        Example: `{"Reach": "touched_near(radius=0.02)", ..., "Stack": "succeeded"}`.
        """
        return {stage.name: _event_name(stage.done) for stage in self.stages}

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all signals the plan reads, each once."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.reads))

    def rescaled(self, factor: float) -> StagePlan:
        """The same stages with every `L_k` of the potential times `factor`; events, distances and costs stay as they are.

        Below 1 the potential rises more steeply, and close to a stage's end. `L_k` = 0.3 m, about how far apart things are at first,
        leaves it nearly flat: from 5 cm to the end of one of four stages it rises by 0.01, with a factor of 0.1 by 0.13.

        Raises:
            ValueError: if `factor` is not positive and finite.
        """
        if not 0.0 < factor < math.inf:
            raise ValueError(f"`factor` must be positive and finite, got {factor}.")
        stages = (
            replace(stage, scale=factor * stage.scale, cost_scale=stage.cost_scale or stage.scale)
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))

    def validate_signals(self, signal_names: Collection[str]) -> None:
        """Raise unless an environment that offers `signal_names` can feed this plan. Call it before any rollout.

        Raises:
            ValueError: names the missing signals and lists the known ones.
        """
        check_names(self.task, self.reads, signal_names)

    def events(self, signals: Signals) -> Tensor:
        """Which stages' own events hold now, `[..., K]` bool; the last one's is success.

        Raises:
            ValueError: if a `done` does not return bool of the leading shape; names the stage.
        """
        lead = check_signals(self.task, self.reads, signals)
        columns = []
        for stage in self.stages:
            done = check_shape(self.task, stage.name, "done", stage.done(_Declared(stage, signals)), lead)
            if done.dtype != torch.bool:
                raise ValueError(
                    f"`done` of stage {stage.name!r} of {self.task!r} must return bool, got {done.dtype}."
                )
            columns.append(done)
        return torch.stack(columns, dim=-1)

    def exits(self, signals: Signals) -> Tensor:
        """Which stages are over now, `[..., K]` bool: their event holds, or success, which implies all of them."""
        return self.events(signals) | signals["success"].unsqueeze(-1)

    def distances(self, signals: Signals) -> Tensor:
        """How far each stage is from its end, whichever is current, `[..., K]` in each stage's own unit.

        Raises:
            ValueError: if a distance is negative or not finite; names the stage.
        """
        lead = check_signals(self.task, self.reads, signals)
        columns = []
        for stage in self.stages:
            distance = stage.distance(_Declared(stage, signals))
            columns.append(check_shape(self.task, stage.name, "distance", distance, lead))
            if not ((distance >= 0) & torch.isfinite(distance)).all():
                raise ValueError(
                    f"`distance` of stage {stage.name!r} of {self.task!r} must be finite and >= 0, got a minimum of "
                    f"{distance.min().item()} and a maximum of {distance.max().item()}."
                )
        return torch.stack(columns, dim=-1)

    def relative_distances(self, signals: Signals) -> Tensor:
        """`d_k / L_k`, what progress is a function of, `[..., K]`."""
        distances = self.distances(signals)
        return distances / distances.new_tensor([stage.scale for stage in self.stages])

    def costs(self, signals: Signals) -> Tensor:
        """What a moment costs in each stage, `[..., K]`: `distance_k / cost_scale_k`."""
        distances = self.distances(signals)
        scales = [stage.scale if stage.cost_scale is None else stage.cost_scale for stage in self.stages]
        return distances / distances.new_tensor(scales)

    def current_stage(self, signals: Signals) -> Tensor:
        """The stage now, `[...]` int64: one past the last event that holds now, 0 if none does, `K` at success."""
        exits = self.exits(signals)
        after = torch.arange(1, len(self) + 1, device=exits.device)
        return (exits * after).amax(dim=-1)

    def progress(self, signals: Signals) -> Tensor:
        """How far the current stage has come, `[...]`: `sigmoid(1 - d_k / L_k) / sigmoid(1)`, or 1 at success."""
        return self._progress(signals, self.current_stage(signals))

    def potential(self, signals: Signals, form: str = "staged") -> Tensor:
        """The potential of each moment, `[...]`, for [`shaped_reward`].

        Args:
            signals (`Signals`): name -> `[...]` or `[..., D]`.
            form (`str`): `"staged"`: `(k + phi_k) / K` in (0, 1], 1 at success; no stage lies below an earlier one.
                `"literal"`: `sigmoid(1 - d_k / L_k)`, as the paper states it. It drops where a stage begins. At
                success nothing is left to do, so d = 0 and the potential is `sigmoid(1)`, about 0.731: the formula's
                largest value.

        Raises:
            ValueError: for an unknown form; lists the known ones.
        """
        if form not in POTENTIAL_FORMS:
            raise ValueError(f"`form` must be one of {POTENTIAL_FORMS}, got {form!r}.")
        current = self.current_stage(signals)
        phi = self._progress(signals, current)
        if form == "literal":
            return phi * _SIGMOID_OF_ONE
        # at success the last stage counts as complete: (K - 1 + 1) / K
        return (current.clamp(max=len(self) - 1) + phi) / len(self)

    def _progress(self, signals: Signals, current: Tensor) -> Tensor:
        distances = self.relative_distances(signals)
        index = current.clamp(max=len(self) - 1).unsqueeze(-1)
        nearness = 1.0 - distances.gather(-1, index).squeeze(-1)
        # float32's vectorised sigmoid rounds otherwise than its scalar one: a moment must be worth the same alone as in a batch
        phi = (torch.sigmoid(nearness.double()) / _SIGMOID_OF_ONE).to(distances.dtype)
        # rounding must not lift a distance of zero above 1
        return torch.where(current == len(self), 1.0, phi.clamp(max=1.0))
