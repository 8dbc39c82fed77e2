"""What an update moves: the stop at `target_kl`, shared critics, references, bfloat16, LoRA, accumulation; and the presets."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_toy import PLAN, ToyEnv, logged, make_policy, make_trainer
from trl import TrlParser

from trl_stare.data import play
from trl_stare.trainers import StagePPOConfig
from trl_stare.trainers.ppo_batch import decision_stages, observations
from trl_stare.trainers.presets import PPO_PRESETS
from trl_stare.trainers.reference import PolicyReference, rollout_logps
from trl_stare.trainers.stage_ppo_config import preset_fields


def test_once_stopped_nothing_moves_the_policy(tmp_path):
    """After `target_kl` the gradient is 0, but momentum and weight decay are not."""
    trainer = make_trainer(
        tmp_path, num_train_epochs=1, value_warmup_iterations=0, weight_decay=0.1, target_kl=1e-6, num_ppo_epochs=3,
    )  # fmt: skip
    seen = []
    step = trainer.training_step

    def remember(*args, **kwargs):
        seen.append(copy.deepcopy(trainer.policy.model.state_dict()))
        return step(*args, **kwargs)

    trainer.training_step = remember
    trainer.train()
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, False, False, False, False]
    assert trainer.optimizer.param_groups[0]["lr"] == 3e-3  # as a checkpoint stores it


def test_a_shared_critic_moves_the_policy_but_not_in_its_warm_up(tmp_path):
    for critic, warmup, moves in (("shared", 0, True), ("hidden", 0, False), ("shared", 1, False)):
        policy = make_policy()
        before = copy.deepcopy(policy.model.state_dict())
        make_trainer(
            tmp_path / f"{critic}{warmup}", policy=policy, num_train_epochs=1, critic=critic, policy_coef=0.0,
            value_warmup_iterations=warmup,
        ).train()  # fmt: skip
        moved = any(not torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
        assert moved == moves, critic


def test_the_reference_is_the_policy_before_training_and_holds_it_back(tmp_path):
    drift = {}
    for kl_coef in (1e-9, 30.0):
        policy = make_policy()
        trainer = make_trainer(
            tmp_path / str(kl_coef), policy=policy, kl_coef=kl_coef, value_warmup_iterations=0, num_train_epochs=3,
            logging_steps=1,
        )  # fmt: skip
        trainer.train()
        kl = logged(trainer, "policy/reference_kl")
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        drift[kl_coef] = kl[-1]
    assert drift[30.0] < 0.5 * drift[1e-9]


def test_with_peft_the_reference_is_the_adapter_as_it_was():
    """Which may have been trained before: not the model without it."""
    policy = make_policy()
    obs = play(ToyEnv(), policy, range(8), temperature=1.0, generator=torch.Generator().manual_seed(0))
    inputs, trace = policy.prepare(observations(obs)), torch.cat([t.trace for t in obs])
    options = {"temperature": 1.0, "batch_size": 5}
    without = rollout_logps(policy, inputs, trace, **options)
    torch.testing.assert_close(without, torch.cat([t.logps for t in obs]))
    policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = rollout_logps(policy, inputs, trace, **options)
    reference = PolicyReference(policy)
    torch.testing.assert_close(reference.logps(inputs, trace, **options), before)
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.mul_(3.0)
    torch.testing.assert_close(reference.logps(inputs, trace, **options), before)
    after = rollout_logps(policy, inputs, trace, **options)
    assert not torch.allclose(after, before, atol=1e-4) and not torch.allclose(before, without, atol=1e-4)


def test_the_first_ratio_is_one_in_bfloat16_too(tmp_path):
    """There only if the old log-probabilities are taken anew."""
    ratio = {}
    for recompute in (False, True):
        trainer = make_trainer(
            tmp_path / str(recompute), num_train_epochs=1, bf16=True, recompute_logps=recompute, num_minibatches=3,
        )  # fmt: skip
        trainer.train()
        (ratio[recompute],) = logged(trainer, "policy/first_ratio")
    assert ratio[True] <= ratio[False] and ratio[True] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout_is_off_unless_it_is_asked_for(tmp_path, disabled):
    policy = make_policy()
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    policy.model = get_peft_model(policy.model, adapter)
    trainer = make_trainer(tmp_path, policy=policy, num_train_epochs=1, num_ppo_epochs=1, disable_dropout=disabled)
    trainer.train()
    (ratio,) = logged(trainer, "policy/first_ratio")
    assert ratio == pytest.approx(1.0, abs=1e-5) if disabled else ratio > 1.01


def test_stages_can_be_normalised_apart(tmp_path):
    trainer = make_trainer(tmp_path, advantage_norm="stage")
    trajectories = trainer.collect_rollout(0)
    batch = trainer.make_batch(trajectories)
    stages = decision_stages(trajectories, PLAN)
    for stage in (0, 1):
        mine = batch["advantages"][stages == stage]
        assert mine.mean().abs() < 1e-5 and mine.std(correction=0) == pytest.approx(1.0, abs=1e-3)


def test_accumulating_two_halves_is_one_update(tmp_path):
    """Episodes to the time limit, so that minibatches are of equal size and a mean of means is the mean. Plain gradient descent,
    because Adam makes a full step of a gradient that is nothing but rounding."""
    weights = {}
    for halves in (1, 2):
        trainer = make_trainer(
            tmp_path / str(halves), num_minibatches=2 * halves, gradient_accumulation_steps=halves, num_train_epochs=2,
            ignore_terminations=True, value_warmup_iterations=0, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 8
        weights[halves] = trainer.model.state_dict()
        assert logged(trainer, "rollout/episode_steps")[0] == 6.0 and logged(trainer, "rollout/success_at_end")
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[2][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_learns_with_the_critic_beside_it_and_resumes_exactly(tmp_path, bf16):
    def start():
        policy = make_policy()
        torch.manual_seed(1)
        policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return make_trainer(
            tmp_path, policy=policy, critic="shared", kl_coef=0.1, num_train_epochs=3, save_strategy="epoch",
            bf16=bf16, recompute_logps=bf16,
        )  # fmt: skip

    whole = start()
    first = copy.deepcopy(whole.model.state_dict())
    whole.train()
    moved = {name for name, value in whole.model.state_dict().items() if not torch.equal(value, first[name])}
    assert moved and all("lora_" in name or name.startswith("value_head.") for name in moved)
    assert any("lora_" in name for name in moved)
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_presets_are_plain_configs(tmp_path):
    for name, fields in PPO_PRESETS.items():
        config = StagePPOConfig.preset(name, str(tmp_path), use_cpu=True, gamma=0.5)
        shown = json.loads(config.to_json_string())
        assert shown["gamma"] == 0.5 and config.output_dir == str(tmp_path)
        assert {key: shown[key] for key in fields if key not in ("gamma", "use_cpu")} == {
            key: value for key, value in fields.items() if key not in ("gamma", "use_cpu")
        }
    config = StagePPOConfig.preset("rl4vla-7b", str(tmp_path), use_cpu=True)
    assert config.updates_per_iteration == 32  # 64 x 80 decisions, 8 x 20 to an update
    with pytest.raises(
        ValueError, match=r"`preset` must be one of \['rl4vla-7b', 'small-cpu', 'small-cpu-rare'\], got 'big'"
    ):
        StagePPOConfig.preset("big", str(tmp_path))


def test_how_many_iterations_a_run_has(tmp_path):
    def iterations(**config):
        return StagePPOConfig(
            str(tmp_path), use_cpu=True, num_ppo_epochs=2, num_minibatches=3, **config
        ).num_iterations

    assert (iterations(num_train_epochs=5), iterations(num_train_epochs=1.5), iterations(max_steps=18)) == (5, 2, 3)


def test_a_preset_lies_below_a_yaml_file_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("gamma: 0.9\nnum_minibatches: 2\nuse_cpu: true\n")
    parser = TrlParser((StagePPOConfig,))
    parser.set_defaults(**preset_fields("small-cpu"))
    (config,) = parser.parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path), "--num_minibatches", "8"]
    )
    assert (config.gamma, config.num_minibatches, config.gae_lambda) == (0.9, 8, 0.7)
    assert config.bootstrap_on_truncation is False and config.learning_rate == 1e-4


def test_adam_does_not_count_the_updates_in_which_the_policy_is_held(tmp_path):
    """A gradient of 0 would be counted, and the first real steps after a warm-up be up to three times too large."""
    trainer = make_trainer(tmp_path, num_train_epochs=3, value_warmup_iterations=1)
    trainer.train()
    counts = [
        {int(trainer.optimizer.state[p]["step"]) for p in group["params"] if p in trainer.optimizer.state}
        for group in trainer.optimizer.param_groups
    ]
    assert counts == [{8}, {12}]  # updates of the policy, and of the critic


def test_a_frozen_policy_is_refused(tmp_path):
    policy = make_policy()
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable, got one without a trainable weight"):
        make_trainer(tmp_path, policy=policy)


def test_every_iteration_is_saved_unless_something_else_is_asked_for(tmp_path):
    """Five hundred updates, Trainer's default, are longer than most runs."""
    plain = StagePPOConfig("somewhere")
    saving = {name: getattr(plain, name) for name in ("save_strategy", "save_total_limit")}
    make_trainer(tmp_path, num_train_epochs=3, **saving).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
