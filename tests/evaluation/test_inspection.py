"""What is said and drawn about episodes whose stages can be read off by eye."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation import inspect, plot_timelines
from trl_stare.stages import Stage, StagePlan, succeeded

PLAN = StagePlan(
    "Ab-v0",
    (
        Stage(name="A", done=lambda s: s["a"], distance=lambda s: s["d"], scale=1.0, reads=("a", "d")),
        Stage(name="B", done=succeeded, distance=lambda s: s["d"], scale=1.0, reads=("success", "d")),
    ),
)


def make_trajectory(seed: int, a: str, success: str) -> Trajectory:
    """One character per moment, x where the event holds; the distance falls by a tenth a step; a decision every two steps."""
    steps = len(a) - 1
    starts = torch.arange(0, steps, 2)
    flags = {name: torch.tensor([c == "x" for c in text]) for name, text in (("a", a), ("success", success))}
    return Trajectory(
        task="Ab-v0",
        instruction="a, then b",
        seed=seed,
        policy="test",
        images=torch.zeros(len(starts), 2, 2, 3, dtype=torch.uint8),
        state=torch.rand(len(starts), 8),
        starts=starts,
        actions=torch.zeros(steps, 7),
        labels=torch.zeros(steps, 7),
        trace=None,
        logps=None,
        features=None,
        final_image=torch.zeros(2, 2, 3, dtype=torch.uint8),
        final_state=torch.zeros(8),
        signals=flags | {"d": 1 - torch.arange(steps + 1, dtype=torch.float32) / 10},
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


EPISODES = [
    make_trajectory(3, "..xx.", "...xx"),
    make_trajectory(5, ".x...", "....."),
    make_trajectory(7, ".....", "....."),
]


def test_numbers():
    seen = json.loads(json.dumps(inspect(EPISODES, PLAN)))
    assert (seen["task"], seen["stages"], seen["n_episodes"], seen["num_success"]) == ("Ab-v0", ["A", "B"], 3, 1)
    assert [(row["reached"], row["passed"]) for row in seen["summary"].values()] == [(3, 2), (2, 1)]
    assert seen["summary"]["A"]["mean_steps"] == pytest.approx((2 + 1 + 4) / 3)
    low, high = seen["summary"]["B"]["ci95"]
    assert low < seen["summary"]["B"]["rate"] == 0.5 < high
    first, second, third = seen["episodes"]
    assert first["seed"] == 3 and first["success"] and first["success_at_end"] and first["num_steps"] == 4
    # cost: mean distance of the moments the actions led to
    assert first["segments"] == [
        {"stage": "A", "start": 0, "stop": 2, "passed": True, "cost": pytest.approx(0.85)},
        {"stage": "B", "start": 2, "stop": 3, "passed": True, "cost": pytest.approx(0.7)},
    ]
    assert [part["passed"] for part in second["segments"]] == [True, False]
    assert [part["stage"] for part in third["segments"]] == ["A"] and not third["success"]


def test_a_stage_that_none_reached_has_no_rate():
    assert inspect(EPISODES[2:], PLAN)["summary"]["B"] == {
        "reached": 0, "passed": 0, "rate": None, "ci95": None, "mean_steps": None,
    }  # fmt: skip


def test_the_picture_grows_with_the_episodes_and_shows_their_stages(tmp_path):
    pictures = []
    for count in (1, 3):
        plot_timelines(EPISODES[:count], PLAN, tmp_path / "new" / f"{count}.png")
        pictures.append(np.asarray(Image.open(tmp_path / "new" / f"{count}.png").convert("RGB")))
    assert pictures[1].shape[0] > 2 * pictures[0].shape[0] and pictures[0].shape[1] == pictures[1].shape[1]
    # Pastel1's first two colours are the bands of A and B
    for color in ((251, 180, 174), (179, 205, 227)):
        share = (np.abs(pictures[1].astype(int) - color).sum(axis=-1) < 6).mean()
        assert share > 0.05, "no such band"


@pytest.mark.parametrize("look", [lambda: inspect([], PLAN), lambda: plot_timelines([], PLAN, "x.png")])
def test_nothing_to_look_at(look):
    with pytest.raises(ValueError, match="`trajectories` must hold at least one episode"):
        look()
