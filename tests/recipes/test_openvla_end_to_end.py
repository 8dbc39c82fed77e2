"""The three phases with a tiny random OpenVLA on a Bridge task, by the recipes: demonstrations, imitation, pairs, preference, PPO."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_stare import TokenPolicy, get_plan, make_env
from trl_stare.data import collect_dataset, load_pairs, load_trajectories
from trl_stare.data.actors import Decision
from trl_stare.envs import get_simulated_task
from trl_stare.policies import OpenVLAOFTPolicy, OpenVLAPolicy, create_tiny_openvla

TASK = "PutCarrotOnPlateInScene-v1"
STATS = {"action": {"q01": [-0.03] * 3 + [-0.2] * 3 + [0.0], "q99": [0.03] * 3 + [0.2] * 3 + [1.0]}}
LORA = [
    "--use_peft",
    "--lora_r",
    "4",
    "--lora_alpha",
    "8",
    "--lora_dropout",
    "0",
    "--lora_target_modules",
    "all-linear",
]
TRAINING = ["--use_cpu", "True", "--report_to", "none", "--logging_steps", "1", *LORA]
ROOM = ["--num_envs", "2", "--num_workers", "1"]


def losses(folder: Path) -> list[float]:
    """Of the newest checkpoint's history."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def half_an_expert(policy, expert):
    """The demonstrator by the policy's own actions in the first environment, chance in the second: something to prefer."""

    def act(obs, signals):
        trace = policy.encode(expert(signals)[:, None])
        trace[1:] = torch.randint(0, 256, trace[1:].shape, generator=torch.Generator().manual_seed(int(trace.sum())))
        actions = policy.decode(trace)
        return Decision(actions, actions, trace, torch.zeros(trace.shape), torch.zeros(len(trace), 1))

    return act


def imitate(run_script, folder: Path, **oft: object) -> TokenPolicy:
    """`base`, `demos` and `sft` in `folder`."""
    torch.manual_seed(0)
    base = create_tiny_openvla({"bridge_orig": STATS})
    base.model.config.norm_stats["another"] = STATS  # as the published ones, it knows several robots
    base.save_pretrained(folder / "base")
    (folder / "oft.yaml").write_text(json.dumps({"oft": oft}))
    demos = ["--episodes", 4, "--successes_only", "--image_size", 56, "--output_dir", folder / "demos"]
    run_script("recipes/collect.py", "--task", TASK, *demos, *ROOM)
    given = ["--config", folder / "oft.yaml", "--model", folder / "base", "--demonstrations", folder / "demos"]
    given += ["--unnorm_key", "bridge_orig", "--action_convention", "bridge", "--output_dir", folder / "sft"]
    steps = ["--max_steps", 12, "--save_steps", 12, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2]
    run_script("recipes/sft.py", *given, *steps, *TRAINING)
    learnt = losses(folder / "sft")
    assert len(learnt) == 12 and learnt[-1] < 0.9 * learnt[0], learnt
    # whole, with one set of statistics and the gripper of the Bridge tasks
    policy = TokenPolicy.from_pretrained(folder / "sft")
    assert not hasattr(policy.model, "peft_config") and policy.unnorm_key == "bridge_orig"
    assert policy.decode(torch.zeros(1, policy.num_tokens).long())[..., 6].unique().tolist() == [-1.0]
    return policy


def interact(run_script, start: Path, out: Path) -> dict[str, torch.Tensor]:
    """Two iterations of PPO from `start`; the adapter that it trained."""
    sizes = ["--num_train_epochs", 2, "--episodes_per_iteration", 2, "--num_minibatches", 4, "--num_ppo_epochs", 1]
    sizes += ["--value_warmup_iterations", 0, "--eval_episodes", 2, "--save_strategy", "epoch"]
    run_script("recipes/ppo.py", "--model", start, "--task", TASK, *sizes, "--output_dir", out, *ROOM, *TRAINING)
    assert "success_once" in (out / "policy" / "README.md").read_text()
    adapter = load_file(out / "policy" / "adapter_model.safetensors")
    return {name: weight for name, weight in adapter.items() if "lora_B" in name and weight.abs().max() > 0}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.bridge_assets]


def test_imitation_preference_interaction(run_script, tmp_path):
    policy = imitate(run_script, tmp_path)
    assert type(policy) is OpenVLAPolicy
    sft, rolls, pairs, dpo, ppo = (tmp_path / name for name in ("sft", "rolls", "pairs", "dpo", "ppo"))
    # by the recipe first: a random policy reaches nothing, and its episodes cannot be compared
    several = ["--episodes", 2, "--episodes_per_seed", 2]
    run_script(
        "recipes/collect.py", "--task", TASK, "--model", sft, *several, "--output_dir", tmp_path / "chance", *ROOM
    )
    assert [t.trace.shape[1] for t in load_trajectories(tmp_path / "chance")] == [7, 7]
    with closing(make_env(TASK, 2, num_workers=1, image_size=56)) as env:
        expert = get_simulated_task(TASK).demonstrate
        collect_dataset(
            env, lambda _: half_an_expert(policy, expert), rolls, get_plan(TASK), episodes=2, episodes_per_seed=2
        )
    run_script("recipes/pairs.py", "--trajectories", rolls, "--output_dir", pairs)
    assert len(load_pairs(pairs)) > 0
    given = ["--model", sft, "--trajectories", rolls, "--preferences", pairs, "--step_micro_batch_size", 16]
    steps = ["--max_steps", 3, "--save_steps", 3, "--per_device_train_batch_size", 1, "--learning_rate", 1e-3]
    run_script("recipes/dpo.py", *given, *steps, "--output_dir", dpo, *TRAINING)
    assert len(losses(dpo)) == 3 and (dpo / "adapter_model.safetensors").is_file()

    assert interact(run_script, dpo, ppo), "nothing was trained"
    # the adapter lies on what preference learning made, not on what it began with
    whole, started = (load_file(folder / "model.safetensors") for folder in (ppo / "base", sft))
    assert any((whole[name] != started[name]).any() for name in started)
    assert TokenPolicy.from_pretrained(ppo / "policy").chunk_size == 1


def test_imitation_interaction_in_chunks(run_script, tmp_path):
    assert type(imitate(run_script, tmp_path, chunk_size=5)) is OpenVLAOFTPolicy
    assert interact(run_script, tmp_path / "sft", tmp_path / "ppo"), "nothing was trained"
    assert not (tmp_path / "ppo" / "base").exists()
    assert TokenPolicy.from_pretrained(tmp_path / "ppo" / "policy").chunk_size == 5
