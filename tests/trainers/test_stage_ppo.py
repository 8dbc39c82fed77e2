"""StagePPOTrainer: a trivial environment is learned, the first ratio is 1, resuming is exact."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from ppo_toy import PLAN, ToyEnv, make_policy, make_trainer, make_trajectory

from trl_stare.data import play
from trl_stare.policies import TokenPolicy
from trl_stare.stages import Stage, StagePlan
from trl_stare.trainers import StagePPOConfig, StagePPOTrainer
from trl_stare.trainers.actor_critic import stage_features
from trl_stare.trainers.ppo_batch import advantages_and_returns, decision_rewards, executed_tokens


def success(policy: TokenPolicy) -> float:
    policy.model.eval()
    generator = torch.Generator().manual_seed(5)
    shown = play(ToyEnv(), policy, range(200), temperature=1.0, generator=generator)
    return sum(trajectory.success_once for trajectory in shown) / len(shown)


def test_rewards_of_chunks_by_hand():
    """Steps 0-2 and 3-4 with gamma 0.5: the reward of 1 at step 4 is the second of its chunk."""
    trajectory = make_trajectory([0.0, 0.0, 2.0, 0.0, 1.0], [0, 3], terminated=True)
    rewards = decision_rewards(trajectory, PLAN, gamma=0.5, weight=0.0, form="staged")
    assert rewards.raw.tolist() == [0.5, 0.5] and rewards.discount.tolist() == [0.125, 0.25]


@pytest.mark.parametrize(
    "terminated, final_potential, bootstrap, stays",
    [
        (True, "zero", True, False),
        (False, "zero", True, True),  # the value of what follows is bootstrapped: no end
        (True, "zero", False, False),
        (False, "zero", False, False),  # an end as any other: a failure must not keep what a success loses
        (True, "kept", True, True),
        (False, "kept", True, True),
        (True, "kept", False, True),
        (False, "kept", False, True),
    ],
)
def test_shaping_of_decisions_telescopes(terminated, final_potential, bootstrap, stays):
    trajectory = make_trajectory([0.0] * 4 + [1.0], [0, 3], terminated=terminated)
    rewards = decision_rewards(
        trajectory, PLAN, gamma=0.9, weight=1.0, form="staged",
        final_potential=final_potential, bootstrap_on_truncation=bootstrap,
    )  # fmt: skip
    shaping = rewards.shaped - rewards.raw
    total = shaping[0] + rewards.discount[0] * shaping[1]
    potential = PLAN.potential(trajectory.signals)
    expected = (0.9**5 * potential[-1] if stays else 0.0) - potential[0]
    assert total.item() == pytest.approx(float(expected), abs=1e-6)


def test_advantages_of_ragged_episodes_by_hand():
    """gamma 1, lambda 1: returns are sums; a truncated end bootstraps only if it is asked to."""
    short, long = make_trajectory([1.0], [0], True), make_trajectory([0.0, 0.0], [0, 1], False)
    rewards = [decision_rewards(t, PLAN, gamma=1.0, weight=0.0, form="staged") for t in (short, long)]
    values, final = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([9.0, 0.5])
    for bootstrap, expected in ((True, [1.0, 0.5, 0.5]), (False, [1.0, 0.0, 0.0])):
        advantages, returns = advantages_and_returns(
            [short, long], rewards, values, final, gae_lambda=1.0, bootstrap_on_truncation=bootstrap
        )
        torch.testing.assert_close(returns, torch.tensor(expected))
        torch.testing.assert_close(advantages, torch.tensor(expected) - values)


def test_tokens_of_steps_that_were_not_executed_are_masked():
    """Three decisions of up to 2 steps with 2 values each; the last episode step is the first of its chunk."""
    mask = executed_tokens(make_trajectory([0.0] * 5, [0, 2, 4], True), num_tokens=4, chunk_size=2)
    assert mask.tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("critic", ["privileged", "stages", "hidden"])
def test_a_trivial_environment_is_learned(tmp_path, critic):
    policy = make_policy()
    before = success(policy)
    trainer = make_trainer(tmp_path, policy=policy, critic=critic, num_train_epochs=12, episodes_per_iteration=64,
                           num_minibatches=4, num_ppo_epochs=4, target_kl=0.05, learning_rate=1e-3)  # fmt: skip
    trainer.train()
    after = success(policy)
    assert after > 0.9 and after > before + 0.1, (before, after)


def test_what_a_critic_of_stages_reads():
    """Far from Near's end, in Hit, and at success; the distances of both stages are the same signal, over 1 and over 0.5."""
    plan = StagePlan("toy", (PLAN.stages[0], replace(PLAN.stages[1], scale=0.5)))
    signals = {"distance": torch.tensor([[1.0], [0.5], [0.0]]), "success": torch.tensor([False, False, True])}
    features = stage_features(plan, signals, torch.tensor([0.0, 0.5, 1.0]))
    log = [[math.log(d / scale + 0.02) for scale in (1.0, 0.5)] for d in (1.0, 0.5, 0.0)]
    expected = torch.tensor(
        [
            [1.0, 0.0, 0.0, 1.0, 2.0, *log[0], 0.0],
            [0.0, 1.0, 0.0, 0.5, 1.0, *log[1], 0.5],
            [0.0, 0.0, 1.0, 0.0, 0.0, *log[2], 1.0],
        ]
    )
    torch.testing.assert_close(features, expected)


