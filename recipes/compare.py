"""Compare two evaluations in pairs, on identical starts: difference, interval, exact test, stage by stage.

    python recipes/compare.py outputs/eval/imitation outputs/eval/interaction
    python recipes/compare.py outputs/eval/a outputs/eval/b --allow temperature --output outputs/eval/a_b.md

Both folders are written by recipes/evaluate.py. What differs besides the policy is refused, unless you allow it by name.
"""

import argparse
import logging
from pathlib import Path

from trl_stare.evaluation import CONDITIONS, check_comparable, compare, comparison_table, read_eval_info, read_played

logger = logging.getLogger("compare")


def main(args: argparse.Namespace) -> None:
    """Check, pair, tell."""
    infos = [read_eval_info(folder) for folder in (args.a, args.b)]
    allowed = check_comparable(*infos, allow=args.allow)
    rows = [
        [
            row
            for task in info["per_task"]
            for row in read_played(Path(folder) / "episodes" / f"{task['task']}.parquet")
        ]
        for folder, info in zip((args.a, args.b), infos, strict=True)
    ]
    stages = {task["task"]: tuple(task["metrics"]["stages"]) for task in infos[0]["per_task"]}
    rules = tuple(info["settings"]["success_rule"] for info in infos)
    lines = [
        f"- {letter}: {info['policy']['name']} ({folder})"
        for letter, info, folder in zip("AB", infos, (args.a, args.b), strict=True)
    ]
    lines += [f"- allowed to differ: {difference}" for difference in allowed]
    text = "\n".join(lines) + "\n\n" + comparison_table(compare(*rows, stages, rules=rules))
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    logger.info("%s", text)


def parse() -> argparse.Namespace:
    """The two folders and what may differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="folder of an evaluation")
    parser.add_argument("b", metavar="B", help="folder of the other")
    parser.add_argument("--allow", nargs="+", default=[], help=f"what may differ: {', '.join(CONDITIONS)}")
    parser.add_argument("--output", help="Markdown file to write the comparison to")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse())
