"""A task is a simulated environment and a stage plan under one name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

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


def import_tasks(module: str | None) -> None:
    """Import the module that registers your tasks, so that this process and the simulators' workers find it.

    Args:
        module (`str`, *optional*): its dotted name (`"my_package.tasks"`), or the path of its file (`"tasks/my_task.py"`).
            The folder of a file goes to the front of `sys.path`, which worker processes inherit: they import the task's
            functions by the module's name. `None` imports nothing.

    Raises:
        ValueError: if there is no such module or file, or another module has the file's name already.

    Example: `import_tasks("tasks/my_task.py")` imports `my_task`.
    """
    if module is None:
        return
    if not module.endswith(".py"):
        _import(module, given=module)
        return
    path = Path(module).resolve()
    if not path.is_file() or not path.stem.isidentifier():
        raise ValueError(f"`task_module` must be a Python file whose name can be imported, got {module!r}.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    found = _import(path.stem, given=module)
    if found.__file__ is None or Path(found.__file__).resolve() != path:
        raise ValueError(
            f"`task_module` must have a name of its own, got {module!r}: that is {found}. Rename the file."
        )


def _import(name: str, *, given: str) -> ModuleType:
    wrong = f"`task_module` must be an importable module or a .py file, got {given!r}."
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(wrong)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name != error.name and not name.startswith(error.name + "."):
            raise  # found, but something that it imports is missing
        raise ValueError(wrong) from error
