"""The version and the dependencies of hgrn2-megatron. kernels/pyproject.toml states the version of both distributions.

Everything else about the distribution is in pyproject.toml, which cannot read another file.
"""

import tomllib
from pathlib import Path

from setuptools import setup

kernels = tomllib.loads((Path(__file__).parent / "kernels" / "pyproject.toml").read_text())["project"]
setup(
    version=kernels["version"],
    install_requires=[
        # torch and Triton come with it; their lower limits are in kernels/pyproject.toml
        f"hgrn2-kernels=={kernels['version']}",
        "safetensors>=0.4",
        # the lower limits of megatron-core and Transformer Engine are the oldest releases that were tried;
        # development uses 0.19.2
        "megatron-core[training]>=0.18,<0.21",
    ],
)
