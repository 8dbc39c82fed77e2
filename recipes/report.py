"""One page about one or several evaluations: tables, stage funnels, learning curves, and the failures by stage.

    python recipes/report.py outputs/eval/imitation outputs/eval/interaction --output_dir outputs/report
    python recipes/report.py outputs/eval/ppo --history outputs/ppo/checkpoint-240/trainer_state.json --output_dir outputs/report

`report.html` needs nothing but itself: send it, open it on a phone. `report.md` has the same tables.
"""

import argparse
import logging
from pathlib import Path

from trl_stare.evaluation import Evaluation, distinct_names, html_page, markdown_page, played_variations

logger = logging.getLogger("report")


def main(args: argparse.Namespace) -> None:
    """Read, draw, write."""
    if args.history and len(args.history) != len(args.evaluations):
        raise ValueError(
            f"`history` must be one file per evaluation, got {len(args.history)} for {len(args.evaluations)}."
        )
    if varied := [folder for folder in args.evaluations if played_variations(folder)]:
        inside = " ".join(f"{varied[0]}/{name}" for name in played_variations(varied[0])[:3])
        raise ValueError(
            f"`evaluations` must be folders of one evaluation each, got {varied[0]} with several variations. Give those of it that "
            f"are to be shown: {inside} ..."
        )
    histories = args.history or [None] * len(args.evaluations)
    shown = [
        Evaluation.load(folder, name=name, history=None if history == "-" else history)
        for folder, name, history in zip(args.evaluations, distinct_names(args.evaluations), histories, strict=True)
    ]
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(html_page(args.title, shown, most=args.failures), encoding="utf-8")
    (out / "report.md").write_text(markdown_page(args.title, shown), encoding="utf-8")
    logger.info("written to %s", out / "report.html")


def parse() -> argparse.Namespace:
    """Folders of evaluations, and what goes with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", help="folders that recipes/evaluate.py wrote")
    parser.add_argument("--output_dir", required=True, help="where report.html and report.md go")
    parser.add_argument("--history", nargs="+", help="a trainer_state.json per evaluation; '-' for none")
    parser.add_argument("--title", default="Evaluation", help="heading")
    parser.add_argument("--failures", type=int, default=12, help="failures shown of each stage")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse())
