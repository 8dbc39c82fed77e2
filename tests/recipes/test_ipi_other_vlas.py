"""The whole pipeline with other VLAs, of tiny sizes and random weights, on a Bridge task, as a user launches it.

An OpenVLA under a LoRA, a pi0, and, in an environment where LeRobot is (docs/flow.md), a SmolVLA.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_stare import FlowPolicy, TokenPolicy
from trl_stare.policies import OpenVLAPolicy, create_tiny_openvla, create_tiny_pi0, load_lerobot_policy

ROOT = Path(__file__).parents[2]
# A Bridge task in which a policy of few updates passes a stage now and then: without that there are no pairs.
TASKS = """
from dataclasses import replace

from trl_stare import Stage, StagePlan, get_plan, register_task
from trl_stare.envs import get_simulated_task

SHIPPED = "PutCarrotOnPlateInScene-v1"


def distance(s):
    return (s["object_position"] - s["tcp_position"]).norm(dim=-1)


def is_near(s):
    return (distance(s) < 0.15) | s["is_grasped"] | s["success"]


READS = ("object_position", "tcp_position", "is_grasped", "success")
APPROACH = Stage(name="Approach", done=is_near, distance=distance, scale=0.3, reads=READS)
TASK = replace(get_simulated_task(SHIPPED), name="ApproachCarrot-v1")
register_task(TASK, StagePlan("ApproachCarrot-v1", (APPROACH, *get_plan(SHIPPED).stages)))
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "recipes/ipi.py"]  # fmt: skip
SMALL = {
    "num_demonstrations": 16, "preference_starts": 4, "rollouts_per_start": 4, "min_cost_gap": 0, "eval_episodes": 2, "video_episodes": 2,
    "num_envs": 4, "temperature": 1.0,
    "imitation.max_steps": 100, "imitation.per_device_train_batch_size": 16, "imitation.learning_rate": "2e-3",
    "imitation.logging_steps": 25,
    "preference.max_steps": 2, "preference.per_device_train_batch_size": 1, "preference.step_micro_batch_size": 16,
    "preference.logging_steps": 1, "preference.learning_rate": "1e-3",
    "interaction.num_train_epochs": 2, "interaction.episodes_per_iteration": 4, "interaction.num_minibatches": 4,
    "interaction.num_ppo_epochs": 1, "interaction.value_warmup_iterations": 0, "interaction.logging_steps": 4,
}  # fmt: skip
SCALE = {"q01": [-0.03] * 3 + [-0.2] * 3 + [0.0], "q99": [0.03] * 3 + [0.2] * 3 + [1.0]}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.bridge_assets]


def openvla(folder: Path) -> tuple[OpenVLAPolicy, dict]:
    """It knows several robots, as the published ones do."""
    policy = create_tiny_openvla({"bridge_orig": {"action": SCALE}})
    policy.model.config.norm_stats["another"] = {"action": SCALE}
    own = {"policy.unnorm_key": "bridge_orig", "policy.action_convention": "bridge", "image_size": 56, "chunk_size": 1}
    return policy, own | {"lora.r": 8, "lora.lora_alpha": 16}


def pi0(folder: Path) -> tuple[FlowPolicy, dict]:
    """All its weights are trained, and it acts in chunks."""
    scale = {"q01": [*SCALE["q01"][:6], -1.0], "q99": SCALE["q99"]}
    policy = create_tiny_pi0({"bridge": {"action": scale}}, num_inference_steps=3)
    return policy, {"image_size": 28, "chunk_size": policy.chunk_size, "preference.cost_coef": 0.0}


def smolvla(folder: Path) -> tuple[FlowPolicy, dict]:
    """Its action expert alone is trained, as LeRobot does it."""
    pytest.importorskip("lerobot", reason="needs LeRobot, in an environment of its own: docs/flow.md")
    sys.path.append(str(ROOT / "tests" / "policies"))
    from lerobot_toy import make_tokenizer, write_lerobot

    write_lerobot("smolvla", folder, train_expert_only=True)
    scale = {"q01": [*SCALE["q01"][:6], -1.0], "q99": SCALE["q99"]}
    policy = load_lerobot_policy(folder, tokenizer=make_tokenizer(), norm_stats={"bridge": {"action": scale}})
    return policy, {"image_size": 56, "chunk_size": policy.chunk_size, "preference.cost_coef": 0.0}


@pytest.mark.parametrize("make", [openvla, pi0, smolvla])
def test_imitation_preference_interaction(make, tmp_path):
    torch.manual_seed(0)
    policy, own = make(tmp_path / "theirs")
    policy.save_pretrained(tmp_path / "base")
    (tmp_path / "approach.py").write_text(TASKS)
    task = {"task": "ApproachCarrot-v1", "task_module": tmp_path / "approach.py"}
    options = SMALL | task | {"init_checkpoint": tmp_path / "base", "output_dir": tmp_path / "run"} | own
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run([sys.executable, *LAUNCH, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["phases"]) == ["imitation", "preference", "interaction"]
    before = load_file(tmp_path / "base" / "model.safetensors")
    for phase in results["phases"]:
        # every checkpoint is whole, loads without a key, and differs from the one before
        folder = tmp_path / "run" / phase
        assert not (folder / "adapter_config.json").exists()
        trained = TokenPolicy.from_pretrained(folder)
        assert type(trained) is type(policy) and trained.chunk_size == policy.chunk_size
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys() and any((after[name] != before[name]).any() for name in before)
        before = after
    assert (tmp_path / "run" / "interaction" / "value_head.safetensors").is_file()
