"""What every test may rely on: one thread, no network, assets and a Vulkan driver chosen before SAPIEN is imported."""

import gc
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# before torch and huggingface_hub are imported: both read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
# where ManiSkill looks for the assets of the Bridge tasks
_ASSETS = ROOT.parent / "shared" / "assets" / "maniskill"
if _ASSETS.is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(_ASSETS))

import pytest  # noqa: E402
import torch  # noqa: E402

from trl_stare.envs.vulkan import select_vulkan_driver  # noqa: E402

torch.set_num_threads(1)
select_vulkan_driver()
# a forked process must not tidy up the renderers of its parent, whose threads it has not: it would wait for them for ever
os.register_at_fork(after_in_child=gc.freeze)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What the marker `bridge_assets` does."""
    assets = Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser() / "data"
    missing = [part for part in ("tasks/bridge_v2_real2sim_dataset", "robots/widowx") if not (assets / part).is_dir()]
    if missing and item.get_closest_marker("bridge_assets"):
        pytest.skip(f"{missing} not in {assets}: download the Bridge tasks' assets, or set MS_ASSET_DIR")


@pytest.fixture
def run_script(monkeypatch) -> Callable[..., None]:
    """`run_script("recipes/collect.py", "--task", "StackCube-v1")`: what the command does, in this process; its errors are raised.

    A process of its own would import torch, TRL and the simulator again, for ten seconds.
    """

    def run(script: str, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """`load_recipe("ppo")`: recipes/ppo.py as a module, for its functions."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their annotations up there
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load
