"""Playing seeded episodes: a policy or a demonstrator acts in a `VectorEnv`, whole trajectories come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.data.actors import Actor, Decision, expert_actor, policy_actor
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, Signals, Step, VectorEnv, VLAPolicy
from trl_stare.stages.validation import check_finite


@dataclass
class Timing:
    """Seconds spent in a rollout: acting (the policy) and stepping (simulation, rendering, transport)."""

    act_s: float = 0.0
    step_s: float = 0.0


class _Moment(NamedTuple):
    """One decision of one episode: row `i` of the environments, row `j` of what the actor answered."""

    obs: Observation
    decision: Decision
    step: Step
    i: int
    j: int


@dataclass
class _Recorder:
    """Collects one running episode; tensors are cut out of the batches only when it ends."""

    episode: int
    first_signals: Signals
    moments: list[_Moment] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Environment steps so far."""
        return sum(int(moment.step.num_steps[moment.i]) for moment in self.moments)


def play(
    env: VectorEnv,
    policy: VLAPolicy,
    seeds: Sequence[int],
    *,
    temperature: float,
    generator: torch.Generator | None,
    ignore_terminations: bool = False,
    on_episode: Callable[[Trajectory], None] | None = None,
    name: str = "policy",
    timing: Timing | None = None,
) -> list[Trajectory]:
    """Let `policy` play one episode per seed.

    Args:
        env (`VectorEnv`): its `chunk_size` must be the policy's.
        temperature (`float`): of sampling; 0 is greedy.
        generator (`torch.Generator`): the only source of randomness, so that the same call gives the same trajectories.
        ignore_terminations (`bool`): go on to the time limit after a success (evaluation).
        on_episode (`Callable`, *optional*): told of every finished trajectory (a progress bar).

    Returns:
        `list[Trajectory]`, in the order of `seeds`.
    """

    act = policy_actor(policy, temperature=temperature, generator=generator)
    return collect(
        env, act, seeds, name=name, ignore_terminations=ignore_terminations, on_episode=on_episode, timing=timing
    )


