"""`pairs.py`, and `push_to_hub.py` as a user runs it, against a Hub on loopback."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trl_stare.data import Trajectory, load_pairs, save_trajectories, validate_dataset
from trl_stare.data.pairs import load_yield
from trl_stare.stages import get_plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from minihub import MiniHub  # noqa: E402

ROOT = Path(__file__).parents[2]
PLAN = get_plan("StackCube-v1")


def push(*flags, **environment) -> subprocess.CompletedProcess:
    """In a process of its own: `huggingface_hub` reads the address of the Hub once."""
    return subprocess.run(
        [sys.executable, "recipes/push_to_hub.py", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def save_rollouts(folder, seeds, plan=PLAN) -> None:
    """An episode of four steps per seed: the gripper comes to the cube, each time from farther away, and stays there."""
    episodes = []
    for number, seed in enumerate(seeds):
        signals = {name: torch.zeros(5, 3) for name in ("tcp_position", "object_position", "goal_position")}
        signals["tcp_position"][:2] = 0.1 * (1 + number)
        signals |= {name: torch.zeros(5, 1) for name in ("object_lift", "gripper_width")}
        signals |= {name: torch.zeros(5, dtype=torch.bool) for name in ("is_contact", "is_grasped", "success")}
        signals["is_contact"][3:] = True
        episode = Trajectory(
            task="StackCube-v1",
            instruction="stack the red cube",
            seed=seed,
            policy="toy",
            images=torch.full((2, 8, 8, 3), 40 * number, dtype=torch.uint8),
            state=torch.zeros(2, 5),
            starts=torch.tensor([0, 2]),
            actions=torch.zeros(4, 7),
            labels=torch.zeros(4, 7),
            trace=torch.zeros(2, 14, dtype=torch.int64),
            logps=torch.zeros(2, 14),
            features=None,
            final_image=torch.zeros(8, 8, 3, dtype=torch.uint8),
            final_state=torch.zeros(5),
            signals=signals,
            reward=torch.zeros(4),
            terminated=False,
            truncated=True,
        )
        episodes.append(episode)
    save_trajectories(episodes, folder, plan)


def test_from_trajectories_to_the_hub(run_script, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_rollouts(tmp_path / "rollouts", seeds=[5, 5, 5])
    run_script(
        "recipes/pairs.py",
        "--trajectories",
        tmp_path / "rollouts",
        "--output_dir",
        tmp_path / "pairs",
        "--min_cost_gap",
        0,
    )
    assert caplog.messages[0].split()[:2] == ["stage", "made"]
    pairs, table = load_pairs(tmp_path / "pairs"), load_yield(tmp_path / "pairs")
    assert [(pair.stage_name, pair.chosen, pair.rejected) for pair in pairs] == [
        ("Reach", 0, 1),
        ("Reach", 0, 2),
        ("Reach", 1, 2),
    ]
    assert table["Reach"]["made"] == 3 and f"holds {len(pairs)} pairs" in caplog.text

    with MiniHub() as hub:
        hub_of_ours = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        flags = ("--trajectories", tmp_path / "rollouts", "--preferences", tmp_path / "pairs", "--repo_id", "user/toy")
        pushed = push(*flags, "--private", HF_TOKEN="hf_writer", **hub_of_ours)
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        repo = hub.repos["user/toy"]
        assert repo["private"] and f"in commit {repo['commits'][-1]['id']}" in pushed.stderr
        refused = push(*flags, HF_TOKEN="hf_other", **hub_of_ours)
        assert refused.returncode != 0
        assert (
            "push_to_hub: the Hub must know who asks for `user/toy`, got the token in the variable" in refused.stderr
        )
        assert "Traceback" not in refused.stderr and "hf_other" not in refused.stderr


def test_episodes_labelled_by_another_plan_are_labelled_anew_when_asked(run_script, tmp_path):
    reach, *rest = PLAN.stages
    earlier = replace(PLAN, stages=(replace(reach, cost_scale=2 * reach.scale), *rest))
    save_rollouts(tmp_path / "rollouts", seeds=[5, 5], plan=earlier)
    flags = ("--trajectories", tmp_path / "rollouts", "--output_dir", tmp_path / "pairs", "--min_cost_gap", 0)
    with pytest.raises(ValueError, match="recipes/pairs.py --relabel true"):
        run_script("recipes/pairs.py", *flags)
    run_script("recipes/pairs.py", *flags, "--relabel", "true")
    validate_dataset(tmp_path / "rollouts", tmp_path / "pairs")


def test_no_pair_is_said_and_nothing_written(run_script, tmp_path):
    save_rollouts(tmp_path / "rollouts", seeds=[5, 6])
    with pytest.raises(SystemExit, match="no two episodes share a seed"):
        run_script("recipes/pairs.py", "--trajectories", tmp_path / "rollouts", "--output_dir", tmp_path / "pairs")
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts"]
