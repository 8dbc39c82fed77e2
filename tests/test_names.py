"""The nearest name, where there is one."""

import pytest

from trl_stare.names import nearest_hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("StackCub-v1", " Did you mean 'StackCube-v1'?"),
        ("pushcube-v1", " Did you mean 'PushCube-v1'?"),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_nearest_hint(name, hint):
    assert nearest_hint(name, {"StackCube-v1": 1, "PushCube-v1": 2}) == hint
