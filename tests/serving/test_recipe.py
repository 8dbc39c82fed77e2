"""recipes/serve_policy.py as it is launched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trl_stare.policies import TokenPolicy
from trl_stare.serving import RemotePolicy

ROOT = Path(__file__).parents[2]
STATS = {"action": {"scale": [0.7] * 3 + [1.0] * 4}, "state": {"mean": [0.0] * 8, "std": [1.0] * 8}}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_saved_checkpoint_is_served_until_stopped(tmp_path):
    torch.manual_seed(0)
    TokenPolicy.create_tiny({"StackCube-v1": STATS}, image_size=32).save_pretrained(tmp_path / "policy")
    line = [sys.executable, "recipes/serve_policy.py", "--model", str(tmp_path / "policy"), "--task", "StackCube-v1"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen([*line, "--port", "0"], cwd=ROOT, env=os.environ, stdout=file, stderr=file)
    try:
        while " at ws://" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        url = log.read_text().split(" at ")[1].split()[0]
        with RemotePolicy(url) as remote:
            assert remote.metadata["control_mode"] == "pd_ee_delta_pose"
            inputs = {"image": torch.zeros(32, 32, 3, dtype=torch.uint8), "state": torch.zeros(8)}
            assert remote.infer(inputs | {"prompt": "stack"})["actions"].shape == (4, 7)
            server.send_signal(signal.SIGTERM)  # while a client is there
            assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
