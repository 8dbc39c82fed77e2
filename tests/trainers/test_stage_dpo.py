"""StageDPOTrainer on the real small VLA: identities of the loss, exact micro-batches, learning, resuming."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import copy  # noqa: E402
import shutil  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from stage_dpo_toy import (  # noqa: E402
    EPISODES,
    STAGE_PAIRS,
    WHOLE_PAIRS,
    batch_of,
    decision_logps,
    episode,
    loss_and_logits,
    make_policy,
    make_trainer,
    perturb,
    stage_pair,
)  # fmt: skip
from trl import DPOTrainer  # noqa: E402

from trl_stare.data.collators import pairs_dataset  # noqa: E402
from trl_stare.data.pairs import StagePair  # noqa: E402
from trl_stare.policies.token_policy import TokenPolicy  # noqa: E402
from trl_stare.trainers.stage_dpo_config import StageDPOConfig  # noqa: E402
from trl_stare.trainers.stage_dpo_trainer import StageDPOTrainer  # noqa: E402


@pytest.fixture
def policy() -> TokenPolicy:
    return make_policy()


def test_it_is_a_dpo_trainer_and_starts_at_log_2(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, cost_coef=0.0)
    assert isinstance(trainer, DPOTrainer)
    loss, logits = loss_and_logits(trainer, batch_of(trainer))
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert logits.abs().max().item() < 1e-6


def test_the_loss_is_what_the_formula_gives_from_the_policys_own_scores(policy, tmp_path):
    """method.md 3, computed by hand from `policy.score`: slices, means, costs, beta, weights."""
    reference = [decision_logps(policy, i) for i in range(4)]
    trainer = make_trainer(policy, tmp_path, beta=0.5, cost_coef=0.2, stage_weights=[1.0, 3.0])
    perturb(policy)
    policy.model.eval()
    now = [decision_logps(policy, i) for i in range(4)]
    q = [a - b for a, b in zip(now, reference, strict=True)]
    sides = [
        (q[0][:2].mean(), q[1][:1].mean()),
        (q[0][2:].mean(), q[1][1:].mean()),
        (q[2].mean(), q[3].mean()),
        (q[1][:1].mean(), q[0][:2].mean()),
    ]
    expected = torch.stack([0.5 * (chosen - 0.2 * 0.25 - (rejected - 0.2 * 1.5)) for chosen, rejected in sides])
    loss, logits = loss_and_logits(trainer, batch_of(trainer))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.abs().max() > 0.05
    weighted = -F.logsigmoid(expected) * torch.tensor([1.0, 3.0, 1.0, 1.0])
    torch.testing.assert_close(loss, weighted.mean(), rtol=1e-4, atol=1e-5)


ONE_STAGE_PAIRS = [stage_pair(0, 1, slice(0, 10), slice(0, 6), 0), stage_pair(2, 3, slice(0, 2), slice(0, 2), 0)]


@pytest.mark.parametrize(("stages", "whole"), [("sta-tpo", "tpo-mean"), ("sta-tpo-sum", "tpo-sum")])
def test_one_stage_and_no_cost_is_tpo(policy, tmp_path, stages, whole):
    stare = make_trainer(policy, tmp_path, ONE_STAGE_PAIRS, objective=stages, cost_coef=0.0)
    tpo = make_trainer(policy, tmp_path, WHOLE_PAIRS, objective=whole, cost_coef=0.7)
    perturb(policy)
    results = [loss_and_logits(trainer, batch_of(trainer)) for trainer in (stare, tpo)]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].item() == results[1][0].item()


@pytest.mark.parametrize(
    ("pairs", "mean", "sum_"), [(WHOLE_PAIRS, "tpo-mean", "tpo-sum"), (ONE_STAGE_PAIRS, "sta-tpo", "sta-tpo-sum")]
)
def test_a_sum_adds_up_where_a_mean_averages(policy, tmp_path, pairs, mean, sum_):
    by_sum = make_trainer(policy, tmp_path, pairs[:1], objective=sum_)
    by_mean = make_trainer(policy, tmp_path, pairs[:1], objective=mean)
    totals, means = (trainer._score_pairs(trainer.model, policy, batch_of(trainer)) for trainer in (by_sum, by_mean))
    torch.testing.assert_close(totals[0], 5 * means[0])
    torch.testing.assert_close(totals[1], 3 * means[1])


def test_one_decision_is_trls_own_sigmoid_dpo_loss(policy, tmp_path):
    """TRL's `_compute_loss`, run on a stand-in that hands it the same log-probabilities as tokens of a text."""
    trainer = make_trainer(policy, tmp_path, [STAGE_PAIRS[2]], beta=0.3, cost_coef=0.0)
    perturb(policy)
    batch = batch_of(trainer)
    loss, _ = loss_and_logits(trainer, batch)
    with torch.no_grad():
        logps = policy.evaluate(batch["inputs"], batch["trace"]).logps
    assert loss.item() == pytest.approx(trl_sigmoid_loss(trainer, logps, batch).item(), rel=1e-5)


