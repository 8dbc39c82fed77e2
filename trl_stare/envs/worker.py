"""One [`EpisodeGroup`]: in this process, or in a process of its own that may die, hang or grow without any episode being lost.

An episode is a function of its seed and actions, so a process is replaced by another one that executes the actions of the
running episodes again, without rendering (25 steps take 0.1 s), and then the decision that was under way.

Not known here: policies, and what the arrays mean.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from trl_stare.interfaces import EpisodeStart

if TYPE_CHECKING:  # the simulator is imported in the processes only
    from gymnasium.vector import AsyncVectorEnv

    from trl_stare.envs.group import EpisodeGroup

START_TIMEOUT = 600.0
"""Seconds a process may take to make its simulators; the first time, meshes and shaders are made too."""
REPLAY_TIMEOUT = 0.2
"""Seconds that executing one action again may take: fifty times what it does take."""
FAILURES = (OSError, EOFError, RuntimeError, multiprocessing.ProcessError)
"""A pipe that broke, a simulator that gave up, a time-out."""
TROUBLE = ("voided", "error", "crash")
"""What the [`EpisodeGroup`] tells of episodes that did not go on."""

logger = logging.getLogger(__name__)

Result = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays of `M` rows by name, and the [`EpisodeGroup`]'s info."""


class Assignment(NamedTuple):
    """Who plays what.

    Attributes:
        starts (`dict[int, tuple[int, ndarray | None]]`): episode -> its seed and the actions `[P, A]` to execute first.
        episodes (`list[int]`): `M` episodes to begin, -1 for an idle row. queue (`list[int]`): those that follow, in order.
        ignore_terminations (`bool`): go on to the time limit after a success.
    """

    starts: dict[int, tuple[int, np.ndarray | None]]
    episodes: list[int]
    queue: list[int]
    ignore_terminations: bool


def assign(starts: Sequence[EpisodeStart], rank: int, world_size: int, num_envs: int, ignore: bool) -> Assignment:
    """Worker `rank`'s share of `starts`: every `world_size`-th.

    Example: of 7 starts, worker 1 of 2 with two environments begins episodes 1 and 3, and 5 waits in the queue.
    """
    share = list(range(len(starts)))[rank::world_size]
    episodes = share[:num_envs] + [-1] * (num_envs - len(share))
    # NumPy: torch would send a tensor through shared memory that it has to manage
    actions = {e: starts[e].actions if starts[e].actions is None else starts[e].actions.numpy() for e in share}
    return Assignment({e: (starts[e].seed, actions[e]) for e in share}, episodes, share[num_envs:], ignore)


class LocalWorker:
    """An [`EpisodeGroup`] of this process: nothing happens before [`wait`].

    Args:
        make_group (`Callable`): makes it.
    """

    def __init__(self, make_group: Callable[[], EpisodeGroup]):
        self._group = make_group()

    def start(self) -> None:
        """Nothing to start."""

    def reset_async(self, assignment: Assignment) -> None:
        """Begin the episodes of `assignment`."""
        self._do = lambda: self._group.reset(options={"assignment": assignment})

    def step_async(self, chunk: np.ndarray) -> None:
        """Begin a decision: actions `[M, C, A]`."""
        self._do = lambda: self._group.step(chunk)

    def wait(self) -> Result:
        """What came out of the last call."""
        # the trainer plays under autocast, which is of the thread: ManiSkill's kinematics on a GPU fail in bfloat16
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            record, *_, info = self._do()
        return {name: array.copy() for name, array in record.items()}, info

    def close(self) -> None:
        """End the simulators."""
        self._group.close()