def test_the_first_update_has_ratio_one_and_the_warm_up_leaves_the_policy_alone(tmp_path):
    policy = make_policy()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    trainer = make_trainer(tmp_path, policy=policy, num_train_epochs=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["policy/largest_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert trainer.model.value_head.layers[-1].weight.abs().sum() > 0


def test_plain_ppo_sees_no_shaping(tmp_path):
    rewards = {}
    for stage_aware in (True, False):
        trainer = make_trainer(tmp_path, stage_aware=stage_aware, num_train_epochs=1)
        trainer.train()
        log = trainer.state.log_history[0]
        rewards[stage_aware] = (log["rollout/reward_raw"], log["rollout/reward_shaped"])
    assert rewards[False][0] == rewards[False][1] == rewards[True][0] and rewards[True][0] != rewards[True][1]


def test_target_kl_stops_the_policy(tmp_path):
    trainer = make_trainer(tmp_path, target_kl=1e-9, value_warmup_iterations=0, num_train_epochs=1, logging_steps=1)
    trainer.train()
    updated = [log["policy/updated"] for log in trainer.state.log_history if "policy/updated" in log]
    assert updated == [1.0, 0.0, 0.0, 0.0]


def test_resuming_at_a_rollout_boundary_is_exact(tmp_path):
    whole = make_trainer(tmp_path / "whole", num_train_epochs=3)
    whole.train()
    make_trainer(tmp_path / "cut", num_train_epochs=3, max_steps=8, save_strategy="steps", save_steps=4).train()
    resumed = make_trainer(tmp_path / "cut", num_train_epochs=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert resumed.env_steps == whole.env_steps
    for (name, first), second in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_the_checkpoint_is_a_plain_policy_folder_and_the_critic_lies_beside_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "value_head.safetensors").is_file()
    loaded = TokenPolicy.from_pretrained(tmp_path / "final")
    for name, value in trainer.policy.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gamma": 1.5}, "`gamma` must be in"),
        ({"ratio_level": "word"}, "`ratio_level` must be one of"),
        ({"critic": "oracle"}, "`critic` must be one of"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"potential_form": "linear"}, "`potential_form` must be one of"),
        ({"potential_scale": 0.0}, "`potential_scale` must be positive"),
        ({"critic": "hidden", "bootstrap_on_truncation": False}, "needs a critic that knows the time"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` must be 8, got 4.*use `num_minibatches`"),
    ],
)
def test_bad_settings_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        StagePPOConfig(str(tmp_path), **config)


def test_a_plan_that_reads_what_is_not_there_is_refused(tmp_path):
    stage = Stage(name="Fly", done=lambda s: s["wings"], distance=lambda s: s["wings"], scale=1.0, reads=("wings",))
    plan = StagePlan("toy", (stage, PLAN.stages[1]))
    with pytest.raises(ValueError, match="wings"):
        StagePPOTrainer(make_policy(), StagePPOConfig(str(tmp_path), use_cpu=True, report_to="none"), ToyEnv(), plan,
                        Dataset.from_dict({"seed": [0]}))  # fmt: skip
