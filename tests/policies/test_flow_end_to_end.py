"""Imitation, preference and interaction with a tiny pi0 in the real simulator: a few iterations of each, on a CPU."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from flow_toy import make_flow

from trl_stare import (
    FlowPolicy,
    StageDPOConfig,
    StageDPOTrainer,
    StagePPOConfig,
    StagePPOTrainer,
    StageSFTConfig,
    StageSFTTrainer,
    get_plan,
    make_env,
)
from trl_stare.data import build_pairs, check_traces, demonstrate, pairs_dataset, play
from trl_stare.envs import get_simulated_task
from trl_stare.policies import quantile_statistics

CHUNK = 4
COMMON = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def with_trace(policy, demonstration):
    """The demonstration as a rollout to be preferred: at every step, the chunk that followed."""
    last = demonstration.num_steps - 1
    steps = (torch.arange(last + 1)[:, None] + torch.arange(CHUNK)).clamp(max=last)
    return replace(demonstration, trace=policy.encode(demonstration.labels[steps]))


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["StackCube-v1", pytest.param("PutCarrotOnPlateInScene-v1", marks=pytest.mark.bridge_assets)]
)
def test_imitation_preference_interaction(tmp_path, task):
    plan, seeds = get_plan(task), range(3)
    env = make_env(task, num_envs=2, num_workers=1, image_size=32)
    demonstrations = demonstrate(env, get_simulated_task(task).demonstrate, seeds)
    env.close()
    actions, state = (torch.cat([getattr(d, name) for d in demonstrations]) for name in ("labels", "state"))
    stats = {task: {"action": quantile_statistics(actions), "state": quantile_statistics(state)}}
    policy = make_flow(stats, spread=1.0, chunk_size=CHUNK, num_inference_steps=3)

    sft = StageSFTConfig(
        str(tmp_path / "sft"), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3, **COMMON
    )
    StageSFTTrainer(policy, sft, demonstrations, plan).train()
    policy.save_pretrained(tmp_path / "imitation")
    policy = FlowPolicy.from_pretrained(tmp_path / "imitation")

    env = make_env(task, num_envs=2, num_workers=1, image_size=32, chunk_size=CHUNK)
    try:
        rollouts = play(env, policy, seeds, temperature=1.0, generator=torch.Generator().manual_seed(0))
        check_traces(rollouts, policy)
        played = [with_trace(policy, demonstration) for demonstration in demonstrations] + rollouts
        pairs = build_pairs(played, plan).pairs[:4]
        dpo = StageDPOConfig(
            str(tmp_path / "dpo"),
            max_steps=3,
            per_device_train_batch_size=2,
            step_micro_batch_size=8,
            cost_coef=0.0,
            **COMMON,
        )
        preference = StageDPOTrainer(policy, dpo, pairs_dataset(played, pairs))
        preference.train()
        assert logged(preference, "loss")[0] == pytest.approx(0.6931, abs=1e-3)

        ppo = StagePPOConfig(
            str(tmp_path / "ppo"), num_train_epochs=2, episodes_per_iteration=2, num_minibatches=2, num_ppo_epochs=1,
            value_warmup_iterations=0, **COMMON,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        interaction = StagePPOTrainer(policy, ppo, env, plan, Dataset.from_dict({"seed": list(range(100, 110))}))
        interaction.train()
        ratios = logged(interaction, "policy/largest_ratio")
        assert ratios[0] == pytest.approx(1.0, abs=1e-2), ratios
        assert any(not torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    finally:
        env.close()
