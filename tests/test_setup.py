"""Packaging and set-up: the lock file fits setup.py, the wheel is complete, the scripts ask and install no more than needed."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
)
SCRIPTS = sorted((ROOT / ".ci").iterdir())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(variable: str) -> list[str] | dict[str, list[str]]:
    """A literal assigned in setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == variable:
            return ast.literal_eval(node.value)
    raise KeyError(variable)


def test_lock_satisfies_setup():
    pins = {canonical(name): version for name, version in LOCK.items()}
    extras = declared("EXTRAS")
    for line in [*declared("BASE"), *extras["maniskill"], *extras["serve"], *extras["test"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonical(requirement.name)], prereleases=True), line


def test_lock_pins_releases_that_any_index_has():
    for name, version in LOCK.items():
        assert re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version), f"{name}=={version}"
    assert not {"torchvision", "timm", "lerobot"} & {canonical(name) for name in LOCK}


def test_no_index_is_named():
    for path in [ROOT / "setup.py", ROOT / "Makefile", ROOT / "requirements.lock", ROOT / "pyproject.toml", *SCRIPTS]:
        assert not re.search(r"https?://|index-url", path.read_text()), path


def test_wheel_holds_the_package_and_the_card_templates(tmp_path):
    for name in ("setup.py", "pyproject.toml", "LICENSE", "trl_stare", "hub_cards"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    names = set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_stare").rglob("*.py")}
    cards = {f"trl_stare/hub_cards/{path.name}" for path in (ROOT / "hub_cards").glob("*.md")}
    assert modules | cards <= names
    assert {name.split("/")[0] for name in names} == {
        "trl_stare",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(("chosen", "seen"), [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "3"}, "3")])
def test_the_one_process_of_make_ipi_sees_one_gpu(tmp_path, chosen, seen):
    accelerate = tmp_path / "accelerate"
    accelerate.write_text('#!/bin/bash\necho "sees $CUDA_VISIBLE_DEVICES"\n')
    accelerate.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | chosen
    command = ["make", "--silent", "--assume-old=setup", "ipi", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == f"sees {seen}\n", done.stderr


def machine(folder: Path, *, uid: int, nvidia: bool, installed: tuple[str, ...]) -> dict[str, str]:
    """An environment whose first PATH entry plays a Debian machine; what `apt-get` was asked lands in `apt.log`."""
    commands = {
        "id": f"echo {uid}",
        "nvidia-smi": f"exit {0 if nvidia else 1}",
        "dpkg": "exit 1",
        # called as `dpkg-query -W -f FORMAT PACKAGE`
        "dpkg-query": f'case " {" ".join(installed)} " in *" $4 "*) echo "install ok installed";; *) exit 1;; esac',
        "apt-get": f'echo "$@" >>{folder}/apt.log',
        "apt-cache": "exit 0",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


LIBRARIES = ("libvulkan1", "libegl1", "libgl1", "libxext6", "libx11-6", "libglib2.0-0")


def run_vulkan(folder: Path, **kwargs) -> tuple[subprocess.CompletedProcess, str]:
    done = subprocess.run(
        ["bash", ROOT / ".ci/vulkan.sh"],
        env=machine(folder, **kwargs),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    log = folder / "apt.log"
    return done, log.read_text() if log.exists() else ""


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="needs a machine without an NVIDIA driver")
def test_without_root_and_driver_the_command_for_an_administrator_is_named(tmp_path):
    done, log = run_vulkan(tmp_path, uid=1000, nvidia=False, installed=LIBRARIES)
    assert done.returncode == 1 and log == ""
    assert f"sudo bash {ROOT / '.ci/vulkan.sh'}" in done.stderr


def test_with_an_nvidia_driver_nothing_is_installed(tmp_path):
    done, log = run_vulkan(tmp_path, uid=0, nvidia=True, installed=LIBRARIES)
    assert (done.returncode, done.stdout, log) == (0, "vulkan: nvidia is there\n", "")


def test_with_an_nvidia_driver_missing_libraries_come_without_mesa(tmp_path):
    done, log = run_vulkan(tmp_path, uid=0, nvidia=True, installed=LIBRARIES[1:])
    assert done.returncode == 0, done.stderr
    assert "libvulkan1" in log and "mesa" not in log
