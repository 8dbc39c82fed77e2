"""Light visuals: the same scene with far fewer triangles, for rendering on a CPU.

On a CPU the time of a small frame is vertex work: a Panda and ManiSkill's ground are 157,000 triangles, the cubes 24.
Here the *visual* meshes of a robot are decimated once, into a cache, and the ground becomes one quad with the same
texture. Collision meshes, inertias and joints are never touched: a light URDF names the original collision files.

Not known here: tasks, cameras, policies.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from trl_stare.envs.cache import build_once, cache_folder
from trl_stare.envs.shaders import quick_first_frame

if TYPE_CHECKING:
    import trimesh

Visuals = Literal["light", "stock"]
VISUALS: tuple[str, ...] = ("light", "stock")

RATIO = 0.03  # of a mesh's triangles that stay
MIN_FACES = 300  # meshes this small cost nothing, and would lose their shape
SHARP_EDGE = 0.6  # rad; faces that meet at more than this keep separate normals
RECIPE = 2  # part of the cache's key: raise it when the code below makes other meshes

logger = logging.getLogger(__name__)


def resolve_visuals(visuals: str | None, device: str) -> Visuals:
    """The visuals to use: `visuals` itself, or, for `None`, what is best on `device` (`"cpu"` or `"cuda"`).

    Example:
        >>> resolve_visuals(None, "cpu"), resolve_visuals(None, "cuda"), resolve_visuals("stock", "cpu")
        ('light', 'stock', 'stock')

    Raises:
        ValueError: `visuals` is no such name.
    """
    if visuals is None:
        return "light" if device == "cpu" else "stock"
    if visuals not in VISUALS:
        raise ValueError(f"`visuals` must be one of {', '.join(VISUALS)}, got {visuals!r}.")
    return visuals  # type: ignore[return-value]


def light_urdf(urdf: str | Path, ratio: float = RATIO) -> Path:
    """A copy of `urdf` with decimated visual meshes and everything else the same, built once and then cached.

    Args:
        urdf (`str` or `Path`): the robot's own URDF.
        ratio (`float`, *optional*, defaults to 0.03): share of the triangles of each visual mesh to keep, in (0, 1].

    Returns:
        `Path`: the light URDF, with the same file name.

    Raises:
        FileNotFoundError: there is no `urdf`.
        PermissionError: the cache cannot be written.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], got {ratio}.")
    urdf = Path(urdf).resolve()
    # the place of the URDF counts too: the copy names the collision files of this very installation
    version = importlib.metadata.version("mani_skill")
    identity = f"{RECIPE} {version} {ratio} {urdf} {urdf.read_text()}"
    name = f"{urdf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def build(folder: Path) -> None:
        logger.info("light visuals: decimating the meshes of %s (once)", urdf.name)
        _build_light_urdf(urdf, folder, ratio)

    return build_once(name, build) / urdf.name


def _build_light_urdf(urdf: Path, folder: Path, ratio: float) -> None:
    """Write the light copy of `urdf`, its meshes and its SRDF into `folder`."""
    tree = ET.parse(urdf)
    names: dict[Path, str] = {}
    for mesh in tree.iterfind(".//collision//mesh"):
        mesh.set("filename", str(_mesh_path(urdf, mesh)))
    for mesh in tree.iterfind(".//visual//mesh"):
        source = _mesh_path(urdf, mesh)
        if source not in names:
            # an STL has no material: it stays one, so that the colour is still the URDF's
            kind, options = ("stl", {}) if source.suffix.lower() == ".stl" else ("glb", {"include_normals": True})
            names[source] = f"{len(names):02d}_{source.stem}.{kind}"
            (folder / names[source]).write_bytes(_light_scene(source, ratio).export(file_type=kind, **options))
        mesh.set("filename", names[source])
    tree.write(folder / urdf.name, encoding="utf-8", xml_declaration=True)
    # SAPIEN looks for the SRDF (which links may touch: physics!) beside the URDF
    srdf = urdf.with_suffix(".srdf")
    if srdf.is_file():
        shutil.copyfile(srdf, folder / srdf.name)


def _mesh_path(urdf: Path, mesh: ET.Element) -> Path:
    """The file that a `<mesh>` names, absolute. SAPIEN drops `package://` and resolves beside the URDF."""
    return urdf.parent / mesh.attrib["filename"].removeprefix("package://")


def _light_scene(source: Path, ratio: float) -> trimesh.Scene:
    """The visual mesh file as a scene whose parts are decimated one by one and keep their material and place."""
    import trimesh

    scene = trimesh.load_scene(source, process=False)
    for name, mesh in scene.geometry.items():
        scene.geometry[name] = _decimate(mesh, ratio)
    return scene


