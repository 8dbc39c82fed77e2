"""Seeded episodes played in lockstep by the simulators of one process: chunks, time limits, and who plays which seed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from multiprocessing import parent_process
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.maniskill import Simulator, time_limit
from trl_stare.envs.registry import SimulatedTask

_BOUNDS = {
    np.uint8: (0, 255),
    np.int8: (0, 1),  # booleans: Gymnasium's Box has none
    np.int64: (-1, np.iinfo(np.int64).max),
    np.float32: (-np.inf, np.inf),
}

STATE_SIZE = 8
"""TCP position (3), TCP quaternion (4, wxyz), gripper opening (1): what [`Simulator.state`] returns."""


class EpisodeGroup(gym.Env):
    """`M` simulated scenes of one process as a single Gymnasium environment with batched arrays.

    Gymnasium's `AsyncVectorEnv` runs one of these per core and moves the arrays through shared memory. Everything that a
    decision produces, also rewards and ends, is therefore part of the observation; the scalar reward is unused.

    Args:
        task ([`SimulatedTask`]): what to simulate.
        num_envs (`int`): `M`.
        chunk_size (`int`): `C`, environment steps per decision.
        image_size (`int`, *optional*), visuals (`str`), device (`str`): see [`Simulator`].
        rank (`int`), world_size (`int`): this group plays `seeds[rank::world_size]`.
    """

    def __init__(
        self,
        task: SimulatedTask,
        *,
        num_envs: int,
        chunk_size: int,
        image_size: int | None,
        visuals: str,
        device: str,
        rank: int,
        world_size: int,
    ):
        if parent_process() is not None:
            torch.set_num_threads(1)  # the workers share the cores; the trainer's own process keeps its threads
        batch = num_envs if device == "cuda" else 1
        self._make = partial(Simulator, task, num_envs=batch, image_size=image_size, visuals=visuals, device=device)
        self.simulators: list[Simulator] = []
        self.task, self.batch, self.num_envs, self.chunk_size = task, batch, num_envs, chunk_size
        self.rank, self.world_size = rank, world_size
        self.max_episode_steps = time_limit(task)
        self.observation_space = record_space(task, num_envs, chunk_size, image_size)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (num_envs, chunk_size, 7), np.float32)
        self.arrays = {name: np.zeros(space.shape, space.dtype) for name, space in self.observation_space.items()}
        self.record = {name: torch.from_numpy(array) for name, array in self.arrays.items()}  # the same memory
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64)
        self.queue: list[int] = []
        self.ignore_terminations = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Take this group's share of `options["seeds"]` and begin. `seed` itself is not used: every episode has its own."""
        seeds: Sequence[int] = (options or {}).get("seeds", range(self.num_envs * self.world_size))
        self.ignore_terminations = (options or {}).get("ignore_terminations", False)
        if not self.simulators:  # not in the constructor: Gymnasium makes one more group only to look at its spaces
            self.simulators = [self._make() for _ in range(self.num_envs // self.batch)]
            if parent_process() is not None:
                # ManiSkill collects garbage whenever it builds a scene: 150 ms over all that was imported, 2 ms without
                gc.freeze()
        self.seeds = list(seeds)
        self.queue = list(range(len(self.seeds)))[self.rank :: self.world_size]
        self.record["episode"][:] = -1
        for index in range(len(self.simulators)):
            rows = torch.arange(index * self.batch, (index + 1) * self.batch)
            self._begin(index, rows)
        return self.arrays, {}

    def step(self, action: np.ndarray):
        """Play `action` `[M, C, 7]`; see [`trl_stare.interfaces.Step`] for what the record then holds."""
        chunk = torch.from_numpy(np.asarray(action, np.float32))
        self.record["reward"][:] = 0
        for name in ("num_steps", "terminated", "truncated"):
            self.record[name][:] = 0
        for index in range(len(self.simulators)):
            self._step_simulator(index, chunk)
        return self.arrays, 0.0, False, False, {}

    def close(self) -> None:
        """End the simulators."""
        for simulator in self.simulators:
            simulator.close()

    def _step_simulator(self, index: int, chunk: Tensor) -> None:
        simulator, rows = self.simulators[index], torch.arange(index * self.batch, (index + 1) * self.batch)
        alive = self.record["episode"][rows] >= 0
        ended = torch.zeros_like(alive)
        if not alive.any():
            return
        for c in range(self.chunk_size):
            simulator.step(chunk[rows, c])
            signals = simulator.signals()
            self._write_chunk_signals(rows[alive], c, {name: value[alive] for name, value in signals.items()})
            self.elapsed[rows[alive]] += 1
            self.record["num_steps"][rows[alive]] += 1
            self.record["reward"][rows[alive], c] = signals["success"][alive].float()
            terminated = signals["success"] & alive & (not self.ignore_terminations)
            truncated = alive & ~terminated & (self.elapsed[rows] >= self.max_episode_steps)
            self.record["terminated"][rows] |= terminated.to(torch.int8)
            self.record["truncated"][rows] |= truncated.to(torch.int8)
            now = terminated | truncated
            if now.any():
                self._look(simulator, rows, now, signals, prefix="final_")
            ended, alive = ended | now, alive & ~now
            if not alive.any():
                break
        if alive.any():
            self._look(simulator, rows, alive, signals)
            self._look(simulator, rows, alive, None, prefix="final_")
        self._begin(index, rows[ended])

    def _begin(self, index: int, rows: Tensor) -> None:
        """Start the next seeds in scenes `rows`; a row that finds none left becomes idle."""
        self.record["episode"][rows] = -1
        rows = rows[: len(self.queue)]
        if not len(rows):
            return
        episodes, self.queue = self.queue[: len(rows)], self.queue[len(rows) :]
        simulator, offset = self.simulators[index], index * self.batch
        simulator.reset([self.seeds[episode] for episode in episodes], rows - offset)
        self.record["episode"][rows] = torch.tensor(episodes)
        self.elapsed[rows] = 0
        begun = torch.zeros(self.batch, dtype=torch.bool)
        begun[rows - offset] = True
        self._look(simulator, torch.arange(offset, offset + self.batch), begun, simulator.signals())

    def _look(
        self, simulator: Simulator, rows: Tensor, mask: Tensor, signals: dict[str, Tensor] | None, prefix: str = ""
    ) -> None:
        """Write image, state and signals of the rows in `mask`; without `signals`, copy what was written last."""
        chosen = rows[mask]
        names = ["image", "state", *(f"signals/{name}" for name in self.task.signal_shapes)]
        if signals is None:
            for name in names:
                self.record[prefix + name][chosen] = self.record[name][chosen]
            return
        told = [signals[name] for name in self.task.state_signals]
        values = {"image": simulator.images(), "state": torch.cat([simulator.state(), *told], dim=-1)}
        values |= {f"signals/{name}": value for name, value in signals.items()}
        for name in names:
            self.record[prefix + name][chosen] = values[name][mask].to(self.record[name].dtype)

    def _write_chunk_signals(self, rows: Tensor, c: int, signals: dict[str, Tensor]) -> None:
        """Signals after step `c`; later steps repeat it until they are overwritten."""
        for name, value in signals.items():
            self.record[f"chunk_signals/{name}"][rows, c:] = value.to(self.record[f"chunk_signals/{name}"].dtype)[
                :, None
            ]


def record_space(task: SimulatedTask, num_envs: int, chunk_size: int, image_size: int | None) -> gym.spaces.Dict:
    """The arrays of one decision of `num_envs` environments, by name; see [`trl_stare.interfaces.Step`]."""

    def array(*shape: int, dtype: type = np.float32) -> gym.spaces.Box:
        low, high = _BOUNDS[dtype]
        return gym.spaces.Box(low, high, (num_envs, *shape), dtype)

    spaces: dict[str, gym.spaces.Space] = {
        "episode": array(dtype=np.int64),
        "num_steps": array(dtype=np.int64),
        "terminated": array(dtype=np.int8),
        "truncated": array(dtype=np.int8),
        "reward": array(chunk_size),
    }
    for prefix in ("", "final_"):
        spaces[f"{prefix}image"] = array(*task.image_shape_at(image_size), 3, dtype=np.uint8)
        spaces[f"{prefix}state"] = array(STATE_SIZE + sum(task.signal_shapes[name] for name in task.state_signals))
    for name, size in task.signal_shapes.items():
        shape, dtype = ((size,), np.float32) if size else ((), np.int8)
        for prefix, leading in (("", ()), ("final_", ()), ("chunk_", (chunk_size,))):
            spaces[f"{prefix}signals/{name}"] = array(*leading, *shape, dtype=dtype)
    return gym.spaces.Dict(spaces)
