"""Which decisions a preference loss's first gradient counts, and how much."""

import json
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

from benchmarks.preference_signal import OBJECTIVES, deal, gradients, main, pair_weights, success_weights  # noqa: E402
from trl_stare.data import build_pairs, play, save_trajectories  # noqa: E402
from trl_stare.losses import stage_preference_loss  # noqa: E402
from trl_stare.stages import register_plan  # noqa: E402
from trl_stare.stages.registry import _PLANS  # noqa: E402
from trl_stare.trainers.ppo_batch import executed_tokens, observations  # noqa: E402
from trl_stare.trainers.stage_dpo_config import SUMMED  # noqa: E402

SOLVED = make_approach([1.0, 0.5, 0.2], True)  # Near [0, 1), Hit [1, 2)
STUCK = make_approach([1.0, 0.8, 0.5, 0.5, 0.5], False)  # Near [0, 2), Hit [2, 4) failed


def test_success_counts_against_the_others_of_its_start():
    alone = make_approach([1.0, 0.8], False, seed=2)
    weights = success_weights([SOLVED, STUCK, STUCK, alone])
    assert [row.tolist() for row in weights] == [[1.0, 1.0], [-0.5] * 4, [-0.5] * 4, [0.0]]


@pytest.mark.parametrize(
    ("name", "solved", "stuck"),
    [
        ("tpo-mean", [0.5, 0.5], [-0.25] * 4),
        ("tpo-sum", [1.0, 1.0], [-1.0] * 4),
        ("sta-tpo", [0.0, 1.0], [0.0, 0.0, -0.5, -0.5]),
        ("sta-tpo-sum", [0.0, 1.0], [0.0, 0.0, -1.0, -1.0]),
        ("sta-tpo, later", [1.0, 1.0], [-0.5] * 4),
        ("sta-tpo-sum, later", [1.0, 1.0], [-1.0] * 4),
    ],
)
def test_what_a_pair_adds_to_its_steps(name, solved, stuck):
    weights, count = pair_weights([SOLVED, STUCK], PLAN, OBJECTIVES[name])
    assert [row.tolist() for row in weights] == [solved, stuck] and count == 1 + name.endswith("later")


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", ["tpo-mean", "tpo-sum", "sta-tpo", "sta-tpo-sum"])
def test_the_gradient_is_that_of_the_loss_at_its_beginning(name, chunk_size):
    """Of `P` pairs of `N` episodes: `-2 P / N` times it, as the sigmoid of no margin is a half, the loss a mean over pairs."""
    policy = make_policy(chunk_size)
    policy.model.eval()
    episodes = play(
        ToyEnv(chunk_size=chunk_size), policy, [1] * 12, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    weights, count = pair_weights(episodes, PLAN, OBJECTIVES[name])
    (found,) = gradients(policy, episodes, [torch.cat(weights)])
    # one token a step
    scores = [
        policy.evaluate(policy.prepare(observations([e])), e.trace).logps[executed_tokens(e, chunk_size, chunk_size)]
        for e in episodes
    ]
    sides = {"chosen": [], "rejected": []}
    for pair in build_pairs(episodes, PLAN, min_cost_gap=float("inf"), objective=name).pairs:
        for side, of in sides.items():
            index, start, stop = (getattr(pair, f"{side}{end}") for end in ("", "_start", "_stop"))
            steps = scores[index][start:stop]
            of.append(steps.sum() if name in SUMMED else steps.mean())
    chosen, rejected = (torch.stack(of) for of in sides.values())
    costs = torch.zeros(count)
    losses, _ = stage_preference_loss(
        chosen, rejected, chosen.detach(), rejected.detach(), costs, costs, beta=1.0, cost_coef=0.0
    )
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(losses.mean(), parameters, materialize_grads=True, allow_unused=True)
    expected = -2 * count / len(episodes) * torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert count > 1 and found.abs().max() > 0.01


def test_it_measures_rollouts_on_disk(tmp_path, monkeypatch):
    """Of a policy with random weights nothing is signal; the tables are there, and add up."""
    policy = make_policy()
    policy.save_pretrained(tmp_path / "policy")
    episodes = play(
        ToyEnv(),
        policy,
        [s for s in range(12) for _ in range(4)],
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    task = "Hit-v0"
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", dict(_PLANS))
    register_plan(replace(PLAN, task=task))
    save_trajectories([replace(e, task=task) for e in episodes], tmp_path / "rollouts", replace(PLAN, task=task))
    main(
        Namespace(
            checkpoint=tmp_path / "policy",
            rollouts=tmp_path / "rollouts",
            task=task,
            temperature=1.0,
            starts=None,
            output_dir=tmp_path / "out",
            groups=3,
        )
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["objectives"]) == ["success", *OBJECTIVES] and min(results["pairs"].values()) > 0
    assert results["pairs"]["sta-tpo, later"] > results["pairs"]["sta-tpo"] == results["pairs"]["sta-tpo-sum"]
    assert "more than tpo-mean" in (tmp_path / "out" / "results.md").read_text()


def test_starts_are_dealt_whole():
    assert deal([3, 3, 5, 7, 9], 2) == [{3, 7}, {5, 9}]
