"""One ManiSkill environment, seen through a task's eyes. The only module that calls the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.control import speed_up_control
from trl_stare.envs.grasping import speed_up_grasping
from trl_stare.envs.messages import tell_once
from trl_stare.envs.overlay import forget_overlays, keep_overlays, overlay
from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations import Variation
from trl_stare.envs.visuals import use_visuals
from trl_stare.envs.vulkan import select_vulkan_driver


def time_limit(task: SimulatedTask) -> int:
    """Environment steps of an episode: the task's own `max_episode_steps` among its `env_kwargs`, or that of the registration.

    Raises:
        ValueError: if neither says.
    """
    select_vulkan_driver()
    import gymnasium as gym
    import mani_skill.envs  # noqa: F401  (registers the environments)

    limit = task.env_kwargs.get("max_episode_steps") or gym.spec(task.env_id).max_episode_steps
    if limit is None:
        raise ValueError(
            f"task {task.name!r} must have a time limit, got none. Give `max_episode_steps` to ManiSkill's `register_env`, or in "
            "the task's `env_kwargs`."
        )
    return limit


def check_assets(task: SimulatedTask) -> None:
    """Raise if ManiSkill lacks files that `task` needs. ManiSkill itself would ask on the terminal whether to download them.

    Raises:
        FileNotFoundError: names the folder that was searched and the commands that download what is missing.
    """
    select_vulkan_driver()
    import mani_skill.envs  # noqa: F401  (registers the environments)
    from mani_skill import ASSET_DIR
    from mani_skill.utils import assets

    # the groups that ManiSkill's own checks look at: that of the environment and that of its robot
    groups = [group for group in (task.env_id, task.robot) if group in assets.DATA_GROUPS]
    needed = {name for group in groups for name in assets.expand_data_group_into_individual_data_source_ids(group)}
    missing = sorted(name for name in needed if not assets.is_data_source_downloaded(name))
    if missing:
        commands = " && ".join(f"python -m mani_skill.utils.download_asset {name}" for name in missing)
        raise FileNotFoundError(
            f"task {task.name!r} needs ManiSkill's assets {', '.join(missing)}, which are not in {ASSET_DIR}. "
            f"Run: {commands} (or set `MS_ASSET_DIR` to the folder that holds them)"
        )


class Simulator:
    """`B` parallel scenes of one task: 1 on the CPU (ManiSkill's limit), any number on CUDA.

    Args:
        task ([`SimulatedTask`]): what to simulate.
        num_envs (`int`): `B`.
        image_size (`int`, *optional*): height and width of the policy's image, pixels; default the task's own.
        visuals (`str`): `"light"` (decimated visual meshes) or `"stock"`.
        device (`str`): `"cpu"` or `"cuda"`.
        variation ([`Variation`], *optional*): what is changed.
    """

    def __init__(
        self,
        task: SimulatedTask,
        *,
        num_envs: int,
        image_size: int | None,
        visuals: str,
        device: str,
        variation: Variation | None = None,
    ):
        select_vulkan_driver()
        import gymnasium as gym
        import mani_skill.envs  # noqa: F401  (registers the environments)

        self.task, self.num_envs, self.visuals, self.variation = task, num_envs, visuals, variation
        cuda = device == "cuda"
        gpu = torch.cuda.current_device() if cuda else None  # without it every process would take the first
        tell_once()
        forget_overlays()
        with self._building():
            env = gym.make(
                task.env_id,
                num_envs=num_envs,
                obs_mode=_obs_mode(task),
                reward_mode="none",
                control_mode=task.control_mode,
                **({} if task.chooses_robot else {"robot_uids": task.robot}),
                sim_backend=f"physx_cuda:{gpu}" if cuda else "physx_cpu",
                render_backend=f"sapien_cuda:{gpu}" if cuda else "sapien_cpu",
                sensor_configs=_sensor_configs(task, image_size),
                **task.env_kwargs,
            )
        self.env: Any = env.unwrapped
        # no observation is rendered by `step`: images are asked for when the policy looks
        self.env._obs_mode = "none"
        self._has_overlay = keep_overlays(self.env)
        self._photographs = dict(self.env._rgb_overlay_images) if self._has_overlay else {}
        self._execute: Callable[[Tensor], Tensor] | None = None
        self._speed_up()
        self.is_rebuilt = not cuda
        self._info: dict[str, Tensor] = {}
        self._is_fresh = torch.zeros(num_envs, dtype=torch.bool)
        self._has_signals = False  # as the task declares them

    def reset(self, seeds: Sequence[int], rows: Tensor) -> None:
        """Begin new episodes in scenes `rows` (`[R]` int64), one explicit seed each."""
        if self._has_overlay:
            self.env._rgb_overlay_images = dict(self._photographs)  # a variation may have changed them
        # one at a time: ManiSkill draws all rows of a reset from the first seed alone
        for seed, row in zip(seeds, rows, strict=True):
            self._reset_row(int(seed), row)
        self._is_fresh[rows] = True
        self._execute = None
        if self.variation is not None and self.variation.changes_scene:
            self._vary(int(seeds[0]))

    def step(self, actions: Tensor) -> None:
        """One control step with `[B, A]` robot-unit actions.

        Raises:
            ValueError: if an action is not finite (ManiSkill checks that on the CPU only).
        """
        if not torch.isfinite(actions).all():
            raise ValueError(f"`actions` must be finite, got {actions.tolist()} for task {self.task.name!r}.")
        if self._execute is not None:
            actions = self._execute(actions)
        *_, self._info = self.env.step(actions.to(self.env.device))
        self._is_fresh[:] = False

    def signals(self) -> dict[str, Tensor]:
        """Signals now: name -> `[B]` bool or `[B, D]` float32, on the CPU."""
        signals = {name: value.cpu() for name, value in self.task.signals(self.env, self._info).items()}
        if not self._has_signals:
            _check_signals(self.task, self.num_envs, signals)
            self._has_signals = True
        # no physics step since the reset: the contacts that PhysX reports are still those of the episode before
        return signals | {name: signals[name] & ~self._is_fresh for name in self.task.contact_signals}

    def state(self) -> Tensor:
        """`[B, 8]` proprioception: TCP position (m, world), TCP quaternion (wxyz), opening of the gripper (m)."""
        agent = self.env.agent
        # not every robot names its TCP; its controller knows which link it moves
        tcp = (agent.tcp if hasattr(agent, "tcp") else agent.controller.controllers["arm"].ee_link).pose
        opening = agent.robot.qpos[:, -2:].sum(dim=-1, keepdim=True)
        return torch.cat([tcp.p, tcp.q, opening], dim=-1).float().cpu()

    def images(self) -> Tensor:
        """`[B, H, W, 3]` uint8, rendered now, without what the task hides from its cameras (PickCube-v1's goal)."""
        for hidden in self.env._hidden_objects:
            hidden.hide_visual()
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.env.scene.sensors[self.task.camera]
        camera.capture()
        picture = camera.get_obs(rgb=True, depth=False, position=False, segmentation=self._has_overlay)
        image = overlay(self.env, self.task.camera, picture) if self._has_overlay else picture["rgb"]
        return image.cpu()

    def close(self) -> None:
        """End the simulator."""
        self.env.close()

    @contextmanager
    def _building(self) -> Iterator[None]:
        with use_visuals(self.visuals, self.task.robot):
            with self.variation.building() if self.variation is not None else nullcontext():
                yield

    def _reset_row(self, seed: int, row: Tensor) -> None:
        # PhysX's bookkeeping of past contacts outlives a reset and moves the next episode by rounding, which grasps amplify:
        # only in a scene built anew is an episode a function of its seed and actions. Parallel scenes cannot be built singly.
        options = {"reconfigure": True} if self.is_rebuilt else {"env_idx": row[None].to(self.env.device)}
        if self.task.configurations:
            options["episode_id"] = torch.tensor([seed % self.task.configurations], device=self.env.device)
        with self._building():  # a reset may build the scene anew
            # the seed for every row: ManiSkill would make up those that are not given
            _, self._info = self.env.reset(seed=[seed] * self.num_envs, options=options)
        if self._info["reconfigure"]:  # a scene built anew has a new agent
            self._speed_up()

    def _vary(self, seed: int) -> None:
        """Change the scene that was just reset, and what will happen to actions."""
        rng = self.variation.generator(seed)
        if self.variation.arrange is not None:
            self.variation.arrange(self.env, self.task, rng)
            self._info = self.env.get_info()
        if self.variation.execute is not None:
            self._execute = self.variation.execute(self.task, rng)

    def _speed_up(self) -> None:
        speed_up_control(self.env)
        speed_up_grasping(self.env)


def _check_signals(task: SimulatedTask, num_envs: int, signals: Mapping[str, Tensor]) -> None:
    """Hold what a task reads against what it declares: written down as a bool, a distance would be True or False."""
    declared = {
        name: f"float32 {[num_envs, size]}" if size else f"bool {[num_envs]}"
        for name, size in task.signal_shapes.items()
    }
    read = {name: f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]}" for name, value in signals.items()}
    wrong = [
        f"{name!r} must be {declared.get(name, 'declared')}, got {read.get(name, 'nothing')}"
        for name in sorted(declared.keys() | read.keys())
        if declared.get(name) != read.get(name)
    ]
    if wrong:
        raise ValueError(
            f"`signals` must be as `signal_shapes` of task {task.name!r} declares them: {'; '.join(wrong)}."
        )


def _obs_mode(task: SimulatedTask) -> str:
    """`"none"`, or what the environment insists on (digital twins know one mode only)."""
    from mani_skill.utils.registration import REGISTERED_ENVS

    supported = REGISTERED_ENVS[task.env_id].cls.SUPPORTED_OBS_MODES
    return "none" if "none" in supported else supported[0]


def _sensor_configs(task: SimulatedTask, image_size: int | None) -> dict[str, Any]:
    """ManiSkill's `sensor_configs`: image size for all cameras, and the task's overrides for the policy's camera.

    Example: an `intrinsic` for 640 x 480 becomes, at `image_size` 64, a tenth of its first row and 64/480 of its second.
    """
    height, width = task.image_shape_at(image_size)
    camera = dict(task.camera_config)
    if "intrinsic" in camera:
        own_height, own_width = task.image_shape
        camera["intrinsic"] = np.diag([width / own_width, height / own_height, 1.0]) @ np.asarray(camera["intrinsic"])
    return {"width": width, "height": height, task.camera: camera}
