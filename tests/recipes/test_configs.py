"""The configurations of OpenVLA and pi0: every one is what its recipe takes, and its lines for several GPUs make the same updates."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from trl import ModelConfig, TrlParser, get_peft_config

from trl_stare import StageDPOConfig, StagePPOConfig, StageSFTConfig

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(path for kind in ("openvla", "pi0") for path in (RECIPES / "configs").glob(f"{kind}_*.yaml"))
PLACES = ["--output_dir", "out", "--use_cpu", "True"]
GIVEN = {
    "sft": ["--demonstrations", "data", *PLACES],
    "dpo": ["--model", "policy", "--trajectories", "data", *PLACES],
    "ppo": ["--model", "policy", *PLACES],
}
ON_THE_EXPERT = ("pi0_bridge_ppo", "pi0_dpo")
STEPS = {"bridge": 60, "franka": 50}


@pytest.fixture(scope="module")
def recipes():
    return {name: runpy.run_path(str(RECIPES / f"{name}.py")) for name in GIVEN}


def parse(recipes, path: Path, *flags: str):
    """What `main` of the recipe is called with."""
    name = path.stem.rsplit("_", 1)[1]
    arguments = [*GIVEN[name], *flags]
    if name == "ppo":
        sys.argv = ["ppo.py", "--config", str(path), *arguments]
        return recipes[name]["parse"]()
    kinds = {"sft": ("SFTArguments", StageSFTConfig), "dpo": ("DPOArguments", StageDPOConfig)}[name]
    parser = TrlParser((recipes[name][kinds[0]], kinds[1], ModelConfig))
    return parser.parse_args_and_config(args=["--config", str(path), *arguments])


def lines(path: Path) -> dict[int, list[str]]:
    """Number of GPUs -> the flags that its line adds to the first one's."""
    found = re.findall(r"^#   (\d) GPUs? .*?(?:recipes/\w+\.py \.\.\.(.*))?$", path.read_text(), re.MULTILINE)
    return {int(count): flags.split() for count, flags in found}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_what_its_recipe_takes(recipes, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    _, config, model = parse(recipes, path)
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (32, 16, 0.0)
    assert lora.target_modules == ("all-linear" if path.stem not in ON_THE_EXPERT else r"model\.dit\..*_proj")
    assert model.dtype == "bfloat16" and config.bf16
    assert f"recipes/configs/{path.name}" in path.read_text(), "the launch line names another file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_four_and_eight_gpus_make_the_same_updates(recipes, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    made = set()
    assert lines(path).keys() == {1, 4, 8}
    for count, flags in lines(path).items():
        args, config, _ = parse(recipes, path, *flags)
        if isinstance(config, StagePPOConfig):
            chunk = 1 if "openvla_7b" in path.stem else 5
            decisions = config.episodes_per_iteration * STEPS[path.stem.split("_")[-2]] // chunk // count
            each, rest = divmod(decisions, config.num_minibatches)
            assert not rest and each in (8, 10) and args.num_envs * count == config.episodes_per_iteration
            made.add((config.updates_per_iteration, each * config.gradient_accumulation_steps * count))
        else:
            made.add(config.per_device_train_batch_size * config.gradient_accumulation_steps * count)
    assert len(made) == 1, made


def test_the_memory_table_of_a_configuration(recipes, monkeypatch, caplog):
    memory = runpy.run_path(str(RECIPES / "estimate_memory.py"))
    path = RECIPES / "configs" / "openvla_7b_bridge_ppo.yaml"
    args, _ = TrlParser(memory["MemoryArguments"]).parse_args_and_config(
        args=["--config", str(path), "--update_batch", "4"], return_remaining_strings=True
    )
    assert (args.lora_r, args.num_envs, args.update_batch) == (32, 64, 4)
    with caplog.at_level("INFO"):
        estimate = memory["main"](args)
    assert "| weights (bfloat16) | 15.08 |" in caplog.text and estimate.kv_cache > 9e9


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("pi0_bridge_ppo", [], "must be 'all-linear' for openvla/openvla-7b.*--sizes_of lerobot/pi0_base"),
        ("pi0_bridge_sft", ["--gradient_checkpointing", "true"], "must be left out for pi0"),
    ],
)
def test_what_one_model_does_not_know_is_refused(name, flags, message):
    memory = runpy.run_path(str(RECIPES / "estimate_memory.py"))
    args, _ = TrlParser(memory["MemoryArguments"]).parse_args_and_config(
        args=["--config", str(RECIPES / "configs" / f"{name}.yaml"), *flags], return_remaining_strings=True
    )
    with pytest.raises(ValueError, match=message):
        memory["main"](args)


def test_the_memory_table_of_pi0(caplog):
    """Its real size: the action expert's adapters alone."""
    memory = runpy.run_path(str(RECIPES / "estimate_memory.py"))
    path = RECIPES / "configs" / "pi0_bridge_ppo.yaml"
    args, _ = TrlParser(memory["MemoryArguments"]).parse_args_and_config(
        args=["--config", str(path), "--sizes_of", "lerobot/pi0_base"], return_remaining_strings=True
    )
    with caplog.at_level("INFO"):
        estimate = memory["main"](args)
    assert estimate.weights == 2 * 3_501_372_176 and estimate.adapters == 4 * 13_860_864
    # 18 layers with one head of 256, keys and values in two bytes, of 256 patches and 32 tokens, for 64 environments
    assert estimate.kv_cache == 64 * 18 * 2 * 256 * 2 * 288
    assert "| weights (bfloat16) | 7.00 |" in caplog.text
