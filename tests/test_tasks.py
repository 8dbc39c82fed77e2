"""Where a task's two halves meet: what is refused when it is registered, looked up, imported or played."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from trl_stare import SimulatedTask, make_env, register_task
from trl_stare.data import collect
from trl_stare.data.actors import Decision
from trl_stare.envs import get_simulated_task
from trl_stare.envs.registry import _TASKS
from trl_stare.interfaces import Observation, Start, Step
from trl_stare.stages import Stage, StagePlan, get_plan, succeeded
from trl_stare.stages.registry import _PLANS
from trl_stare.tasks import import_tasks

TASK = SimulatedTask(
    name="Slide-v0",
    env_id="Slide-v0",
    instruction="slide it",
    signals=lambda env, info: {},
    signal_shapes={"gap": 1, "is_contact": 0, "success": 0},
)


def stage(name="Reach", done=lambda s: s["is_contact"], reads=("gap", "is_contact"), **kwargs):
    return Stage(name=name, done=done, distance=lambda s: s["gap"][..., 0], scale=0.3, reads=reads, **kwargs)


LAST = stage("Slide", done=succeeded, reads=("gap", "success"))
PLAN = StagePlan("Slide-v0", (stage(), LAST))


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers or imports is forgotten."""
    monkeypatch.setattr("trl_stare.envs.registry._TASKS", dict(_TASKS))
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", dict(_PLANS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("slide_")]:
        del sys.modules[name]


def test_a_task_is_known_to_both_registries():
    register_task(TASK, PLAN)
    assert get_plan("Slide-v0") is PLAN and get_simulated_task("Slide-v0") is TASK


@pytest.mark.parametrize("look_up", [get_plan, get_simulated_task, make_env])
def test_an_unknown_task_lists_the_known_and_the_nearest(look_up):
    with pytest.raises(ValueError, match=r"'StackCube-v1'.*got 'StackCubes-v1'\. Did you mean 'StackCube-v1'\?"):
        look_up("StackCubes-v1")
    with pytest.raises(ValueError, match=r"'StackCube-v1'.*got 'zzz'\. Use `register_") as error:
        look_up("zzz")
    assert "Did you mean" not in str(error.value)


def test_names_that_differ_are_refused():
    with pytest.raises(ValueError, match="`plan` must be of task 'Slide-v0', got one of 'Slide-v1'"):
        register_task(TASK, replace(PLAN, task="Slide-v1"))
    assert "Slide-v0" not in sys.modules["trl_stare.envs.registry"]._TASKS


