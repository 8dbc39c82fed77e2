"""Imitation from other VLAs, without a simulator: real classes, two updates.

By `sft.py` from a pi0 (and, where LeRobot is, a SmolVLA) as LeRobot writes it, and from a LLaVA that was made a VLA; by `ipi.py` from that.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from trl_stare import FlowPolicy, StageSFTConfig, TokenPolicy
from trl_stare.data import Trajectory, save_trajectories
from trl_stare.policies import HFVLMPolicy, create_tiny_pi0
from trl_stare.stages import get_plan

TESTS = Path(__file__).parents[1]
TASK = "StackCube-v1"


def demonstration(seed: int, steps: int = 6) -> Trajectory:
    """Noise in the ranges of the Panda, seen at every step."""
    g = torch.Generator().manual_seed(seed)
    signals = {name: torch.zeros(steps + 1, 3) for name in ("tcp_position", "object_position", "goal_position")}
    signals |= {name: torch.zeros(steps + 1, 1) for name in ("object_lift", "gripper_width")}
    signals |= {name: torch.zeros(steps + 1, dtype=torch.bool) for name in ("is_contact", "is_grasped", "success")}
    actions = torch.rand(steps, 7, generator=g) * 0.2 - 0.1
    actions[:, 6] = 1.0
    return Trajectory(
        task=TASK, instruction="stack the red cube", seed=seed, policy="toy", starts=torch.arange(steps),
        images=torch.randint(0, 256, (steps, 32, 32, 3), generator=g).byte(), state=torch.randn(steps, 8, generator=g),
        actions=actions, labels=actions, trace=None, logps=None, features=None, signals=signals, reward=torch.zeros(steps),
        final_image=torch.zeros(32, 32, 3, dtype=torch.uint8), final_state=torch.zeros(8), terminated=True, truncated=False,
    )  # fmt: skip


@pytest.fixture
def lerobot(tmp_path) -> tuple[Path, dict, dict]:
    """A folder as LeRobot writes it, what of its architecture is not the published one's, and its weights by our names."""
    torch.manual_seed(0)
    policy = create_tiny_pi0({"any": {"action": {"q01": [-1.0], "q99": [1.0]}}}, chunk_size=50)
    policy.model.save_pretrained(tmp_path / "ours")
    policy.processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "theirs").mkdir()
    weights = {f"model.{name}": value for name, value in load_file(tmp_path / "ours" / "model.safetensors").items()}
    save_file(weights, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": 50}))
    config = policy.model.config.to_dict()
    sizes = {name: config[name] for name in ("vlm_config", "dit_config", "max_state_dim", "max_action_dim")}
    return tmp_path, sizes, policy.model.state_dict()


def run_sft(folder: Path, run_script, **flags: object) -> list[Trajectory]:
    """`sft.py` on the checkpoint `folder / "theirs"`; the demonstrations."""
    shown = [demonstration(seed) for seed in range(3)]
    save_trajectories(shown, folder / "data", get_plan(TASK))
    flags = {
        "model": folder / "theirs", "demonstrations": folder / "data", "output_dir": folder / "sft", "max_steps": 2,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "lora_r": 4,
        "lora_dropout": 0, "save_strategy": "no",
    } | flags  # fmt: skip
    run_script("recipes/sft.py", *(part for name, value in flags.items() for part in (f"--{name}", value)))
    return shown


def run_lerobot(folder: Path, run_script, settings: dict, **flags: object) -> list[Trajectory]:
    """The same on what LeRobot wrote."""
    (folder / "settings.yaml").write_text(yaml.safe_dump({"lerobot": settings}))
    given = {"config": folder / "settings.yaml", "tokenizer": folder / "tokenizer", "use_peft": True}
    return run_sft(folder, run_script, **given, **flags)


def test_a_pi0_of_lerobot_is_trained_and_takes_the_statistics_of_the_demonstrations(lerobot, run_script):
    folder, sizes, before = lerobot
    settings = sizes | {"chunk_size": 2, "num_inference_steps": 3}
    shown = run_lerobot(folder, run_script, settings, lora_target_modules=r"model\.dit\..*_proj")

    policy = FlowPolicy.from_pretrained(folder / "sft")
    assert policy.chunk_size == 2 and policy.model.config.num_inference_steps == 3
    actions = torch.cat([trajectory.labels for trajectory in shown]).double()
    assert torch.allclose(policy.statistics.second[:6], actions.quantile(0.99, dim=0)[:6], atol=1e-6)
    assert policy.statistics.mask.tolist() == [True] * 6 + [False] and policy.state_statistics.action_dim == 8
    after = policy.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.dit.") and "_proj" in name for name in changed)


def test_a_smolvla_of_lerobot_is_trained(tmp_path, run_script):
    pytest.importorskip("lerobot", reason="needs LeRobot, in an environment of its own: docs/flow.md")
    sys.path.append(str(TESTS / "policies"))
    from lerobot_toy import make_tokenizer, write_lerobot

    write_lerobot("smolvla", tmp_path / "theirs")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    adapted = r".*lm_expert.*\.q_proj"
    run_lerobot(tmp_path, run_script, {"chunk_size": 2, "num_inference_steps": 3}, lora_target_modules=adapted)
    policy = FlowPolicy.from_pretrained(tmp_path / "sft")
    assert policy.chunk_size == 2 and policy.state_statistics.action_dim == 8
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "sft" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        before.keys() == after.keys() and changed and all("lm_expert" in name and "q_proj" in name for name in changed)
    )


