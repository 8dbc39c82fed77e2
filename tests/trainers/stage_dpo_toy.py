"""Toy pairs, a tiny VLA and a trainer on them, for the tests of StageDPOTrainer."""

from dataclasses import replace

import torch
from datasets import Dataset

from trl_stare.data.collators import PreferenceCollator, pairs_dataset
from trl_stare.data.pairs import StagePair, build_pairs
from trl_stare.data.schema import save_pairs, save_trajectories
from trl_stare.data.trajectory import Trajectory
from trl_stare.policies.token_policy import TokenPolicy
from trl_stare.stages import Stage, StagePlan, succeeded
from trl_stare.trainers.stage_dpo_config import StageDPOConfig
from trl_stare.trainers.stage_dpo_trainer import StageDPOTrainer

CHUNK, ACTION_DIM, BINS, STATE = 2, 3, 5, 4
TEXT = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}


def make_policy() -> TokenPolicy:
    """A small VLA with random weights, the same every time."""
    torch.manual_seed(0)
    stats = {"toy": {"action": {"scale": [1.0] * ACTION_DIM}, "state": {"mean": [0.0] * STATE, "std": [1.0] * STATE}}}
    return TokenPolicy.create_tiny(
        stats,
        image_size=16,
        chunk_size=CHUNK,
        action_dim=ACTION_DIM,
        num_bins=BINS,
        state_size=STATE,
        conv_channels=[8, 8, 8],
        readout_channels=4,
        text_config=TEXT,
    )


def episode(num_decisions: int, seed: int) -> Trajectory:
    """`num_decisions` chunks of noise, all from seed 7's start."""
    g = torch.Generator().manual_seed(seed)
    steps = num_decisions * CHUNK
    images = torch.randint(0, 256, (num_decisions, 16, 16, 3), generator=g, dtype=torch.uint8)
    state = torch.randn(num_decisions, STATE, generator=g)
    trace = torch.randint(0, BINS, (num_decisions, CHUNK * ACTION_DIM), generator=g)
    actions = (trace - BINS // 2).view(steps, ACTION_DIM) / (BINS // 2)  # what the policy's bins of scale 1 stand for
    return Trajectory(
        task="Toy-v1",
        instruction="stack the red cube",
        seed=7,
        policy="toy",
        images=images,
        state=state,
        starts=torch.arange(0, steps, CHUNK),
        actions=actions,
        labels=actions,
        trace=trace,
        logps=None,
        features=None,
        final_image=torch.zeros(16, 16, 3, dtype=torch.uint8),
        final_state=torch.zeros(STATE),
        signals={"success": torch.zeros(steps + 1, dtype=torch.bool)},
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


def stage_pair(chosen: int, rejected: int, better: slice, worse: slice, stage: int, **fields) -> StagePair:
    slices = (better.start, better.stop, worse.start, worse.stop)
    name = ("Reach", "Grasp")[stage]
    pair = StagePair("Toy-v1", "stack the red cube", 7, stage, name, chosen, rejected, *slices, 0.25, 1.5, "passed")
    return replace(pair, **fields)


EPISODES = [episode(5, 1), episode(3, 2), episode(1, 3), episode(1, 4)]
STAGE_PAIRS = [
    stage_pair(0, 1, slice(0, 4), slice(0, 2), 0),
    stage_pair(0, 1, slice(4, 10), slice(2, 6), 1),
    stage_pair(2, 3, slice(0, 2), slice(0, 2), 0),
    stage_pair(1, 0, slice(0, 2), slice(0, 4), 0),
]
WHOLE_PAIRS = [
    stage_pair(0, 1, slice(0, 10), slice(0, 6), 0, stage_name="trajectory", chosen_cost=0.0, rejected_cost=0.0),
    stage_pair(2, 3, slice(0, 2), slice(0, 2), 0, stage_name="trajectory", chosen_cost=0.0, rejected_cost=0.0),
]


def make_trainer(
    policy, folder, pairs=STAGE_PAIRS, *, ref_policy=None, peft_config=None, eval_dataset=None, **options
):
    defaults = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 4,
    }
    dataset = pairs if isinstance(pairs, Dataset) else pairs_dataset(EPISODES, pairs)
    args = StageDPOConfig(str(folder), **defaults | options)
    return StageDPOTrainer(policy, args, dataset, eval_dataset, ref_policy=ref_policy, peft_config=peft_config)


def perturb(policy, scale=0.05):
    """Move the policy away from its reference."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))


def batch_of(trainer):
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def loss_and_logits(trainer, batch):
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return loss, outputs["logits"]


def decision_logps(policy, index):
    """Score of each decision of one episode, straight from the policy."""
    row = pairs_dataset(EPISODES, [stage_pair(index, index, *[slice(0, EPISODES[index].num_steps)] * 2, 0)])[0]
    batch = PreferenceCollator(policy.prepare, CHUNK)([row])
    with torch.no_grad():
        return policy.score(batch["inputs"], batch["trace"])[: len(EPISODES[index].starts)]


def save_toy(folder) -> dict[str, str]:
    """Checkpoint, rollouts and four of their pairs as folders; returns the flags of recipes/dpo.py that name them."""
    plan = StagePlan(
        "Toy-v1",
        tuple(
            Stage(name=name, done=done, distance=lambda s: 1.0 - s["success"].float(), scale=1.0, reads=reads)
            for name, done, reads in (
                ("Reach", lambda s: s["is_near"], ("is_near", "success")),
                ("Grasp", succeeded, ("success",)),
            )
        ),
    )
    rollouts = [
        outcome(episode(5, 1), near_at=4, success_at=10),
        outcome(episode(3, 2), near_at=2),
        outcome(episode(1, 3)),
        outcome(episode(1, 4)),
    ]
    make_policy().save_pretrained(folder / "checkpoint")
    save_trajectories(rollouts, folder / "trajectories", plan, metadata={"collection": {"temperature": 1.0}})
    # of Reach 0 > 3, 1 > 2 and 1 > 3, of Grasp 0 > 1
    save_pairs(build_pairs(rollouts, plan).pairs[1:], folder / "pairs")
    return {
        "model": str(folder / "checkpoint"),
        "trajectories": str(folder / "trajectories"),
        "preferences": str(folder / "pairs"),
    }


def outcome(trajectory: Trajectory, *, near_at: int | None = None, success_at: int | None = None) -> Trajectory:
    """The episode with events at these steps."""
    rows = torch.arange(trajectory.num_steps + 1)
    signals = {
        name: rows >= (len(rows) if at is None else at) for name, at in (("is_near", near_at), ("success", success_at))
    }
    ends = {"terminated": success_at is not None, "truncated": success_at is None}
    return replace(trajectory, signals=signals, reward=signals["success"][1:].float(), **ends)
