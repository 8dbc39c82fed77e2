"""The three trainers take SmolVLA and pi0.5 as they take pi0. Runs where LeRobot is, as test_lerobot.py does."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("lerobot", reason="needs LeRobot, in an environment of its own: docs/flow.md")

from flow_toy import statistics  # noqa: E402
from lerobot_toy import make_tokenizer, small_pi05, write_lerobot  # noqa: E402
from peft import LoraConfig  # noqa: E402
from ppo_toy import make_trainer as make_ppo_trainer  # noqa: E402
from stage_dpo_toy import ACTION_DIM, CHUNK, STATE  # noqa: E402
from stage_dpo_toy import make_trainer as make_dpo_trainer  # noqa: E402
from test_flow_trains import assert_imitation_helps, flow_pairs, logged  # noqa: E402

from trl_stare.policies import load_lerobot_policy  # noqa: E402


@pytest.fixture(scope="module", params=["smolvla", "pi05"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with small_pi05() if request.param == "pi05" else nullcontext():
        write_lerobot(request.param, folder, spread=1.0)
        yield folder


def load(folder, action_dim, state_size, chunk_size):
    norm_stats, settings = statistics(action_dim, state_size), {"chunk_size": chunk_size}
    return load_lerobot_policy(folder, tokenizer=make_tokenizer(), norm_stats=norm_stats, settings=settings)


def test_imitation(folder, tmp_path):
    assert_imitation_helps(load(folder, 7, 8, 3), tmp_path)


@pytest.mark.parametrize("adapter", [False, True])
def test_preference(folder, tmp_path, adapter):
    policy = load(folder, ACTION_DIM, STATE, CHUNK)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if adapter else None
    options = {"max_steps": 3, "learning_rate": 5e-4, "per_device_train_batch_size": 4, "cost_coef": 0.0}
    trainer = make_dpo_trainer(policy, tmp_path, flow_pairs(policy), peft_config=peft_config, **options)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0], losses


def test_interaction(folder, tmp_path):
    policy = load(folder, 1, 1, 2)
    trainer = make_ppo_trainer(tmp_path, 2, policy, num_train_epochs=1, value_warmup_iterations=0, logging_steps=1)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    trainer.train()
    assert logged(trainer, "policy/largest_ratio")[0] == pytest.approx(1.0, abs=1e-3)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert "model.action_out_proj.weight" in changed and any(
        "text_model" in n or "language_model" in n for n in changed
    )
