"""`make_env`: a task as a [`VectorEnv`], spread over the cores of this machine or over the scenes of a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import parent_process
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.registry import SimulatedTask, get_simulated_task
from trl_stare.envs.variations import Variation, get_variation
from trl_stare.envs.visuals import resolve_visuals
from trl_stare.envs.worker import LocalWorker, Worker, assign
from trl_stare.interfaces import ACTION_DIM, NOMINAL, EpisodeStart, Observation, Start, Step, VoidEpisode, Work


def make_env(
    task: str,
    num_envs: int = 8,
    *,
    num_workers: int | None = None,
    chunk_size: int = 1,
    image_size: int | None = None,
    visuals: str | None = None,
    device: str | None = None,
    variation: str | None = None,
    step_timeout: float = 60.0,
    max_restarts: int = 3,
    memory_growth: float = 2.0,
) -> WorkerVectorEnv:
    """Make `num_envs` environments of `task`.

    Args:
        task (`str`): a registered name, e.g. `"StackCube-v1"`.
        num_envs (`int`): `N`.
        num_workers (`int`, *optional*): processes that share the environments evenly; default on the CPU as cores allow, 8 for 16
            environments on twelve. 0: in this process, all that CUDA (ManiSkill's GPU simulation) allows; with more it is the CPU.
        chunk_size (`int`): `C`, environment steps per decision.
        image_size (`int`, *optional*): height and width of the images, pixels. Default is the task's own: 64 for the Panda's,
            480 x 640 for SimplerEnv's. Square images of the latter are the whole picture, squashed, as OpenVLA's are.
        visuals (`str`, *optional*): `"light"` (default on the CPU) or `"stock"` (default on CUDA, and for SimplerEnv's tasks).
        device (`str`, *optional*): `"cpu"` or `"cuda"`; default is what the machine has and the task can use.
        variation (`str`, *optional*): one change of the task, e.g. `"camera/shift"`; see [`known_variations`]. All but those of
            the instruction need `device="cpu"`, where every episode has a scene of its own.
        step_timeout (`float`): seconds for one decision of a worker; one that takes longer hangs and is replaced.
        max_restarts (`int`): how often a worker that dies or hangs is replaced from one `reset` to the next. The episodes it was
            playing go on exactly where they were.
        memory_growth (`float`): GiB by which a worker may grow before it is replaced, when an episode has ended.

    Raises:
        ValueError: unknown task, variation or visuals, or numbers that do not fit.
        ImportError: if ManiSkill is not installed.
        FileNotFoundError: if the task's assets are not there; names the commands that download them.

    Example:

    ```python
    >>> env = make_env("StackCube-v1", num_envs=4, chunk_size=4)
    >>> start = env.reset(range(100))  # four episodes begin, the others follow by themselves
    >>> start.obs.images.shape
    torch.Size([4, 64, 64, 3])
    ```
    """
    spec, varied = get_simulated_task(task), None if variation in (None, NOMINAL) else get_variation(variation)
    on_gpu = spec.gpu_simulation and torch.cuda.is_available() and not num_workers
    device = device or ("cuda" if on_gpu else "cpu")
    visuals = resolve_visuals("stock" if visuals is None and not spec.light_visuals else visuals, device)
    _check_device(spec, varied, device, visuals, num_workers)
    if num_workers is None:
        num_workers = 0 if device == "cuda" else _most_workers(num_envs, len(os.sched_getaffinity(0)))
    sizes = {"num_envs": num_envs, "num_workers": num_workers, "chunk_size": chunk_size, "image_size": image_size}
    limits = {"step_timeout": step_timeout, "max_restarts": max_restarts, "memory_growth": memory_growth}
    _check_sizes(**sizes)
    _check_limits(**limits)
    _check_simulator(spec)
    return WorkerVectorEnv(spec, **sizes, visuals=visuals, device=device, variation=varied, **limits)


class WorkerVectorEnvPart:
    """A [`~trl_stare.interfaces.VectorEnvPart`]: the environments of some workers.

    Args:
        task ([`SimulatedTask`]): what is simulated.
        workers (`Sequence[Worker | LocalWorker]`): who simulates it; `num_envs` of this part are spread over them evenly.
        num_envs (`int`), chunk_size (`int`), max_episode_steps (`int`), metadata (`dict`): see
            [`~trl_stare.interfaces.VectorEnv`].
    """

    def __init__(
        self,
        task: SimulatedTask,
        workers: Sequence[Worker | LocalWorker],
        *,
        num_envs: int,
        chunk_size: int,
        max_episode_steps: int,
        metadata: dict[str, Any],
    ):
        self.task, self.instruction = task.name, task.instruction
        self.workers, self.num_envs, self.chunk_size = tuple(workers), num_envs, chunk_size
        self.max_episode_steps, self.metadata = max_episode_steps, metadata
        self.signal_names = tuple(task.signal_shapes)

    def reset(self, starts: Sequence[int | EpisodeStart], *, ignore_terminations: bool = False) -> Start:
        """Begin the episodes of `starts`; finished environments take the next one by themselves.

        Raises:
            ValueError: if there is no start, a seed is negative, or actions have another shape, are not finite, or end their
                episode.
        """
        starts = [_check_start(start, self.metadata) for start in starts]
        if not starts:
            raise ValueError("`starts` must hold at least one seed, got none.")
        share = self.num_envs // len(self.workers)
        for rank, worker in enumerate(self.workers):
            worker.reset_async(assign(starts, rank, len(self.workers), share, ignore_terminations))
        record, voided, work = self._wait()
        return Start(self._observation(record), self._signals(record, "signals/"), record["episode"], voided, work)

    def step(self, actions: Tensor) -> Step:
        """Execute `[N, C, A]` robot-unit action chunks."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Tensor) -> None:
        """Begin to execute `[N, C, A]` robot-unit action chunks.

        Raises:
            ValueError: if they have another shape or are not finite.
        """
        expected = (self.num_envs, self.chunk_size, ACTION_DIM)
        if tuple(actions.shape) != expected:
            raise ValueError(f"`actions` must have shape {expected}, got {tuple(actions.shape)}.")
        if not torch.isfinite(
            actions
        ).all():  # before it reaches a worker, and on a GPU, where ManiSkill does not look
            rows = torch.nonzero(~torch.isfinite(actions).flatten(1).all(1)).flatten().tolist()
            raise ValueError(f"`actions` must be finite, got NaN or infinity for environments {rows} of {self.task}.")
        chunk = actions.detach().cpu().float().numpy()
        for worker, rows in zip(self.workers, np.split(chunk, len(self.workers)), strict=True):
            worker.step_async(rows)

    def step_wait(self) -> Step:
        """The result of the decision that [`step_async`] began."""
        record, voided, work = self._wait()
        return Step(
            obs=self._observation(record),
            signals=self._signals(record, "signals/"),
            episode=record["episode"],
            chunk_signals=self._signals(record, "chunk_signals/"),
            reward=record["reward"],
            num_steps=record["num_steps"],
            terminated=record["terminated"],
            truncated=record["truncated"],
            final_obs=self._observation(record, "final_"),
            final_signals=self._signals(record, "final_signals/"),
            voided=voided,
            work=work,
        )

    def close(self) -> None:
        """End the simulators and their processes."""
        for worker in self.workers:
            worker.close()

    def _wait(self) -> tuple[dict[str, Tensor], tuple[VoidEpisode, ...], Work]:
        """What all workers answer: `[N, ...]` tensors by name."""
        records, infos = zip(*[worker.wait() for worker in self.workers], strict=True)
        for info in infos:
            if "error" in info:
                raise ValueError(info["error"])
            if "crash" in info:
                raise RuntimeError(info["crash"])
        joined = {name: torch.from_numpy(np.concatenate([record[name] for record in records])) for name in records[0]}
        tensors = {name: value.bool() if value.dtype == torch.int8 else value for name, value in joined.items()}
        firsts = range(0, self.num_envs, self.num_envs // len(infos))
        found = [
            (first, VoidEpisode(*void))
            for first, info in zip(firsts, infos, strict=True)
            for void in info.get("voided", ())
        ]
        voided = tuple(void._replace(env=first + void.env) for first, void in found)
        busy, render = (float(sum(info[name] for info in infos)) / len(infos) for name in ("busy_s", "render_s"))
        return tensors, voided, Work(simulate_s=busy - render, render_s=render)

    def _observation(self, record: dict[str, Tensor], prefix: str = "") -> Observation:
        return Observation(record[f"{prefix}image"], (self.instruction,) * self.num_envs, record[f"{prefix}state"])

    def _signals(self, record: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {name: record[prefix + name] for name in self.signal_names}


class WorkerVectorEnv(WorkerVectorEnvPart):
    """A [`~trl_stare.interfaces.VectorEnv`] over supervised processes. Made by [`make_env`], which documents it.

    Attributes:
        parts (`tuple[WorkerVectorEnvPart, ...]`): two halves of the workers; one part where there is one worker or none.
    """

    def __init__(
        self,
        task: SimulatedTask,
        *,
        num_envs: int,
        num_workers: int,
        chunk_size: int,
        image_size: int | None,
        visuals: str,
        device: str,
        variation: Variation | None = None,
        step_timeout: float = 60.0,
        max_restarts: int = 3,
        memory_growth: float = 2.0,
    ):
        if variation is not None and variation.instruct is not None:
            task = replace(task, instruction=variation.instruct(task))
        count = max(num_workers, 1)
        make_group = partial(
            _make_group,
            task,
            environ=dict(os.environ),
            num_envs=num_envs // count,
            chunk_size=chunk_size,
            image_size=image_size,
            visuals=visuals,
            device=device,
            variation=variation,
        )
        limits = {
            "step_timeout": step_timeout,
            "max_restarts": max_restarts,
            "memory_growth": int(memory_growth * 2**30),
        }
        workers = [
            Worker(make_group, name=f"worker {rank} of {task.name}", **limits) for rank in range(num_workers)
        ] or [LocalWorker(make_group)]
        from trl_stare.envs.maniskill import time_limit

        shared = {"chunk_size": chunk_size, "max_episode_steps": time_limit(task)}
        shared["metadata"] = {
            "task": task.name,
            "control_mode": task.control_mode,
            "robot": task.robot,
            "sim_backend": "physx_cuda" if device == "cuda" else "physx_cpu",
            "render_backend": "sapien_cuda" if device == "cuda" else "sapien_cpu",
            "visuals": visuals,
            "variation": NOMINAL if variation is None else variation.name,
            "image_shape": list(task.image_shape_at(image_size)),
            "chunk_size": chunk_size,
            "max_episode_steps": shared["max_episode_steps"],
            "versions": {name: _version(name) for name in ("mani_skill", "sapien", "gymnasium")},
        }
        super().__init__(task, workers, num_envs=num_envs, **shared)
        halves = [half for half in (workers[: (count + 1) // 2], workers[(count + 1) // 2 :]) if half]
        self.parts = tuple(
            WorkerVectorEnvPart(task, half, num_envs=num_envs // count * len(half), **shared) for half in halves
        )
        with ThreadPoolExecutor(count) as threads:  # every process imports the simulator for seconds: all at once
            list(threads.map(methodcaller("start"), workers))


def _check_device(
    spec: SimulatedTask, varied: Variation | None, device: str, visuals: str, num_workers: int | None
) -> None:
    if visuals == "light" and not spec.light_visuals:
        raise ValueError(f"`visuals` must be 'stock' for {spec.name!r}, whose robot has no light meshes, got 'light'.")
    if device == "cuda" and not spec.gpu_simulation:
        raise ValueError(f"`device` must be 'cpu' for {spec.name!r}, whose `gpu_simulation` is off, got 'cuda'.")
    if device == "cuda" and varied is not None and varied.changes_scene:
        raise ValueError(f"`device` must be 'cpu' for variation {varied.name!r}, got 'cuda'. Say `device='cpu'`.")
    if device == "cuda" and num_workers:
        raise ValueError(
            "`num_workers` must be 0 on CUDA, where a process that is replaced could not play its episodes again, got "
            f"{num_workers}. Leave it out, or say `device='cpu'`."
        )


def _most_workers(num_envs: int, cores: int) -> int:
    return max((n for n in range(1, min(num_envs, cores) + 1) if num_envs % n == 0), default=1)


def _check_simulator(spec: SimulatedTask) -> None:
    if find_spec("mani_skill") is None:
        raise ImportError("`make_env` needs ManiSkill. Run: pip install 'trl-stare[maniskill]'")
    from trl_stare.envs.maniskill import check_assets

    check_assets(spec)


def _check_sizes(num_envs: int, num_workers: int, chunk_size: int, image_size: int | None) -> None:
    if num_envs < 1 or chunk_size < 1:
        raise ValueError(f"`num_envs` and `chunk_size` must be at least 1, got {num_envs} and {chunk_size}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` must be at least 1, got {image_size}.")
    if num_workers and num_envs % num_workers:
        raise ValueError(f"`num_envs` must be a multiple of `num_workers`, got {num_envs} and {num_workers}.")


def _check_limits(**limits: float) -> None:
    for name, value in limits.items():
        if not value > 0 and not (value == 0 and name == "max_restarts"):
            raise ValueError(f"`{name}` must be greater than 0, got {value}.")


def _check_start(start: int | EpisodeStart, metadata: dict[str, Any]) -> EpisodeStart:
    """`start` with its actions on the CPU."""
    start = start if isinstance(start, EpisodeStart) else EpisodeStart(int(start))
    if start.seed < 0:
        raise ValueError(f"`starts` must be of seeds >= 0, got {start.seed}.")
    if start.actions is None or not len(start.actions):
        return EpisodeStart(int(start.seed))
    actions = start.actions.detach().cpu().float()
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not torch.isfinite(actions).all():
        raise ValueError(
            f"`actions` of the start of seed {start.seed} must be finite [P, {ACTION_DIM}], got {tuple(actions.shape)} with "
            f"{int((~torch.isfinite(actions)).sum())} values that are not finite."
        )
    if metadata["sim_backend"] != "physx_cpu":
        raise ValueError(
            f"`starts` must be without actions on CUDA, where all scenes step together, got {len(actions)} for seed "
            f"{start.seed}. Use `device='cpu'`."
        )
    return EpisodeStart(int(start.seed), actions)


def _make_group(task: SimulatedTask, environ: dict[str, str], **kwargs: Any):
    """Runs in the worker: the simulator is imported there only."""
    if parent_process() is not None:
        os.environ.update(environ)  # the process that workers are forked from may be older than what was set since
    from trl_stare.envs.group import EpisodeGroup

    return EpisodeGroup(task, **kwargs)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
