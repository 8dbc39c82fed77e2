"""What the task pays: RL4VLA's difference reward against hand-worked values, and refusals."""

import pytest
import torch
from ppo_toy import PLAN, make_trainer, make_trajectory

from trl_stare.trainers import StagePPOConfig
from trl_stare.trainers.ppo_batch import decision_rewards
from trl_stare.trainers.rewards import check_reward, rl4vla_reward, task_reward

# grasped and solved at each row of the signals -> the reward of each step
TABLE = [
    ("00000", "00000", [0.0, 0.0, 0.0, 0.0]),
    ("01111100", "00000001", [0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 1.0]),  # held for rows 1 to 5, solved after the release
    ("0110011110", "0" * 10, [0.1] + [0.0] * 8),  # dropped: the grasp is latched; four rows in a row are no hold
    ("011111", "001100", [0.1, 1.0, 0.0, -1.0, 0.1]),  # what success brought is paid back
    ("0000", "0111", [0.0, 0.0, 0.0]),  # solved without a grasp does not count
    ("111111", "000001", [0.0, 0.0, 0.0, 0.1, 1.0]),  # begun with the object in the hand: row 0 is not paid for
]


@pytest.mark.parametrize(("grasped", "solved", "expected"), TABLE)
def test_difference_reward_by_hand(grasped, solved, expected):
    signals = {
        name: torch.tensor([c == "1" for c in flags]) for name, flags in (("is_grasped", grasped), ("success", solved))
    }
    torch.testing.assert_close(rl4vla_reward(signals), torch.tensor(expected))


def test_difference_rewards_add_up_to_what_the_last_row_is_worth():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        grasped, solved = torch.rand(2, 30, generator=generator) < 0.5
        grasped[0] = False
        total = rl4vla_reward({"is_grasped": grasped, "success": solved}).sum().item()
        runs = "".join("1" if g else "0" for g in grasped)
        assert total == pytest.approx(0.1 * ("1" in runs) + 0.1 * ("11111" in runs) + 1.0 * bool(solved[-1]), abs=1e-6)


def test_the_reward_reaches_the_decisions():
    """Grasped at step 1, solved at step 3; decisions of two steps, gamma 0.5: 0.5 * 0.1 and 0.5 * 1."""
    signals = {
        "distance": torch.tensor([[1.0], [0.8], [0.6], [0.4], [0.2]]),
        "is_grasped": torch.tensor([False, False, True, True, True]),
        "success": torch.tensor([False, False, False, False, True]),
    }
    trajectory = make_trajectory([0.0, 0.0, 0.0, 7.0], [0, 2], True, signals)
    options = {"gamma": 0.5, "weight": 0.0, "form": "staged"}
    torch.testing.assert_close(
        decision_rewards(trajectory, PLAN, reward="rl4vla", **options).raw, torch.tensor([0.05, 0.5])
    )
    assert decision_rewards(trajectory, PLAN, reward="success", **options).raw.tolist() == [0.0, 3.5]
    assert task_reward(trajectory, "success").tolist() == [0.0, 0.0, 0.0, 7.0]


def test_a_task_without_a_grasp_is_refused_before_any_rollout(tmp_path):
    with pytest.raises(ValueError, match="`reward` must be 'success' for 'toy'.* no signal 'is_grasped'"):
        make_trainer(tmp_path, reward="rl4vla")
    check_reward("rl4vla", ("is_grasped", "success"), "toy")
    check_reward("success", ("success",), "toy")


def test_unknown_rewards_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`reward` must be one of \('success', 'rl4vla'\), got 'dense'"):
        StagePPOConfig(str(tmp_path), reward="dense")


def test_a_reward_that_asks_for_an_earlier_grasp_is_not_paid_to_episodes_that_begin_after_it(tmp_path):
    with pytest.raises(ValueError, match="`reset_share` must be 0 with reward='rl4vla', got 0.2"):
        StagePPOConfig(str(tmp_path), reward="rl4vla", reset_share=0.2)