def demonstrate(
    env: VectorEnv,
    expert: Callable[[Signals], Tensor],
    seeds: Sequence[int],
    *,
    noise: float = 0.0,
    mistake_size: float = 0.6,
    generator: torch.Generator | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Let a scripted expert show one episode per seed, one environment step at a time; see [`expert_actor`]."""
    act = expert_actor(expert, noise=noise, mistake_size=mistake_size, generator=generator)
    return collect(env, act, seeds, name="expert", on_episode=on_episode)


def demonstrate_successes(
    env: VectorEnv,
    expert: Callable[[Signals], Tensor],
    count: int,
    *,
    first_seed: int,
    noise: float = 0.0,
    mistake_size: float = 0.6,
    generator: torch.Generator | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """The first `count` successful demonstrations from `first_seed` on; see [`demonstrate`].

    Raises:
        RuntimeError: if fewer than one in twenty succeeds.
    """
    kept: list[Trajectory] = []
    seed, most = first_seed, first_seed + 20 * count + env.num_envs
    while len(kept) < count:
        if seed >= most:
            raise RuntimeError(f"only {len(kept)} of {seed - first_seed} demonstrations succeeded. Lower the noise.")
        seeds = range(seed, seed + max(count - len(kept), env.num_envs))
        seed = seeds.stop
        shown = demonstrate(
            env, expert, seeds, noise=noise, mistake_size=mistake_size, generator=generator, on_episode=on_episode
        )
        kept += [trajectory for trajectory in shown if trajectory.success_once]
    return kept[:count]


def replay(env: VectorEnv, trajectory: Trajectory) -> Trajectory:
    """Execute the recorded actions again, one environment step at a time: the same states, seen at every step.

    Args:
        env (`VectorEnv`): of the same task, with `chunk_size` 1; its images may have another size (a video).

    Raises:
        ValueError: if the states differ, i.e. the simulator is not the one that recorded the episode.
    """
    actions = iter(trajectory.actions)

    def act(obs: Observation, signals: Signals) -> Decision:
        action = next(actions)[None, None]
        return Decision(action, action)

    # an evaluation goes on after a success
    played_on = trajectory.num_steps > int(trajectory.signals["success"][1:].long().argmax()) + 1
    ignore = bool(trajectory.success_once and played_on)
    again = collect(env, act, [trajectory.seed], name=trajectory.policy, ignore_terminations=ignore)[0]
    for name, value in trajectory.signals.items():
        if not torch.equal(value, again.signals[name]):
            raise ValueError(
                f"`env` must repeat the episode of seed {trajectory.seed}, got another {name!r}. Use its backend."
            )
    return again


def collect(
    env: VectorEnv,
    act: Actor,
    seeds: Sequence[int],
    *,
    name: str,
    ignore_terminations: bool = False,
    on_episode: Callable[[Trajectory], None] | None = None,
    timing: Timing | None = None,
) -> list[Trajectory]:
    """Play one episode per seed with `act`, all of them in the order of `seeds`; see [`play`] and [`demonstrate`]."""
    finished: dict[int, Trajectory] = {}
    for index, trajectory in stream(
        env, act, seeds, name=name, ignore_terminations=ignore_terminations, timing=timing
    ):
        finished[index] = trajectory
        if on_episode is not None:
            on_episode(trajectory)
    return [finished[index] for index in range(len(seeds))]


@torch.no_grad()
def stream(
    env: VectorEnv,
    act: Actor,
    seeds: Sequence[int],
    *,
    name: str,
    ignore_terminations: bool = False,
    timing: Timing | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Play one episode per seed with `act` and yield each as it ends, with its index in `seeds`: only running ones are kept."""
    seeds, timing = [int(seed) for seed in seeds], timing or Timing()
    start = env.reset(seeds, ignore_terminations=ignore_terminations)
    obs, signals, episode = start
    recorders = [_Recorder(int(e), _row(signals, i)) for i, e in enumerate(episode)]
    while (active := torch.nonzero(episode >= 0).flatten()).numel():
        _require_finite({key: value[:, None] for key, value in signals.items()}, recorders, env.task, seeds, ahead=0)
        began = time.perf_counter()
        decision = act(_rows(obs, active), {key: value[active] for key, value in signals.items()})
        actions = torch.zeros(env.num_envs, *decision.actions.shape[1:])
        actions[active] = decision.actions
        acted = time.perf_counter()
        step = env.step(actions)
        timing.act_s += acted - began
        timing.step_s += time.perf_counter() - acted
        _require_finite(step.chunk_signals, recorders, env.task, seeds, ahead=1)
        for j, i in enumerate(active.tolist()):
            recorders[i].moments.append(_Moment(obs, decision, step, i, j))
            if step.terminated[i] or step.truncated[i]:
                ended, recorders[i] = recorders[i], _Recorder(int(step.episode[i]), _row(step.signals, i))
                yield ended.episode, _finish(ended, env, seeds, name)
        obs, signals, episode = step.obs, step.signals, step.episode


def _finish(recorder: _Recorder, env: VectorEnv, seeds: list[int], name: str) -> Trajectory:
    """Cut the episode's rows out of the batches it was recorded in."""
    moments = recorder.moments
    last, row = moments[-1].step, moments[-1].i
    taken = [int(step.num_steps[i]) for _, _, step, i, _ in moments]

    def answers(name: str) -> Tensor | None:
        values = [(getattr(moment.decision, name), moment.j) for moment in moments]
        return None if values[0][0] is None else torch.stack([value[j] for value, j in values])

    def executed(name: str) -> Tensor:
        return torch.cat([getattr(m.decision, name)[m.j, :n] for m, n in zip(moments, taken, strict=True)])

    signals = {
        key: torch.cat(
            [first[None], *(m.step.chunk_signals[key][m.i, :n] for m, n in zip(moments, taken, strict=True))]
        )
        for key, first in recorder.first_signals.items()
    }
    return Trajectory(
        task=env.task,
        instruction=env.instruction,
        seed=seeds[recorder.episode],
        policy=name,
        images=torch.stack([moment.obs.images[moment.i] for moment in moments]),
        state=torch.stack([moment.obs.state[moment.i] for moment in moments]),
        starts=torch.tensor([0, *taken[:-1]]).cumsum(0),
        actions=executed("actions"),
        labels=executed("labels"),
        trace=answers("trace"),
        logps=answers("logps"),
        features=answers("features"),
        final_image=last.final_obs.images[row],
        final_state=last.final_obs.state[row],
        signals=signals,
        reward=torch.cat([m.step.reward[m.i, :n] for m, n in zip(moments, taken, strict=True)]),
        terminated=bool(last.terminated[row]),
        truncated=bool(last.truncated[row]),
    )


def _require_finite(
    signals: Signals, recorders: Sequence[_Recorder], task: str, seeds: Sequence[int], *, ahead: int
) -> None:
    """Raise `ValueError` naming task, seed, environment and step if the simulator gave a value that is not finite.

    `signals` are `[N, C]` or `[N, C, D]`; column 0 is `ahead` steps past the last one recorded.
    """
    if all(bool(torch.isfinite(value).all()) for value in signals.values()):  # one look at all, as this is every step
        return
    for i, recorder in enumerate(recorders):
        if recorder.episode >= 0:
            where = f"seed {seeds[recorder.episode]} (environment {i})"
            check_finite(task, _row(signals, i), where=where, first_step=recorder.num_steps + ahead)


def _row(signals: Signals, i: int) -> dict[str, Tensor]:
    return {key: value[i] for key, value in signals.items()}


def _rows(obs: Observation, rows: Tensor) -> Observation:
    state = None if obs.state is None else obs.state[rows]
    return Observation(obs.images[rows], tuple(obs.instructions[i] for i in rows.tolist()), state)
