"""Package metadata. Build system and tool settings: pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "distill_optim" / "__init__.py").read_text("utf-8"), re.M)
assert version is not None

# One line each: why this library and not our own code.
demo = [
    "scikit-learn>=1.3",  # bundles a real data set (digits), so the demo needs no download
    "matplotlib>=3.8",  # the picture
    "rich>=13",  # progress bar and table
]
studies = [
    *demo,  # their data, tables and pictures
    "tqdm>=4.66",  # a progress bar that survives being piped into a file
]
plot = ["matplotlib>=3.8"]  # the monitor's picture
test = [
    *studies,
    "pytest>=8",
    "pytest-xdist>=3",  # the suite on all cores
    "hypothesis>=6.100",  # the theorems
    "expecttest>=0.2",  # torch.testing._internal.common_optimizers, which test_optim of torch is made of, imports it
    "scipy>=1.11",  # an independent quadratic-programming solver as oracle
    "torchjd[full]>=0.18",  # the same methods by other hands
    "conflictfree>=0.1.8",  # ConFIG by its authors
    # Interprets our kernel where there is no GPU (a wheel of 200 MB, 700 MB on disk); torch for CUDA brings it along.
    "triton>=3.5; platform_system == 'Linux'",
    "sybil>=8",  # runs the examples in README and docs
]
integrations = [
    "scikit-learn>=1.3",  # the digits that the scripts train on
    "lightning>=2.6",  # a host: joint_loss under its loops, precision plugins and checkpoints
    "accelerate>=1.15",  # a host: accumulate, clip and mixed precision
    "transformers>=5.23",  # a host: the Trainer, and a tiny language model from a config
]
docs = [
    "sphinx>=8",
    "furo",  # theme that reads well on a phone
    "myst-parser",  # pages in Markdown
]
bench = [*studies, "scipy>=1.11", "torchjd[full]", "pytorch-optimizer"]  # the peers

setup(
    name="distill_optim",
    version=version.group(1),
    description="Drop-in torch.optim optimizers for training on several losses at once, distillation first",
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["distill_optim", "distill_optim.*"]),
    package_data={"distill_optim": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.9", "numpy"],
    extras_require={
        "demo": demo,
        "studies": studies,
        "plot": plot,
        "test": test,
        "integrations": integrations,
        "docs": docs,
        "bench": bench,
        "dev": [*test, *docs, "build", "mypy", "pre-commit", "ruff"],
    },
    entry_points={"console_scripts": ["distill-optim = distill_optim.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",  # what it was tested with
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="knowledge distillation, multi-task learning, optimizer, gradient conflict, torch",
)
