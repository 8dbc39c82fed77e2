"""Whether stages pull a policy in one direction: what is compared, and the cosine that noise does not shorten."""

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

from benchmarks.preference_signal import gradients  # noqa: E402
from benchmarks.stage_gradients import SHARPER, WHOLE, contrasts, cosine, main  # noqa: E402
from trl_stare.data import play, save_trajectories  # noqa: E402
from trl_stare.stages import register_plan  # noqa: E402
from trl_stare.stages.registry import _PLANS  # noqa: E402
from trl_stare.trainers.ppo_batch import observations  # noqa: E402

SOLVED = make_approach([1.0, 0.5, 0.2], True)  # Near [0, 1), Hit [1, 2)
STUCK = make_approach([1.0, 0.8, 0.5, 0.5, 0.5], False)  # Near [0, 2), Hit [2, 4) failed
FAR = make_approach([1.0, 0.9], False)  # Near [0, 1) failed


def test_what_each_decision_counts():
    found = contrasts([SOLVED, STUCK, FAR], PLAN)
    expected = {
        WHOLE: [1 / 2] * 2 + [-1 / 8] * 4 + [-1 / 2],
        "Near": [1 / 2, 0] + [1 / 4, 1 / 4, 0, 0] + [-1],
        "Hit": [0, 1] + [0, 0, -1 / 2, -1 / 2] + [0],
    }
    assert {name: weight.tolist() for name, weight in found.items()} == expected


def test_a_stage_that_none_failed_in_or_none_passed_compares_nothing():
    assert contrasts([SOLVED, STUCK], PLAN)["Near"].tolist() == [0] * 6
    assert contrasts([STUCK, FAR], PLAN)["Hit"].tolist() == [0] * 5


def test_noise_does_not_shorten_a_cosine():
    torch.manual_seed(0)
    first, second = torch.eye(400)[0], torch.eye(400)[:2].sum(0) / math.sqrt(2)
    a, b = (direction + 0.1 * torch.randn(2000, 400) for direction in (first, second))
    assert cosine(a, b).item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert cosine(a, -a).item() == pytest.approx(-1.0)
    none = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert cosine(none, none).isnan()  # both lengths are the root of a negative number, and their product is not one
    assert (a * b).sum(1).mean() / (a.norm(dim=1) * b.norm(dim=1)).mean() < 0.2  # what it would be with the noise


def test_the_last_gradient_is_of_the_entropy_and_all_are_taken_at_the_temperature():
    policy = make_policy()
    policy.model.eval()
    (episode,) = play(ToyEnv(), policy, [1], temperature=3.0, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(episode.num_steps)
    found = gradients(policy, [episode], [ones], temperature=3.0, entropy=True)
    evaluation = policy.evaluate(policy.prepare(observations([episode])), episode.trace, temperature=3.0)
    assert found.shape[0] == 2 and not torch.allclose(found[0], gradients(policy, [episode], [ones])[0])
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    for row, value in zip(found, (evaluation.logps.sum(), evaluation.entropies.sum()), strict=True):
        parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in parts]), rtol=1e-4, atol=1e-5)


def test_it_measures_rollouts_on_disk(tmp_path, monkeypatch):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "policy")
    seeds = [seed for seed in range(12) for _ in range(4)]
    episodes = play(ToyEnv(), policy, seeds, temperature=1.0, generator=torch.Generator().manual_seed(0))
    plan = replace(PLAN, task="Hit-v0")
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", dict(_PLANS))
    register_plan(plan)
    save_trajectories([replace(e, task=plan.task) for e in episodes], tmp_path / "rollouts", plan)
    given = {"checkpoint": tmp_path / "policy", "rollouts": tmp_path / "rollouts", "task": plan.task, "groups": 3}
    main(Namespace(**given, temperature=1.0, starts=9, output_dir=tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == [WHOLE, *PLAN.names, SHARPER] and list(results[WHOLE]) == [*PLAN.names, SHARPER]
    text = (tmp_path / "out" / "results.md").read_text()
    assert ("?" in text) is any(
        None in pair for row in results.values() for pair in row.values()
    ) and "NaN" not in text
