"""`check`: does a plan say about recorded episodes what its author means? Run it before anything is trained on a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.segments import Segment, segment, stage_success
from trl_stare.stages.spec import StagePlan
from trl_stare.stages.validation import check_episode

FALL = 1e-6
"""Smallest fall of a potential that counts: several roundings of float32 near 1."""


@dataclass(frozen=True)
class Finding:
    """One thing that [`check`] noticed.

    Attributes:
        severity (`str`): `"error"`: training on this plan would learn something else than meant. `"note"`: look at it.
        kind (`str`): one of those listed at [`check`].
        stage (`str` or `None`): name of the stage.
        episodes (`tuple[int, ...]`): indices of the episodes in which it happened.
        message (`str`): what happened, and what to do.
    """

    severity: str
    kind: str
    stage: str | None
    episodes: tuple[int, ...]
    message: str

    def __str__(self) -> str:
        where = f" [{self.stage}]" if self.stage else ""
        return f"{self.severity}: {self.kind}{where}, episodes {_ranges(self.episodes)}: {self.message}"


@dataclass(frozen=True)
class PlanReport:
    """What [`check`] found; `str()` is a short text.

    Attributes:
        task (`str`), names (`tuple[str, ...]`): the plan's.
        num_episodes (`int`), num_successes (`int`): how many episodes there were, and how many the task called solved.
        passed (`tuple[tuple[int, int], ...]`): `(num_passed, num_reached)` of each stage, see [`stage_success`].
        findings (`tuple[Finding, ...]`): errors first.
    """

    task: str
    names: tuple[str, ...]
    num_episodes: int
    num_successes: int
    passed: tuple[tuple[int, int], ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be notes."""
        return not self.errors

    def __str__(self) -> str:
        errors = len(self.errors)
        stages = ", ".join(
            f"{name} {passed}/{reached}" for name, (passed, reached) in zip(self.names, self.passed, strict=True)
        )
        head = (
            f"{self.task}: {errors} error(s), {len(self.findings) - errors} note(s) in {self.num_episodes} episode(s), "
            f"{self.num_successes} of them successful"
        )
        return "\n".join([head, f"passed / reached: {stages}", *map(str, self.findings)])


class _Episode(NamedTuple):
    """One episode up to its first success (all rows if it has none): `T + 1` rows, `K` stages."""

    index: int
    events: Tensor
    distances: Tensor
    potential: Tensor
    segments: tuple[Segment, ...]
    succeeded: bool


def check(plan: StagePlan, episodes: Sequence[Signals], *, form: str = "staged") -> PlanReport:
    """Hold a plan against recorded episodes. Give some that succeed and some that fail, of an expert and of chance.

    | kind | what it means |
    |---|---|
    | `never_entered` | no step of any episode was taken in the stage |
    | `never_left` | the stage's own event never holds: at best success passes the stage, as it passes all |
    | `equal_events` | two events hold at the very same moments: the later stage is empty |
    | `out_of_order` | a later stage's event holds before this one's has held at all |
    | `skipped` | success came before the stage's event had held; the plan then counts the stage as passed |
    | `potential_falls` | the potential is lower where the stage is passed than one step before: progress is punished |
    | `distance_does_not_fall` | the stage's distance is not smaller at its end than at its start, in successful episodes |
    | `zero_steps` | most episodes that passed the stage spent no step in it |
    | `dead_signal` | the plan reads a signal that never changes |
    | `no_success` | no episode succeeded, so that less can be told |

    An error is what happens in more than half of the successful episodes; `zero_steps` and what was seen in failures
    alone is a note, because a stage may be out of reach of whoever acted.

    Args:
        plan ([`StagePlan`]): the plan.
        episodes (`Sequence[Signals]`): one or more trajectories, name -> `[T + 1]` or `[T + 1, D]`, `T >= 1`. What
            follows an episode's first success is left out.
        form (`str`): of the potential, see [`StagePlan.potential`]; the literal one falls at every boundary.

    Raises:
        ValueError: if there are no episodes, or if a signal is missing, misshapen or not finite; names episode, signal
            and step.

    Example: a plan whose Transport ends when the object is over the goal *and* on the table, for a task that holds it
    in the air: `never_left [Transport]` in all episodes, `never_entered` for the stage behind it, and `report.ok` is
    `False`.
    """
    if not len(episodes):
        raise ValueError("`episodes` must hold the signals of one or more episodes, got none. Record some first.")
    for index, signals in enumerate(episodes):
        check_episode(plan.task, plan.reads, signals, where=f"episodes[{index}]")
    seen = [_look(plan, index, signals, form) for index, signals in enumerate(episodes)]
    findings = [
        finding
        for look in (_unreached, _empty, _equal_events, _disorder, _falls, _distances, _no_success)
        for finding in look(plan.names, seen)
    ]
    findings += _dead_signals(plan, episodes)
    return PlanReport(
        task=plan.task,
        names=plan.names,
        num_episodes=len(seen),
        num_successes=sum(episode.succeeded for episode in seen),
        passed=stage_success([episode.segments for episode in seen], len(plan)),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),  # "error" < "note"
    )


