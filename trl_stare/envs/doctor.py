"""What works on this machine, and the command that repairs each thing that does not: `python -m trl_stare.envs.doctor`."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_stare.envs.visuals import cache_folder, resolve_visuals
from trl_stare.envs.vulkan import ICD_FOLDERS, REPAIR, has_nvidia_driver, select_vulkan_driver


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name (`str`): what.
        status (`str`): `"ok"`; `"warning"`: something will be missed or slow; `"failed"`: needed, and it does not work.
        detail (`str`): what was found.
        repair (`str`): the command that repairs it, empty where there is nothing to repair.
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    detail: str
    repair: str = ""


LIBRARIES = {
    "libvulkan.so.1": "libvulkan1",
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libXext.so.6": "libxext6",
}
"""What SAPIEN loads -> the Debian package that brings it."""
PIP = f"{sys.executable} -m pip"
EXTRAS = ("", "maniskill")
"""The extras of trl-stare that the recipes need."""
RENDER_TIMEOUT = 120  # s; the first import of a fresh installation takes 20
SLOW_FRAME = 50.0  # ms at 64 px; light visuals take 5 to 10 on a CPU of 2024


def installed(package: str) -> str | None:
    """The installed version of `package`, `None` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_python() -> list[Check]:
    """The interpreter."""
    supported = sys.version_info >= (3, 11)
    repair = "" if supported else "make clean setup PYTHON=python3.11"
    return [
        Check("python", "ok" if supported else "failed", f"{platform.python_version()} at {sys.executable}", repair)
    ]


def check_packages() -> list[Check]:
    """Every requirement of the installed trl-stare against what is there; one line where all is well."""
    try:
        requirements = [Requirement(line) for line in requires("trl-stare") or []]
    except PackageNotFoundError:
        return [Check("packages", "failed", "trl-stare is not installed here", f"{PIP} install -e '.[maniskill]'")]
    needed = [
        r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in EXTRAS)
    ]
    checks = []
    for requirement in needed:
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            detail = f"must be {requirement.specifier or 'installed'}, got {found or 'none'}"
            repair = f"{PIP} install '{requirement.name}{requirement.specifier}'"
            checks.append(Check(requirement.name, "failed", detail, repair))
    shown = ", ".join(f"{name} {installed(name)}" for name in ("trl", "transformers", "mani_skill", "sapien", "numpy"))
    return checks or [Check("packages", "ok", f"{len(needed)} of {len(needed)} as required: {shown}")]


def check_known_bad_pairs() -> list[Check]:
    """Combinations that install without a word and then break."""
    checks = []
    numpy, pyarrow = installed("numpy"), installed("pyarrow")
    numpy_2 = numpy is not None and int(numpy.split(".")[0]) >= 2
    if installed("torchvision") and torch.version.cuda is None:
        detail = f"torchvision {installed('torchvision')} beside a CPU torch breaks `import transformers`; nothing here needs it"
        checks.append(Check("torchvision", "failed", detail, f"{PIP} uninstall -y torchvision"))
    if numpy_2 and installed("mplib"):
        detail = (
            f"mplib crashes under numpy {numpy}; only ManiSkill's own motion-planning demos use it, nothing here does"
        )
        repair = "in another environment: pip install mani_skill 'numpy<2' 'pandas<3' 'pyarrow<25' 'opencv-python<5'"
        checks.append(Check("mplib + numpy 2", "warning", detail, repair))
    if not numpy_2 and pyarrow is not None and int(pyarrow.split(".")[0]) >= 26:
        detail = f"pyarrow {pyarrow} refuses numpy {numpy} when imported"
        checks.append(Check("pyarrow + numpy 1", "failed", detail, f"{PIP} install 'pyarrow>=24,<25'"))
    return checks or [Check("known-bad pairs", "ok", "none")]


def check_torch() -> list[Check]:
    """PyTorch, its threads, and whether it uses the GPU that is there."""
    threads = f"{torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} cores"
    checks = [Check("torch", "ok", f"{torch.__version__}, {threads}")]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        checks.append(
            Check("cuda", "ok", f"{torch.version.cuda}: {count} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        )
    elif has_nvidia_driver():
        detail = "there is an NVIDIA driver, but this torch does not use it"
        repair = (
            f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]}  (a CUDA build), then nvidia-smi"
        )
        checks.append(Check("cuda", "warning", detail, repair))
    else:
        checks.append(Check("cuda", "ok", "no GPU: everything runs on the CPU"))
    return checks


def check_vulkan() -> list[Check]:
    """The libraries that SAPIEN loads, and the driver that it will find."""
    checks = []
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            checks.append(Check(library, "failed", "cannot be loaded", f"sudo apt-get install -y {package}"))
    try:
        driver = select_vulkan_driver()
    except RuntimeError as error:
        repair = "unset VK_DRIVER_FILES VK_ICD_FILENAMES" if "Unset" in str(error) else REPAIR
        return [*checks, Check("vulkan driver", "failed", str(error), repair)]
    if driver.name == "nvidia" and not any(any(folder.glob("nvidia_icd*.json")) for folder in ICD_FOLDERS):
        detail = (
            "an NVIDIA GPU, but not the graphics part of its driver (a container gets it only when it asks for it)"
        )
        checks.append(
            Check("vulkan driver", "failed", detail, "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all ...")
        )
        return checks
    return [*checks, Check("vulkan driver", "ok", driver.name + (f" ({driver.icd})" if driver.icd else ""))]


