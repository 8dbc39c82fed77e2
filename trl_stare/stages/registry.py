"""Which plan a task has."""

from __future__ import annotations

from trl_stare.names import nearest_hint
from trl_stare.stages.spec import StagePlan

_PLANS: dict[str, StagePlan] = {}


def register_plan(plan: StagePlan) -> None:
    """Make `plan` known to [`get_plan`] under its task's name. A second registration of a name replaces the first."""
    _PLANS[plan.task] = plan


def get_plan(task: str) -> StagePlan:
    """Look up the plan of a task.

    Raises:
        ValueError: if the task has none; lists the tasks that have one and the nearest name.

    Example: `get_plan("StackCube-v1").names` is `("Reach", "Grasp", "Transport", "Stack")`.
    """
    if task not in _PLANS:
        raise ValueError(
            f"`task` must be one with a stage plan, {sorted(_PLANS)}, got {task!r}.{nearest_hint(task, _PLANS)} "
            f"Use `register_plan` for a plan of your own."
        )
    return _PLANS[task]
