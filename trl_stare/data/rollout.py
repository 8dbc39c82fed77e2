"""Playing seeded episodes: a policy or a demonstrator acts in a `VectorEnv`, whole trajectories come out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl_stare.data.actors import Actor, Decision, expert_actor, policy_actor
from trl_stare.data.recorder import Moment, Recorder, require_finite, row_of, rows_of
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import (
    EpisodeStart,
    Observation,
    Signals,
    Start,
    Step,
    VectorEnv,
    VectorEnvPart,
    VLAPolicy,
    VoidEpisode,
    Work,
)

logger = logging.getLogger(__name__)


@dataclass
class Timing:
    """Where the seconds of rollouts went, as the average worker spent them: the four sum to the time they took.

    Attributes:
        simulate_s (`float`): physics, signals, scenes built anew.
        render_s (`float`): pictures.
        policy_s (`float`): waiting for the policy to act on the worker's own part of the environments.
        idle_s (`float`): everything else: waiting for the policy to finish with another part, for the slowest worker of a part,
            for the transport of pictures, for the last episodes to end.
    """

    simulate_s: float = 0.0
    render_s: float = 0.0
    policy_s: float = 0.0
    idle_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the rollouts."""
        return self.simulate_s + self.render_s + self.policy_s + self.idle_s

    def add_work(self, work: Work, share: float) -> None:
        """What the workers of a part did, which is a `share` of all."""
        self.simulate_s += share * work.simulate_s
        self.render_s += share * work.render_s


OnVoid = Callable[[EpisodeStart, VoidEpisode], None]
"""Told of an episode that the simulator spoiled, with its start."""


def play(
    env: VectorEnv,
    policy: VLAPolicy,
    starts: Sequence[int | EpisodeStart],
    *,
    temperature: float,
    generator: torch.Generator | None,
    ignore_terminations: bool = False,
    on_episode: Callable[[Trajectory], None] | None = None,
    on_void: OnVoid | None = None,
    name: str = "policy",
    timing: Timing | None = None,
) -> list[Trajectory]:
    """Let `policy` play one episode per start; what comes out depends on starts, weights and generator only.

    Args:
        env (`VectorEnv`): its `chunk_size` must be the policy's.
        starts (`Sequence[int | EpisodeStart]`): seeds, or seeds and actions that are executed first.
        temperature (`float`): of sampling; 0 is greedy.
        generator (`torch.Generator`): the only source of randomness, so that the same call gives the same trajectories.
        ignore_terminations (`bool`): go on to the time limit after a success (evaluation).
        on_episode (`Callable`, *optional*): told of every finished trajectory (a progress bar).
        on_void (`Callable`, *optional*): told of every episode that the simulator spoiled with a value that is not finite,
            which is then left out. Without it such an episode is an error.
        name (`str`): who acted, as the trajectories say.
        timing ([`Timing`], *optional*): the rollout's seconds are added to it.

    Returns:
        `list[Trajectory]`, in the order of `starts`.

    Raises:
        ValueError: if an episode was spoiled and there is no `on_void`; names task, seed and step.
    """
    act = policy_actor(policy, temperature=temperature, generator=generator)
    return collect(
        env,
        act,
        starts,
        name=name,
        ignore_terminations=ignore_terminations,
        on_episode=on_episode,
        on_void=on_void,
        timing=timing,
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
    on_void: OnVoid | None = None,
) -> list[Trajectory]:
    """Let a scripted expert show one episode per seed, one environment step at a time; see [`expert_actor`] and [`play`]."""
    act = expert_actor(expert, noise=noise, mistake_size=mistake_size, generator=generator)
    return collect(env, act, seeds, name="expert", on_episode=on_episode, on_void=on_void)


def replay(env: VectorEnv, trajectory: Trajectory) -> Trajectory:
    """Execute the recorded actions again, one environment step at a time: the same states, seen at every step.

    What a demonstrator meant to do where a mistake was made, `labels`, is kept.

    Args:
        env (`VectorEnv`): of the same task, with `chunk_size` 1; its images may have another size (a video).

    Raises:
        ValueError: if the states differ, i.e. the simulator is not the one that recorded the episode.
    """
    actions = iter(trajectory.actions[:, None, None])

    def act(obs: Observation, signals: Signals) -> Decision:
        action = next(actions, None)
        if action is None:
            raise _unlike(trajectory, "end")
        return Decision(action, action)

    # an evaluation goes on after a success
    played_on = trajectory.num_steps > int(trajectory.signals["success"][1:].long().argmax()) + 1
    ignore = bool(trajectory.success_once and played_on)
    start = EpisodeStart(trajectory.seed, trajectory.prefix)
    again = collect(env, act, [start], name=trajectory.policy, ignore_terminations=ignore)[0]
    for name, value in trajectory.signals.items():
        if not torch.equal(value, again.signals[name]):
            raise _unlike(trajectory, name)
    return replace(again, labels=trajectory.labels)


def warn_of_void(start: EpisodeStart, void: VoidEpisode) -> None:
    """An `on_void` that logs which episode is left out, and why."""
    logger.warning(
        "the episode of seed %d is left out, whose %s was not finite at step %d", start.seed, void.what, void.step
    )


def _unlike(trajectory: Trajectory, what: str) -> ValueError:
    return ValueError(
        f"`env` must repeat the episode of seed {trajectory.seed}, got another {what!r}. Use its backend."
    )


