"""`make_env`: a task as a [`VectorEnv`], spread over the cores of this machine or over the scenes of a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.registry import SimulatedTask, get_simulated_task
from trl_stare.envs.visuals import resolve_visuals
from trl_stare.interfaces import Observation, Start, Step


def make_env(
    task: str,
    num_envs: int = 8,
    *,
    num_workers: int | None = None,
    chunk_size: int = 1,
    image_size: int | None = None,
    visuals: str | None = None,
    device: str | None = None,
) -> WorkerVectorEnv:
    """Make `num_envs` environments of `task`.

    Args:
        task (`str`): a registered name, e.g. `"StackCube-v1"`.
        num_envs (`int`): `N`.
        num_workers (`int`, *optional*): processes that share the environments; default one per core on the CPU (at most
            `num_envs`). 0 keeps them in this process, as does CUDA, where ManiSkill's GPU simulation is used.
        chunk_size (`int`): `C`, environment steps per decision.
        image_size (`int`, *optional*): height and width of the images, pixels. Default is the task's own: 64 for the
            Panda's tasks, 480 x 640 for SimplerEnv's. Square images of the latter are the whole picture, squashed, as
            OpenVLA's preprocessing makes them.
        visuals (`str`, *optional*): `"light"` (default on the CPU) or `"stock"` (default on CUDA, and for SimplerEnv's tasks).
        device (`str`, *optional*): `"cpu"` or `"cuda"`; default is what the machine has and the task can use.

    Raises:
        ValueError: unknown task or visuals, or numbers that do not fit.
        ImportError: if ManiSkill is not installed.
        FileNotFoundError: if the task's assets are not there; names the commands that download them.

    Example:

    ```python
    >>> env = make_env("StackCube-v1", num_envs=4, chunk_size=4)
    >>> start = env.reset(seeds=range(100))  # four episodes begin, the others follow by themselves
    >>> start.obs.images.shape
    torch.Size([4, 64, 64, 3])
    ```
    """
    spec = get_simulated_task(task)
    if find_spec("mani_skill") is None:
        raise ImportError("`make_env` needs ManiSkill. Run: pip install 'trl-stare[maniskill]'")
    device = device or ("cuda" if spec.gpu_simulation and torch.cuda.is_available() else "cpu")
    visuals = resolve_visuals("stock" if visuals is None and not spec.light_visuals else visuals, device)
    if visuals == "light" and not spec.light_visuals:
        raise ValueError(f"`visuals` must be 'stock' for {task!r}, whose robot has no light meshes, got 'light'.")
    if num_envs < 1 or chunk_size < 1:
        raise ValueError(f"`num_envs` and `chunk_size` must be at least 1, got {num_envs} and {chunk_size}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` must be at least 1, got {image_size}.")
    if device == "cuda" and not spec.gpu_simulation:
        raise ValueError(f"`device` must be 'cpu' for {task!r}, which ManiSkill cannot simulate on a GPU, got 'cuda'.")
    if num_workers is None:
        num_workers = 0 if device == "cuda" else min(num_envs, len(os.sched_getaffinity(0)))
    if num_workers and num_envs % num_workers:
        raise ValueError(f"`num_envs` must be a multiple of `num_workers`, got {num_envs} and {num_workers}.")
    from trl_stare.envs.maniskill import check_assets

    check_assets(spec)
    return WorkerVectorEnv(
        spec,
        num_envs=num_envs,
        num_workers=num_workers,
        chunk_size=chunk_size,
        image_size=image_size,
        visuals=visuals,
        device=device,
    )


class WorkerVectorEnv:
    """A [`~trl_stare.interfaces.VectorEnv`] over Gymnasium's worker processes. Made by [`make_env`], which documents it."""

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
    ):
        import gymnasium as gym

        self.task, self.instruction = task.name, task.instruction
        self.num_envs, self.num_workers, self.chunk_size = num_envs, num_workers, chunk_size
        self.signal_names = tuple(task.signal_shapes)
        shards = max(num_workers, 1)
        groups = [
            partial(
                _make_group,
                task,
                num_envs=num_envs // shards,
                chunk_size=chunk_size,
                image_size=image_size,
                visuals=visuals,
                device=device,
                rank=rank,
                world_size=shards,
            )
            for rank in range(shards)
        ]
        manual = gym.vector.AutoresetMode.DISABLED
        if num_workers:
            # "spawn": neither Vulkan nor torch's thread pool survives a fork
            self._pool = gym.vector.AsyncVectorEnv(groups, context="spawn", autoreset_mode=manual)
        else:
            self._pool = gym.vector.SyncVectorEnv(groups, autoreset_mode=manual)
        self.max_episode_steps: int = self._pool.get_attr("max_episode_steps")[0]
        self.metadata: dict[str, Any] = {
            "task": task.name,
            "control_mode": task.control_mode,
            "robot": task.robot,
            "sim_backend": "physx_cuda" if device == "cuda" else "physx_cpu",
            "render_backend": "sapien_cuda" if device == "cuda" else "sapien_cpu",
            "visuals": visuals,
            "image_shape": list(task.image_shape_at(image_size)),
            "chunk_size": chunk_size,
            "max_episode_steps": self.max_episode_steps,
            "versions": {name: _version(name) for name in ("mani_skill", "sapien", "gymnasium")},
        }

    def reset(self, seeds: Sequence[int], *, ignore_terminations: bool = False) -> Start:
        """Begin the episodes of `seeds`; finished environments take the next one by themselves."""
        seeds = [int(seed) for seed in seeds]
        if not seeds or min(seeds) < 0:
            raise ValueError(f"`seeds` must be a non-empty sequence of integers >= 0, got {seeds[:8]}.")
        record, _ = self._pool.reset(options={"seeds": seeds, "ignore_terminations": ignore_terminations})
        record = self._flatten(record)
        return Start(self._observation(record), self._signals(record, "signals/"), record["episode"])

    def step(self, actions: Tensor) -> Step:
        """Execute `[N, C, A]` robot-unit action chunks."""
        expected = (self.num_envs, self.chunk_size, 7)
        if tuple(actions.shape) != expected:
            raise ValueError(f"`actions` must have shape {expected}, got {tuple(actions.shape)}.")
        if not torch.isfinite(actions).all():  # before it reaches a worker, which an error would end
            rows = torch.nonzero(~torch.isfinite(actions).flatten(1).all(1)).flatten().tolist()
            raise ValueError(f"`actions` must be finite, got NaN or infinity for environments {rows} of {self.task}.")
        shards = max(self.num_workers, 1)
        chunk = actions.detach().cpu().float().numpy()
        record, *_ = self._pool.step(chunk.reshape(shards, -1, *expected[1:]))
        record = self._flatten(record)
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
        )

    def close(self) -> None:
        """End the simulators and their processes."""
        self._pool.close()

    def _flatten(self, record: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """`[workers, N / workers, ...]` shared arrays -> `[N, ...]` tensors of our own."""
        tensors = {
            name: torch.from_numpy(array.reshape(-1, *array.shape[2:]).copy()) for name, array in record.items()
        }
        return {name: value.bool() if value.dtype == torch.int8 else value for name, value in tensors.items()}

    def _observation(self, record: dict[str, Tensor], prefix: str = "") -> Observation:
        return Observation(record[f"{prefix}image"], (self.instruction,) * self.num_envs, record[f"{prefix}state"])

    def _signals(self, record: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {name: record[prefix + name] for name in self.signal_names}


def _make_group(task: SimulatedTask, **kwargs: Any):
    """Runs in the worker: the simulator is imported there only."""
    from trl_stare.envs.group import EpisodeGroup

    return EpisodeGroup(task, **kwargs)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
