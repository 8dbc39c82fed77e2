"""Packaging of trl-stare. `pip install -e .` for the base; extras `maniskill`, `deepspeed`, `serve` and `test` add the rest."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "trl_stare" / "__init__.py").read_text(), re.MULTILINE)[1]
README = ROOT / "README.md"

# torchvision is left out on purpose: beside a CPU build of torch it breaks `import transformers`
BASE = [
    "accelerate>=1.10.1",
    "datasets>=4.7",
    "filelock",
    "huggingface_hub",
    "imageio[ffmpeg]",
    "jinja2",
    "matplotlib",
    "numpy",
    "peft>=0.18",
    "pillow",
    "pyyaml",
    "rich",
    "safetensors",
    "scipy",
    "torch",
    "tqdm",
    "transformers>=5.2,<6",
    "trl>=1.13,<2",
]
EXTRAS = {
    "maniskill": ["fast-simplification", "gymnasium", "mani_skill==3.0.1", "sapien==3.0.3"],
    "deepspeed": ["deepspeed>=0.18.6"],
    "serve": ["msgpack>=1.0", "websockets>=15"],
    "test": ["hypothesis", "psutil", "pytest", "pytest-timeout", "pytest-xdist", "ruff"],
}

setup(
    name="trl-stare",
    version=VERSION,
    description="Fine-tune vision-language-action policies stage by stage (STARE-VLA) with Hugging Face TRL",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # the cards' templates lie at the top, where people look for them, and are installed inside the package
    packages=[*find_packages(include=["trl_stare", "trl_stare.*"]), "trl_stare.hub_cards"],
    package_dir={"trl_stare.hub_cards": "hub_cards"},
    package_data={"trl_stare.hub_cards": ["*.md"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
