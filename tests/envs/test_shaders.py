"""Shaders without the table of reflections: the same pictures to the bit, and SAPIEN as before outside."""

import shutil
from pathlib import Path

import pytest
import torch

from trl_stare.envs import get_simulated_task, shaders
from trl_stare.envs.maniskill import Simulator, check_assets
from trl_stare.envs.shaders import DECLARATION, LOOKUP, quick_first_frame, quick_shaders
from trl_stare.envs.vulkan import select_vulkan_driver

CPU_RENDERER = select_vulkan_driver().name == "lavapipe"


def stock_folder() -> Path:
    import sapien

    return Path(sapien.__file__).parent / "vulkan_shader"


def picture(task: str, visuals: str) -> torch.Tensor:
    """A picture of a moving robot."""
    simulator = Simulator(get_simulated_task(task), num_envs=1, image_size=96, visuals=visuals, device="cpu")
    simulator.reset([3], torch.tensor([0]))
    simulator.step(torch.full((1, 7), 0.3))
    image = simulator.images()
    simulator.close()
    return image


@pytest.mark.skipif(not CPU_RENDERER, reason="other renderers keep SAPIEN's own shaders")
@pytest.mark.parametrize(("task", "visuals"), [("StackCube-v1", "light"), ("PutCarrotOnPlateInScene-v1", "stock")])
def test_the_picture_is_the_same_to_the_bit(task, visuals, monkeypatch):
    try:
        check_assets(get_simulated_task(task))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    quick = picture(task, visuals)
    monkeypatch.setattr(shaders, "_shaders_of_this_machine", lambda: None)
    stock = picture(task, visuals)
    assert torch.equal(quick, stock)
    assert stock.float().std() > 20  # there is a picture at all


def test_nothing_but_the_lookup_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_STARE_CACHE", str(tmp_path))
    quick = quick_shaders(stock_folder())
    assert sorted(file.name for file in quick.iterdir()) == sorted(
        file.name for file in (stock_folder() / "minimal").iterdir()
    )
    for file in quick.iterdir():
        lines = (stock_folder() / "minimal" / file.name).read_text().splitlines()
        kept = [line for line in lines if DECLARATION not in line]
        changed = [(a, b) for a, b in zip(kept, file.read_text().splitlines(), strict=True) if a != b]
        assert all(a.replace(LOOKUP, "vec2(0.0)") == b for a, b in changed)
        assert len(changed) == (file.name == "gbuffer.frag")


def test_other_shaders_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_STARE_CACHE", str(tmp_path / "cache"))
    for pack in ("common", "minimal"):
        shutil.copytree(stock_folder() / pack, tmp_path / "sapien" / pack)
    frag = tmp_path / "sapien" / "minimal" / "gbuffer.frag"
    frag.write_text(frag.read_text().replace("samplerBRDFLUT", "samplerOther"))
    with pytest.raises(RuntimeError, match=r"`sapien` must be 3\.0\.3"):
        quick_shaders(tmp_path / "sapien")
    assert list((tmp_path / "cache" / "visuals").iterdir()) == []


def test_sapien_is_as_before_outside_the_context():
    import sapien.render

    before = sapien.render.set_camera_shader_dir
    with pytest.raises(KeyError), quick_first_frame():
        assert (sapien.render.set_camera_shader_dir is not before) == CPU_RENDERER
        raise KeyError
    assert sapien.render.set_camera_shader_dir is before
