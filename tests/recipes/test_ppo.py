"""recipes/ppo.py with its smoke configuration: the launch line as documented, killed and continued, in one and two processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from safetensors.torch import load_file
from trl import ModelConfig, TrlParser

from trl_stare import StagePPOConfig, TokenPolicy

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "configs" / "ppo_smoke.yaml"
BRIDGE = ROOT / "recipes" / "configs" / "openvla_7b_bridge_ppo.yaml"
CPU2 = ROOT / "recipes" / "accelerate" / "cpu2.yaml"


@pytest.fixture(scope="module")
def recipe(load_recipe):
    return load_recipe("ppo")


def parse(recipe, *flags: str):
    return TrlParser((recipe.PPOArguments, StagePPOConfig)).parse_args_and_config(
        args=["--config", str(SMOKE), *flags]
    )


def test_the_smoke_configuration_and_flags_over_it(recipe):
    args, config = parse(recipe, "--learning_rate", "1e-3", "--stage_aware", "False")
    assert (args.task, config.num_train_epochs, config.save_strategy.value) == ("StackCube-v1", 3, "epoch")
    assert (config.learning_rate, config.stage_aware) == (1e-3, False)


@pytest.mark.parametrize("flags", [("--model", "outputs/policy"), ("--demonstrations", "0")])
def test_a_checkpoint_or_demonstrations_but_not_both(recipe, flags):
    with pytest.raises(ValueError, match="one of `model` and `demonstrations` must be given"):
        parse(recipe, *flags)


@pytest.mark.parametrize(
    ("flags", "max_steps", "updates"),
    [
        (["--preset", "rl4vla-7b", "--max_steps", "64"], 64, 32),
        (["--config", str(BRIDGE), "--max_steps", "48"], 48, 24),
        (["--config", str(BRIDGE), "--preset", "small-cpu", "--max_steps", "144"], 144, 72),
    ],
)
def test_settings_are_checked_over_the_preset_and_not_before(recipe, monkeypatch, tmp_path, flags, max_steps, updates):
    """Without the preset an iteration has 48 updates, and 72 with the file; the preset of a flag goes before the file's."""
    given = ["--model", "policy", "--output_dir", str(tmp_path), "--use_cpu", "True", *flags]
    monkeypatch.setattr(sys, "argv", ["ppo.py", *given])
    args, config, _ = recipe.parse()
    assert (args.model, config.max_steps, config.updates_per_iteration) == ("policy", max_steps, updates)


