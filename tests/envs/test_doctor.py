"""The doctor: what it says here, and what it says where something is broken."""

import sys

import pytest
from rich.console import Console

from trl_stare.envs import doctor, vulkan
from trl_stare.envs.doctor import Check, check_render, check_vulkan, report
from trl_stare.envs.vulkan import select_vulkan_driver


def worst(checks: list[Check]) -> str:
    return max((check.status for check in checks), key=("ok", "warning", "failed").index)


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No NVIDIA driver, no driver manifest, nothing chosen by the user."""
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "LP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vulkan, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(vulkan, "ICD_FOLDERS", (tmp_path,))
    return tmp_path


def test_a_frame_is_rendered_here():
    (check,) = check_render()
    assert check.status in ("ok", "warning"), check
    assert " ms at 64 px" in check.detail


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os; os.abort()", "crashed with signal 6"),
        ("import time; time.sleep(60)", "none after 1 s"),
        ("raise RuntimeError('ErrorIncompatibleDriver')", "ErrorIncompatibleDriver"),
        ('print(\'{"ms": 5.0, "contrast": 0.0, "visuals": "light", "device": "x"}\')', "empty picture"),
    ],
    ids=["crash", "hang", "error", "black"],
)
def test_a_broken_driver_is_a_line_of_the_report(code, found):
    (check,) = check_render((sys.executable, "-c", code), timeout=1 if "sleep" in code else 30)
    assert check.status == "failed" and found in check.detail and ".ci/vulkan.sh" in check.repair


def test_no_driver_at_all_names_the_repair(bare_machine):
    with pytest.raises(RuntimeError, match=r"sudo bash \.ci/vulkan\.sh"):
        select_vulkan_driver()
    assert check_vulkan()[-1].repair == vulkan.REPAIR


def test_lavapipe_is_chosen_by_name(bare_machine, monkeypatch):
    (icd := bare_machine / "lvp_icd.x86_64.json").write_text("{}")
    monkeypatch.setenv("VK_DRIVER_FILES", "")  # so that monkeypatch takes back what is set below
    monkeypatch.setenv("VK_ICD_FILENAMES", "")
    monkeypatch.setenv("LP_NUM_THREADS", "2")
    assert select_vulkan_driver() == ("lavapipe", str(icd))
    assert select_vulkan_driver() == ("lavapipe", str(icd))
    import os

    assert os.environ["VK_DRIVER_FILES"] == os.environ["VK_ICD_FILENAMES"] == str(icd)
    assert os.environ["LP_NUM_THREADS"] == "2"  # the user's own choice stays


def test_nvidia_is_left_alone(bare_machine, monkeypatch):
    (bare_machine / "lvp_icd.json").write_text("{}")
    monkeypatch.setattr(vulkan, "has_nvidia_driver", lambda: True)
    assert select_vulkan_driver() == ("nvidia", None)


def test_a_missing_manifest_is_an_error(bare_machine, monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/none")
    with pytest.raises(RuntimeError, match="must name a Vulkan driver manifest, got '/none'"):
        select_vulkan_driver()
    assert check_vulkan()[-1].repair.startswith("unset VK_DRIVER_FILES")


VERSIONS = {"numpy": "2.4.6", "pyarrow": "26.0.1", "mplib": None, "torchvision": None}


@pytest.mark.parametrize(
    ("versions", "status", "repair"),
    [
        ({}, "ok", ""),
        ({"mplib": "0.1.1"}, "warning", "'numpy<2'"),
        ({"mplib": "0.1.1", "numpy": "1.26.4", "pyarrow": "24.0.0"}, "ok", ""),
        ({"torchvision": "0.28.0"}, "failed", "uninstall -y torchvision"),
        ({"numpy": "1.26.4"}, "failed", "pyarrow>=24,<25"),
    ],
)
def test_known_bad_pairs(monkeypatch, versions, status, repair):
    monkeypatch.setattr(doctor, "installed", (VERSIONS | versions).get)
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    checks = doctor.check_known_bad_pairs()
    assert worst(checks) == status
    assert repair in checks[0].repair


def test_a_package_out_of_range_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["trl<2,>=1.13", "numpy", 'mani_skill==3.0.1; extra == "maniskill"']
    )
    monkeypatch.setattr(doctor, "installed", {"trl": "1.12.0", "numpy": "2.4.6"}.get)
    checks = {check.name: check for check in doctor.check_packages()}
    assert set(checks) == {"trl", "mani_skill"} and worst(list(checks.values())) == "failed"
    assert checks["trl"].detail == "must be <2,>=1.13, got 1.12.0"
    assert checks["mani_skill"].repair.endswith("-m pip install 'mani_skill==3.0.1'")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_exit_code_and_repair_lines(status, code):
    console = Console(record=True, width=60, file=open("/dev/null", "w"))
    repair = "pip install 'trl-stare[maniskill]' " + "x" * 80
    assert report([Check("thing", status, "detail [with] brackets", repair)], console) == code
    text = console.export_text()
    assert "detail [with] brackets" in text and f"thing: {repair}\n" in text  # one unbroken line to copy


def test_the_bridge_tasks_need_the_scene_and_the_robot(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    names = {"bridge_v2_real2sim": "tasks/bridge_v2_real2sim_dataset", "widowx250s": "robots/widowx"}
    for name, folder in names.items():
        (check,) = doctor.check_assets()
        assert f"download_asset {name} -y" in check.repair and name in check.detail
        (tmp_path / "data" / folder).mkdir(parents=True)
    (check,) = doctor.check_assets()
    assert check == ("assets", "ok", f"Bridge tasks: in {tmp_path / 'data'}", "")
