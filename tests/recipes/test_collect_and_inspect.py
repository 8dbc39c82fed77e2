"""`collect.py` and `inspect_stages.py` on the real simulator."""

import json
import logging
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch

from trl_stare.actors import NamedActor
from trl_stare.data import load_trajectories, stored_settings
from trl_stare.data.actors import Decision
from trl_stare.policies import TokenPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from ppo_toy import PLAN, SpoiledEnv  # noqa: E402


def test_collect(run_script, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--task", "StackCube-v1", "--num_envs", 2, "--image_size", 32, "--output_dir", tmp_path / "demos"]
    flags += ["--episodes_per_seed", 2]
    run_script("recipes/collect.py", *flags, "--episodes", 3, "--noise", 0.05)
    assert "demos holds 3 episodes" in caplog.text
    trajectories = load_trajectories(tmp_path / "demos")
    assert [trajectory.seed for trajectory in trajectories] == [100_000, 100_000, 100_001]
    assert trajectories[0].images.shape[1:] == (32, 32, 3)
    with pytest.raises(ValueError, match="must be new or of the same collection"):
        run_script("recipes/collect.py", *flags, "--episodes", 4, "--noise", 0.2)


def test_other_weights_under_the_same_name_do_not_continue_a_collection(run_script, tmp_path):
    stats = {"action": {"scale": [0.1] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    flags = ["--task", "PushCube-v1", "--num_envs", 1, "--episodes", 1, "--output_dir", tmp_path / "rollouts"]
    flags += ["--model", tmp_path / "model"]
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        TokenPolicy.create_tiny({"toy": stats}, image_size=16, chunk_size=10).save_pretrained(tmp_path / "model")
        if seed:
            with pytest.raises(ValueError, match=r"collected with"):
                run_script("recipes/collect.py", *flags)
        else:
            run_script("recipes/collect.py", *flags)
    (note,) = stored_settings(tmp_path / "rollouts")[1]
    assert note["collection"]["policy"] == str(tmp_path / "model")
    assert note["collection"]["weights"].keys() >= {"config.json", "model.safetensors"}


def test_inspect_stages(run_script, tmp_path):
    flags = ["--task", "StackCube-v1", "--episodes", 2, "--seed", 4, "--videos", 1, "--num_envs", 2]
    run_script("recipes/inspect_stages.py", *flags, "--output_dir", tmp_path)
    seen = json.loads((tmp_path / "stages.json").read_text())
    assert [episode["seed"] for episode in seen["episodes"]] == [4, 5]
    assert seen["num_success"] == 2 == seen["summary"]["Stack"]["passed"]
    video = imageio.imread(tmp_path / "expert_success_seed4.mp4")
    assert len(video) == seen["episodes"][0]["num_steps"] + 1
    assert imageio.imread(tmp_path / "timeline.png").shape[1] > 800
    assert "0 error" in (tmp_path / "findings.txt").read_text()


def test_an_episode_that_the_simulator_spoils_is_told_of_and_the_others_are_looked_at(
    load_recipe, tmp_path, monkeypatch, caplog
):
    recipe = load_recipe("inspect_stages")
    actor = NamedActor("nobody", lambda generator: lambda obs, signals: Decision(*(-obs.state[:, None].sign(),) * 2))
    monkeypatch.setattr(recipe, "load_actor", lambda *_, **__: actor)
    monkeypatch.setattr(recipe, "get_plan", lambda task: PLAN)
    monkeypatch.setattr(recipe, "plot_timelines", lambda *_: None)  # a point has no gripper
    for spoiled, seeds in (((1,), [0, 2]), ((0, 1, 2), None)):
        monkeypatch.setattr(recipe, "make_env", lambda *_, spoiled=spoiled, **__: SpoiledEnv(*spoiled))
        args = recipe.InspectArguments(PLAN.task, episodes=3, videos=0, output_dir=str(tmp_path / str(len(spoiled))))
        if seeds is None:
            with pytest.raises(SystemExit, match="must hold one whose values are finite"):
                recipe.main(args)
        else:
            recipe.main(args)
            seen = json.loads((tmp_path / "1" / "stages.json").read_text())
            assert [episode["seed"] for episode in seen["episodes"]] == seeds
    assert "the episode of seed 1 is left out, whose state was not finite at step 2" in caplog.text


@pytest.mark.parametrize(("recipe", "file"), [("inspect_stages", "stages.json"), ("evaluate", "eval_info.json")])
def test_no_videos_where_an_episode_does_not_repeat_itself(run_script, tmp_path, monkeypatch, recipe, file):
    monkeypatch.setattr("trl_stare.evaluation.can_film", lambda env: False)
    flags = ["--model", "expert", "--task", "StackCube-v1", "--episodes", 1, "--num_envs", 1, "--output_dir", tmp_path]
    run_script(f"recipes/{recipe}.py", *flags)
    assert (tmp_path / file).exists() and not [*tmp_path.rglob("*.mp4")]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("collect", ["--task", "StackCub-v1", "--output_dir", "x"], "Did you mean 'StackCube-v1'"),
        ("inspect_stages", ["--task", "StackCube-v1", "--episodes", 0], "`episodes` must be at least 1"),
    ],
)
def test_bad_flags(run_script, recipe, flags, message):
    with pytest.raises(ValueError, match=message):
        run_script(f"recipes/{recipe}.py", *flags)
