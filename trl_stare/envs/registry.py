"""Which simulator a task name stands for. No simulator is imported here, so that `import trl_stare` needs none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.names import nearest_hint


@dataclass(frozen=True)
class SimulatedTask:
    """How a ManiSkill environment becomes a task: what it is told, what is read off it, and who can show it.

    Args:
        name (`str`): the name users say, e.g. `"StackCube-v1"`.
        env_id (`str`): id for `gym.make`.
        instruction (`str`): what the policy is told.
        signals (`Callable[[BaseEnv, dict], dict[str, Tensor]]`): reads privileged state off the unwrapped environment and its
            `get_info()`: name -> `[B]` bool or `[B, D]` float32. Must contain `"success"`, and only instantaneous values.
        signal_shapes (`dict[str, int]`): name -> `D`, or 0 for a `[B]` bool signal.
        contact_signals (`tuple[str, ...]`): bool signals that come from contact forces. PhysX only renews contacts when it steps,
            so right after a reset it still holds the previous episode's: these signals are then `False` by definition.
        state_signals (`tuple[str, ...]`): `[B, D]` signals that the policy is told besides its proprioception: they are appended
            to the observation's `state`, in this order. For what the task asks for but the camera does not show.
        demonstrate (`Callable[[Signals], Tensor]`, *optional*): scripted expert, signals `[N, ...]` -> `[N, A]` actions.
        mistake_size (`float`): largest translation of a random mistake in noisy demonstrations, in the controller's units.
        control_mode (`str`): 7-dimensional end-effector control by default.
        robot (`str`): ManiSkill robot uid.
        chooses_robot (`bool`): the environment makes `robot` by itself and takes none from `gym.make`.
        camera (`str`): which of the environment's cameras the policy sees.
        camera_config (`dict`): overrides for that camera (ManiSkill's `sensor_configs`); the image size is set apart. An
            `intrinsic` (`[3, 3]`) is that of a picture of `image_shape` and follows the image size.
        image_shape (`tuple[int, int]`): height and width of the task's own picture, pixels.
        configurations (`int`): how many initial configurations the environment has; the episode of a seed then starts from
            number `seed % configurations` (ManiSkill's reset option `episode_id`). 0 if the seed itself draws the start.
        light_visuals (`bool`): whether the robot can be shown with [`light_visuals`]; a robot whose colours are textures cannot.
        gpu_simulation (`bool`): whether ManiSkill's GPU simulation can run it, i.e. a scene is reset without the others, and the
            reset draws all of its start (PegInsertionSide-v1's peg and hole are built once).
        env_kwargs (`dict`): more arguments for `gym.make`.
    """

    name: str
    env_id: str
    instruction: str
    signals: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    signal_shapes: Mapping[str, int]
    contact_signals: tuple[str, ...] = ()
    state_signals: tuple[str, ...] = ()
    demonstrate: Callable[[Signals], Tensor] | None = None
    mistake_size: float = 0.6
    control_mode: str = "pd_ee_delta_pose"
    robot: str = "panda"
    chooses_robot: bool = False
    camera: str = "base_camera"
    camera_config: Mapping[str, Any] = field(default_factory=dict)
    image_shape: tuple[int, int] = (64, 64)
    configurations: int = 0
    light_visuals: bool = True
    gpu_simulation: bool = True
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.signal_shapes.get("success") != 0:
            raise ValueError(
                f"`signal_shapes` of task {self.name!r} must contain 'success' as a bool signal (0), got "
                f"{dict(self.signal_shapes)}. Add the environment's own success."
            )
        unknown = [name for name in self.contact_signals if self.signal_shapes.get(name) != 0]
        if unknown:
            raise ValueError(f"`contact_signals` of task {self.name!r} must be bool signals of it, got {unknown}.")
        unknown = [name for name in self.state_signals if not self.signal_shapes.get(name)]
        if unknown:
            raise ValueError(f"`state_signals` of task {self.name!r} must be `[B, D]` signals of it, got {unknown}.")

    def image_shape_at(self, image_size: int | None) -> tuple[int, int]:
        """Height and width of pictures of `image_size` pixels: square, or the task's own `image_shape` for `None`."""
        return self.image_shape if image_size is None else (image_size, image_size)


_TASKS: dict[str, SimulatedTask] = {}


def register_simulated_task(task: SimulatedTask) -> None:
    """Make `task` known to [`make_env`]. A second registration of a name replaces the first."""
    _TASKS[task.name] = task


def get_simulated_task(name: str) -> SimulatedTask:
    """Look a task up.

    Raises:
        ValueError: if `name` is unknown; lists the known names and the nearest one.
    """
    if name not in _TASKS:
        raise ValueError(
            f"`task` must be one of {sorted(_TASKS)}, got {name!r}.{nearest_hint(name, _TASKS)} Use `register_task` for a task of your own."
        )
    return _TASKS[name]
