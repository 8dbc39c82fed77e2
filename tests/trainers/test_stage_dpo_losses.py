"""The losses of StageDPOTrainer against `DPOTrainer._compute_loss` itself, on the policy's own scores; precision."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from stage_dpo_toy import (
    ACTION_DIM,
    BINS,
    EPISODES,
    STAGE_PAIRS,
    WHOLE_PAIRS,
    batch_of,
    loss_and_logits,
    make_policy,
    make_trainer,
    perturb,
    stage_pair,
)
from trl import DPOTrainer

from trl_stare.data.collators import pairs_dataset
from trl_stare.losses import PREFERENCE_LOSSES
from trl_stare.trainers.stage_dpo_trainer import REFERENCE_COLUMNS


def trl_loss(trainer, batch):
    """TRL's loss of one pair whose decisions are handed to it as the tokens of two texts, padded at the end."""
    with torch.no_grad():
        steps = trainer.policy.score(batch["inputs"], batch["trace"])
    sides = [steps[batch["side_ids"] == side] for side in (0, 1)]
    logps = torch.nn.utils.rnn.pad_sequence(sides, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(side), dtype=torch.long) for side in sides], True)
    first = torch.zeros(2, 1, dtype=torch.long)  # a token of the prompt
    output = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
        log_sum_sq_probs=None,
        aux_loss=None,
    )
    inputs = {name: batch[name] for name in REFERENCE_COLUMNS} | {
        "input_ids": torch.cat([first, torch.zeros_like(mask)], dim=1),
        "attention_mask": torch.cat([first + 1, mask], dim=1),
        "completion_mask": torch.cat([first, mask], dim=1),
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: output, inputs, False)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_both_policies_are_scored_at_the_temperature_of_the_rollouts(tmp_path, temperature):
    """From the logits themselves: `sum log softmax(logits / temperature)` of the tokens taken, chosen side less rejected."""
    policy = make_policy()
    trainer = make_trainer(policy, tmp_path, WHOLE_PAIRS[:1], objective="tpo-sum", beta=0.3, temperature=temperature)
    batch = batch_of(trainer)
    taken, side = batch["trace"].unsqueeze(-1), batch["side_ids"] == 0

    def margin():
        with torch.no_grad():
            logits, _ = policy.action_logits(batch["inputs"], batch["trace"])
        steps = (logits / temperature).log_softmax(-1).gather(-1, taken).sum((1, 2))
        return steps[side].sum() - steps[~side].sum()

    before = margin()
    perturb(policy)
    _, logits = loss_and_logits(trainer, batch)
    torch.testing.assert_close(logits, 0.3 * (margin() - before)[None], rtol=1e-4, atol=1e-4)
    assert logits.abs() > 0.01


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_tpo_sum_is_trls_own_loss(tmp_path, loss_type):
    """Five decisions against three. TRL's `ipo` divides by their number, as `tpo-mean` does for every loss."""
    policy, smoothing = make_policy(), 0.1 if loss_type == "robust" else 0.0
    trainer = make_trainer(
        policy,
        tmp_path,
        WHOLE_PAIRS[:1],
        objective="tpo-sum",
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
    )
    by_mean = make_trainer(policy, tmp_path, WHOLE_PAIRS[:1], objective="tpo-mean", beta=0.3, loss_type="ipo")
    perturb(policy)
    batch = batch_of(trainer)
    ours = by_mean if loss_type == "ipo" else trainer
    loss, logits = loss_and_logits(ours, batch_of(ours))
    assert logits.abs().min() > 0.01
    torch.testing.assert_close(loss.detach(), trl_loss(trainer, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_checkpointing": True}, {"step_micro_batch_size": 2, "bf16": True}], ids=str
)
def test_bf16_and_gradient_checkpointing_train(tmp_path, options):
    policy, dtypes = make_policy(), set()
    trainer = make_trainer(policy, tmp_path, STAGE_PAIRS[:3], per_device_train_batch_size=3, **options)
    layer = next(module for name, module in policy.model.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16 if options.get("bf16") else torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_lora_in_bf16_with_gradient_checkpointing_and_micro_batches(tmp_path):
    policy = make_policy()
    base = [(parameter, parameter.detach().clone()) for parameter in policy.model.parameters()]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    options = {"bf16": True, "gradient_checkpointing": True, "step_micro_batch_size": 2, "learning_rate": 1e-2}
    trainer = make_trainer(policy, tmp_path, STAGE_PAIRS[:3], peft_config=lora, max_steps=6, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    # in the reference's own precision: the adapter begins as zero
    assert trainer.state.log_history[0]["rewards/chosen"] == trainer.state.log_history[0]["rewards/rejected"] == 0.0
    assert all(torch.equal(parameter, before) for parameter, before in base)


def test_what_stages_score_adds_up_to_what_the_trajectory_scores(tmp_path):
    """Also where a stage ends within a chunk, and the episode too."""
    episodes = [replace(EPISODES[0], actions=EPISODES[0].actions[:9]), EPISODES[1]]
    stages = [stage_pair(0, 1, slice(0, 3), slice(0, 2), 0), stage_pair(0, 1, slice(3, 9), slice(2, 6), 1)]
    whole = [stage_pair(0, 1, slice(0, 9), slice(0, 6), 0, stage_name="trajectory")]
    logits = {}
    for objective, pairs in (("sta-tpo-sum", stages), ("tpo-sum", whole)):
        policy, rows = make_policy(), pairs_dataset(episodes, pairs)
        trainer = make_trainer(policy, tmp_path / objective, rows, objective=objective, beta=0.3, cost_coef=0.0)
        perturb(policy)
        logits[objective] = loss_and_logits(trainer, batch_of(trainer))[1].detach()
    torch.testing.assert_close(logits["sta-tpo-sum"].sum(), logits["tpo-sum"][0], rtol=1e-4, atol=1e-5)
    assert logits["tpo-sum"].abs() > 0.01


@pytest.mark.parametrize("centered", [False, True])
def test_steps_that_were_not_taken_in_the_stage_do_not_count(tmp_path, centered):
    """Another action in their place makes no other pair; in the place of those that were it does."""
    pairs, losses = [stage_pair(0, 1, slice(0, 3), slice(0, 2), 0)], []
    for changed in (None, 3, 2):  # steps of the second chunk, of which the segment holds the first
        policy, trace = make_policy(), EPISODES[0].trace.clone()
        if changed is not None:
            actions = trace.view(-1, ACTION_DIM)
            actions[changed] = (actions[changed] + 1) % BINS
        rows = pairs_dataset([replace(EPISODES[0], trace=trace), EPISODES[1]], pairs)
        trainer = make_trainer(policy, tmp_path / str(changed), rows, centered=centered)
        perturb(policy)
        losses.append(loss_and_logits(trainer, batch_of(trainer))[0].item())
    assert losses[0] == losses[1] != losses[2]
