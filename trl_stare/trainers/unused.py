"""Fields that a config inherits and its trainer has no use for: refused, as nobody would notice that they do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_unused(config: Any, unused: Mapping[str, Any], advice: str) -> None:
    """Raise `ValueError` if a field of `config` has another value than the default it has in `unused`.

    Args:
        config (dataclass instance): after it has been checked otherwise.
        unused (`Mapping`): name -> default. advice (`str`): sentences on what there is instead.
    """
    for name, value in unused.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"`{name}` must be {value!r}, got {getattr(config, name)!r}: it would change nothing. {advice}"
            )
