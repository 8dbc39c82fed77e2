"""SAPIEN's shaders without the one table that takes a CPU six seconds and that no picture of ManiSkill's tasks needs.

SAPIEN's `minimal` shaders look up how a surface mirrors its surroundings (the split-sum table of image-based lighting,
https://learnopengl.com/PBR/IBL/Specular-IBL). SAPIEN computes that table in every process before the first frame: 6.4 of
the 6.8 s that a first frame took on a CPU. What is looked up is then multiplied by the environment map, which is black
unless a task sets one, and ManiSkill's table-top tasks do not. Without the look-up the pictures are the same to the
bit (tested). A task of your own that sets an environment map keeps its diffuse light and loses its mirror images.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path

from trl_stare.envs.cache import build_once
from trl_stare.envs.vulkan import select_vulkan_driver

LOOKUP = "texture(samplerBRDFLUT, vec2(roughness, dotNV)).xy"
DECLARATION = "uniform sampler2D samplerBRDFLUT;"


def quick_shaders(stock: Path) -> Path:
    """A copy of SAPIEN's `minimal` shaders without the look-up, built once and then cached.

    Args:
        stock (`Path`): SAPIEN's folder of shader packs.

    Raises:
        RuntimeError: the shaders are not those this was written for.
    """

    def build(folder: Path) -> None:
        for pack in ("common", "minimal"):
            shutil.copytree(stock / pack, folder / pack)
        texts = {file: file.read_text() for file in sorted((folder / "minimal").glob("*.frag"))}
        if not any(LOOKUP in text for text in texts.values()):
            raise RuntimeError(f"`sapien` must be 3.0.3, whose shaders look up {LOOKUP!r}, got others in {stock}.")
        for file, text in texts.items():
            kept = [line for line in text.splitlines() if DECLARATION not in line]
            file.write_text("\n".join(kept).replace(LOOKUP, "vec2(0.0)") + "\n")

    return build_once(f"shaders-{importlib.metadata.version('sapien')}", build) / "minimal"


@functools.cache  # asked at every reset
def _shaders_of_this_machine() -> Path | None:
    if select_vulkan_driver().name != "lavapipe":
        return None
    import sapien

    return quick_shaders(Path(sapien.__file__).parent / "vulkan_shader")


@contextlib.contextmanager
def quick_first_frame() -> Iterator[None]:
    """Cameras that are made inside this context on Mesa's CPU renderer show their first frame six seconds sooner."""
    quick = _shaders_of_this_machine()
    if quick is None:
        yield
        return
    import sapien.render

    choose = sapien.render.set_camera_shader_dir
    sapien.render.set_camera_shader_dir = lambda pack: choose(str(quick) if pack == "minimal" else pack)
    try:
        yield
    finally:
        sapien.render.set_camera_shader_dir = choose