def test_entries_of_imitation_are_flags_and_a_push_that_would_publish_the_data_is_refused(
    recipe, monkeypatch, tmp_path
):
    given = ["ppo.py", "--demonstrations", "4", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", [*given, "--imitation.max_steps", "3"])
    assert recipe.parse()[0].imitation == {"max_steps": 3}
    monkeypatch.setattr(sys, "argv", [*given, "--push_to_hub", "true", "--hub_model_id", "user/vla"])
    with pytest.raises(ValueError, match=f"hf upload user/vla {tmp_path}/policy"):
        recipe.parse()
    monkeypatch.setattr(sys, "argv", [*given, "--learningrate", "3"])
    with pytest.raises(ValueError, match="unknown flag '--learningrate'"):
        recipe.parse()


def test_help_shows_the_fields_of_the_trainer_too(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        recipe.parse()
    shown = capsys.readouterr().out
    assert "--preset" in shown and "--episodes_per_iteration" in shown and "--lora_r" in shown


def test_an_unknown_preset_and_steps_that_do_not_fit_it_are_refused(recipe, monkeypatch, tmp_path):
    given = ["ppo.py", "--model", "policy", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", [*given, "--preset", "big"])
    with pytest.raises(ValueError, match="`preset` must be one of"):
        recipe.parse()
    monkeypatch.setattr(sys, "argv", [*given, "--preset", "rl4vla-7b", "--max_steps", "48"])
    with pytest.raises(ValueError, match="whole iterations of 32 updates, got 48"):
        recipe.parse()


@pytest.mark.parametrize(("flags", "size"), [([], 16), (["--image_size", "32"], 32)])
def test_pictures_are_of_the_size_that_the_model_reads(recipe, monkeypatch, tmp_path, flags, size):
    stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    TokenPolicy.create_tiny({"StackCube-v1": stats}, image_size=16).save_pretrained(tmp_path / "policy")
    args, config = parse(recipe, "--model", str(tmp_path / "policy"), "--demonstrations", "0", *flags)

    def make_env(*_, image_size, **__):
        raise InterruptedError(image_size)

    monkeypatch.setattr(recipe, "make_env", make_env)
    with pytest.raises(InterruptedError, match=f"^{size}$"):
        recipe.main(args, config, ModelConfig())


def launch(out: Path, processes: int) -> subprocess.Popen:
    """The documented line."""
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(CPU2)] if processes == 2 else []
    line += ["recipes/ppo.py", "--config", str(SMOKE), "--output_dir", str(out), "--num_workers", "1"]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def kill(launcher: subprocess.Popen, processes: int) -> None:
    """SIGKILL. Several processes end with their launcher; one is not its own launcher's to end (accelerate starts it plainly)."""
    started = psutil.Process(launcher.pid).children(recursive=True)
    for process in started if processes == 1 else ():
        process.kill()
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(started, timeout=30)[1]


def wait_for(path: Path, process: subprocess.Popen, lines: int = 0) -> None:
    """Until `path` is there, with so many lines."""
    while not path.exists() or (lines and len(path.read_text().splitlines()) < lines):
        assert process.poll() is None, path
        time.sleep(0.02)


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if not name.startswith("time/")} for entry in entries]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_rollout_update_and_saving_the_smoke_run_ends_the_same(tmp_path, processes):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, processes).wait(1800) == 0, whole.with_suffix(".log").read_text()[-3000:]
    # within the first rollout; while the second iteration's update runs; as the second checkpoint is begun
    for path, lines in ((killed / "episodes.jsonl", 3), (killed / "episodes.jsonl", 32), (killed / "_saving", 0)):
        process = launch(killed, processes)
        wait_for(path, process, lines)
        kill(process, processes)
    assert launch(killed, processes).wait(1800) == 0, killed.with_suffix(".log").read_text()[-3000:]

    assert (whole / "episodes.jsonl").read_text() == (killed / "episodes.jsonl").read_text()
    assert len((whole / "episodes.jsonl").read_text().splitlines()) == 48
    assert history_of(whole / "checkpoint-24") == history_of(killed / "checkpoint-24")
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (whole / "policy" / name).read_bytes() == (killed / "policy" / name).read_bytes()
    first, last = (load_file(folder / "model.safetensors") for folder in (whole / "initial", whole / "policy"))
    assert any((first[name] != last[name]).any() for name in first), "nothing was trained"
    assert TokenPolicy.from_pretrained(killed / "policy").chunk_size == 4
    assert "success_once" in (killed / "policy" / "README.md").read_text()


@pytest.mark.parametrize(("flags", "temperature"), [([], 1.0), (["--eval_temperature", "0.6"], 0.6)])
def test_what_is_published_is_played_at_the_temperature_of_evaluation(
    recipe, monkeypatch, tmp_path, flags, temperature
):
    stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    TokenPolicy.create_tiny({"StackCube-v1": stats}, image_size=16).save_pretrained(tmp_path / "policy")
    args, config = parse(recipe, "--output_dir", str(tmp_path), "--use_cpu", "True", *flags)

    def evaluate(policy, *_, temperature, **__):
        assert policy.device == config.device and not policy.model.training
        raise InterruptedError(temperature)

    monkeypatch.setattr(recipe, "evaluate", evaluate)
    starts = {"seed": [0]}
    trainer = SimpleNamespace(env=None, plan=None, args=config, eval_dataset=starts, train_dataset=starts)
    with pytest.raises(InterruptedError, match=f"^{temperature}$"):
        recipe.report(args, config, trainer)


def test_a_small_vla_of_other_demonstrations_is_not_taken_for_the_one_that_is_asked_for(recipe, monkeypatch, tmp_path):
    def imitate(args, config, plan):
        stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
        TokenPolicy.create_tiny({args.task: stats}, image_size=16).save_pretrained(tmp_path / "initial")

    def killed(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(recipe, "imitate", imitate)
    monkeypatch.setattr(recipe, "make", killed)
    for flags, error in (
        ([], InterruptedError),
        ([], InterruptedError),
        (["--demonstrations", "9", "--seed", "1"], ValueError),
    ):
        args, config = parse(recipe, "--output_dir", str(tmp_path), *flags)
        with pytest.raises(error, match=r"other \['demonstrations', 'seed'\]" if flags else None):
            recipe.main(args, config, ModelConfig())