def trl_sigmoid_loss(trainer, logps, batch):
    """`DPOTrainer._compute_loss` on `[2, L]` token log-probabilities (chosen, rejected)."""
    length = logps.shape[1]
    output = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
        log_sum_sq_probs=None,
        aux_loss=None,
    )
    inputs = {
        "input_ids": torch.zeros(2, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(2, length + 1, dtype=torch.long),
        "completion_mask": torch.tensor([[0] + [1] * length] * 2),
        "ref_chosen_logps": batch["ref_chosen_logps"],
        "ref_rejected_logps": batch["ref_rejected_logps"],
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: output, inputs, False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_micro_batches_have_the_gradients_of_one_shot(policy, tmp_path, dtype, tolerance):
    gradients = {}
    for size in (None, 1, 3, 100):
        fresh = copy.copy(policy)
        fresh.model = copy.deepcopy(policy.model).to(dtype)
        # a cache of its own: scores rounded in another way would show in the seventh digit
        trainer = make_trainer(fresh, tmp_path / str(size), step_micro_batch_size=size)
        loss, _ = loss_and_logits(trainer, batch_of(trainer))
        loss.backward()
        gradients[size] = torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None])
    assert gradients[None].norm() > 1e-3
    for size in (1, 3, 100):
        assert (gradients[size] - gradients[None]).norm() / gradients[None].norm() < tolerance


def test_a_micro_batch_is_all_that_is_forwarded_at_once(policy, tmp_path):
    trainer, rows = make_trainer(policy, tmp_path, step_micro_batch_size=3), []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    loss, _ = loss_and_logits(trainer, batch_of(trainer))
    assert rows == [3, 3, 3, 3, 1]
    loss.backward()
    assert sorted(rows[5:]) == [1, 3, 3, 3, 3]


