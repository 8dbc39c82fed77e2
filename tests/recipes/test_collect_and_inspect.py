"""`collect.py` and `inspect_stages.py`, run as a user runs them, on the real simulator."""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest

from trl_stare.data import load_trajectories

ROOT = Path(__file__).parents[2]


def run(recipe: str, **flags) -> subprocess.CompletedProcess:
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, f"recipes/{recipe}.py", *given], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_collect(tmp_path):
    flags = {"task": "StackCube-v1", "noise": 0.05, "num_envs": 2, "image_size": 32, "output_dir": tmp_path / "demos"}
    flags |= {"episodes_per_seed": 2}
    done = run("collect", episodes=3, **flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "demos holds 3 episodes" in done.stderr
    trajectories = load_trajectories(tmp_path / "demos")
    assert [trajectory.seed for trajectory in trajectories] == [100_000, 100_000, 100_001]
    assert trajectories[0].images.shape[1:] == (32, 32, 3)
    other = run("collect", episodes=4, **flags | {"noise": 0.2})
    assert other.returncode != 0 and "must be new or of the same collection" in other.stderr


def test_inspect_stages(tmp_path):
    done = run("inspect_stages", task="StackCube-v1", episodes=2, seed=4, videos=1, num_envs=2, output_dir=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads((tmp_path / "stages.json").read_text())
    assert [episode["seed"] for episode in seen["episodes"]] == [4, 5]
    assert seen["num_success"] == 2 == seen["summary"]["Stack"]["passed"]
    video = imageio.imread(tmp_path / "expert_success_seed4.mp4")
    assert len(video) == seen["episodes"][0]["num_steps"] + 1
    assert imageio.imread(tmp_path / "timeline.png").shape[1] > 800
    assert "0 error" in (tmp_path / "findings.txt").read_text()


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("collect", {"task": "StackCub-v1", "output_dir": "x"}, "Did you mean 'StackCube-v1'"),
        ("inspect_stages", {"task": "StackCube-v1", "episodes": 0}, "`episodes` must be at least 1"),
    ],
)
def test_bad_flags(recipe, flags, message):
    done = run(recipe, **flags)
    assert done.returncode != 0 and message in done.stderr
