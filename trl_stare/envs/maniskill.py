"""One ManiSkill environment, seen through a task's eyes. The only module that calls the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_stare.envs.control import speed_up_control
from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.visuals import use_visuals
from trl_stare.envs.vulkan import select_vulkan_driver


def time_limit(task: SimulatedTask) -> int:
    """The environment's own `max_episode_steps`, read from its registration."""
    select_vulkan_driver()
    import gymnasium as gym
    import mani_skill.envs  # noqa: F401  (registers the environments)

    return gym.spec(task.env_id).max_episode_steps


class Simulator:
    """`B` parallel scenes of one task: 1 on the CPU (ManiSkill's limit), any number on CUDA.

    Args:
        task ([`SimulatedTask`]): what to simulate.
        num_envs (`int`): `B`.
        image_size (`int`): height and width of the policy's image, pixels.
        visuals (`str`): `"light"` (decimated visual meshes) or `"stock"`.
        device (`str`): `"cpu"` or `"cuda"`.
    """

    def __init__(self, task: SimulatedTask, *, num_envs: int, image_size: int, visuals: str, device: str):
        select_vulkan_driver()
        import gymnasium as gym
        import mani_skill.envs  # noqa: F401  (registers the environments)

        self.task, self.num_envs, self.visuals = task, num_envs, visuals
        cuda = device == "cuda"
        with use_visuals(visuals, task.robot):
            env = gym.make(
                task.env_id,
                num_envs=num_envs,
                # no observation is rendered by `step`: images are asked for when the policy looks
                obs_mode="none",
                reward_mode="none",
                control_mode=task.control_mode,
                robot_uids=task.robot,
                sim_backend="physx_cuda" if cuda else "physx_cpu",
                render_backend="sapien_cuda" if cuda else "sapien_cpu",
                sensor_configs={"width": image_size, "height": image_size, task.camera: dict(task.camera_config)},
                **task.env_kwargs,
            )
        self.env: Any = env.unwrapped
        speed_up_control(self.env)
        self._info: dict[str, Tensor] = {}
        self._is_fresh = torch.zeros(num_envs, dtype=torch.bool)

    def reset(self, seeds: Sequence[int], rows: Tensor) -> None:
        """Begin new episodes in scenes `rows` (`[R]` int64), one explicit seed each."""
        options = {} if self.num_envs == 1 else {"env_idx": rows.to(self.env.device)}
        with use_visuals(self.visuals, self.task.robot):  # a reset may build the scene anew
            _, self._info = self.env.reset(seed=[int(seed) for seed in seeds], options=options)
        self._is_fresh[rows] = True
        if self._info["reconfigure"]:  # some tasks build a new agent for every episode
            speed_up_control(self.env)

    def step(self, actions: Tensor) -> None:
        """One control step with `[B, A]` robot-unit actions.

        Raises:
            ValueError: if an action is not finite (ManiSkill checks that on the CPU only).
        """
        if not torch.isfinite(actions).all():
            raise ValueError(f"`actions` must be finite, got {actions.tolist()} for task {self.task.name!r}.")
        *_, self._info = self.env.step(actions.to(self.env.device))
        self._is_fresh[:] = False

    def signals(self) -> dict[str, Tensor]:
        """Signals now: name -> `[B]` bool or `[B, D]` float32, on the CPU."""
        signals = {name: value.cpu() for name, value in self.task.signals(self.env, self._info).items()}
        # no physics step since the reset: the contacts that PhysX reports are still those of the episode before
        return signals | {name: signals[name] & ~self._is_fresh for name in self.task.contact_signals}

    def state(self) -> Tensor:
        """`[B, 8]` proprioception: TCP position (m, world), TCP quaternion (wxyz), opening of the gripper (m)."""
        agent = self.env.agent
        opening = agent.robot.qpos[:, -2:].sum(dim=-1, keepdim=True)
        return torch.cat([agent.tcp.pose.p, agent.tcp.pose.q, opening], dim=-1).float().cpu()

    def images(self) -> Tensor:
        """`[B, H, W, 3]` uint8, rendered now."""
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.env.scene.sensors[self.task.camera]
        camera.capture()
        return camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"].cpu()

    def close(self) -> None:
        """End the simulator."""
        self.env.close()