def render_probe() -> None:
    """Render StackCube-v1 at 64 px and write what was measured as one JSON line. Runs in a process of its own."""
    from trl_stare.envs.maniskill import Simulator
    from trl_stare.envs.registry import get_simulated_task

    torch.set_num_threads(1)
    # the device that `make_env` takes: on a GPU this renders and computes side by side, which some drivers fail at
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task, visuals = get_simulated_task("StackCube-v1"), resolve_visuals(None, device)
    simulator = Simulator(task, num_envs=1, image_size=64, visuals=visuals, device=device)
    simulator.reset([0], torch.tensor([0]))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        image = simulator.images()
        times.append(time.perf_counter() - start)
    import sapien.render

    gpu = sapien.render.get_device_summary().splitlines()[0].removeprefix("GPU:").strip()
    milliseconds = 1e3 * sorted(times)[len(times) // 2]
    found = {"ms": milliseconds, "contrast": image.float().std().item(), "visuals": visuals, "device": gpu}
    sys.stdout.write(json.dumps(found) + "\n")


def check_render(command: tuple[str, ...] = (), timeout: float = RENDER_TIMEOUT) -> list[Check]:
    """A rendered frame and its time. A crash or a hang of the driver is a line of the report, not the end of it.

    Args:
        command (`tuple[str, ...]`, *optional*): what to run instead of [`render_probe`].
        timeout (`float`): seconds after which the probe is ended.
    """
    probe = command or (sys.executable, "-c", "from trl_stare.envs.doctor import render_probe; render_probe()")
    name, repair = "rendered frame", f"{REPAIR}, then: {sys.executable} -m trl_stare.envs.doctor"
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return [Check(name, "failed", f"none after {timeout:g} s: the driver hangs", repair)]
    if done.returncode < 0:
        return [Check(name, "failed", f"the driver crashed with signal {-done.returncode}", repair)]
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check(name, "failed", last, repair)]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    detail = f"{found['ms']:.1f} ms at 64 px, {found['visuals']} visuals, on {found['device']}"
    if found["contrast"] < 1:
        return [Check(name, "failed", f"empty picture; {detail}", repair)]
    if found["ms"] > SLOW_FRAME:
        return [Check(name, "warning", f"slow: {detail}", "end other processes; export LP_NUM_THREADS=0")]
    return [Check(name, "ok", detail)]


def check_light_visuals() -> list[Check]:
    """The cache of light meshes: filled, or at least writable."""
    folder = cache_folder()
    robots = sorted(path.name for path in folder.glob("*/*.urdf"))
    if robots:
        return [Check("light visuals", "ok", f"{', '.join(robots)} in {folder}")]
    parent = next(path for path in folder.parents if path.exists())
    if not os.access(parent, os.W_OK):
        return [
            Check(
                "light visuals", "failed", f"{folder} cannot be written", "export TRL_STARE_CACHE=/a/folder/of/yours"
            )
        ]
    return [
        Check(
            "light visuals",
            "warning",
            "not built yet",
            f"{sys.executable} -c 'from trl_stare.envs.visuals import warm_up; warm_up()'",
        )
    ]


def check_assets() -> list[Check]:
    """Downloaded assets. StackCube-v1 needs none; the Bridge tasks do."""
    data = Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")) / "data"
    needed = {
        "bridge_v2_real2sim": data / "tasks" / "bridge_v2_real2sim_dataset",
        "widowx250s": data / "robots" / "widowx",
    }
    missing = [name for name, folder in needed.items() if not folder.is_dir()]
    if not missing:
        return [Check("assets", "ok", f"Bridge tasks: in {data}")]
    repair = " && ".join(f"{sys.executable} -m mani_skill.utils.download_asset {name} -y" for name in missing)
    found = f"StackCube-v1 needs none; of the Bridge tasks {', '.join(missing)} is not here (optional)"
    return [Check("assets", "ok", found, repair)]


CHECKS: tuple[Callable[[], list[Check]], ...] = (
    check_python,
    check_torch,
    check_packages,
    check_known_bad_pairs,
    check_vulkan,
    check_light_visuals,
    check_render,
    check_assets,
)


def report(checks: list[Check], console: Console) -> int:
    """Show the checks as a table, then the repairs as lines to copy.

    Returns:
        `int`: 1 where something that is needed failed, else 0.
    """
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table("check", "status", "found", title="trl-stare doctor", title_justify="left")
    for check in checks:
        table.add_row(check.name, Text(check.status, colours[check.status]), Text(check.detail))
    console.print(table)
    for check in checks:
        if check.repair:
            # plain and unbroken, so that a line can be copied from the terminal
            console.print(f"{check.name}: {check.repair}", markup=False, highlight=False, soft_wrap=True)
    return int(any(check.status == "failed" for check in checks))


def main() -> int:
    """Run every check."""
    console = Console()
    checks = []
    with console.status("") as status:
        for check in CHECKS:
            status.update(check.__name__.replace("_", " "))
            checks += check()
    return report(checks, console)


if __name__ == "__main__":
    sys.exit(main())
