"""StageSFTTrainer: rows, chunks and masks by hand, exact resume, and that it learns."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_stage_ppo_processes import in_two_processes

from trl_stare.data import DemonstrationCollator, Trajectory, demonstration_dataset
from trl_stare.policies import TokenPolicy
from trl_stare.stages import get_plan
from trl_stare.trainers import StageSFTConfig, StageSFTTrainer

PLAN = get_plan("StackCube-v1")
STATS = {"t": {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}}


def make_demonstration(steps: int = 6, seed: int = 0, mistake_at: int | None = None) -> Trajectory:
    """Contact after step 1, lifted after 2, over the goal after 3, solved at the end; action t is t/10 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(steps) / 10)[:, None].expand(-1, 7).clone()
    actions = labels.clone()
    if mistake_at is not None:
        actions[mistake_at] = -1.0
    time = torch.arange(steps + 1)
    lift = torch.where(time >= 2, 0.05, 0.0)
    cube = torch.stack([torch.where(time >= 3, 0.0, 0.3), torch.zeros(steps + 1), 0.02 + lift], dim=-1)
    return Trajectory(
        task="StackCube-v1",
        instruction="stack the red cube on the green cube",
        seed=seed,
        policy="expert",
        images=torch.randint(0, 256, (steps, 32, 32, 3), dtype=torch.uint8, generator=generator),
        state=torch.randn(steps, 8, generator=generator),
        starts=torch.arange(steps),
        actions=actions,
        labels=labels,
        trace=None,
        logps=None,
        features=None,
        final_image=torch.zeros(32, 32, 3, dtype=torch.uint8),
        final_state=torch.zeros(8),
        signals={
            "tcp_position": cube,
            "object_position": cube,
            "goal_position": torch.tensor([0.0, 0.0, 0.06]).expand(steps + 1, 3),
            "object_lift": lift[:, None],
            "is_contact": time >= 1,
            "is_grasped": time >= 1,
            "success": time >= steps,
        },
        reward=(time[1:] >= steps).float(),
        terminated=True,
        truncated=False,
    )


def make_policy() -> TokenPolicy:
    torch.manual_seed(0)
    return TokenPolicy.create_tiny(STATS, image_size=32, chunk_size=3, soft_bins=0.0)


def make_trainer(folder, policy: TokenPolicy, peft_config=None, **config) -> StageSFTTrainer:
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    args = StageSFTConfig(str(folder), **(options | config))
    demonstrations = [make_demonstration(seed=seed) for seed in range(4)]
    return StageSFTTrainer(policy, args, demonstrations, PLAN, peft_config=peft_config)


def test_rows_carry_the_stage_and_its_weight():
    """Six steps: Reach, Grasp and Transport last one step each, Stack three. Weights 6 / (4 * count)."""
    rows = demonstration_dataset([make_demonstration()], PLAN)
    assert rows["stage"] == [0, 1, 2, 3, 3, 3]
    assert rows["weight"] == [1.5, 1.5, 1.5, 0.5, 0.5, 0.5] and sum(rows["weight"]) == 6


