"""Test modules may import what lies beside them and the trainers' toys; the reference outputs of the published OpenVLA."""

import sys
from pathlib import Path

import pytest

for folder in ("policies", "trainers"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "openvla_reference"
"""A checkpoint and outputs of the published code; not part of the repository."""


@pytest.fixture(scope="session")
def openvla_reference() -> Path:
    if not REFERENCE.is_dir():
        pytest.skip(f"needs the reference outputs of the published OpenVLA in {REFERENCE}")
    return REFERENCE
