"""Compare two evaluations in pairs, on identical starts: difference, interval, exact test, stage by stage.

    python recipes/compare.py outputs/eval/imitation outputs/eval/interaction
    python recipes/compare.py outputs/eval/a outputs/eval/b --allow temperature --output outputs/eval/a_b.md
    python recipes/compare.py outputs/eval/ppo-{0,1,2} --with outputs/eval/sta_ppo-{0,1,2}

All folders are written by recipes/evaluate.py. What differs besides the policy is refused, unless you allow it by name.
The last line compares two methods rather than two checkpoints: the k-th training run of one with the k-th of the other.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_stare.evaluation import (
    CONDITIONS,
    Comparison,
    check_comparable,
    compare,
    compare_runs,
    comparison_table,
    read_eval_info,
    read_played,
    runs_table,
)

logger = logging.getLogger("compare")


def main(args: argparse.Namespace) -> None:
    """Check, pair, tell."""
    folders = list(zip(args.a, args.b, strict=True))
    lines, first, runs, known = [], read_eval_info(args.a[0]), [], []
    for pair in folders:
        infos = [read_eval_info(folder) for folder in pair]
        known.append([_weights(folder, info) for folder, info in zip(pair, infos, strict=True)])
        if known[-1] in known[:-1]:
            raise ValueError(
                f"`--with` must give training runs that differ, got the weights of {' and '.join(pair)} twice: "
                "one run counted again would only seem to make the mean surer. Give each pair of runs once."
            )
        for side, folder, info in zip("AB", pair, infos, strict=True):
            lines.append(f"- {side}: {info['policy']['name']} ({folder})")
        allowed = [sentence for info in infos for sentence in check_comparable(first, info, allow=args.allow)]
        lines += [f"- allowed to differ: {sentence}" for sentence in allowed]
        runs.append(_compare(pair, infos))
    table = comparison_table(runs[0]) if len(runs) == 1 else runs_table(compare_runs(runs))
    text = "\n".join(lines) + "\n\n" + table
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    logger.info("%s", text)


def _weights(folder: str, info: dict) -> Any:
    """What tells a training run from others: its files, or the folder of an evaluation of a demonstrator or chance, which have none."""
    return info["policy"]["files"] or Path(folder).resolve()


def _compare(folders: Sequence[str], infos: Sequence[dict]) -> dict[str, list[Comparison]]:
    """Two evaluations."""
    rows = [
        [
            row
            for task in info["per_task"]
            for row in read_played(Path(folder) / "episodes" / f"{task['task']}.parquet")
        ]
        for folder, info in zip(folders, infos, strict=True)
    ]
    stages = {task["task"]: tuple(task["metrics"]["stages"]) for task in infos[0]["per_task"]}
    return compare(*rows, stages, rules=tuple(info["settings"]["success_rule"] for info in infos))


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
