"""Running episodes, decision by decision, until they end and become trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.data.actors import Decision
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import EpisodeStart, Observation, Signals, Step, VectorEnv
from trl_stare.stages.validation import check_finite


class Moment(NamedTuple):
    """One decision of one episode: row `i` of the environments, row `j` of what the actor answered."""

    obs: Observation
    decision: Decision
    step: Step
    i: int
    j: int

    @property
    def taken(self) -> int:
        """Environment steps executed."""
        return int(self.step.num_steps[self.i])


@dataclass
class Recorder:
    """Collects one running episode (-1: none) of environment `env`; tensors are cut out of the batches only when it ends."""

    env: int
    episode: int
    first_signals: Signals
    moments: list[Moment] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Environment steps so far."""
        return sum(moment.taken for moment in self.moments)

    def finish(self, env: VectorEnv, start: EpisodeStart, name: str) -> Trajectory:
        """Cut the episode's rows out of the batches it was recorded in."""
        moments = self.moments
        last, row = moments[-1].step, moments[-1].i
        signals = {
            key: torch.cat([first[None], *(m.step.chunk_signals[key][m.i, : m.taken] for m in moments)])
            for key, first in self.first_signals.items()
        }
        return Trajectory(
            task=env.task,
            instruction=env.instruction,
            seed=start.seed,
            policy=name,
            images=torch.stack([m.obs.images[m.i] for m in moments]),
            state=torch.stack([m.obs.state[m.i] for m in moments]),
            starts=torch.tensor([0, *(m.taken for m in moments[:-1])]).cumsum(0),
            actions=self._executed("actions"),
            labels=self._executed("labels"),
            trace=self._answers("trace"),
            logps=self._answers("logps"),
            features=self._answers("features"),
            final_image=last.final_obs.images[row],
            final_state=last.final_obs.state[row],
            signals=signals,
            reward=torch.cat([m.step.reward[m.i, : m.taken] for m in moments]),
            terminated=bool(last.terminated[row]),
            truncated=bool(last.truncated[row]),
            prefix=start.actions,
            env=self.env,
        )

    def _answers(self, name: str) -> Tensor | None:
        values = [(getattr(moment.decision, name), moment.j) for moment in self.moments]
        return None if values[0][0] is None else torch.stack([value[j] for value, j in values])

    def _executed(self, name: str) -> Tensor:
        return torch.cat([getattr(m.decision, name)[m.j, : m.taken] for m in self.moments])


def require_finite(
    signals: Signals, recorders: Sequence[Recorder], task: str, starts: Sequence[EpisodeStart], *, ahead: int
) -> None:
    """Raise `ValueError` naming task, seed, environment and step if the simulator gave a value that is not finite.

    `signals` are `[N, C]` or `[N, C, D]`; column 0 is `ahead` steps past the last one recorded.
    """
    if all(bool(torch.isfinite(value).all()) for value in signals.values()):  # one look at all, as this is every step
        return
    for i, recorder in enumerate(recorders):
        if recorder.episode >= 0:
            where = f"seed {starts[recorder.episode].seed} (environment {i})"
            check_finite(task, row_of(signals, i), where=where, first_step=recorder.num_steps + ahead)


def row_of(signals: Signals, i: int | Tensor) -> dict[str, Tensor]:
    """One environment's signals, or several environments'."""
    return {key: value[i] for key, value in signals.items()}


def rows_of(obs: Observation, rows: Tensor) -> Observation:
    """What the environments `rows` show."""
    state = None if obs.state is None else obs.state[rows]
    return Observation(obs.images[rows], tuple(obs.instructions[i] for i in rows.tolist()), state)