@pytest.fixture
def llava(tmp_path) -> Path:
    """`theirs`: a VLA by `HFVLMPolicy.create`, whose statistics are in `config.vla`, of two robots."""
    sys.path.append(str(TESTS / "policies"))
    from hf_vlm_toy import OPENVLA_STATS, make_llava_vla

    make_llava_vla(another=OPENVLA_STATS["bridge_orig"]).save_pretrained(tmp_path / "theirs")
    return tmp_path


def trained_llava(folder: Path, saved: Path) -> HFVLMPolicy:
    """What was saved, loaded without a key; its weights are whole and not those that it began with."""
    policy = TokenPolicy.from_pretrained(saved)
    assert type(policy) is HFVLMPolicy and policy.chunk_size == 2 and not hasattr(policy.model, "peft_config")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "theirs", saved))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    return policy


def test_a_llava_is_trained_with_one_set_of_its_statistics(llava, run_script):
    run_sft(llava, run_script, unnorm_key="another")
    policy = trained_llava(llava, llava / "sft")
    theirs = TokenPolicy.from_pretrained(llava / "theirs", "another").model.config.vla
    assert policy.model.config.vla == theirs | {"norm_stats": {"another": theirs["norm_stats"]["another"]}}


def test_a_llava_takes_the_statistics_of_the_demonstrations(llava, run_script):
    lora = {"use_peft": True, "lora_target_modules": "all-linear"}
    shown = run_sft(llava, run_script, new_statistics=True, action_convention="bridge", **lora)
    policy = trained_llava(llava, llava / "sft")
    assert policy.unnorm_key == TASK and policy.model.config.vla["action_convention"] == "bridge"
    actions = torch.cat([trajectory.labels for trajectory in shown]).double()
    assert torch.allclose(policy.bins.statistics.second[:6], actions.quantile(0.99, dim=0)[:6], atol=1e-6)


@pytest.mark.parametrize("flags", [{"new_statistics": True}, {"action_convention": "bridge"}])
def test_what_has_no_convention_is_refused_another_one_and_other_statistics(tmp_path, run_script, flags):
    stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    TokenPolicy.create_tiny({TASK: stats}, image_size=16).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="must have an `action_convention`, got a 'stare_vla' without"):
        run_sft(tmp_path, run_script, **flags)


@pytest.mark.parametrize("lora", [{}, {"r": 2}])
def test_ipi_imitates_with_a_llava(llava, load_recipe, lora):
    recipe = load_recipe("ipi")
    args = recipe.IPIArguments(
        output_dir=str(llava / "ipi"), init_checkpoint=str(llava / "theirs"), chunk_size=2, lora=lora,
        policy={"unnorm_key": "another", "action_convention": "bridge"},
        imitation={"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "save_strategy": "no"},
    )  # fmt: skip
    shown = [demonstration(seed) for seed in range(3)]
    recipe.imitate(args, recipe.trainer_config(args, "imitation"), shown, get_plan(TASK))
    policy = trained_llava(llava, llava / "ipi" / "imitation")
    assert policy.unnorm_key == "another" and policy.model.config.vla["action_convention"] == "bridge"


def test_an_adapter_is_refused_where_no_process_could_merge_it(load_recipe, tmp_path, monkeypatch):
    recipe = load_recipe("sft")
    monkeypatch.setattr(recipe, "is_deepspeed_zero3_enabled", lambda: True)
    given = recipe.SFTArguments("model", "demonstrations"), StageSFTConfig(str(tmp_path)), ModelConfig(use_peft=True)
    with pytest.raises(ValueError, match="`use_peft` must be false under ZeRO-3"):
        recipe.main(*given)
