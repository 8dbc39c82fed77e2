"""The phases of a run: their names, their order, and what is on record of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_stare.files import write_atomically

PHASES = ("imitation", "preference", "interaction")
"""The phases of a run, in order. What is done in rounds is `preference`, `preference-2`, `preference-3`, ..."""


def in_round(name: str, turn: int) -> str:
    """`name` as it is called in that round, counted from 1. Example: `in_round("rollouts", 1)` is `"rollouts"`, of 2 `"rollouts-2"`."""
    return name if turn == 1 else f"{name}-{turn}"


def phase_turn(name: str) -> tuple[str, int]:
    """The phase, and which round of it, that [`in_round`] made `name` of.

    Raises:
        ValueError: if that is no round of a phase; names the phases.

    Example: `phase_turn("preference")` is `("preference", 1)`, `phase_turn("preference-3")` is `("preference", 3)`.
    """
    phase, _, number = name.partition("-")
    turn = int(number) if number.isdecimal() else 1
    if phase not in PHASES or turn < 1 or name != in_round(phase, turn):
        raise ValueError(f"a phase must be among {', '.join(PHASES)} and rounds like preference-2, got {name!r}.")
    return phase, turn


def phase_order(name: str) -> tuple[int, int]:
    """Sorts names of phases as a run goes through them. Raises what [`phase_turn`] does."""
    phase, turn = phase_turn(name)
    return PHASES.index(phase), turn


class PhaseRecords:
    """What is on record of a run's phases, in files that are there or not: a killed run continues after the last one.

    Args:
        folder (`Path`): of the records: `{phase}_training.json`, written when the phase's checkpoint is complete, and `{phase}.json`,
            written last: a phase that has it is done.
        phases (`Sequence[str]`): of the run, in order.
    """

    def __init__(self, folder: Path, phases: Sequence[str]):
        self.folder = folder
        self.phases = tuple(phases)

    @property
    def done(self) -> list[str]:
        """The phases that are done, in order."""
        return [phase for phase in self.phases if self._file(phase).exists()]

    def before(self, phase: str) -> str | None:
        """The last phase before this one that is done: the one whose checkpoint it starts from."""
        earlier = [other for other in self.done if self.phases.index(other) < self.phases.index(phase)]
        return earlier[-1] if earlier else None

    def is_trained(self, phase: str) -> bool:
        """Whether the phase's checkpoint is complete."""
        return self._file(f"{phase}_training").exists()

    def training(self, phase: str) -> dict[str, Any]:
        """What [`~PhaseRecords.write_training`] wrote."""
        return json.loads(self._file(f"{phase}_training").read_text(encoding="utf-8"))

    def write_training(self, phase: str, record: Mapping[str, Any]) -> None:
        """The phase's checkpoint is complete; what remains is to evaluate it."""
        write_atomically(self._file(f"{phase}_training"), json.dumps(record))

    def write(self, phase: str, record: Mapping[str, Any]) -> None:
        """The phase is done."""
        write_atomically(self._file(phase), json.dumps(record, indent=1))

    def read(self) -> dict[str, dict[str, Any]]:
        """Phase -> record, of those that are done, in order."""
        return {phase: json.loads(self._file(phase).read_text(encoding="utf-8")) for phase in self.done}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"
