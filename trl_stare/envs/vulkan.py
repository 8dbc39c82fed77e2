"""Choose the Vulkan driver before SAPIEN is imported: the NVIDIA driver where there is one, else Mesa's CPU renderer.

SAPIEN reads the choice once, when it is imported; so this module imports nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ICD_FOLDERS = (Path("/usr/share/vulkan/icd.d"), Path("/usr/local/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"))
REPAIR = "sudo bash .ci/vulkan.sh"


class VulkanDriver(NamedTuple):
    """Which driver SAPIEN will find.

    Attributes:
        name (`str`): `"nvidia"`, `"lavapipe"` (Mesa on the CPU), or `"environment"`: chosen by the user's own variables.
        icd (`str` or `None`): the driver's manifest, a JSON file; `None` where the Vulkan loader finds it by itself.
    """

    name: str
    icd: str | None


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver with at least one GPU answers."""
    # not /proc/driver/nvidia: a container sees its host's, also where the GPU was not handed to it
    if Path("/dev/nvidiactl").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout


def find_lavapipe() -> Path | None:
    """The manifest of Mesa's CPU renderer, or `None` where it is not installed."""
    return next((icd for folder in ICD_FOLDERS for icd in sorted(folder.glob("lvp_icd*.json"))), None)


def select_vulkan_driver() -> VulkanDriver:
    """Point the Vulkan loader at a driver that works here. Call it before `import sapien`; calling it again is harmless.

    The user's own `VK_DRIVER_FILES` or `VK_ICD_FILENAMES` are left alone, and so is a machine with an NVIDIA driver.
    Anywhere else the CPU renderer is chosen by name (its package brings drivers of absent GPUs too, which SAPIEN would
    try first), and `LP_NUM_THREADS` defaults to 0: it then renders in the calling thread, which is fastest for small
    images and leaves the other cores to other environments.

    Returns:
        `VulkanDriver`: the choice.

    Raises:
        RuntimeError: there is no driver, or the manifest that the user named is missing. Says how to repair it.
    """
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if named:
        if not any(Path(icd).is_file() for icd in named.split(os.pathsep)):
            raise RuntimeError(
                f"`VK_DRIVER_FILES`/`VK_ICD_FILENAMES` must name a Vulkan driver manifest, got {named!r}, which does not "
                "exist. Unset it, and the driver is found by itself."
            )
        name = "lavapipe" if "lvp_icd" in named else "environment"
        if name == "lavapipe":
            os.environ.setdefault("LP_NUM_THREADS", "0")
        return VulkanDriver(name, named)
    if has_nvidia_driver():
        return VulkanDriver("nvidia", None)
    icd = find_lavapipe()
    if icd is None:
        raise RuntimeError(
            "a Vulkan driver must be installed to render, found neither an NVIDIA driver nor Mesa's CPU renderer. "
            f"Run `{REPAIR}` in the project's folder (`make setup` does, as root), then `make doctor`."
        )
    os.environ["VK_DRIVER_FILES"] = os.environ["VK_ICD_FILENAMES"] = str(icd)
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return VulkanDriver("lavapipe", str(icd))
