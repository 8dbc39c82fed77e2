"""Episodes played in lockstep by the simulators of one process: chunks, time limits, and who plays which start."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing import parent_process
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.maniskill import Simulator, time_limit
from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations import Variation
from trl_stare.envs.worker import FAILURES
from trl_stare.interfaces import ACTION_DIM

_BOUNDS = {
    np.uint8: (0, 255),
    np.int8: (0, 1),  # booleans: Gymnasium's Box has none
    np.int64: (-1, np.iinfo(np.int64).max),
    np.float32: (-np.inf, np.inf),
}

BUGS = (LookupError, TypeError, AttributeError, NameError, AssertionError, ArithmeticError, ImportError)
"""What Python and torch raise where the code of a task is wrong."""

STATE_SIZE = 8
"""TCP position (3), TCP quaternion (4, wxyz), gripper opening (1): what [`Simulator.state`] returns."""
CHUNK_PREFIX = "chunk_signals/"


class EpisodeGroup(gym.Env):
    """`M` simulated scenes of one process as a single Gymnasium environment with batched arrays.

    Gymnasium's `AsyncVectorEnv` runs it in a process and moves the arrays through shared memory. Everything that a decision
    produces, also rewards and ends, is therefore part of the observation; the scalar reward is unused. `info` tells of
    `"render_s"` and `"busy_s"` (seconds), `"left"` (length of the queue), and if need be `"voided"` (a list of
    [`~trl_stare.interfaces.VoidEpisode`]'s fields), `"error"` (a text for a `ValueError`) or `"crash"` (one for a `RuntimeError`).

    Args:
        task ([`SimulatedTask`]): what to simulate.
        num_envs (`int`): `M`.
        chunk_size (`int`): `C`, environment steps per decision.
        image_size (`int`, *optional*), visuals (`str`), device (`str`), variation ([`Variation`], *optional*): see
            [`Simulator`].
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
        variation: Variation | None = None,
    ):
        if parent_process() is not None:
            torch.set_num_threads(1)  # the workers share the cores; the trainer's own process keeps its threads
        batch = num_envs if device == "cuda" else 1
        shown = {"image_size": image_size, "visuals": visuals, "variation": variation}
        self._make = partial(Simulator, task, num_envs=batch, device=device, **shown)
        self.simulators: list[Simulator] = []
        self.task, self.batch, self.num_envs, self.chunk_size = task, batch, num_envs, chunk_size
        self.max_episode_steps = time_limit(task)
        self.observation_space = record_space(task, num_envs, chunk_size, image_size)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (num_envs, chunk_size, ACTION_DIM), np.float32)
        self.arrays = {name: np.zeros(space.shape, space.dtype) for name, space in self.observation_space.items()}
        self.record = {name: torch.from_numpy(array) for name, array in self.arrays.items()}  # the same memory
        floats = [name for name, array in self.arrays.items() if array.dtype == np.float32]
        self._of_start = [name for name in floats if name.startswith(("state", "signals/"))]
        self._of_step = [name for name in floats if name.startswith(("final_state", CHUNK_PREFIX))]
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64)
        self.queue: list[int] = []
        self.ignore_terminations = False

    def open(self) -> None:
        """Make the simulators. Not in the constructor: Gymnasium makes one more group only to look at its spaces."""
        if self.simulators:
            return
        self.simulators = [self._make() for _ in range(self.num_envs // self.batch)]
        if parent_process() is not None:
            # ManiSkill collects garbage whenever it builds a scene: 150 ms over all that was imported, 2 ms without
            gc.freeze()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begin what `options["assignment"]` (an [`~trl_stare.envs.worker.Assignment`]) says. `seed` itself is not used: every episode has its own."""
        began = self._take_note()
        self.open()
        self.starts, episodes, self.queue, self.ignore_terminations = options["assignment"]
        self.record["episode"][:] = -1
        for index in range(len(self.simulators)):
            rows = torch.arange(index * self.batch, (index + 1) * self.batch)
            chosen = [episodes[row] for row in rows]
            self._guarded(index, self._begin, rows[torch.tensor(chosen) >= 0], [e for e in chosen if e >= 0])
        return self.arrays, self._info(began)

    def step(self, action: np.ndarray):
        """Play `action` `[M, C, 7]`; see [`trl_stare.interfaces.Step`] for what the record then holds."""
        began = self._take_note()
        chunk = torch.from_numpy(np.asarray(action, np.float32))
        self.record["reward"][:] = 0
        for name in ("num_steps", "terminated", "truncated"):
            self.record[name][:] = 0
        for index in range(len(self.simulators)):
            self._guarded(index, self._step_simulator, chunk)
        return self.arrays, 0.0, False, False, self._info(began)

    def close(self) -> None:
        """End the simulators."""
        for simulator in self.simulators:
            simulator.close()

    def _take_note(self) -> float:
        self._render_s, self._voided, self._error, self._crash = 0.0, [], None, None
        return time.perf_counter()

    def _info(self, began: float) -> dict[str, Any]:
        info = {"busy_s": time.perf_counter() - began, "render_s": self._render_s, "left": len(self.queue)}
        told = {"voided": self._voided, "error": self._error, "crash": self._crash}
        return info | {name: value for name, value in told.items() if value}

    def _guarded(self, index: int, play: Any, *args: Any) -> None:
        """`play(index, *args)`, whose errors are told with the episodes of simulator `index`.

        A `ValueError` is what the caller gave; raised here, it would end the process and everybody's episodes. One of `FAILURES` may
        not come again: it does end the process, which is replaced. One of `BUGS` would.
        """
        try:
            play(index, *args)
        except ValueError as error:
            self._error = self._error or str(error)
        except (*BUGS, *FAILURES) as error:
            if isinstance(error, FAILURES) and parent_process() is not None:
                raise
            episodes = self.record["episode"][index * self.batch : (index + 1) * self.batch].tolist()
            seeds = [self.starts[episode][0] for episode in episodes if episode >= 0]
            trace = "".join(traceback.format_exception(error))
            self._crash = self._crash or f"task {self.task.name!r} failed while it played seeds {seeds}.\n{trace}"

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
        ended |= self._void(rows[ended | alive], rows, self._of_step, spoils=self.arrays)
        self._begin_next(index, rows[ended])

    def _begin_next(self, index: int, rows: Tensor) -> None:
        """Begin the next episodes of the queue in scenes `rows`; a row that finds none left becomes idle."""
        self.record["episode"][rows] = -1
        rows = rows[: len(self.queue)]
        if len(rows):
            episodes, self.queue = self.queue[: len(rows)], self.queue[len(rows) :]
            self._begin(index, rows, episodes)

    def _begin(self, index: int, rows: Tensor, episodes: Sequence[int]) -> None:
        """Begin `episodes` in scenes `rows`; where one is void from its start, the next one."""
        if not len(rows):
            return
        simulator, offset = self.simulators[index], index * self.batch
        self.record["episode"][rows] = torch.tensor(episodes)
        simulator.reset([self.starts[episode][0] for episode in episodes], rows - offset)
        self.elapsed[rows] = 0
        for row, episode in zip(rows.tolist(), episodes, strict=True):
            self._replay(simulator, row, *self.starts[episode])
        everyone = torch.arange(offset, offset + self.batch)
        begun = torch.isin(everyone, rows)
        self._look(simulator, everyone, begun, simulator.signals())
        # of a start alone: the rest of its row is the end of the episode before
        void = self._void(rows, everyone, self._of_start, spoils=[*self._of_start, "image"])
        self._begin_next(index, everyone[void])

    def _replay(self, simulator: Simulator, row: int, seed: int, actions: np.ndarray | None) -> None:
        """Execute the actions of an episode's start; nobody looks.

        Raises:
            ValueError: if they end the episode.
        """
        for step, action in enumerate(torch.from_numpy(actions) if actions is not None else (), 1):
            simulator.step(action[None])
            solved = not self.ignore_terminations and bool(simulator.signals()["success"])
            if solved or step >= self.max_episode_steps:
                raise ValueError(
                    f"`starts` must end before their episodes do, but of the {len(actions)} actions of seed {seed} of "
                    f"{self.task.name!r} number {step} {'solves the task' if solved else 'meets the time limit'}. "
                    "Leave out the last actions."
                )
            self.elapsed[row] = step

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
        began = time.perf_counter()
        image = simulator.images()
        self._render_s += time.perf_counter() - began
        values = {"image": image, "state": torch.cat([simulator.state(), *told], dim=-1)}
        values |= {f"signals/{name}": value for name, value in signals.items()}
        for name in names:
            self.record[prefix + name][chosen] = values[name][mask].to(self.record[name].dtype)

    def _write_chunk_signals(self, rows: Tensor, c: int, signals: dict[str, Tensor]) -> None:
        """Signals after step `c`; later steps repeat it until they are overwritten."""
        for name, value in signals.items():
            self.record[CHUNK_PREFIX + name][rows, c:] = value.to(self.record[CHUNK_PREFIX + name].dtype)[:, None]

    def _void(self, rows: Tensor, everyone: Tensor, names: Sequence[str], *, spoils: Iterable[str]) -> Tensor:
        """Which of `everyone` `[B]` are among `rows` and have a value in `names` that is not finite: their episodes are void.

        Nothing that `spoils` names may be used of them: it is set to zero.
        """
        void = torch.zeros(len(everyone), dtype=torch.bool)
        for row in rows.tolist():
            wrong = [name for name in names if not np.isfinite(self.arrays[name][row]).all()]
            if wrong:
                step = int(self.elapsed[row])
                if wrong[0].startswith(CHUNK_PREFIX):
                    finite = np.isfinite(self.arrays[wrong[0]][row]).reshape(self.chunk_size, -1).all(axis=1)
                    step += 1 + int(finite.argmin()) - int(self.arrays["num_steps"][row])
                what = f"signals[{wrong[0].split('/')[1]!r}]" if "/" in wrong[0] else "state"
                self._voided.append((int(self.arrays["episode"][row]), step, what, row))
                for name in spoils:
                    self.arrays[name][row] = 0
                void |= everyone == row
        return void


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
