"""recipes/dpo.py on toy folders: full fine-tuning, LoRA, continuing; one process and two of DDP, ZeRO-2 and ZeRO-3."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from stage_dpo_toy import make_policy, save_toy
from trl import ModelConfig, TrlParser

from trl_stare import StageDPOConfig, TokenPolicy
from trl_stare.data import InvalidDatasetError, load_pairs, save_pairs

sys.path.insert(0, str(Path(__file__).parents[1]))
from minihub import MiniHub  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("dpo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


def flags_of(folders, out, **options) -> list[str]:
    given = folders | {
        "output_dir": out, "learning_rate": 1e-3, "max_steps": STEPS, "per_device_train_batch_size": 2,
        "step_micro_batch_size": 3, "logging_steps": 1, "save_steps": 3, "disable_tqdm": True,
    } | options  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name}", *str(value).split())]


def run(recipe, folders, out, **options):
    parser = TrlParser((recipe.DPOArguments, StageDPOConfig, ModelConfig))
    recipe.main(*parser.parse_args_and_config(args=flags_of(folders, out, **options)))


def losses_of(out):
    history = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_it_trains_and_continues(recipe, folders, tmp_path):
    run(recipe, folders, tmp_path / "whole")
    trained = TokenPolicy.from_pretrained(tmp_path / "whole").model.state_dict()
    initial = make_policy().model.state_dict()
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)

    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert card.data.pipeline_tag == "robotics" and {"trl", "sta-tpo", "robotics"} <= set(card.data.tags)
    for part in (
        "# whole",
        "policy for Toy-v1, fine-tuned on pairs",
        "4 pairs: Reach 3, Grasp 1. Step 6 of 6.",
        "| objective | sta-tpo |",
        "| learning_rate | 0.001 |",
        "TokenPolicy.from_pretrained('whole')",
    ):
        assert part in card.content, part
    assert "time machine" not in card.content and "None" not in card.content

    run(recipe, folders, tmp_path / "two", max_steps=3, lr_scheduler_type="constant")
    (tmp_path / "two" / "checkpoint-5").mkdir()  # as a process leaves it that is killed while it saves
    run(recipe, folders, tmp_path / "two", lr_scheduler_type="constant")
    assert len(losses_of(tmp_path / "two")) == STEPS
    # what it was trained on stays, whatever is refused
    rows = (tmp_path / "two" / "_pairs" / "pairs.arrow").stat().st_mtime_ns
    for other in ({"beta": 0.7}, {"learning_rate": 1e-2}):
        with pytest.raises(ValueError, match=f"config.yaml has other \\['{next(iter(other))}'\\]"):
            run(recipe, folders, tmp_path / "two", lr_scheduler_type="constant", **other)
    assert (tmp_path / "two" / "_pairs" / "pairs.arrow").stat().st_mtime_ns == rows


def test_a_run_goes_on_from_the_same_contents_under_any_name_and_from_no_others(recipe, folders, tmp_path):
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
    moved, options = {name: str(tmp_path / name) for name in folders}, {"lr_scheduler_type": "constant"}
    run(recipe, folders, tmp_path / "out", max_steps=3, **options)
    run(recipe, moved, tmp_path / "out", **options)
    assert len(losses_of(tmp_path / "out")) == STEPS
    other = make_policy()
    other.model.lm_head.weight.data += 1.0
    other.save_pretrained(moved["model"])
    save_pairs(load_pairs(folders["preferences"])[:-1], moved["preferences"])
    for name, other in (("model", "weights"), ("preferences", "data")):
        with pytest.raises(ValueError, match=f"config.yaml has other \\['{other}'\\]"):
            run(recipe, folders | {name: moved[name]}, tmp_path / "out", **options)


def test_another_temperature_than_the_rollouts_is_a_warning(recipe, folders, caplog):
    for temperature in (1.0, 0.3):
        recipe.warn_of_other_temperatures(Path(folders["trajectories"]), temperature)
    assert caplog.messages == [
        "`temperature` should be that of the rollouts, 1.0, got 0.3. Give `--temperature`.",
    ]


def test_lora_saves_an_adapter(recipe, folders, tmp_path):
    run(recipe, folders, tmp_path, use_peft=True, lora_r=2, lora_target_modules="q_proj v_proj", loss_type="ipo")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    # PEFT would load the weights into it, where they count for something else
    with pytest.raises(ValueError, match="config.yaml has other \\['adapter'\\]"):
        run(
            recipe,
            folders,
            tmp_path,
            use_peft=True,
            lora_r=2,
            lora_alpha=64,
            lora_target_modules="q_proj v_proj",
            loss_type="ipo",
        )
    config = json.loads((tmp_path / "policy_config.json").read_text())  # statistics may not be the base's
    assert config["norm_stats"] and config["model_type"] == "stare_vla"
    assert "merge_checkpoint(" in (tmp_path / "README.md").read_text()


def test_a_loss_that_needs_more_than_a_margin_is_refused_by_name(recipe, folders, tmp_path):
    with pytest.raises(ValueError, match="`loss_type` must be one of .*apo_zero"):
        run(recipe, folders, tmp_path, loss_type="apo_zero")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_from_the_hub_at_a_revision(folders, tmp_path):
    """Model, trajectories and pairs of an older revision than main; in a process that knows no other Hub."""
    with MiniHub() as hub:
        model = hub.publish("user/policy", Path(folders["model"]))
        hub.publish("user/policy", Path(folders["trajectories"]))  # main is no model any more
        env = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_writer", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        pushed = subprocess.run(
            [sys.executable, "recipes/push_to_hub.py", "--repo_id", "user/toy", "--trajectories", folders["trajectories"],
             "--preferences", folders["preferences"]], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        data = hub.repos["user/toy"]["commits"][-1]["id"]
        hub.publish("user/toy", Path(folders["model"]))
        given = {"model": "user/policy", "model_revision": model, "trajectories": "user/toy", "revision": data}
        done = subprocess.run(
            [sys.executable, "recipes/dpo.py", *flags_of(given, tmp_path / "out")],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses_of(tmp_path / "out")) == STEPS
    assert [path.suffix for path in (tmp_path / "out" / "_pairs").iterdir()].count(".arrow") == 1


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("pairs of others", InvalidDatasetError, "the dataset must be without problems, got"),
        ("another checkpoint", ValueError, "must be a rollout of a policy with the same actions"),
        ("no pairs", ValueError, "`preferences` must be given, got None"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_made(
    recipe, folders, tmp_path, change, kind, message
):
    given = dict(folders)
    if change == "pairs of others":
        pairs = load_pairs(folders["preferences"])
        save_pairs([replace(pairs[0], chosen=9), *pairs[1:]], tmp_path / "pairs")
        given["preferences"] = str(tmp_path / "pairs")
    elif change == "another checkpoint":
        policy = make_policy()
        policy.model.config.norm_stats["toy"]["action"]["scale"] = [2.0] * 3
        policy.save_pretrained(tmp_path / "other")
        given["model"] = str(tmp_path / "other")
    else:
        del given["preferences"]
    with pytest.raises(kind, match=message):
        run(recipe, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_two_processes_have_the_losses_of_one(recipe, folders, tmp_path, name):
    """The same global batch: two pairs in one process, or one pair in each of two."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed. Run: pip install 'trl-stare[deepspeed]'")
    config = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    flags = flags_of(folders, tmp_path / "two", per_device_train_batch_size=1)
    # DeepSpeed looks for ninja on the path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "recipes/dpo.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "two" / f"checkpoint-{STEPS}" / "rng_state_1.pth").is_file(), "there was one process only"

    run(recipe, folders, tmp_path / "one")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    start, one, two = (
        torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])
        for folder in (Path(folders["model"]), tmp_path / "one", tmp_path / "two")
    )
    # Adam takes full steps also where gradients are rounding errors
    assert (two - one).norm() < 0.02 * (one - start).norm()
