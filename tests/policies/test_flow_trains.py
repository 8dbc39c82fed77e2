"""The three trainers take pi0 as they take the small VLA, and its rollouts go through files without loss."""

from dataclasses import replace

import pytest
import torch
from flow_toy import make_flow, statistics
from peft import LoraConfig
from ppo_toy import PLAN, ToyEnv
from ppo_toy import make_trainer as make_ppo_trainer
from stage_dpo_toy import ACTION_DIM, CHUNK, EPISODES, STAGE_PAIRS, STATE
from stage_dpo_toy import make_trainer as make_dpo_trainer
from test_stage_sft import make_trainer as make_sft_trainer

from trl_stare.data import check_traces, load_trajectories, pairs_dataset, play, save_trajectories
from trl_stare.data.validate import validate_dataset

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def make_toy_flow(**config):
    """For `ToyEnv`: one action, one state value, two steps a decision."""
    return make_flow(statistics(1, 1), chunk_size=2, max_action_dim=2, **config)


def test_imitation(tmp_path):
    assert_imitation_helps(make_flow(spread=1.0, chunk_size=3), tmp_path)


def assert_imitation_helps(policy, tmp_path):
    trainer = make_sft_trainer(tmp_path, policy, max_steps=20, learning_rate=3e-3, seed=0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    inputs = {name: value for name, value in batch.items() if name not in ("trace", "mask", "weight")}
    # the loss itself is of random noise and times; the score is the same error without chance
    before = policy.score(inputs, batch["trace"]).mean().item()
    trainer.train()
    after = policy.score(inputs, batch["trace"]).mean().item()
    assert after > before + 0.25, (before, after)


def flow_pairs(policy):
    """The pairs of `stage_dpo_toy`, as if this policy had played them."""
    played = [replace(e, trace=policy.encode(e.actions.view(-1, CHUNK, ACTION_DIM))) for e in EPISODES]
    return pairs_dataset(played, STAGE_PAIRS)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
def test_preference(tmp_path, peft_config):
    policy = make_flow(statistics(ACTION_DIM, STATE), spread=1.0, chunk_size=CHUNK)
    options = {"max_steps": 3, "learning_rate": 5e-4, "per_device_train_batch_size": 4, "cost_coef": 0.0}
    trainer = make_dpo_trainer(policy, tmp_path, flow_pairs(policy), peft_config=peft_config, **options)
    trainer.train()
    losses = logged(trainer, "loss")
    # the reference, scored apart and in other batches, is the policy: log 2
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1, "critic": "shared", "ratio_level": "action"}])
def test_interaction(tmp_path, options):
    policy = make_toy_flow()
    trainer = make_ppo_trainer(
        tmp_path, 2, policy, num_train_epochs=1, value_warmup_iterations=0, logging_steps=1, **options
    )
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    trainer.train()
    # what the rollout says of its chains is what the update computes
    assert logged(trainer, "policy/largest_ratio")[0] == pytest.approx(1.0, abs=1e-3)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("vision_tower" in name for name in changed) and "action_out_proj.weight" in changed


def test_rollouts_survive_files(tmp_path):
    """Trace and log-probabilities come back bit by bit, are valid, and mean the same actions to the policy."""
    policy, generator = make_toy_flow(), torch.Generator().manual_seed(0)
    played = play(ToyEnv(chunk_size=2), policy, range(4), temperature=1.0, generator=generator)
    check_traces(played, policy)
    save_trajectories(played, tmp_path, PLAN, metadata={})
    validate_dataset(tmp_path)
    loaded = load_trajectories(tmp_path)
    for one, other in zip(played, loaded, strict=True):
        assert torch.equal(one.trace, other.trace) and torch.equal(one.logps, other.logps)
    with pytest.raises(ValueError, match="that decode to others"):
        check_traces(loaded, make_flow(statistics(1, 1), chunk_size=2, max_action_dim=4))
