"""The three trainers take OpenVLA as they take the small VLA: with a LoRA, a reference without the adapter, a value head."""

import pytest
import torch
from openvla_toy import make_openvla
from peft import LoraConfig
from ppo_toy import make_trainer as make_ppo_trainer
from stage_dpo_toy import make_trainer as make_dpo_trainer
from test_stage_sft import make_trainer as make_sft_trainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def statistics(action_dim: int) -> dict:
    return {"toy": {"action": {"q01": [-1.0] * action_dim, "q99": [1.0] * action_dim}}}


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def adapter_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}


@pytest.mark.slow
def test_imitation(tmp_path):
    policy = make_openvla(statistics(7))
    trainer = make_sft_trainer(tmp_path, policy, max_steps=12, learning_rate=3e-3)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_preference_with_an_adapter_whose_base_is_the_reference(tmp_path):
    policy = make_openvla(statistics(6), n_action_bins=6)
    trainer = make_dpo_trainer(policy, tmp_path, peft_config=LORA, max_steps=6, learning_rate=1e-2, beta=1.0)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0], losses
    assert any(weight.abs().max() > 0 for weight in adapter_weights(trainer).values())


@pytest.mark.slow
def test_interaction(tmp_path):
    policy = make_openvla(statistics(1), n_action_bins=6)
    trainer = make_ppo_trainer(tmp_path, policy=policy, num_train_epochs=1, value_warmup_iterations=0)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    trainer.train()
    assert abs(logged(trainer, "policy/approx_kl")[0]) < 1.0
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("projector" in name for name in changed) and any("vision_backbone" in name for name in changed)
