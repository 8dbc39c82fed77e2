"""docs/own_task.md, followed to the letter: its code is the module, its command is what runs, with tiny budgets."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from trl import TrlParser

from trl_stare import get_plan, make_env
from trl_stare.data import demonstrate
from trl_stare.envs import get_simulated_task
from trl_stare.envs.registry import _TASKS
from trl_stare.runs import set_entries
from trl_stare.stages import check
from trl_stare.stages.registry import _PLANS
from trl_stare.tasks import import_tasks

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "own_task.md").read_text()
TASK = "PokeCube-v1"
TINY = {
    "num_demonstrations": 2, "eval_episodes": 2, "video_episodes": 0, "num_envs": 2, "chunk_size": 10,
    "num_workers": 1, "image_size": 32, "imitation.max_steps": 2, "imitation.per_device_train_batch_size": 4,
    "interaction.num_train_epochs": 1,
    "interaction.episodes_per_iteration": 2, "interaction.num_minibatches": 1,
}  # fmt: skip


def block(language: str, containing: str) -> str:
    """The one code block of the page that contains a text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL) if containing in code]
    return found


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """The page's module in a file of its own; registries, import path and modules are as before afterwards."""
    monkeypatch.setattr("trl_stare.envs.registry._TASKS", dict(_TASKS))
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", dict(_PLANS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "poke_cube.py"
    path.write_text(block("python", "register_task("))
    yield path
    sys.modules.pop("poke_cube", None)


def test_the_plan_is_right_and_the_demonstrator_solves_the_task(module):
    import_tasks(str(module))
    with closing(make_env(TASK, 2, num_workers=1, image_size=16)) as env:
        shown = demonstrate(env, get_simulated_task(TASK).demonstrate, range(4))
    assert sum(trajectory.success_once for trajectory in shown) >= 3
    report = check(get_plan(TASK), [trajectory.signals for trajectory in shown])
    assert report.ok, str(report)


def command_of_the_page() -> list[str]:
    """The line that runs all phases."""
    return shlex.split(block("bash", "--output_dir outputs/poke\n"))


def test_the_command_is_one_that_the_recipe_takes(load_recipe):
    recipe, command = load_recipe("ipi"), command_of_the_page()
    assert command[:3] == ["accelerate", "launch", "recipes/ipi.py"]
    parser = TrlParser(recipe.IPIArguments)
    args = set_entries(*parser.parse_args_and_config(args=command[3:], return_remaining_strings=True))
    assert (args.task, args.task_module, args.output_dir) == (TASK, "poke_cube.py", "outputs/poke")


@pytest.mark.slow
def test_the_recipe_runs_on_it(module, tmp_path):
    """Without Preference: after two steps of imitation no rollout passes a stage, so that there is nothing to compare."""
    command, phases = command_of_the_page(), "imitation,interaction"
    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    given = [str(module) if part == "poke_cube.py" else part for part in command[2:]]
    tiny = TINY | {"phases": phases, "output_dir": tmp_path / "run"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, *given,
         *(str(part) for name, value in tiny.items() for part in (f"--{name}", value))],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == TASK and list(results["phases"]) == phases.split(",")
    assert list(results["phases"]["imitation"]["stage_success"]) == ["Reach", "Aim", "Poke"]


@pytest.mark.slow
def test_the_demonstrator_on_a_hundred_seeds(module):
    import_tasks(str(module))
    with closing(make_env(TASK, 2, num_workers=2, image_size=16)) as env:
        shown = demonstrate(env, get_simulated_task(TASK).demonstrate, range(100))
    assert sum(trajectory.success_once for trajectory in shown) >= 95
    assert check(get_plan(TASK), [trajectory.signals for trajectory in shown]).ok


def test_the_page_is_one_page():
    assert len(DOC.splitlines()) <= 130
    plan = block("python", "register_task(").split("# 2.")[1].split("# 3.")[0]
    assert len([line for line in plan.splitlines() if line.strip()]) <= 22