def test_gradient_accumulation_is_a_larger_batch(policy, tmp_path):
    weights = []
    for batch, accumulation in ((4, 1), (1, 4)):
        fresh = copy.copy(policy)
        fresh.model = copy.deepcopy(policy.model)
        make_trainer(
            fresh,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        ).train()
        weights.append(torch.cat([p.detach().flatten() for p in fresh.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_every_pair_is_logged_also_where_the_last_update_accumulates(policy, tmp_path):
    pairs = (STAGE_PAIRS * 2)[:5]
    counts = []
    for accumulation in (1, 3):
        trainer = make_trainer(
            policy, tmp_path, pairs, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=-1,
            num_train_epochs=1, logging_steps=1, learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        counts.append(sum(v for logs in trainer.state.log_history for k, v in logs.items() if k.endswith("/pairs")))
    assert counts == [5, 5]


def test_swapping_the_sides_negates_the_logit(policy, tmp_path):
    swapped = [
        StagePair(
            **{
                field.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected"): value
                for field, value in vars(pair).items()
            }
        )
        for pair in STAGE_PAIRS
    ]
    there, back = make_trainer(policy, tmp_path), make_trainer(policy, tmp_path, swapped)
    perturb(policy)
    logits = [loss_and_logits(trainer, batch_of(trainer))[1] for trainer in (there, back)]
    torch.testing.assert_close(logits[0], -logits[1], rtol=1e-4, atol=1e-5)
    assert logits[0].abs().min() > 1e-3


def test_training_widens_the_margin_and_logs_it_by_stage(policy, tmp_path):
    dataset = pairs_dataset(EPISODES, STAGE_PAIRS[:3])
    trainer = make_trainer(
        policy,
        tmp_path,
        dataset,
        eval_dataset=dataset,
        max_steps=15,
        step_micro_batch_size=4,
        per_device_train_batch_size=3,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval_rewards/margins"] > 1.0
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    assert after["eval_rewards/accuracies"] == 1.0
    assert (after["eval_stage/Reach/pairs"], after["eval_stage/Grasp/pairs"]) == (2.0, 1.0)
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(steps) >= 15
    wanted = {
        f"stage/{stage}/{name}" for stage in ("Reach", "Grasp") for name in ("loss", "margin", "accuracy", "pairs")
    }
    assert wanted <= set().union(*steps)


def test_resuming_equals_not_having_stopped(policy, tmp_path):
    initial = copy.deepcopy(policy.model.state_dict())

    def run(folder, resume=None):
        policy.model.load_state_dict(initial)
        trainer = make_trainer(policy, folder, save_strategy="steps", save_steps=2, max_steps=4)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, load_file(folder / "checkpoint-4" / "model.safetensors")

    losses, weights = run(tmp_path / "whole")
    halfway = tmp_path / "resumed" / "checkpoint-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", halfway)
    resumed_losses, resumed_weights = run(tmp_path / "resumed", str(halfway))
    assert len(losses) == 4
    assert resumed_losses == losses
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_resuming_from_weights_that_do_not_match_raises(policy, tmp_path):
    make_trainer(policy, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights["renamed.weight"] = weights.pop("lm_head.weight")
    save_file(weights, file, metadata={"format": "pt"})
    trainer = make_trainer(policy, tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_lora_scores_its_reference_with_the_adapter_off_and_saves_an_adapter(policy, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    reference = decision_logps(policy, 2).mean().item()
    trainer = make_trainer(policy, tmp_path, peft_config=lora, save_strategy="steps", save_steps=2)
    assert trainer.train_dataset["ref_chosen_logps"][2] == pytest.approx(reference, rel=1e-5)
    assert decision_logps(policy, 2).mean().item() != pytest.approx(reference, rel=1e-3)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert "base_model.model.lm_head.weight" in frozen


def test_another_reference_is_used_and_not_trained(policy, tmp_path):
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    perturb(other)
    expected = decision_logps(other, 2).mean().item()
    weights = [p.clone() for p in other.model.parameters()]
    trainer = make_trainer(policy, tmp_path, ref_policy=other)
    assert trainer.train_dataset["ref_chosen_logps"][2] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, other.model.parameters(), strict=True))


def test_reference_scores_of_another_trainer_are_dropped(policy, tmp_path):
    stale = make_trainer(policy, tmp_path).train_dataset
    perturb(policy)
    second = make_trainer(policy, tmp_path, stale)
    fresh = make_trainer(policy, tmp_path)
    assert second.train_dataset["ref_chosen_logps"] == fresh.train_dataset["ref_chosen_logps"]
    assert second.train_dataset["ref_chosen_logps"] != stale["ref_chosen_logps"]


def test_a_copy_of_the_model_runs_its_own_weights(policy, tmp_path):
    """TRL's fused LM head closes over the original (`keep_forward`)."""
    trainer = make_trainer(policy, tmp_path)
    copied = copy.copy(policy)
    copied.model = copy.deepcopy(policy.model)
    same = decision_logps(policy, 0)
    perturb(policy)
    torch.testing.assert_close(decision_logps(copied, 0), same)
    assert trainer.model is policy.model


def test_checkpoints_load_as_a_policy(policy, tmp_path):
    make_trainer(policy, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    loaded = TokenPolicy.from_pretrained(tmp_path / "checkpoint-2")
    policy.model.eval()
    torch.testing.assert_close(decision_logps(loaded, 0), decision_logps(policy, 0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda pairs: pairs.select([]), "must hold a pair, got none. Play more starts"),
        (lambda pairs: pairs.to_list(), "must be a Dataset, got list. Use `pairs_dataset`"),
    ],
)
def test_no_pairs_are_refused_by_name(policy, tmp_path, rows, message):
    pairs = pairs_dataset([episode(2, 0), episode(2, 1)], [stage_pair(0, 1, slice(0, 2), slice(0, 2), 0)])
    with pytest.raises(ValueError, match=message):
        StageDPOTrainer(policy, StageDPOConfig(str(tmp_path), use_cpu=True, report_to="none"), rows(pairs))


def test_the_trainer_refuses_rows_that_do_not_fit(policy, tmp_path):
    stage_rows, whole_rows = pairs_dataset(EPISODES, STAGE_PAIRS), pairs_dataset(EPISODES, WHOLE_PAIRS)
    cases = [
        (stage_rows, {"objective": "tpo-mean"}, "objective='tpo-mean'"),
        (whole_rows, {}, "objective='sta-tpo'"),
        (stage_rows, {"stage_weights": [1.0]}, "`stage_weights` must have a weight for each"),
        (stage_rows.remove_columns("chosen_trace"), {}, "chosen_trace"),
    ]
    for rows, options, message in cases:
        with pytest.raises(ValueError, match=message):
            make_trainer(policy, tmp_path, rows, **options)


def test_nothing_to_train_is_refused(policy, tmp_path):
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable, got one without a trainable weight"):
        make_trainer(policy, tmp_path)
