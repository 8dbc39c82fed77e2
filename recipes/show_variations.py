"""Look at what the variations do to a task: the first picture of one episode under each of them, in one image.

    python recipes/show_variations.py --task StackCube-v1 --output docs/variations_stackcube.png
    python recipes/show_variations.py --task PutCarrotOnPlateInScene-v1 --variations camera/shift,table/texture --output carrot.png

Do this before you believe a robustness table. Variations of actions and instructions leave the first picture as it is and are left out.
"""

import argparse
import logging
from contextlib import closing

from tqdm.auto import tqdm

from trl_stare import make_env
from trl_stare.envs import get_variation, select_variations
from trl_stare.evaluation import plot_variations
from trl_stare.interfaces import NOMINAL
from trl_stare.tasks import import_tasks

logger = logging.getLogger("show_variations")


def main(args: argparse.Namespace) -> None:
    """One environment after the other, one reset each."""
    import_tasks(args.task_module)
    shown = [name for name in select_variations(args.variations) if get_variation(name).arrange is not None]
    images = {}
    for name in tqdm([NOMINAL, *shown], desc=args.task, unit="variation"):
        settings = {"image_size": args.image_size, "visuals": args.visuals, "device": "cpu", "variation": name}
        with closing(make_env(args.task, 1, num_workers=0, **settings)) as env:
            images[name] = env.reset([args.seed]).obs.images[0].numpy()
    plot_variations(images, args.output)
    logger.info("written to %s", args.output)


def parse() -> argparse.Namespace:
    """Which task, which episode, where to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="a registered task")
    parser.add_argument("--variations", default="all", help="'all', or names with commas between them")
    parser.add_argument("--seed", type=int, default=0, help="of the episode")
    parser.add_argument("--image_size", type=int, default=144, help="pixels of each picture")
    parser.add_argument("--visuals", help="'light' (default on a CPU) or 'stock'")
    parser.add_argument("--task_module", help="module, or its file, that registers tasks or variations of your own")
    parser.add_argument("--output", required=True, help="the PNG")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse())