class Worker:
    """A process that holds an [`EpisodeGroup`], and its replacement whenever it fails.

    Args:
        make_group (`Callable`): makes the group, in the process.
        name (`str`): for messages: which worker of which task.
        step_timeout (`float`): seconds for one decision of all its environments.
        max_restarts (`int`): how often it is replaced after failures between two calls of [`reset_async`].
        memory_growth (`int`): bytes by which the process may grow before it is replaced where an episode ended.
    """

    def __init__(
        self,
        make_group: Callable[[], EpisodeGroup],
        *,
        name: str,
        step_timeout: float,
        max_restarts: int,
        memory_growth: int,
    ):
        self._make_group, self._name = make_group, name
        self._step_timeout, self._max_restarts, self._memory_growth = step_timeout, max_restarts, memory_growth
        self._pool: AsyncVectorEnv | None = None
        self._command: tuple[str, Any] | None = None

    @property
    def pid(self) -> int:
        """The present process."""
        return self._pool.processes[0].pid

    def start(self) -> None:
        """Start the process and make its simulators."""
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode

        # never "fork": neither Vulkan nor torch's thread pool survives it
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(["trl_stare.envs.preload"])
        self._pool = AsyncVectorEnv(
            [self._make_group], context=method, copy=False, autoreset_mode=AutoresetMode.DISABLED
        )
        self._pool.call_async("open")
        self._pool.call_wait(timeout=START_TIMEOUT)
        self._first_size: int | None = None

    def reset_async(self, assignment: Assignment) -> None:
        """Begin the episodes of `assignment`. A decision whose result nobody took is finished first and forgotten."""
        if not self._is_alive() or (self._command is not None and self._receive() is None):
            logger.warning("%s is no longer there, or hangs; it is replaced.", self._name)
            self.close()
            self.start()
        self._assignment, self._restarts = assignment, 0
        self._send("reset", assignment)

    def step_async(self, chunk: np.ndarray) -> None:
        """Begin a decision: actions `[M, C, A]`."""
        self._send("step", chunk)

    def wait(self) -> Result:
        """What came out of the last call, whatever happened to the process in between.

        Raises:
            RuntimeError: if it failed more than `max_restarts` times; names task and seeds.
        """
        name, argument = self._command
        result = self._receive()
        while result is None:
            self._count_failure()
            if self._replace(running=name == "step"):
                self._send(name, argument)
                result = self._receive()
        if self._follow(name, argument, *result) and self._has_grown():
            logger.info("%s has grown by more than %d MiB: replaced.", self._name, self._memory_growth >> 20)
            while not self._replace(running=True):
                self._count_failure()
        self._command = None
        return result

    def close(self) -> None:
        """End the process at once: it holds nothing that would have to be saved, and it may hang."""
        if self._pool is not None:
            for process in self._pool.processes:
                process.kill()
                process.join()
            for pipe in self._pool.parent_pipes:
                if pipe is not None:  # Gymnasium's mark of a process that ended with an error
                    pipe.close()
            self._pool.closed = True
        self._pool = self._command = None

    def _is_alive(self) -> bool:
        return self._pool is not None and self._pool.parent_pipes[0] is not None and self._pool.processes[0].is_alive()

    def _send(self, name: str, argument: Any) -> None:
        self._command, self._failure = (name, argument), None
        try:
            if name == "reset":
                self._pool.reset_async(options={"assignment": argument})
            else:
                self._pool.step_async(argument[None])
        except OSError as failure:  # the process is dead
            self._failure = failure

    def _receive(self) -> Result | None:
        """The result of the last command, or `None` if the process failed."""
        if self._failure is not None:
            return None
        name, argument = self._command
        waiting = argument if name == "reset" else self._assignment
        replayed = [len(actions) for _, actions in waiting.starts.values() if actions is not None]
        timeout = self._step_timeout + REPLAY_TIMEOUT * len(waiting.episodes) * max(replayed, default=0)
        try:
            wait = self._pool.reset_wait if name == "reset" else self._pool.step_wait
            record, *_, info = wait(timeout=timeout)
        except FAILURES as failure:
            self._failure = failure
            return None
        # what Gymnasium made of a plain dictionary, for one environment
        info = {key: value[0] for key, value in info.items() if not key.startswith("_")}
        return {key: array[0].copy() for key, array in record.items()}, info

    def _follow(self, name: str, argument: Any, record: dict[str, np.ndarray], info: dict[str, Any]) -> bool:
        """Note which actions the running episodes have seen. Returns whether some episode ended."""
        episodes = record["episode"].tolist()
        before, rows = (self._assignment.episodes, range(len(episodes))) if name == "step" else ([], ())
        if name == "reset":
            self._played: list[list[np.ndarray]] = [[] for _ in episodes]
        for row in rows:
            if episodes[row] == before[row]:
                self._played[row].append(argument[row])
            else:
                self._played[row] = []
        queue = self._assignment.queue
        self._assignment = self._assignment._replace(episodes=episodes, queue=queue[len(queue) - info["left"] :])
        return name == "step" and episodes != before

    def _running(self) -> Assignment:
        """The assignment that leads to where the episodes are now."""
        starts = {episode: self._assignment.starts[episode] for episode in self._assignment.queue}
        for episode, played in zip(self._assignment.episodes, self._played, strict=True):
            if episode >= 0:
                seed, first = self._assignment.starts[episode]
                done = played if first is None else [first, *played]
                starts[episode] = (seed, np.concatenate(done) if done else None)
        return self._assignment._replace(starts=starts)

    def _replace(self, *, running: bool) -> bool:
        """A new process in the place of the old one, if `running` with its episodes where they were. False if it failed too."""
        self.close()
        try:
            self.start()
        except FAILURES as failure:
            self._failure = failure
            return False
        if not running:
            return True
        self._send("reset", self._running())
        result = self._receive()
        wrong = {name: told for name, told in result[1].items() if name in TROUBLE} if result else {}
        if wrong:  # the episodes are not where they were
            self._failure = RuntimeError(f"the episodes could not be played again: {wrong}")
        return self._failure is None

    def _count_failure(self) -> None:
        seeds = [self._assignment.starts[episode][0] for episode in self._assignment.episodes if episode >= 0]
        cause = f"{type(self._failure).__name__}: {self._failure}".rstrip(": ")
        if self._restarts >= self._max_restarts:
            self.close()
            raise RuntimeError(
                f"{self._name} failed {self._restarts + 1} times in one rollout, more than `max_restarts` = "
                f"{self._max_restarts}. It was playing seeds {seeds}; the last cause was {cause}."
            ) from self._failure
        self._restarts += 1
        logger.warning("%s failed (%s); it is replaced, and seeds %s go on where they were.", self._name, cause, seeds)

    def _has_grown(self) -> bool:
        """Whether the process takes more memory than `memory_growth` above what it took when its first episode ended."""
        size = resident_bytes(self.pid)
        if self._first_size is None:
            self._first_size = size
        return size - self._first_size > self._memory_growth


def resident_bytes(pid: int) -> int:
    """Resident memory of a process of this machine; see `man 5 proc_pid_status`. 0 where there is no such file."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = [line for line in file if line.startswith("VmRSS:")]
    except OSError:
        return 0
    return 1024 * int(lines[0].split()[1]) if lines else 0