def _decimate(mesh: trimesh.Trimesh, ratio: float) -> trimesh.Trimesh:
    """Quadric edge collapse of one part to `ratio` of its triangles, but to no fewer than `MIN_FACES`."""
    import fast_simplification
    import trimesh

    target = max(int(len(mesh.faces) * ratio), MIN_FACES)
    if len(mesh.faces) <= target:
        return mesh
    whole = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    # the files store every triangle's corners on their own; collapsing edges needs them joined
    whole.merge_vertices()
    points, faces = fast_simplification.simplify(whole.vertices, whole.faces, target_count=target)
    light = trimesh.graph.smooth_shade(trimesh.Trimesh(points, faces, process=False), angle=SHARP_EDGE)
    if (material := getattr(mesh.visual, "material", None)) is not None:
        light.visual = trimesh.visual.TextureVisuals(material=material)
    return light


def _light_ground(scene: Any, floor_width: int = 100, floor_length: int | None = None, **kwargs: Any) -> Any:
    """ManiSkill's `build_ground` with one quad in place of a quad per square metre. The picture is the same."""
    import numpy as np
    import sapien.render
    from mani_skill.utils.building.ground import build_ground

    # actor, collision plane and texture come from ManiSkill; one tile of picture, which is then replaced
    actor = build_ground(scene, floor_width=1, floor_length=1, **kwargs)
    if not scene.can_render():
        return actor
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    xy = corners * np.array([floor_width, floor_length or floor_width]) / 2
    square = kwargs.get("texture_square_len", 4)
    vertices = np.concatenate(
        [xy + kwargs.get("xy_origin", (0, 0)), np.full((4, 1), kwargs.get("altitude", 0))], axis=1
    )
    for entity in actor._objs:
        tile = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        quad = sapien.render.RenderShapeTriangleMesh(
            vertices=vertices,
            triangles=np.array([[0, 1, 2], [0, 2, 3]]),
            normals=np.tile([0.0, 0.0, 1.0], (4, 1)),
            uvs=xy / square + 0.5,
            material=tile.render_shapes[0].parts[0].material,
        )
        entity.remove_component(tile)
        body = sapien.render.RenderBodyComponent()
        body.attach(quad)
        entity.add_component(body)
    return actor


def _modules_with_ground() -> list[ModuleType]:
    """The loaded ManiSkill modules that imported `build_ground` by name, besides the one that defines it."""
    from mani_skill.utils.building.ground import build_ground

    loaded = [module for name, module in sys.modules.items() if name.startswith("mani_skill.")]
    users = [module for module in loaded if vars(module).get("build_ground") is build_ground]
    return [module for module in users if module.__name__ != build_ground.__module__]


@contextlib.contextmanager
def light_visuals(robot_uid: str = "panda", ratio: float = RATIO) -> Iterator[None]:
    """Environments that are made inside this context get light visuals; outside, ManiSkill is as it was.

    Args:
        robot_uid (`str`, *optional*, defaults to `"panda"`): ManiSkill's name of the robot.
        ratio (`float`, *optional*, defaults to 0.03): share of the triangles of each visual mesh to keep.

    Raises:
        ValueError: ManiSkill knows no such robot, or it is not built from a URDF.

    Example:
        >>> with light_visuals():
        ...     env = gym.make("StackCube-v1", obs_mode="rgb")
    """
    import mani_skill.envs  # noqa: F401  (registers tasks and robots)
    from mani_skill.agents.registration import REGISTERED_AGENTS

    if robot_uid not in REGISTERED_AGENTS:
        raise ValueError(f"`robot_uid` must be one of {', '.join(sorted(REGISTERED_AGENTS))}, got {robot_uid!r}.")
    robot = REGISTERED_AGENTS[robot_uid].agent_cls
    if robot.urdf_path is None:
        raise ValueError(f"`robot_uid` must be a robot with a URDF, got {robot_uid!r}. Use `visuals='stock'` for it.")
    with contextlib.ExitStack() as restore:
        _set_until_exit(restore, robot, "urdf_path", str(light_urdf(robot.urdf_path, ratio)))
        for module in _modules_with_ground():
            _set_until_exit(restore, module, "build_ground", _light_ground)
        yield


def _set_until_exit(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Set an attribute, and put back what was there (also: nothing, where it was inherited) when `stack` closes."""
    own = vars(target)
    if name in own:
        stack.callback(setattr, target, name, own[name])
    else:
        stack.callback(delattr, target, name)
    setattr(target, name, value)


@contextlib.contextmanager
def use_visuals(visuals: str, robot_uid: str = "panda") -> Iterator[None]:
    """The context to make an environment in: [`light_visuals`] for `"light"`; [`quick_first_frame`] for both."""
    light = resolve_visuals(visuals, "cpu") == "light"
    with quick_first_frame(), light_visuals(robot_uid) if light else contextlib.nullcontext():
        yield


def warm_up(robot_uid: str = "panda") -> Path:
    """Fill the cache for a robot, so that no first run waits (set-up calls this). Returns the cache's folder."""
    with use_visuals("light", robot_uid):
        return cache_folder()
