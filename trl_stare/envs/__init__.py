"""Simulators behind the [`~trl_stare.interfaces.VectorEnv`] protocol. ManiSkill is imported when an environment is made."""

from trl_stare.envs import tasks as _tasks  # noqa: F401  (registers the tasks we ship)
from trl_stare.envs.experts import PickAndPlaceExpert
from trl_stare.envs.registry import SimulatedTask, get_simulated_task, register_simulated_task
from trl_stare.envs.variations import (
    Variation,
    get_variation,
    known_variations,
    register_variation,
    select_variations,
)
from trl_stare.envs.vector import WorkerVectorEnv, make_env

__all__ = [
    "PickAndPlaceExpert",
    "SimulatedTask",
    "Variation",
    "WorkerVectorEnv",
    "get_simulated_task",
    "get_variation",
    "known_variations",
    "make_env",
    "register_simulated_task",
    "register_variation",
    "select_variations",
]
