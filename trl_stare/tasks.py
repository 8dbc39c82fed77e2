"""A task is a simulated environment and a stage plan under one name."""

from __future__ import annotations

from trl_stare.envs.registry import SimulatedTask, register_simulated_task
from trl_stare.stages import StagePlan, register_plan


def register_task(task: SimulatedTask, plan: StagePlan) -> None:
    """Make a task of your own known to [`make_env`] and [`get_plan`], from your own module.

    Args:
        task ([`SimulatedTask`]): the environment and the signals read off it.
        plan ([`StagePlan`]): its stages, functions of those signals.

    Raises:
        ValueError: if the names differ, or the plan reads a signal that the task does not give.
    """
    if task.name != plan.task:
        raise ValueError(f"`plan` must be of task {task.name!r}, got one of {plan.task!r}.")
    plan.validate_signals(tuple(task.signal_shapes))
    register_simulated_task(task)
    register_plan(plan)