def test_a_plan_that_reads_a_signal_the_environment_does_not_give_is_refused():
    poor = replace(TASK, signal_shapes={"gap": 1, "success": 0})
    with pytest.raises(ValueError, match=r"\['is_contact'\] are missing; known are \['gap', 'success'\]"):
        register_task(poor, PLAN)
    with pytest.raises(ValueError, match="Did you mean|Use `register_plan`"):
        get_plan("Slide-v0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage(done=None), "`done` of stage 'Reach' must be a function .* the stage has no exit"),
        (lambda: Stage(name="Reach", done=succeeded, distance=0.1, scale=1.0, reads=("success",)),
         "`distance` of stage 'Reach' must be a function"),
        (lambda: stage(reads="gap"), r"`reads` of stage 'Reach' must be a tuple of signal names, got 'gap'"),
        (lambda: stage(reads=()), r"`reads` of stage 'Reach' must be a tuple"),
        (lambda: StagePlan("Slide-v0", (stage(), stage("Slide"))), "only the environment says what success is"),
        (lambda: StagePlan("Slide-v0", ()), "`stages` of 'Slide-v0' must be a tuple of two or more stages"),
        (lambda: StagePlan("Slide-v0", (LAST,)), "tuple of two or more stages"),
        (lambda: StagePlan("Slide-v0", LAST), "tuple of two or more stages"),
        (lambda: StagePlan("Slide-v0", ("Reach", "Slide")), "tuple of two or more stages"),
        (lambda: StagePlan("Slide-v0", (LAST, LAST)), "different names"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_right_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_is_imported_by_name_and_its_folder_can_be_imported_from(tmp_path):
    (tmp_path / "slide_task.py").write_text("from slide_plan import NAME\n")
    (tmp_path / "slide_plan.py").write_text("NAME = 'Slide-v0'\n")
    import_tasks(str(tmp_path / "slide_task.py"))
    assert sys.modules["slide_task"].NAME == "Slide-v0" and sys.path[0] == str(tmp_path)
    import_tasks(str(tmp_path / "slide_task.py"))  # again does no harm
    import_tasks("slide_plan")
    import_tasks(None)


@pytest.mark.parametrize("module", ["no_such_module", "json.no_such_module", "no/such/file.py", "."])
def test_a_module_that_is_not_there_is_named(module):
    with pytest.raises(ValueError, match=f"`task_module` must be .*got '{module}'"):
        import_tasks(module)


def test_a_file_that_cannot_be_imported_under_its_name_is_refused(tmp_path):
    for name in ("my-task.py", "json.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="whose name can be imported, got .*my-task.py"):
        import_tasks(str(tmp_path / "my-task.py"))
    # workers would import the standard library's
    with pytest.raises(ValueError, match="must have a name of its own, got .*Rename the file"):
        import_tasks(str(tmp_path / "json.py"))


def test_what_is_missing_inside_a_module_is_said_as_it_is(tmp_path):
    (tmp_path / "slide_broken.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        import_tasks(str(tmp_path / "slide_broken.py"))


class BrokenEnv:
    """Two environments, chunks of two steps, episodes of six; the gap of seed 13 becomes NaN after `bad_step` steps."""

    task, instruction, num_envs, chunk_size, max_episode_steps = "Slide-v0", "slide it", 2, 2, 6
    signal_names, metadata = ("gap", "success"), {}

    def __init__(self, bad_step: int):
        self.bad_step = bad_step

    def reset(self, seeds, *, ignore_terminations=False) -> Start:
        self.seeds, self.elapsed = seeds, 0
        return Start(self._obs(), self._signals(0), torch.arange(2))

    def step(self, actions) -> Step:
        chunk = [self._signals(self.elapsed + 1), self._signals(self.elapsed + 2)]
        self.elapsed += 2
        none, ended = torch.zeros(2, dtype=torch.bool), torch.full((2,), self.elapsed == 6)
        return Step(
            self._obs(), chunk[1], torch.where(ended, -1, torch.arange(2)),
            {name: torch.stack([row[name] for row in chunk], dim=1) for name in self.signal_names},
            torch.zeros(2, 2), torch.full((2,), 2), none, ended, self._obs(), chunk[1],
        )  # fmt: skip

    def _obs(self) -> Observation:
        return Observation(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), (self.instruction,) * 2, torch.zeros(2, 8))

    def _signals(self, step: int):
        bad = [seed == 13 and step >= self.bad_step for seed in self.seeds]
        gap = torch.tensor([[math.nan if wrong else 0.1] for wrong in bad])
        return {"gap": gap, "success": torch.zeros(2, dtype=torch.bool)}


def stand_still(obs, signals):
    actions = torch.zeros(len(obs.images), 2, 7)
    return Decision(actions, actions)


@pytest.mark.parametrize("bad_step", [0, 1, 2, 3, 6])
def test_a_signal_that_is_not_finite_names_task_seed_environment_and_step(bad_step):
    message = rf"'gap'.* of task 'Slide-v0' must be finite, got nan at step {bad_step} of seed 13 \(environment 1\)"
    with pytest.raises(ValueError, match=message):
        collect(BrokenEnv(bad_step), stand_still, [7, 13], name="nobody")


def test_finite_signals_are_played_to_the_end():
    played = collect(BrokenEnv(bad_step=7), stand_still, [7, 13], name="nobody")
    assert [trajectory.num_steps for trajectory in played] == [6, 6]
