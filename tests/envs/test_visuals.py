"""Light visuals: same physics to the bit, nearly the same picture, a cache that survives crashes and company."""

import multiprocessing
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from trl_stare.envs import visuals as module
from trl_stare.envs.maniskill import Simulator
from trl_stare.envs.registry import _TASKS, get_simulated_task
from trl_stare.envs.visuals import cache_folder, light_urdf, light_visuals, resolve_visuals, use_visuals

TASK = "StackCube-v1"


def play(visuals: str, steps: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """`([T, S] simulator states, [64, 64, 3] first image)` of one episode with actions that push into the cubes."""
    simulator = Simulator(get_simulated_task(TASK), num_envs=1, image_size=64, visuals=visuals, device="cpu")
    simulator.reset([7], torch.tensor([0]))
    image = simulator.images()[0]
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(steps):
        action = torch.rand(1, 7, generator=generator) * 2 - 1
        action[:, 2] -= 0.5  # downwards: contacts of fingers, cubes and table
        simulator.step(action)
        states.append(simulator.env.get_state()[0].clone())
    simulator.close()
    return torch.stack(states), image


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: play(name) for name in ("stock", "light")}


def panda_urdf() -> Path:
    from mani_skill.agents.robots.panda.panda import Panda

    return Path(Panda.urdf_path)


def meshes(urdf: Path, kind: str) -> list[Path]:
    return [urdf.parent / mesh.attrib["filename"] for mesh in ET.parse(urdf).iterfind(f".//{kind}//mesh")]


def triangles(paths: list[Path]) -> int:
    import trimesh

    return sum(len(mesh.faces) for path in paths for mesh in trimesh.load_scene(path).geometry.values())


def test_physics_is_bit_identical(both):
    stock, light = both["stock"][0], both["light"][0]
    assert torch.equal(stock, light)
    assert not torch.equal(stock[0], stock[-1])


def test_picture_is_the_same_to_the_eye(both):
    stock, light = both["stock"][1].int(), both["light"][1].int()
    difference = (stock - light).abs()
    assert difference.float().mean() < 3  # of 255
    assert (difference.amax(dim=-1) > 40).float().mean() < 0.02  # outlines of the arm
    assert stock.float().std() > 20  # there is a picture at all


@pytest.mark.parametrize(("name", "channel"), [("red", 0), ("green", 1)])
def test_cubes_look_the_same(both, name, channel):
    others = [other for other in range(3) if other != channel]

    def mask(image: torch.Tensor) -> torch.Tensor:
        image = image.int()
        return image[..., channel] > 2 * image[..., others].amax(dim=-1) + 20

    stock, light = (both[visuals][1] for visuals in ("stock", "light"))
    assert mask(stock).sum() > 5
    assert torch.equal(stock[mask(stock) & mask(light)], light[mask(stock) & mask(light)])
    assert (mask(stock) ^ mask(light)).sum() <= 2


def test_light_urdf_keeps_all_but_the_visual_meshes():
    stock, light = panda_urdf(), light_urdf(panda_urdf())
    assert meshes(light, "collision") == meshes(stock, "collision")
    assert triangles(meshes(light, "visual")) < 0.1 * triangles(meshes(stock, "visual"))
    assert light.with_suffix(".srdf").read_bytes() == stock.with_suffix(".srdf").read_bytes()
    trees = [ET.parse(path) for path in (stock, light)]
    for tree in trees:
        for mesh in tree.iterfind(".//mesh"):
            del mesh.attrib["filename"]
    stock_xml, light_xml = (ET.canonicalize(ET.tostring(tree.getroot()), strip_text=True) for tree in trees)
    assert stock_xml == light_xml


def test_materials_stay():
    import trimesh

    light = light_urdf(panda_urdf())
    for stock_file, light_file in zip(meshes(panda_urdf(), "visual"), meshes(light, "visual"), strict=True):
        colours = [
            sorted(tuple(mesh.visual.material.main_color) for mesh in trimesh.load_scene(path).geometry.values())
            for path in (stock_file, light_file)
        ]
        assert colours[0] == colours[1]


def test_shapes_stay_within_a_pixel():
    import trimesh

    for files in zip(meshes(panda_urdf(), "visual"), meshes(light_urdf(panda_urdf()), "visual"), strict=True):
        stock, light = (trimesh.load_scene(path).bounds for path in files)
        assert abs(stock - light).max() < 0.01  # m, a pixel at 128 px


@pytest.mark.parametrize("robot", sorted({task.robot for task in _TASKS.values() if task.light_visuals}))
def test_every_robot_gets_light_meshes_from_nothing(robot, tmp_path, monkeypatch):
    """The wrist camera of `panda_wristcam` is an STL without a material: it stays one, with the colour of the URDF."""
    from mani_skill.agents.registration import REGISTERED_AGENTS

    monkeypatch.setenv("TRL_STARE_CACHE", str(tmp_path))
    stock = Path(REGISTERED_AGENTS[robot].agent_cls.urdf_path)
    light = light_urdf(stock)
    assert triangles(meshes(light, "visual")) < 0.1 * triangles(meshes(stock, "visual"))
    for old, new in zip(meshes(stock, "visual"), meshes(light, "visual"), strict=True):
        assert (old.suffix.lower() == ".stl") == (new.suffix == ".stl")


def test_maniskill_is_as_before_outside_the_context():
    from mani_skill.agents.robots.panda.panda import Panda
    from mani_skill.utils.building.ground import build_ground
    from mani_skill.utils.scene_builder.table import scene_builder

    before = Panda.urdf_path
    with pytest.raises(KeyError), light_visuals():
        assert Panda.urdf_path != before and scene_builder.build_ground is not build_ground
        raise KeyError
    assert Panda.urdf_path == before and scene_builder.build_ground is build_ground
    with use_visuals("stock"):
        assert Panda.urdf_path == before


def build_into(cache: str, barrier) -> str:
    import os

    os.environ["TRL_STARE_CACHE"] = cache
    barrier.wait()
    return str(light_urdf(panda_urdf()))


def test_two_processes_may_build_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        paths = pool.starmap(build_into, [(str(tmp_path), barrier)] * 2)
    assert paths[0] == paths[1] and all(mesh.is_file() for mesh in meshes(Path(paths[0]), "visual"))
    assert len(list((tmp_path / "visuals").iterdir())) == 1  # nothing half-made stays


def test_a_killed_build_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_STARE_CACHE", str(tmp_path))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_light_scene", die)
        light_urdf(panda_urdf())
    assert list(cache_folder().iterdir()) == []
    assert light_urdf(panda_urdf()).is_file()


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`visuals` must be one of light, stock, got 'heavy'"):
        resolve_visuals("heavy", "cpu")
    with pytest.raises(ValueError, match="`ratio` must be in"):
        light_urdf(panda_urdf(), ratio=0)
    with (
        pytest.raises(ValueError, match="`robot_uid` must be one of .*panda.*, got 'pandda'"),
        light_visuals("pandda"),
    ):
        pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_STARE_CACHE", str(tmp_path / "file"))
    with pytest.raises(PermissionError, match="TRL_STARE_CACHE"):
        light_urdf(panda_urdf())


@pytest.mark.parametrize(
    ("visuals", "device", "expected"),
    [(None, "cpu", "light"), (None, "cuda", "stock"), ("stock", "cpu", "stock"), ("light", "cuda", "light")],
)
def test_default_depends_on_the_device(visuals, device, expected):
    assert resolve_visuals(visuals, device) == expected
