"""What the Trainer's own arguments do in ours: they work, or they are refused."""

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_toy import make_policy, make_trainer
from stage_dpo_toy import EPISODES, STAGE_PAIRS, decision_logps
from stage_dpo_toy import make_policy as make_dpo_policy
from stage_dpo_toy import make_trainer as make_dpo_trainer

from trl_stare.data import pairs_dataset
from trl_stare.policies import TokenPolicy
from trl_stare.trainers import StageDPOConfig, StagePPOConfig, StageSFTConfig
from trl_stare.trainers.checkpointing import _report_failed_push

sys.path.insert(0, str(Path(__file__).parents[1]))
from minihub import MiniHub  # noqa: E402

PUSHING = """
import sys, time
sys.path.insert(0, "tests/trainers")
from huggingface_hub import HfApi
from ppo_toy import make_trainer

send = HfApi.create_commit
HfApi.create_commit = lambda *args, **kwargs: (time.sleep(0.3), send(*args, **kwargs))[1]  # slower than the disk
options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
make_trainer(sys.argv[1], num_train_epochs=2, save_strategy="epoch", hub_model_id=sys.argv[2], **options).train()
"""


def test_checkpoints_are_uploaded_from_where_they_stay_and_nothing_else_is(tmp_path):
    with MiniHub() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_writer",
        }  # fmt: skip
        command = [sys.executable, "-c", PUSHING, str(tmp_path / "run"), "user/ppo"]
        subprocess.run(command, cwd=Path(__file__).parents[2], env=env, timeout=120, check=True)
        files = {name for commit in hub.repos["user/ppo"]["commits"] for name in commit["files"]}
    assert {"model.safetensors", "checkpoint-4/optimizer.pt", "checkpoint-8/manifest.json", "episodes.jsonl"} <= files
    assert not [name for name in files if name.startswith(("_", "."))]


def test_an_upload_that_fails_is_said(caplog):
    job = Future()
    job.add_done_callback(_report_failed_push)
    job.set_exception(FileNotFoundError("checkpoint-4"))
    assert "a checkpoint was not uploaded to the Hub: FileNotFoundError: checkpoint-4" in caplog.text


def test_a_run_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    make_trainer(tmp_path, num_train_epochs=2, save_strategy="epoch").train()
    ledger = (tmp_path / "episodes.jsonl").read_text()
    with pytest.raises(ValueError, match=r"no checkpoints where a run begins, got checkpoint-4, checkpoint-8"):
        make_trainer(tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    assert (tmp_path / "episodes.jsonl").read_text() == ledger


def test_a_path_is_verified_as_a_string_is(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="optimizer.pt is missing"):
        make_trainer(tmp_path, num_train_epochs=2).train(resume_from_checkpoint=tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (StageSFTConfig, "torch_compile", True),
        (StageDPOConfig, "torch_compile", True),
        (StagePPOConfig, "auto_find_batch_size", True),
        (StagePPOConfig, "lr_scheduler_type", "reduce_lr_on_plateau"),
        (StagePPOConfig, "lr_scheduler_type", "greedy"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(tmp_path, config, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got '?{value}"):
        config(str(tmp_path), **{field: value})


@pytest.mark.parametrize("config", [StageSFTConfig, StageDPOConfig, StagePPOConfig])
def test_processes_without_a_gpu_find_each_other(tmp_path, config):
    """accelerate makes them DDP on CPUs only if `use_cpu` is set."""
    assert config(str(tmp_path)).use_cpu is not torch.accelerator.is_available()


def test_several_gpus_of_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(StagePPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"a process must see one GPU, got 2.*accelerate launch"):
        make_trainer(tmp_path)


def test_an_evaluation_without_starts_says_so(tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` must hold starts to evaluate, got None"):
        make_trainer(tmp_path).evaluate()


def test_the_critic_reads_ends_in_batches_of_the_rollouts_size(tmp_path):
    trainer = make_trainer(tmp_path, critic="hidden", episodes_per_iteration=20)
    act, rows = trainer.policy.act, []
    trainer.policy.act = lambda inputs, **kwargs: (rows.append(len(inputs["state"])), act(inputs, **kwargs))[1]
    trainer.make_batch(trainer.collect_rollout(0))
    assert rows[-3:] == [8, 8, 4] and max(rows) == trainer.env.num_envs


def test_of_several_evaluation_sets_each_logs_its_own_metrics(tmp_path):
    sets = {name: pairs_dataset(EPISODES, pairs) for name, pairs in (("a", STAGE_PAIRS[:1]), ("b", STAGE_PAIRS[1:]))}
    trainer = make_dpo_trainer(make_dpo_policy(), tmp_path, eval_dataset=sets, max_steps=1)
    trainer.train()
    trainer.evaluate()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_rewards/margins", "eval_b_rewards/margins", "rewards/margins"} <= logged
    assert "eval_rewards/margins" not in logged


def test_after_preference_with_a_new_adapter_the_policy_saves_it(tmp_path):
    policy = make_dpo_policy()
    policy.save_pretrained(tmp_path / "base")
    policy = TokenPolicy.from_pretrained(tmp_path / "base")
    make_dpo_trainer(
        policy, tmp_path / "run", peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), learning_rate=0.1
    ).train()
    policy.save_pretrained(tmp_path / "adapter")
    loaded = TokenPolicy.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(decision_logps(loaded, 0), decision_logps(policy, 0))
    assert not torch.allclose(decision_logps(policy, 0), decision_logps(make_dpo_policy(), 0), atol=1e-3)


def test_a_model_with_an_adapter_inside_is_refused(tmp_path):
    policy = make_policy()
    # what it returns, and not the model in it, is the adapter
    get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got one that an adapter was put into"):
        make_trainer(tmp_path, policy=policy)


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    """And not the model below it: before the first update nothing has drifted."""
    policy = make_policy()
    policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trained = [name for name, value in policy.model.named_parameters() if value.requires_grad]
    trainer = make_trainer(tmp_path, policy=policy, kl_coef=0.1, value_warmup_iterations=0, save_strategy="epoch")
    batch = trainer.make_batch(trainer.collect_rollout(0))
    torch.testing.assert_close(batch["ref_logps"], batch["logps"])
    assert [name for name, value in policy.model.named_parameters() if value.requires_grad] == trained
    trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/reference")), "a checkpoint holds the adapter that is trained"