def collect(
    env: VectorEnv,
    act: Actor,
    starts: Sequence[int | EpisodeStart],
    *,
    name: str,
    ignore_terminations: bool = False,
    on_episode: Callable[[Trajectory], None] | None = None,
    on_void: OnVoid | None = None,
    timing: Timing | None = None,
) -> list[Trajectory]:
    """Play one episode per start with `act`, all of them in the order of `starts`; see [`play`] and [`demonstrate`]."""
    finished: dict[int, Trajectory] = {}
    for index, trajectory in stream(
        env, act, starts, name=name, ignore_terminations=ignore_terminations, on_void=on_void, timing=timing
    ):
        finished[index] = trajectory
        if on_episode is not None:
            on_episode(trajectory)
    return [finished[index] for index in sorted(finished)]


@torch.no_grad()
def stream(
    env: VectorEnv,
    act: Actor,
    starts: Sequence[int | EpisodeStart],
    *,
    name: str,
    ignore_terminations: bool = False,
    on_void: OnVoid | None = None,
    timing: Timing | None = None,
) -> Iterator[tuple[int, Trajectory]]:
    """Play one episode per start with `act` and yield each as it ends, with its index in `starts`: only running ones are kept.

    While `act` looks at one of `env.parts` the others simulate. It takes the parts in turns, however long they take, so the
    episodes depend on starts and `act` only. See [`play`] for the arguments.
    """
    starts = [start if isinstance(start, EpisodeStart) else EpisodeStart(int(start)) for start in starts]
    timing, began = timing or Timing(), time.perf_counter()
    before = timing.total_s
    plain = [start.seed if start.actions is None else start for start in starts]
    first = env.reset(plain, ignore_terminations=ignore_terminations)
    timing.add_work(first.work, 1.0)
    _tell_of(first.voided, env.task, starts, on_void)
    running: list[_Part] = []
    offset = 0
    for part in getattr(env, "parts", None) or (_Whole(env),):
        rows = torch.arange(offset, offset := offset + part.num_envs)
        running.append(_Part(part, first, rows, share=part.num_envs / env.num_envs))
    for part in running:
        part.act(act, starts, timing)
    while running := [part for part in running if part.is_running]:
        for part in running:
            step = part.wait(starts, timing)
            for recorder in part.record(step):
                yield recorder.episode, recorder.finish(env, starts[recorder.episode], name)
            voided = [void._replace(env=part.first_row + void.env) for void in step.voided]
            _tell_of(voided, env.task, starts, on_void)
            part.act(act, starts, timing)
    timing.idle_s += time.perf_counter() - began - (timing.total_s - before)


class _Whole:
    """A [`VectorEnv`] without parts as its only part, which simulates when it is waited for."""

    def __init__(self, env: VectorEnv):
        self.env, self.num_envs, self.task = env, env.num_envs, env.task

    def step_async(self, actions: Tensor) -> None:
        self.actions = actions

    def step_wait(self) -> Step:
        return self.env.step(self.actions)


class _Part:
    """A part of the environments, its running episodes, and what the actor last decided there."""

    def __init__(self, env: VectorEnvPart | _Whole, start: Start, rows: Tensor, *, share: float):
        self.env, self.share, self.first_row = env, share, int(rows[0])
        self.obs, self.signals, self.episode = (
            rows_of(start.obs, rows),
            row_of(start.signals, rows),
            start.episode[rows],
        )
        self.recorders = [
            Recorder(env, int(e), row_of(self.signals, i))
            for i, (env, e) in enumerate(zip(rows.tolist(), self.episode, strict=True))
        ]
        self.is_running = True

    def act(self, act: Actor, starts: Sequence[EpisodeStart], timing: Timing) -> None:
        """Let `act` decide where an episode runs, and send it on its way."""
        self.active = torch.nonzero(self.episode >= 0).flatten()
        self.is_running = bool(len(self.active))
        if not self.is_running:
            return
        now = {key: value[:, None] for key, value in self.signals.items()}
        require_finite(now, self.recorders, self.env.task, starts, ahead=0)
        began = time.perf_counter()
        self.decision = act(rows_of(self.obs, self.active), row_of(self.signals, self.active))
        actions = torch.zeros(self.env.num_envs, *self.decision.actions.shape[1:])
        actions[self.active] = self.decision.actions
        timing.policy_s += self.share * (time.perf_counter() - began)
        self.env.step_async(actions)

    def wait(self, starts: Sequence[EpisodeStart], timing: Timing) -> Step:
        """What came of the decision."""
        step = self.env.step_wait()
        timing.add_work(step.work, self.share)
        require_finite(step.chunk_signals, self.recorders, self.env.task, starts, ahead=1)
        return step

    def record(self, step: Step) -> list[Recorder]:
        """Record the step; returns the episodes that it ended."""
        ended = []
        for j, i in enumerate(self.active.tolist()):
            self.recorders[i].moments.append(Moment(self.obs, self.decision, step, i, j))
            if step.episode[i] != self.recorders[i].episode:
                if step.terminated[i] or step.truncated[i]:
                    ended.append(self.recorders[i])
                self.recorders[i] = Recorder(self.recorders[i].env, int(step.episode[i]), row_of(step.signals, i))
        self.obs, self.signals, self.episode = step.obs, step.signals, step.episode
        return ended


def _tell_of(voided: Sequence[VoidEpisode], task: str, starts: Sequence[EpisodeStart], on_void: OnVoid | None) -> None:
    for void in voided:
        start = starts[void.episode]
        if on_void is None:
            raise ValueError(
                f"`{void.what}` of task {task!r} must be finite, but was not at step {void.step} of seed {start.seed}. "
                "Leave that seed out (`on_void` does), and look at what the simulator did there."
            )
        on_void(start, void)
