"""Reads the source with `ast` and holds it to the architecture: which layer may import what, and the house rules."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "trl_stare").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
SOURCES = PACKAGE + RECIPES + sorted((ROOT / "benchmarks").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LAYERS = (
    "checkpoints",
    "files",
    "names",
    "interfaces",
    "losses",
    "stages",
    "envs",
    "policies",
    "data",
    "trainers",
    "evaluation",
    "serving",
)
FORBIDDEN = {
    "checkpoints": {*LAYERS} - {"checkpoints"},
    "files": {*LAYERS} - {"files"},
    "names": {*LAYERS} - {"names"},
    "interfaces": {"losses", "stages", "envs", "policies", "data", "trainers", "evaluation"},
    "losses": {"interfaces", "stages", "envs", "policies", "data", "trainers", "evaluation"},
    "stages": {"losses", "envs", "policies", "data", "trainers", "evaluation"},
    "envs": {"losses", "stages", "policies", "trainers", "evaluation"},
    "policies": {"losses", "stages", "envs", "trainers", "evaluation"},
    "data": {"losses", "envs", "policies", "trainers", "evaluation"},
    "trainers": {"envs", "policies"},
    "evaluation": {"losses", "envs", "policies", "trainers"},
    "serving": {"losses", "stages", "envs", "policies", "data", "trainers", "evaluation"},
}
for layer in FORBIDDEN.keys() - {"serving"}:
    FORBIDDEN[layer].add("serving")  # the extra `serve` may be missing
"""Layer -> layers of the package it must not import."""
OWNERS = {
    "trl": {"trainers", "recipes", "benchmarks"},
    "mani_skill": {"envs"},
    "sapien": {"envs"},
    "torchvision": set(),
    "websockets": {"serving"},
    "msgpack": {"serving"},
}
"""Outside package -> the only layers that may import it."""
ONLY = {"losses": {"torch"}, "stages": {"torch", "trl_stare"}}
"""Layer -> all it may import besides the standard library."""


def layer_of(path: Path) -> str:
    """`trl_stare/envs/tasks.py` -> `envs`, `trl_stare/losses.py` -> `losses`, `recipes/ipi.py` -> `recipes`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "trl_stare" else parts[0]


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-1]
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def layer_violations(source: str, path: Path) -> list[str]:
    """Imports in `source`, as if it were the file `path`, that point the wrong way."""
    layer, found = layer_of(path), []
    for line, name in imports(ast.parse(source), path):
        top, *rest = name.split(".")
        wrong = layer not in OWNERS.get(top, {layer})
        wrong |= layer in ONLY and top not in ONLY[layer] and top not in sys.stdlib_module_names
        if top == "trl_stare" and layer in LAYERS:
            # the package's root imports all layers, so no layer may go through it
            wrong |= not rest or rest[0] not in LAYERS or rest[0] in FORBIDDEN[layer]
        if wrong:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def house_violations(source: str, path: Path) -> list[str]:
    """`print`, handlers that swallow everything, files and functions that are too long."""
    where, found = path.relative_to(ROOT), []
    if len(source.splitlines()) > MAX_FILE_LINES:
        found.append(f"{where} has {len(source.splitlines())} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{where}:{node.lineno} calls print")
        if isinstance(node, ast.ExceptHandler) and catches_everything(node):
            found.append(f"{where}:{node.lineno} catches everything")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > MAX_FUNCTION_LINES:
            found.append(f"{where}:{node.lineno} {node.name} has {length(node)} lines")
    return found


def catches_everything(handler: ast.ExceptHandler) -> bool:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {node.id for node in types if isinstance(node, ast.Name)}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: documentation is not what makes a function long."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_read():
    assert {"interfaces", "losses", "stages", "envs", "data"} <= {layer_of(path) for path in PACKAGE}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path):
    assert layer_violations(path.read_text(), path) == []


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_house_rules(path):
    assert house_violations(path.read_text(), path) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_remote_code(path):
    assert "trust_remote_code" not in path.read_text()


