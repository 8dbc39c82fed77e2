"""`centered=True`: a preference between actions, to which the states they were taken in contribute nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from stage_dpo_toy import STAGE_PAIRS, batch_of, loss_and_logits, make_policy, make_trainer, perturb

from trl_stare.losses import centered_scores


def test_a_sides_score_is_the_mean_of_its_decisions_centered_ones(tmp_path):
    policy = make_policy()
    trainer = make_trainer(policy, tmp_path, beta=0.5, cost_coef=0.2, centered=True)
    reference = copy.deepcopy(policy)
    perturb(policy)
    batch = batch_of(trainer)
    given = batch["inputs"], batch["trace"]
    with torch.no_grad():
        distributions = policy.action_logps(*given), reference.action_logps(*given)
        steps = centered_scores(*distributions, batch["trace"]) - reference.score(*given)
    means = torch.stack([steps[batch["side_ids"] == side].mean() for side in range(2 * len(STAGE_PAIRS))])
    chosen, rejected = means.chunk(2)
    _, logits = loss_and_logits(trainer, batch)
    torch.testing.assert_close(logits, 0.5 * (chosen - rejected + 0.2 * 1.25), rtol=1e-4, atol=1e-5)
    assert means.abs().min() > 1e-4


def test_before_training_nothing_is_told_apart(tmp_path):
    """At the reference the KL and its gradient are 0: the first step is that of the loss as the paper states it."""
    gradients = []
    for centered in (True, False):
        policy = make_policy()
        trainer = make_trainer(policy, tmp_path / str(centered), cost_coef=0.0, centered=centered)
        loss, logits = loss_and_logits(trainer, batch_of(trainer))
        assert logits.abs().max() < 1e-5
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_policy_spoilt_in_the_rejected_states_gains_nothing(tmp_path, temperature):
    """Noise on the weights moves both sides away from the reference. On the reference's own actions the plain score falls
    by the KL, which is the shortcut; the centered one stays where it is, up to the sampling of 400 actions a state."""
    policy, g = make_policy(), torch.Generator().manual_seed(1)
    trainer = make_trainer(policy, tmp_path, centered=True, temperature=temperature)
    reference = copy.deepcopy(policy)
    perturb(policy, scale=0.1)
    inputs = {name: value[:1].expand(400, *value.shape[1:]) for name, value in batch_of(trainer)["inputs"].items()}
    trace = reference.act(inputs, temperature=temperature, generator=g).trace
    with torch.no_grad():
        ref = reference.score(inputs, trace, temperature=temperature)
        plain = policy.score(inputs, trace, temperature=temperature) - ref
        centered = trainer._score_steps(policy, inputs, trace, torch.ones_like(trace), True) - ref
    error = centered.std() / 20
    assert plain.mean() < -5 * error
    assert centered.mean().abs() < 3 * error


def test_micro_batches_have_the_gradients_of_one_shot(tmp_path):
    gradients = []
    for size in (None, 3):
        policy = make_policy()
        policy.model.double()  # in float32 sums in another order differ by 1.07e-6 of their size on some processors
        trainer = make_trainer(policy, tmp_path / str(size), step_micro_batch_size=size, centered=True)
        perturb(policy)
        loss, _ = loss_and_logits(trainer, batch_of(trainer))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-6


def test_lora_s_reference_is_the_model_without_it(tmp_path):
    policy = make_policy()
    base = copy.deepcopy(policy)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(
        policy, tmp_path, peft_config=lora, learning_rate=1e-1, step_micro_batch_size=4, centered=True
    )
    trainer.train()
    batch = batch_of(trainer)
    given = batch["inputs"], batch["trace"]
    torch.testing.assert_close(trainer._reference_distribution(*given), base.action_logps(*given).detach())
    assert (policy.action_logps(*given) - base.action_logps(*given)).abs().max() > 1e-3
    assert not hasattr(trainer, "_kept_reference")


def test_a_policy_without_tokens_is_refused(tmp_path):
    trainer = make_trainer(make_policy(), tmp_path)
    trainer.policy = SimpleNamespace()
    with pytest.raises(
        ValueError, match="`centered` must be False for a SimpleNamespace, got True: it samples no tokens"
    ):
        trainer._keep_reference()
