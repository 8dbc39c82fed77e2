"""Compare two evaluations in pairs, on identical starts: difference, interval, exact test, stage by stage.

    python recipes/compare.py outputs/eval/imitation outputs/eval/interaction
    python recipes/compare.py outputs/eval/a outputs/eval/b --allow temperature --output outputs/eval/a_b.md
    python recipes/compare.py outputs/eval/ppo-{0,1,2} --with outputs/eval/sta_ppo-{0,1,2}
    python recipes/compare.py outputs/robust/imitation outputs/robust/interaction

All folders are written by recipes/evaluate.py. What differs besides the policy is refused, unless you allow it by name.
The third line compares two methods rather than two checkpoints: the k-th training run of one with the k-th of the other. In the
last the folders are of `evaluate.py --variations`: which policy is the better one under each variation.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_stare.evaluation import (
    CONDITIONS,
    Comparison,
    Evaluation,
    check_comparable,
    compare,
    compare_runs,
    compare_varied,
    comparison_table,
    played_variations,
    runs_table,
)
from trl_stare.files import write_atomically

logger = logging.getLogger("compare")

Evaluations = Mapping[str, Evaluation]
"""What a folder holds: variation -> its evaluation, or `""` -> the only one."""


def main(args: argparse.Namespace) -> None:
    """Check, pair, tell."""
    folders = list(zip(args.a, args.b, strict=True))
    lines, first, runs, known = [], None, [], []
    for pair in folders:
        loaded = [load(folder) for folder in pair]
        first = first or loaded[0]
        known.append([_weights(*side) for side in zip(pair, loaded, strict=True)])
        if known[-1] in known[:-1]:
            raise ValueError(
                f"`--with` must give training runs that differ, got the weights of {' and '.join(pair)} twice: "
                "one run counted again would only seem to make the mean surer. Give each pair of runs once."
            )
        for side, folder, evaluations in zip("AB", pair, loaded, strict=True):
            lines.append(f"- {side}: {_any(evaluations).info['policy']['name']} ({folder})")
        # a training run may have been evaluated on starts of its own, both methods on the same
        allowed = _differences(*loaded, args.allow) + _differences(first, loaded[0], args.allow, free=("seeds",))
        lines += [f"- allowed to differ: {sentence}" for sentence in dict.fromkeys(allowed)]
        runs.append(_compare(*loaded, together=len(folders) > 1))
    names = "task" if "" in first else "variation"
    table = comparison_table(runs[0], names=names) if len(runs) == 1 else runs_table(compare_runs(runs), names=names)
    text = "\n".join(lines) + "\n\n" + table
    logger.info("%s", text)
    if args.output:
        write_atomically(args.output, text + "\n")


def load(folder: str) -> Evaluations:
    """Every evaluation in `folder`."""
    return {name: Evaluation.load(Path(folder, name)) for name in played_variations(folder) or ("",)}


def _any(evaluations: Evaluations) -> Evaluation:
    """One of them, where it does not matter which."""
    return next(iter(evaluations.values()))


def _weights(folder: str, evaluations: Evaluations) -> Any:
    """What tells a training run from others: its files, or the folder of an evaluation of a demonstrator or chance, which have none."""
    return _any(evaluations).info["policy"]["files"] or Path(folder).resolve()


def _differences(a: Evaluations, b: Evaluations, allow: Sequence[str], free: Sequence[str] = ()) -> list[str]:
    """What besides the policy differs, and may."""
    if a.keys() != b.keys():
        raise ValueError(
            f"`A` and `B` must be of the same variations, got {sorted(a)} and {sorted(b)}. Evaluate both with the same "
            "`--variations`, or compare the folders of one: outputs/robust/camera/shift."
        )
    return [sentence for name in a for sentence in check_comparable(a[name].info, b[name].info, allow, free=free)]


def _compare(a: Evaluations, b: Evaluations, *, together: bool) -> dict[str, list[Comparison]]:
    """Two policies."""
    rules = tuple(_any(side).info["settings"]["success_rule"] for side in (a, b))
    rows = [
        {name: [row for task in e.episodes.values() for row in task] for name, e in side.items()} for side in (a, b)
    ]
    if "" not in a:
        return compare_varied(*rows, rules=rules, together=together)
    names, b_names = (
        {task["task"]: tuple(task["metrics"]["stages"]) for task in side[""].info["per_task"]} for side in (a, b)
    )
    return compare(rows[0][""], rows[1][""], names, b_stage_names=b_names, rules=rules)


def parse() -> argparse.Namespace:
    """The folders and what may differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="A", help="folder of an evaluation, and of the other: A B")
    parser.add_argument(
        "--with", dest="b", nargs="+", metavar="B", help="then the folders before are A's training runs, these B's"
    )
    parser.add_argument("--allow", nargs="+", default=[], help=f"what may differ: {', '.join(CONDITIONS)}")
    parser.add_argument("--output", help="Markdown file to write the comparison to")
    args = parser.parse_args()
    if args.b is None and len(args.folders) != 2:
        parser.error(f"`A B` must be two folders, got {len(args.folders)}. Several training runs: A1 A2 --with B1 B2.")
    args.a, args.b = (args.folders, args.b) if args.b else (args.folders[:1], args.folders[1:])
    if len(args.a) != len(args.b):
        parser.error(f"`--with` must give as many folders as there are before it, {len(args.a)}, got {len(args.b)}.")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse())