def test_importing_the_package_needs_no_simulator():
    """`pip install trl-stare` alone has no ManiSkill."""
    code = (
        "import sys; sys.modules.update(mani_skill=None, sapien=None); import trl_stare; from trl_stare import stages"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


WRONG = [
    ("trl_stare/envs/tasks.py", "from trl_stare.stages import get_plan"),
    ("trl_stare/envs/tasks.py", "from ..policies import tiny"),
    ("trl_stare/envs/tasks.py", "from trl_stare import policies"),
    ("trl_stare/envs/tasks.py", "from trl_stare import StagePPOTrainer"),
    ("trl_stare/envs/tasks.py", "def f():\n    import trl_stare.stages.spec"),
    ("trl_stare/policies/tiny/model.py", "from trl_stare.envs.registry import get_simulated_task"),
    ("trl_stare/policies/tiny/model.py", "from ...stages import segment"),
    ("trl_stare/stages/spec.py", "import numpy as np"),
    ("trl_stare/stages/spec.py", "from trl_stare.losses import gae"),
    ("trl_stare/losses.py", "from trl_stare.interfaces import Signals"),
    ("trl_stare/losses.py", "from . import interfaces"),
    ("trl_stare/files.py", "from trl_stare.interfaces import NOMINAL"),
    ("trl_stare/trainers/stage_ppo_trainer.py", "import trl_stare.envs"),
    ("trl_stare/trainers/stage_ppo_trainer.py", "import mani_skill.envs"),
    ("trl_stare/data/pairs.py", "from trl_stare.trainers import StageDPOTrainer"),
    ("trl_stare/data/pairs.py", "from trl import DPOConfig"),
    ("trl_stare/evaluation/report.py", "from sapien import Pose"),
    ("trl_stare/evaluation/evaluate.py", "from trl_stare.serving import RemotePolicy"),
    ("trl_stare/serving/server.py", "from trl_stare.policies import TokenPolicy"),
    ("recipes/ipi.py", "import mani_skill"),
    ("recipes/ipi.py", "import torchvision"),
]
RIGHT = [
    (
        "trl_stare/stages/spec.py",
        "import torch\nimport math\nfrom trl_stare.interfaces import Signals\nfrom . import check",
    ),
    ("trl_stare/losses.py", "from torch.nn import functional as F"),
    ("trl_stare/envs/maniskill.py", "def f():\n    import mani_skill.envs"),
    ("trl_stare/trainers/stage_dpo_trainer.py", "from trl import DPOTrainer\nfrom trl_stare.losses import gae"),
    ("trl_stare/data/pairs.py", "from trl_stare.stages import segment\nimport numpy"),
    ("recipes/ipi.py", "from trl_stare import StagePPOTrainer, make_env\nfrom trl import TrlParser"),
]


@pytest.mark.parametrize(("path", "source"), WRONG)
def test_a_wrong_import_is_found(path, source):
    assert len(layer_violations(source, ROOT / path)) == 1


@pytest.mark.parametrize(("path", "source"), RIGHT)
def test_a_right_import_is_not(path, source):
    assert layer_violations(source, ROOT / path) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("print('hello')", 1),
        ("console.print('hello')", 0),
        ("try:\n    f()\nexcept:\n    pass", 1),
        ("try:\n    f()\nexcept (ValueError, Exception):\n    pass", 1),
        ("try:\n    f()\nexcept ValueError:\n    pass", 0),
        ("def f():\n" + "    x = 1\n" * 59, 0),
        ("def f():\n" + "    x = 1\n" * 60, 1),
        ("def f():\n    '''" + "Words.\n" * 30 + "    '''\n" + "    x = 1\n" * 59, 0),
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
    ],
)
def test_house_violations_are_found(source, count):
    assert len(house_violations(source, ROOT / "trl_stare/data/pairs.py")) == count
