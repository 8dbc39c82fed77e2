"""What to say to a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """The nearest of the `known` names as a sentence that an error message can end with; empty if none is near.

    Example: `nearest_hint("StackCub-v1", ["StackCube-v1", "PushCube-v1"])` is `" Did you mean 'StackCube-v1'?"`.
    """
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
