"""What of success a stage's event tells, and what it leaves open, on episodes where both are known."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "trainers"))

from ppo_toy import PLAN, ToyEnv, make_approach, make_policy  # noqa: E402

from benchmarks.stage_exits import (  # noqa: E402
    Exit,
    by_fifths,
    decided_by_start,
    exits,
    features,
    left_open,
    main,
    markdown,
    measure,
    told_by_passing,
)
from trl_stare.data import play, save_trajectories  # noqa: E402
from trl_stare.envs import SimulatedTask, register_simulated_task  # noqa: E402
from trl_stare.stages import register_plan  # noqa: E402
from trl_stare.stages.registry import _PLANS  # noqa: E402


def row(passed, success, state=(0.0,), distance=0.0, nearest=0.0, seed=0):
    return Exit(passed, distance, nearest, seed, torch.tensor(state), success)


def test_one_row_for_each_stage_that_was_reached():
    near, hit = exits([make_approach([1.0, 0.5, 0.2], True), make_approach([1.0, 0.8, 0.9], False)], PLAN)
    assert [(r.passed, r.success) for r in near] == [(True, True), (False, False)]
    assert [r.distance for r in near] == pytest.approx([0.5, 0.9])
    assert [r.nearest for r in near] == pytest.approx([0.5, 0.8])
    # the state where the stage ended: the signal and the time, not success
    assert near[0].state.tolist() == [0.5, 1.0]
    assert [(r.passed, r.success) for r in hit] == [(True, True)]


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([(True, True), (True, False), (False, False), (False, False)], 1 / 3),
        ([(True, True), (True, True), (False, False), (False, False)], 1.0),
        ([(True, True), (True, False), (True, True), (True, False)], 0.0),
        ([(True, True), (True, False), (False, True), (False, False)], 0.0),
        ([(True, False), (False, False)], 0.0),
    ],
)
def test_told_by_passing(rows, share):
    assert told_by_passing([row(*each) for each in rows]) == pytest.approx(share)


def test_what_is_left_open():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 3, generator=generator)
    luck = torch.rand(600, generator=generator) < 0.5
    decided = [row(True, bool(s[0].abs() < 0.7), s.tolist(), seed=seed) for seed, s in enumerate(states)]
    chance = [
        row(True, bool(won), s.tolist(), seed=seed) for seed, (s, won) in enumerate(zip(states, luck, strict=True))
    ]
    found = left_open(decided)
    assert found > 0.7
    assert left_open(chance) < 0.02
    # what was not passed plays no part; of few, or of one kind, nothing can be learned
    assert left_open(decided + [row(False, False)] * 50) == found
    # twenty starts of thirty episodes each, whose ends could be learned by heart but say nothing of another start
    by_heart = [row(True, bool(luck[k % 20]), states[k % 20].tolist(), seed=k % 20) for k in range(600)]
    assert left_open(by_heart) < 0.1
    assert left_open(decided[:199]) is None and left_open([row(True, True, s.tolist()) for s in states]) is None


RATINGS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Shrout and Fleiss (1979), table 2: four judges rate six targets."""


@pytest.mark.parametrize(
    ("by_start", "share"),
    [
        (RATINGS, 0.1657),
        ([[0.1, 0.1], [0.3, 0.3]], 1.0),
        ([[0.1, 0.3], [0.1, 0.3]], 0.0),
        # by hand: mean squares 169/30 between and 7/18 within, size 5 - 13/5 = 2.4
        ([[1.0, 2.0], [3.0, 4.0, 4.0]], (169 / 30 - 7 / 18) / (169 / 30 + 1.4 * 7 / 18)),
        ([[0.1, 0.1], [0.1, 0.1]], None),
        ([[0.1], [0.2], [0.3, 0.4]], None),
    ],
)
def test_what_the_start_decides(by_start, share):
    rows = [row(True, True, nearest=value, seed=seed) for seed, values in enumerate(by_start) for value in values]
    assert decided_by_start(rows) == (share if share is None else pytest.approx(share, abs=1e-4))


def test_fifths_begin_with_the_nearest():
    rows = [row(True, distance < 0.35, distance=distance) for distance in torch.linspace(0.9, 0.0, 10).tolist()]
    assert by_fifths(rows + [row(False, True)]) == [
        (pytest.approx(0.1 + 0.2 * i), share) for i, share in enumerate((1.0, 1.0, 0.0, 0.0, 0.0))
    ]
    assert by_fifths(rows[:4]) is None


def test_seeds_that_go_round_the_configurations_are_one_start():
    """Seven starts of six episodes each, numbered by the seeds; how near an episode comes is its start's."""
    episodes = [make_approach([1.0, 0.4 + 0.01 * (seed % 7)], False, seed=seed) for seed in range(42)]
    near, _ = exits(episodes, PLAN, 7)
    assert {row.start for row in near} == {*range(7)} and decided_by_start(near) == pytest.approx(1.0)
    assert decided_by_start(exits(episodes, PLAN)[0]) is None


def test_the_hand_is_seen_from_the_object():
    """A peg that points along world y, and a hand 0.1 m along it: 0.1 along the peg's own x."""
    half = math.sqrt(0.5)
    signals = {
        "tcp_position": torch.tensor([[0.2, 0.4, 0.0]]),
        "object_position": torch.tensor([[0.2, 0.3, 0.0]]),
        "object_quaternion": torch.tensor([[half, 0.0, 0.0, half]]),
        "success": torch.tensor([True]),
    }
    seen = features(signals, 0)
    assert len(seen) == 3 + 4 + 3 + 3 + 3 + 1 + 1
    torch.testing.assert_close(seen[10:13], torch.tensor([0.1, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[-2:], torch.tensor([0.1, 0.0]), atol=1e-6, rtol=0)


def test_the_command(tmp_path, monkeypatch):
    """Of a policy with random weights: what is on disk says the same as what was played."""
    episodes = play(ToyEnv(), make_policy(), range(40), temperature=1.0, generator=torch.Generator().manual_seed(0))
    plan = replace(PLAN, task="Hit-v0")
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", dict(_PLANS))
    register_plan(plan)
    save_trajectories([replace(e, task=plan.task) for e in episodes], tmp_path / "rollouts", plan)
    monkeypatch.setattr("trl_stare.envs.registry._TASKS", {})
    register_simulated_task(SimulatedTask(plan.task, "", "", lambda *_: {}, {"success": 0}, configurations=8))
    main(Namespace(task=plan.task, task_module=None, rollouts=[tmp_path / "rollouts"], output_dir=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["episodes"] == 40 and written["stages"] == json.loads(json.dumps(measure(episodes, plan, 8)))
    near, hit = written["stages"].values()
    assert 0 < near["passed"] < near["reached"] == 40 and hit["told_by_passing"] == pytest.approx(1.0)
    assert markdown(written["stages"]) == (tmp_path / "out" / "results.md").read_text()
    assert f"| Near | {near['passed']}/40 | {100 * near['told_by_passing']:.0f} % | - | 0 % |" in markdown(
        written["stages"]
    )
