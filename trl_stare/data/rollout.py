"""Playing seeded episodes: a policy or a demonstrator acts in a `VectorEnv`, whole trajectories come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, Signals, VectorEnv, VLAPolicy


class Decision(NamedTuple):
    """What an actor answers for `N` environments.

    Attributes:
        actions (`Tensor`): `[N, C, A]`, executed.
        labels (`Tensor`): `[N, C, A]`, what should be imitated; differs from `actions` where noise was added.
        trace (`Tensor` or `None`): `[N, L]`. logps (`Tensor` or `None`): `[N, L]`.
        features (`Tensor` or `None`): `[N, F]`, for a value head.
    """

    actions: Tensor
    labels: Tensor
    trace: Tensor | None = None
    logps: Tensor | None = None
    features: Tensor | None = None


MISTAKE_SIZE = 0.6
"""Largest translation of a random mistake, controller units: 6 cm for `pd_ee_delta_pose`."""

Actor = Callable[[Observation, Signals], Decision]


@dataclass
class Timing:
    """Seconds spent in a rollout: acting (the policy) and stepping (simulation, rendering, transport)."""

    act_s: float = 0.0
    step_s: float = 0.0


@dataclass
class _Recorder:
    """Collects one running episode."""

    episode: int
    signals: list[dict[str, Tensor]]
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    num_steps: int = 0


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

    def act(obs: Observation, signals: Signals) -> Decision:
        sample = policy.act(policy.prepare(obs), temperature=temperature, generator=generator)
        return Decision(sample.actions, sample.actions, sample.trace, sample.logps, sample.features)

    return collect(
        env, act, seeds, name=name, ignore_terminations=ignore_terminations, on_episode=on_episode, timing=timing
    )


def demonstrate(
    env: VectorEnv,
    expert: Callable[[Signals], Tensor],
    seeds: Sequence[int],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Let a scripted expert show one episode per seed, one environment step at a time.

    With `noise`, that share of the steps is a mistake: a random translation and a random gripper command are executed, while
    the recorded label stays the expert's own action. Demonstrations then contain recoveries, also from fingers that closed
    beside the object (in the manner of DART, arXiv 1703.09327).
    """
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"`noise` must be in [0, 1), got {noise}.")

    def act(obs: Observation, signals: Signals) -> Decision:
        labels = expert(signals)[:, None]
        actions = labels.clone()
        if noise:
            mistaken = torch.rand(len(labels), generator=generator) < noise
            random = torch.rand(actions.shape, generator=generator) * 2 - 1
            actions[mistaken, :, :3] = MISTAKE_SIZE * random[mistaken, :, :3]
            actions[mistaken, :, -1] = random[mistaken, :, -1].sign()
        return Decision(actions, labels)

    return collect(env, act, seeds, name="expert", on_episode=on_episode)


@torch.no_grad()
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
    """Play one episode per seed with `act`; see [`play`] and [`demonstrate`]."""
    seeds, timing = [int(seed) for seed in seeds], timing or Timing()
    start = env.reset(seeds, ignore_terminations=ignore_terminations)
    obs, signals, episode = start
    recorders = [_Recorder(int(e), [_row(signals, i)]) for i, e in enumerate(episode)]
    finished: dict[int, Trajectory] = {}
    while (active := torch.nonzero(episode >= 0).flatten()).numel():
        began = time.perf_counter()
        decision = act(_rows(obs, active), {key: value[active] for key, value in signals.items()})
        actions = torch.zeros(env.num_envs, *decision.actions.shape[1:])
        actions[active] = decision.actions
        acted = time.perf_counter()
        step = env.step(actions)
        timing.act_s += acted - began
        timing.step_s += time.perf_counter() - acted
        for j, i in enumerate(active.tolist()):
            _record(recorders[i], obs, decision, step, i, j)
            if step.terminated[i] or step.truncated[i]:
                trajectory = _finish(recorders[i], env, seeds, step, i, name)
                finished[recorders[i].episode] = trajectory
                if on_episode is not None:
                    on_episode(trajectory)
                recorders[i] = _Recorder(int(step.episode[i]), [_row(step.signals, i)])
        obs, signals, episode = step.obs, step.signals, step.episode
    return [finished[index] for index in range(len(seeds))]


def _record(recorder: _Recorder, obs: Observation, decision: Decision, step, i: int, j: int) -> None:
    """Append one decision: row `i` of the environments, row `j` of the active ones."""
    taken = int(step.num_steps[i])
    recorder.seen.append((obs.images[i], obs.state[i]))
    recorder.starts.append(recorder.num_steps)
    recorder.decisions.append(Decision(*(None if value is None else value[j] for value in decision)))
    recorder.actions.append(decision.actions[j, :taken])
    recorder.labels.append(decision.labels[j, :taken])
    recorder.rewards.append(step.reward[i, :taken])
    recorder.signals.extend({key: value[i, c] for key, value in step.chunk_signals.items()} for c in range(taken))
    recorder.num_steps += taken


def _finish(recorder: _Recorder, env: VectorEnv, seeds: list[int], step, i: int, name: str) -> Trajectory:
    stack = lambda field: None if recorder.decisions[0]._asdict()[field] is None else torch.stack(  # noqa: E731
        [decision._asdict()[field] for decision in recorder.decisions]
    )
    return Trajectory(
        task=env.task,
        instruction=env.instruction,
        seed=seeds[recorder.episode],
        policy=name,
        images=torch.stack([image for image, _ in recorder.seen]),
        state=torch.stack([state for _, state in recorder.seen]),
        starts=torch.tensor(recorder.starts),
        actions=torch.cat(recorder.actions),
        labels=torch.cat(recorder.labels),
        trace=stack("trace"),
        logps=stack("logps"),
        features=stack("features"),
        final_image=step.final_obs.images[i],
        final_state=step.final_obs.state[i],
        signals={key: torch.stack([row[key] for row in recorder.signals]) for key in recorder.signals[0]},
        reward=torch.cat(recorder.rewards),
        terminated=bool(step.terminated[i]),
        truncated=bool(step.truncated[i]),
    )


def _row(signals: Signals, i: int) -> dict[str, Tensor]:
    return {key: value[i] for key, value in signals.items()}


def _rows(obs: Observation, rows: Tensor) -> Observation:
    state = None if obs.state is None else obs.state[rows]
    return Observation(obs.images[rows], tuple(obs.instructions[i] for i in rows.tolist()), state)
