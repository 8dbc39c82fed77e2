"""The whole pipeline in miniature, launched as a user launches it: real simulator, real trainers, everything it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState

from trl_stare import TokenPolicy
from trl_stare.data import load_pairs, load_trajectories
from trl_stare.policies import create_tiny_pi0

ROOT = Path(__file__).parents[2]
PHASES = ["imitation", "preference", "preference-2", "interaction"]
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "recipes/ipi.py"]  # fmt: skip
SMALL = {
    "task": "PushCube-v1", "num_demonstrations": 24, "preference_rounds": 2, "preference_starts": 6,
    "rollouts_per_start": 4, "min_cost_gap": 0, "eval_episodes": 8, "num_envs": 4, "video_episodes": 2,
    # a task, and as much imitation as it takes, in which some rollouts reach the cube: without any there are no pairs
    "image_size": 32, "imitation.max_steps": 400, "imitation.learning_rate": "1e-3", "imitation.per_device_train_batch_size": 16,
    "imitation.logging_steps": 50,
    "preference.max_steps": 3, "preference.per_device_train_batch_size": 4, "preference.logging_steps": 1,
    "interaction.num_train_epochs": 2, "interaction.episodes_per_iteration": 8, "interaction.num_minibatches": 2,
    "interaction.logging_steps": 6,
}  # fmt: skip


def flags_of(folder: Path, **changes) -> list[str]:
    options = SMALL | {"output_dir": str(folder)} | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(folder: Path, launch: list[str] = LAUNCH, **changes) -> subprocess.CompletedProcess:
    line = [sys.executable, *launch, *flags_of(folder, **changes)]
    return subprocess.run(line, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ipi") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_results_say_what_was_measured(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["task", "seed", "versions", "visuals", "phases"]
    assert results["task"] == "PushCube-v1" and results["visuals"] == "light" and results["versions"]["trl"]
    assert list(results["phases"]) == PHASES
    for phase in results["phases"].values():
        low, high = phase["success_once_ci95"]
        assert low <= phase["success_once"] <= high and phase["n_episodes"] == 8 == len(phase["eval_seeds"])
        assert list(phase["stage_success"]) == ["Reach", "Push"]
        assert phase["env_steps"] > 0 and phase["wall_s"] > 0
    seeds = [phase["eval_seeds"] for phase in results["phases"].values()]
    assert all(of_phase == seeds[0] for of_phase in seeds)


def test_checkpoints_load_and_have_cards(finished):
    for phase in PHASES:
        policy = TokenPolicy.from_pretrained(finished / phase)
        assert (policy.chunk_size, policy.action_dim) == (4, 7)
        assert "robotics" in (finished / phase / "README.md").read_text()
    assert (finished / "interaction" / "value_head.safetensors").is_file()


def test_data_report_and_videos_are_there(finished):
    demonstrations = load_trajectories(finished / "data" / "demonstrations")
    assert len(demonstrations) == 24 and all(demonstration.success_once for demonstration in demonstrations)
    for folder in (finished / "data" / "rollouts", finished / "data" / "rollouts-2"):
        assert len(load_trajectories(folder)) == 24
    for folder in (finished / "data" / "pairs", finished / "data" / "pairs-2"):
        assert len(load_pairs(folder)) > 0
    report = (finished / "report.md").read_text()
    assert "Interaction" in report.title() and (finished / "report.png").stat().st_size > 10_000
    assert (finished / "config.yaml").is_file()
    assert {video.name.split("_")[0] for video in (finished / "videos").glob("*.mp4")} == {*PHASES}


def test_each_round_goes_on_from_the_one_before_on_rollouts_of_its_own(finished):
    first, second = (load_trajectories(finished / "data" / name) for name in ("rollouts", "rollouts-2"))
    assert {rollout.seed for rollout in first} == {*range(200_000, 200_006)}
    assert {rollout.seed for rollout in second} == {*range(200_006, 200_012)}
    for phase, before in zip(PHASES[1:], PHASES[:-1], strict=True):
        assert f"{finished / before}" in (finished / phase / "README.md").read_text()
        trained, start = (TokenPolicy.from_pretrained(finished / name).model.state_dict() for name in (phase, before))
        assert any(not trained[name].equal(start[name]) for name in start)


def test_a_second_run_continues_and_makes_nothing_twice(run_script, finished):
    (finished / "evaluation" / "interaction.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (finished / "imitation" / "model.safetensors",
            finished / "preference" / "model.safetensors", finished / "evaluation" / "preference.json")}  # fmt: skip
    before = json.loads((finished / "results.json").read_text())["phases"]["preference"]
    run_script("recipes/ipi.py", *flags_of(finished))
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    after = json.loads((finished / "results.json").read_text())["phases"]
    assert after["preference"] == before and "interaction" in after


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_leave_what_one_leaves(finished, tmp_path):
    """One collects, evaluates and writes, both train: the same phases, starts and episodes, each phase from the one before."""
    launch = [*LAUNCH[:2], "--config_file", "recipes/accelerate/cpu2.yaml", LAUNCH[-1]]
    done = run(tmp_path / "run", launch, num_workers=1, imitation__per_device_train_batch_size=8,
               preference__per_device_train_batch_size=2)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    alone, together = (json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path / "run"))
    assert list(together["phases"]) == PHASES
    for name, phase in together["phases"].items():
        assert phase["eval_seeds"] == alone["phases"][name]["eval_seeds"] and phase["env_steps"] > 0
    for name in ("rollouts", "rollouts-2"):
        played, twice = (load_trajectories(folder / "data" / name) for folder in (finished, tmp_path / "run"))
        assert [rollout.seed for rollout in twice] == [rollout.seed for rollout in played]
    for phase, before in zip(PHASES[1:], PHASES[:-1], strict=True):
        assert f"{tmp_path / 'run' / before}" in (tmp_path / "run" / phase / "README.md").read_text()


def test_other_settings_in_the_same_folder_are_refused_before_any_work(run_script, finished):
    with pytest.raises(ValueError, match=r"\['num_demonstrations'\]"):
        run_script("recipes/ipi.py", *flags_of(finished, num_demonstrations=7))
    # the report would say that the phases began from it
    with pytest.raises(ValueError, match=r"\['init_checkpoint'\]"):
        run_script("recipes/ipi.py", *flags_of(finished, init_checkpoint=finished / "imitation"))


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("ipi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--task": "StackCubes-v1"}, "Did you mean 'StackCube-v1'"),
        ({"--interaction.gamma": 2}, r"`gamma` must be in \[0, 1\], got 2"),
        ({"--preference.temperature": 0.5}, "`preference` must not have its own temperature, got 0.5"),
        ({"--interaction.eval_temperature": 0.6}, "`interaction` must not have its own eval_temperature, got 0.6"),
        ({"--num_demonstrations": 0}, "`num_demonstrations` must be at least 1"),
        ({"--preference_rounds": 0}, "`preference_rounds` must be at least 1"),
        ({"--rollouts_per_start": 1}, "at least 2 to compare"),
        ({"--video_episodes": -1}, "`video_episodes` must be at least 0"),
        ({"--phases": "preference,imitation"}, "in this order"),
        ({"--phases": "preference"}, "`init_checkpoint` must be given"),
        ({"--phase.gamma": 2}, "unknown flag '--phase.gamma'"),
    ],
)
def test_bad_input_is_refused_before_any_work(run_script, tmp_path, changes, message):
    flags = [part for pair in changes.items() for part in pair]
    with pytest.raises(ValueError, match=message):
        run_script("recipes/ipi.py", "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_policy_without_tokens_is_refused_centered_scores_before_any_work(run_script, tmp_path):
    policy = create_tiny_pi0({"panda": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}})
    policy.save_pretrained(tmp_path / "pi0")
    flags = [
        "--init_checkpoint",
        tmp_path / "pi0",
        "--chunk_size",
        policy.chunk_size,
        "--output_dir",
        tmp_path / "run",
    ]
    with pytest.raises(ValueError, match="`preference.centered` must be false for a policy that samples no tokens"):
        run_script("recipes/ipi.py", *flags, "--preference.centered", True)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_has_begun_from_one_checkpoint_does_not_go_on_from_another(recipe, monkeypatch, tmp_path):
    stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    for name in ("a", "b"):
        TokenPolicy.create_tiny({"toy": stats}, image_size=16).save_pretrained(tmp_path / name)

    def killed(*_):
        raise InterruptedError

    monkeypatch.setattr(recipe, "make", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(recipe, "prefer", killed)
    given = {"phases": "preference", "image_size": 16, "output_dir": str(tmp_path / "run")}
    for checkpoint, error in (("a", InterruptedError), ("a", InterruptedError), ("b", ValueError)):
        with pytest.raises(error, match=r"\['init_checkpoint'\]" if checkpoint == "b" else None):
            recipe.main(recipe.IPIArguments(init_checkpoint=str(tmp_path / checkpoint), **given))


def test_no_videos_where_an_episode_does_not_repeat_itself(recipe, monkeypatch, tmp_path, caplog):
    """Of a phase that is done: its checkpoint, which is not there, is not even loaded."""
    PartialState()
    args = recipe.IPIArguments(output_dir=str(tmp_path))
    recipe.phase_records(args).write("imitation", {})
    recipe.film(args, SimpleNamespace(task=args.task, metadata={"sim_backend": "physx_cuda"}), None)
    assert "no videos of StackCube-v1" in caplog.text and not (tmp_path / "videos").exists()


def test_an_unwritable_folder_is_named(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        run_script("recipes/ipi.py", "--output_dir", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--chunk_size", "2"], "must act in chunks of 2 x 7 values, got 4 x 7"),
        (["--image_size", "16"], "`image_size` must be at least 32 for .*, got 16"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(run_script, finished, tmp_path, own, message):
    flags = ["--init_checkpoint", finished / "imitation", "--phases", "preference", *own]
    with pytest.raises(ValueError, match=message):
        run_script("recipes/ipi.py", "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "temperature"), [("ipi_stackcube_tiny.yaml", 1.0), ("ipi_stackcube_full.yaml", 0.3)])
def test_shipped_configurations_are_valid(recipe, monkeypatch, name, temperature):
    """Preference and interaction learn about the policy that is sampled, at the pipeline's temperature."""
    monkeypatch.setattr(sys, "argv", ["ipi.py", "--config", str(ROOT / "recipes" / "configs" / name)])
    parsed = recipe.TrlParser(recipe.IPIArguments).parse_args_and_config(return_remaining_strings=True)
    args = recipe.set_entries(*parsed)
    configs = [recipe.trainer_config(args, phase) for phase in ("imitation", "preference", "interaction")]
    assert [config.seed for config in configs] == [0, 0, 0]
    assert [config.temperature for config in configs[1:]] == [temperature] * 2
