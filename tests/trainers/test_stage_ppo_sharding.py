"""ZeRO with two processes on a CPU: the run of DDP, and continued exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppo_toy import make_policy, make_trainer
from test_stage_ppo_processes import errors_of, free_port, in_two_processes, train
from test_stage_ppo_resume import weights_of

ROOT = Path(__file__).parents[2]


def launch(name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    line += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"), "--num_processes", "2"]
    # DeepSpeed looks for ninja on the path
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    program = str(Path(__file__).with_name("stage_ppo_toy.py"))
    return subprocess.run(
        [*line, program, str(folder), *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700
    )


def outcomes(folder: Path) -> list[tuple[int, int, bool]]:
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return [(row["seed"], row["length"], row["success"]) for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_divided_weights_learn_what_whole_ones_do_and_continue_exactly(tmp_path, name):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed. Run: pip install 'trl-stare[deepspeed]'")
    whole, killed, ddp = (tmp_path / part for part in ("whole", "killed", "ddp"))
    ddp.mkdir()
    done = launch(name, whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(whole.glob("checkpoint-16/global_step16/zero_pp_rank_1_*optim*")), "nothing was divided"
    assert in_two_processes(train, ddp, None, 1, {"episodes_per_iteration": 10}) == [0, 0], errors_of(ddp)
    found, expected = weights_of(whole / "policy"), weights_of(ddp / "policy")
    start = make_policy().model.state_dict()
    policy = [key for key in expected if key in start]
    assert found.keys() >= expected.keys() and len(policy) > 10
    moved, apart = (
        torch.cat([(expected[key] - other[key]).flatten() for key in policy]).norm() for other in (start, found)
    )
    # Adam takes full steps also where gradients are rounding errors
    assert moved > 0.1 and apart < 0.05 * moved, (moved, apart)
    assert outcomes(whole) == outcomes(ddp)

    assert launch(name, killed, "--die", "kill:update:6", "--rank", "1").returncode != 0
    done = launch(name, killed)
    assert done.returncode == 0, done.stderr[-3000:]
    again = weights_of(killed / "policy")
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    assert (whole / "episodes.jsonl").read_text() == (killed / "episodes.jsonl").read_text()


def test_fsdp_is_refused_also_where_accelerate_makes_ddp_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"must run with DDP or DeepSpeed, got FSDP.*zero3.yaml"):
        make_trainer(tmp_path)
