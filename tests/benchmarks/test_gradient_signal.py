"""What batches of gradients have in common, by hand; and the whole benchmark on a few episodes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gradient_signal import SETTINGS, agreement, between, compare, gain, jackknife, markdown  # noqa: E402
from trl_stare import StagePPOConfig, TokenPolicy  # noqa: E402


def test_products_of_different_batches_by_hand():
    g = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert between(g, g).item() == pytest.approx(2 * (1 + 0 + 2) / 6)
    assert agreement(g).item() == pytest.approx(1.0 / ((1 + 2 + 4) / 3))
    assert agreement(torch.eye(3)).item() == 0.0
    assert agreement(torch.ones(4, 5)).item() == pytest.approx(1.0)
    r = torch.tensor([[3.0, 4.0]] * 3)
    assert gain(2 * r, r).item() == pytest.approx(5.0)
    assert gain(torch.tensor([[0.0, 1.0]] * 3), r).item() == pytest.approx(4.0)


def test_chance_alone_is_not_taken_for_signal():
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.zeros(400), torch.randn(200, 400, generator=generator)
    assert agreement(noise).item() == pytest.approx(0.0, abs=5e-4)
    signal[0] = 20.0  # as long as the noise: half of the squared length
    value, error = jackknife(agreement, signal + noise)
    assert value == pytest.approx(0.5, abs=3 * error) and 0 < error < 0.02


def test_the_jackknife_of_a_mean_is_the_standard_error():
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])
    value, error = jackknife(lambda rows: rows.mean(), x)
    assert value == 4.0 and error == pytest.approx(x.std().item() / 2)


def test_a_setting_is_compared_along_the_first_and_with_the_second():
    generator = torch.Generator().manual_seed(1)
    success = torch.tensor([1.0, 0.0, 0.0]) + 0.1 * torch.randn(6, 3, generator=generator)
    plain, better = torch.tensor([[1.0, 1.0, 0.0]] * 6), torch.tensor([[5.0, 0.0, 0.0]] * 6)
    results = compare({"success": success, "ppo": plain, "better": better})
    assert results["ppo"]["gain"][0] == pytest.approx(0.5**0.5, rel=0.1) and results["ppo"]["more"] == (0.0, 0.0)
    assert results["better"]["more"][0] == pytest.approx(1 - 0.5**0.5, rel=0.2)
    table = markdown({name: row | {"explained": 0.5} for name, row in results.items()})
    assert "| better | 50 % | 1.000 +- 0.000 | " in table and "more than ppo" in table
    assert gain(torch.zeros(3, 2), torch.ones(3, 2)).item() == agreement(torch.zeros(3, 2)).item() == 0.0


@pytest.mark.parametrize("name", yaml.safe_load(SETTINGS.read_text()))
def test_every_setting_is_one_of_the_trainer(name, tmp_path):
    settings = yaml.safe_load(SETTINGS.read_text())[name]
    StagePPOConfig.preset("small-cpu", str(tmp_path), **settings)


@pytest.mark.slow
def test_it_measures_a_checkpoint_and_continues(run_script, tmp_path, capsys):
    torch.manual_seed(0)
    stats = {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}
    TokenPolicy.create_tiny({"toy": stats}, image_size=64, chunk_size=4).save_pretrained(tmp_path / "policy")
    settings = {
        "success": {"stage_aware": False, "gae_lambda": 1.0},
        "hidden": {"critic": "hidden", "bootstrap_on_truncation": True},
    }
    command = [
        "benchmarks/gradient_signal.py", f"--checkpoint={tmp_path / 'policy'}", "--task=PushCube-v1", "--num_envs=4",
        f"--config={tmp_path / 'settings.yaml'}", f"--output_dir={tmp_path / 'out'}", "--episodes=4", "--batches=3", "--warmup=1",
    ]  # fmt: skip
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    run_script(*command)
    first = tmp_path / "out" / "settings" / "hidden" / "measured.safetensors"
    written = first.stat().st_mtime_ns
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(settings | {"sta-ppo": {"potential_scale": 0.5}}, sort_keys=False)
    )
    run_script(*command)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert list(results) == ["success", "hidden", "sta-ppo"] and first.stat().st_mtime_ns == written
    # progress is paid in every episode, solved or not: there is a gradient, and of three batches not the same one
    assert (
        results["sta-ppo"]["agreement"][0] not in (0.0, pytest.approx(1.0)) and results["sta-ppo"]["agreement"][1] > 0
    )
    with pytest.raises(SystemExit):
        run_script(*command, "--batches=2")
    assert "`--batches` must be at least 3" in capsys.readouterr().err