def test_chunks_repeat_the_last_action_and_stop_at_mistakes():
    policy = make_policy()
    collator = DemonstrationCollator([make_demonstration(mistake_at=2)], policy.prepare, policy.encode, 3)
    batch = collator([{"trajectory": 0, "decision": d, "weight": 1.0} for d in (0, 1, 2, 3, 5)])
    decoded = policy.decode(batch["trace"])[:, :, 0]
    expected = torch.tensor([[0, 0.1, 0.2], [0.1, 0.2, 0.3], [0.2, 0.3, 0.4], [0.3, 0.4, 0.5], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(decoded, expected, atol=0.04, rtol=0)
    # the answer to the mistake's own observation counts, what follows it does not
    mask = batch["mask"].view(5, 3, 7)[:, :, 0]
    assert mask.tolist() == [[True] * 3, [True, True, False], [True, False, False], [True] * 3, [True] * 3]


@pytest.mark.parametrize("name", ["loss_type", "completion_only_loss", "eval_packing", "label_smoothing_factor"])
def test_what_would_change_nothing_is_refused(tmp_path, name):
    value = {"loss_type": "dft", "label_smoothing_factor": 0.1}.get(name, True)
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value!r}: it would change nothing"):
        StageSFTConfig(str(tmp_path), use_cpu=True, **{name: value})


def test_no_demonstrations_are_refused():
    with pytest.raises(ValueError, match="must hold a demonstration of StackCube-v1, got 0"):
        demonstration_dataset([], PLAN)


def test_it_learns_and_saves(tmp_path):
    policy = make_policy()
    trainer = make_trainer(tmp_path, policy, max_steps=120, learning_rate=2e-3)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    trainer.save_model(str(tmp_path / "final"))
    loaded = TokenPolicy.from_pretrained(tmp_path / "final")
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name


def test_stage_balance_changes_the_loss_and_nothing_else(tmp_path):
    losses = []
    for balanced in (False, True):
        policy = make_policy()
        trainer = make_trainer(tmp_path, policy, stage_balanced=balanced)
        batch = trainer.data_collator([{"trajectory": 0, "decision": d, "weight": w} for d, w in ((0, 1.5), (4, 1.0))])
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
            each = [
                policy.imitation_loss(
                    {k: v[i : i + 1] for k, v in batch.items() if k not in ("trace", "mask", "weight")},
                    batch["trace"][i : i + 1],
                    batch["mask"][i : i + 1],
                ).item()
                for i in range(2)
            ]
    assert losses[0] == pytest.approx((each[0] + each[1]) / 2, abs=1e-5)
    # not divided by the batch's own weights: with one decision in a micro-batch nothing would be left of them
    assert losses[1] == pytest.approx((1.5 * each[0] + 1.0 * each[1]) / 2, abs=1e-5)


def test_resuming_is_exact(tmp_path):
    whole = make_policy()
    make_trainer(tmp_path / "whole", whole).train()
    make_trainer(tmp_path / "cut", make_policy(), save_strategy="steps", save_steps=3).train()
    resumed = make_policy()
    make_trainer(tmp_path / "cut", resumed).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for (name, first), second in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


def test_an_adapter_that_was_loaded_into_the_model_is_refused(tmp_path):
    """It would take the place of what `--use_peft` adds, or be frozen."""
    policy, lora = make_policy(), LoraConfig(r=2, target_modules=["q_proj"])
    policy.save_pretrained(tmp_path / "base")
    policy = TokenPolicy.from_pretrained(tmp_path / "base")
    policy.model = get_peft_model(policy.model, lora)
    policy.save_pretrained(tmp_path / "adapter")
    for config in (None, lora):
        with pytest.raises(ValueError, match="must be trainable, got one that an adapter was put into"):
            make_trainer(tmp_path, TokenPolicy.from_pretrained(tmp_path / "adapter"), peft_config=config)


def test_a_finished_run_that_is_given_again_goes_no_further(tmp_path):
    """Its second epoch has batches left; the Trainer itself would take one more of them each time."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path, make_policy(), **options)
    trainer.train()
    again = make_trainer(tmp_path, make_policy(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == 8 and not (tmp_path / "checkpoint-9").exists()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    longer = make_trainer(tmp_path, make_policy(), **options | {"max_steps": 10})
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert longer.state.global_step == 10


def two_epochs(rank, folder):
    """Writes the rows that this process saw, and what it would have drawn as noise."""
    trainer = make_trainer(folder, make_policy(), max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3)
    collate, seen = trainer.data_collator, []
    trainer.data_collator = lambda rows: (
        seen.append([(r["trajectory"], r["decision"]) for r in rows]),
        collate(rows),
    )[1]
    compute_loss, drawn = trainer.compute_loss, []
    trainer.compute_loss = lambda *args, **kwargs: (drawn.append(torch.rand(1).item()), compute_loss(*args, **kwargs))[
        1
    ]
    trainer.train()
    (folder / f"{rank}.json").write_text(json.dumps([seen, drawn]))


def test_two_processes_share_the_rows_and_draw_their_own_noise(tmp_path):
    assert in_two_processes(two_epochs, tmp_path) == [0, 0], [p.read_text() for p in tmp_path.glob("error-*")]
    (seen, drawn), (others, other_draws) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(seen) == len(others) == 8
    for epoch in (slice(0, 4), slice(4, 8)):
        rows = [tuple(row) for batch in seen[epoch] + others[epoch] for row in batch]
        assert len(rows) == len(set(rows)) == 24, "four demonstrations of six steps, each once"
    assert not set(drawn) & set(other_draws)