def _look(plan: StagePlan, index: int, signals: Signals, form: str) -> _Episode:
    solved = torch.nonzero(signals["success"]).flatten()
    # a segment needs one step, also in the odd episode that begins solved
    stop = max(int(solved[0]), 1) + 1 if len(solved) else len(signals["success"])
    rows = {name: signals[name][:stop] for name in plan.reads}
    return _Episode(
        index=index,
        events=plan.events(rows),
        distances=plan.distances(rows),
        potential=plan.potential(rows, form),
        segments=segment(plan, rows),
        succeeded=len(solved) > 0,
    )


def _unreached(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    """Stages whose event never holds by itself; the last stage's is success, which `_no_success` is about."""
    solved = [episode.index for episode in seen if episode.succeeded]
    for k in _never_left(seen):
        beyond = [e.index for e in seen if e.succeeded or e.events[:, k + 1 :].any()]
        if beyond:
            advice = f"{len(solved)} success(es) and later events came without it: can it hold at all in this task?"
            yield Finding("error", "never_left", names[k], tuple(beyond), f"its event never holds; {advice}")
        else:
            tried = [e.index for e in seen if len(e.segments) > k]
            message = "its event never holds. Give episodes that get further, to tell a hard stage from a wrong event."
            yield Finding("note", "never_left", names[k], tuple(tried), message)


def _empty(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    """Stages that nothing is done in."""
    for k, name in enumerate(names):
        passed = [e.index for e in seen if len(e.segments) > k and e.segments[k].passed]
        at_once = [e.index for e in seen if e.index in passed and e.segments[k].start == e.segments[k].stop]
        spent = any(len(e.segments) > k and e.segments[k].stop > e.segments[k].start for e in seen)
        if not spent and passed:
            message = "every episode that got here was past it at once: its event holds as soon as it begins."
            yield Finding("error", "never_entered", name, tuple(at_once), message)
        elif not spent:
            everywhere = tuple(e.index for e in seen)
            message = f"no episode passed {names[k - 1]}. Give episodes that get further."
            yield Finding("note", "never_entered", name, everywhere, message)
        elif 2 * len(at_once) > len(passed):
            message = f"{len(at_once)} of the {len(passed)} episodes that passed it spent no step in it."
            yield Finding("note", "zero_steps", name, tuple(at_once), message)


def _equal_events(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    events = torch.cat([episode.events for episode in seen])
    for k in range(len(names)):
        for j in range(k + 1, len(names)):
            if events[:, k].any() and torch.equal(events[:, k], events[:, j]):
                where = tuple(e.index for e in seen if e.events[:, k].any())
                message = f"its event holds exactly when that of {names[k]} does. Merge the two, or change one."
                yield Finding("error", "equal_events", names[j], where, message)


def _disorder(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    """Later events, or success, before this stage's event has held."""
    last, unreachable = len(names) - 1, _never_left(seen)
    for k in range(last):
        if k in unreachable:
            continue
        before = {e.index: ~e.events[:, k].cumsum(0).bool() for e in seen}
        for j in range(k + 1, last):
            where = [e.index for e in seen if (before[e.index] & e.events[:, j]).any()]
            message = (
                f"the event of {names[j]} holds before this one ever has: the current stage jumps over {names[k]}."
            )
            yield from _weighed("out_of_order", names[k], where, seen, message)
        where = [e.index for e in seen if e.succeeded and before[e.index][-1]]
        message = "success came without its event; the plan adds it, because success passes every stage."
        yield from _weighed("skipped", names[k], where, seen, message)


def _falls(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    """Potentials lower at the row where an event first holds than one row before."""
    for k, name in enumerate(names):
        where = []
        for episode in seen:
            part = episode.segments[k] if len(episode.segments) > k else None
            if part is not None and part.passed and part.stop > 0:
                where += [episode.index] * bool(episode.potential[part.stop] < episode.potential[part.stop - 1] - FALL)
        message = "the potential falls at the step that passes it, so that shaping punishes the progress."
        yield from _weighed("potential_falls", name, where, seen, message)


def _distances(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    """Distances that are not smaller at the end of a stage, where the episode succeeds."""
    for k, name in enumerate(names):
        parts = [(e, e.segments[k]) for e in seen if e.succeeded]
        where = [
            e.index for e, p in parts if p.stop > p.start and not e.distances[p.stop, k] < e.distances[p.start, k]
        ]
        message = "its distance is no smaller at its end than at its start: neither cost nor potential sees the work."
        yield from _weighed("distance_does_not_fall", name, where, seen, message)


def _no_success(names: Sequence[str], seen: Sequence[_Episode]) -> Iterator[Finding]:
    if not any(episode.succeeded for episode in seen):
        message = "no episode succeeded: only a success shows whether a plan leads there. Add some, e.g. an expert's."
        yield Finding("note", "no_success", names[-1], tuple(e.index for e in seen), message)


def _dead_signals(plan: StagePlan, episodes: Sequence[Signals]) -> Iterator[Finding]:
    for name in plan.reads:
        first = episodes[0][name][:1]
        # without a success its signal is constant: `no_success` says so
        if name != "success" and all(bool((signals[name] == first).all()) for signals in episodes):
            readers = ", ".join(stage.name for stage in plan.stages if name in stage.reads)
            message = (
                f"{name!r}, read by {readers}, is {first[0].tolist()} at every step. Is it read from the right place?"
            )
            yield Finding("note", "dead_signal", None, tuple(range(len(episodes))), message)


def _never_left(seen: Sequence[_Episode]) -> list[int]:
    """Stages before the last whose event holds in no row of any episode."""
    held = torch.stack([episode.events.any(dim=0) for episode in seen]).any(dim=0)
    return torch.nonzero(~held[:-1]).flatten().tolist()


def _weighed(
    kind: str, stage: str, where: Collection[int], seen: Sequence[_Episode], message: str
) -> Iterator[Finding]:
    """A finding if there are any episodes `where` it happened: an error if most of the successful ones are among them."""
    solved = {episode.index for episode in seen if episode.succeeded}
    if where:
        severity = "error" if 2 * len(solved.intersection(where)) > len(solved) else "note"
        yield Finding(severity, kind, stage, tuple(where), message)


def _ranges(episodes: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` -> `"0-2, 5"`."""
    runs: list[list[int]] = []
    for episode in episodes:
        if runs and episode == runs[-1][1] + 1:
            runs[-1][1] = episode
        else:
            runs.append([episode, episode])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
