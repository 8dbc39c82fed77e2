"""Rollouts over parts: who acts when, what is told, what is counted."""

import time
from dataclasses import replace

import pytest
import torch

from trl_stare.data import collect, replay, stream
from trl_stare.data.actors import Decision
from trl_stare.data.rollout import Timing
from trl_stare.interfaces import EpisodeStart, Observation, Start, Step, VoidEpisode, Work


class Row:
    """One environment: an episode of seed `s` lasts `s` steps; its signal is the steps so far, those of the start included."""

    task, instruction, signal_names, metadata = "Count-v0", "count", ("count", "success"), {}
    num_envs, chunk_size, max_episode_steps = 1, 1, 99

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def begin(self, queue: list[tuple[int, EpisodeStart]]) -> None:
        self.queue, self.voided = queue, []
        self._next()

    def _next(self) -> None:
        self.episode, start = self.queue.pop(0) if self.queue else (-1, EpisodeStart(0))
        self.seed, self.count = start.seed, 0 if start.actions is None else len(start.actions)

    def obs(self) -> Observation:
        return Observation(torch.full((1, 2, 2, 3), self.seed, dtype=torch.uint8), ("count",), torch.zeros(1, 1))

    def signals(self):
        return {"count": torch.tensor([[float(self.count)]]), "success": torch.tensor([self.count == self.seed])}

    def step_async(self, actions) -> None:
        self.log.append(f"{self.name} steps")

    def step_wait(self) -> Step:
        self.log.append(f"{self.name} waits")
        self.count += 1
        now, obs, void, ended = self.signals(), self.obs(), (), self.count == self.seed
        if self.seed == 13:  # spoiled at its first step
            void, ended, now = (VoidEpisode(self.episode, self.count, "signals['count']"),), False, self.signals()
        if ended or void:
            self._next()
        chunk = {name: value[:, None] for name, value in now.items()}
        return Step(
            self.obs(), self.signals(), torch.tensor([self.episode]), chunk, torch.zeros(1, 1), torch.tensor([not void]).long(),
            torch.tensor([ended]), torch.tensor([False]), obs, now, void, Work(simulate_s=0.25, render_s=0.125),
        )  # fmt: skip


class TwoRows:
    """A `VectorEnv` of two parts; episodes are dealt to them in turns."""

    task, instruction, signal_names, metadata = Row.task, Row.instruction, Row.signal_names, {}
    num_envs, chunk_size, max_episode_steps = 2, 1, 99

    def __init__(self):
        self.log: list[str] = []
        self.parts = (Row("left", self.log), Row("right", self.log))

    def reset(self, starts, *, ignore_terminations=False) -> Start:
        starts = [start if isinstance(start, EpisodeStart) else EpisodeStart(start) for start in starts]
        for rank, part in enumerate(self.parts):
            part.begin(list(enumerate(starts))[rank::2])
        obs = [part.obs() for part in self.parts]
        signals = [part.signals() for part in self.parts]
        return Start(
            Observation(torch.cat([o.images for o in obs]), ("count",) * 2, torch.zeros(2, 1)),
            {name: torch.cat([s[name] for s in signals]) for name in self.signal_names},
            torch.tensor([part.episode for part in self.parts]),
            work=Work(simulate_s=0.5),
        )


def actor(log: list[str]):
    def act(obs, signals) -> Decision:
        log.append(f"seed {int(obs.images.flatten()[0])} is looked at")
        return Decision(*[torch.zeros(1, 1, 2)] * 2)

    return act


def test_the_policy_acts_on_one_part_while_the_other_simulates():
    env = TwoRows()
    collect(env, actor(env.log), [2, 1], name="nobody")
    assert env.log == [
        "seed 2 is looked at", "left steps", "seed 1 is looked at", "right steps",
        "left waits", "seed 2 is looked at", "left steps", "right waits",  # the right one has nothing left to play
        "left waits",
    ]  # fmt: skip


def test_trajectories_come_in_the_order_of_the_starts():
    env = TwoRows()
    played = collect(env, actor(env.log), [3, 1, 2, 5, 1], name="nobody")
    assert [(t.seed, t.num_steps) for t in played] == [(3, 3), (1, 1), (2, 2), (5, 5), (1, 1)]
    assert played[3].signals["count"].flatten().tolist() == [0, 1, 2, 3, 4, 5] and played[3].terminated
    as_they_end = [index for index, _ in stream(env, actor(env.log), [3, 1, 2, 5, 1], name="nobody")]
    assert as_they_end == [1, 0, 2, 4, 3]


def test_the_recording_begins_after_the_actions_of_the_start():
    env = TwoRows()
    prefix = torch.ones(2, 2)
    one, other = collect(env, actor(env.log), [EpisodeStart(5, prefix), 2], name="nobody")
    assert one.num_steps == 3 and one.signals["count"].flatten().tolist() == [2, 3, 4, 5]
    assert torch.equal(one.prefix, prefix) and other.prefix is None


def test_a_replay_that_ends_elsewhere_is_refused():
    env = TwoRows()
    (played,) = collect(env, actor(env.log), [3], name="nobody")
    assert torch.equal(replay(env, played).signals["count"], played.signals["count"])
    # what was meant is not what was done, where a mistake was made
    meant = replace(played, labels=played.actions + 1)
    assert torch.equal(replay(env, meant).labels, meant.labels)
    assert torch.equal(replay(env, meant).actions, played.actions)
    with pytest.raises(ValueError, match="`env` must repeat the episode of seed 3, got another 'end'"):
        replay(env, replace(played, actions=played.actions[:2]))  # the environment goes on
    with pytest.raises(ValueError, match="`env` must repeat the episode of seed 2, got another 'count'"):
        replay(env, replace(played, seed=2))  # it ends before


def test_a_void_episode_is_an_error_or_told_of():
    env, told, seen = TwoRows(), [], []
    with pytest.raises(ValueError, match=r"`signals\['count'\]` of task 'Count-v0'.* not at step 1 of seed 13"):
        collect(env, actor(env.log), [1, 13, 2], name="nobody", on_episode=seen.append)
    assert [t.seed for t in seen] == [1]  # what was finished before has been handed over
    played = collect(env, actor(env.log), [1, 13, 2, 3], name="nobody", on_void=lambda *void: told.append(void))
    assert [t.seed for t in played] == [1, 2, 3]
    assert told == [(EpisodeStart(13), VoidEpisode(1, 1, "signals['count']", env=1))]


def test_seconds_of_the_average_worker_sum_to_the_time_it_took():
    env, timing = TwoRows(), Timing()

    def slow(obs, signals) -> Decision:
        time.sleep(0.02)
        return actor(env.log)(obs, signals)

    began = time.perf_counter()
    collect(env, slow, [2, 2], name="nobody", timing=timing)
    assert timing.total_s == pytest.approx(time.perf_counter() - began, abs=0.01)
    # two decisions of each of two workers, and half a second for the reset
    assert timing.simulate_s == pytest.approx(0.5 + 2 * 0.25) and timing.render_s == pytest.approx(2 * 0.125)
    assert 0.04 <= timing.policy_s < 0.2  # a worker waits for its own two decisions only
