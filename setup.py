"""The packages of the wheel; everything else about the project stands in pyproject.toml.

Only code can say "every package of moco/, and configs/ as moco.configs": a list in pyproject.toml would drop a
sub-package that someone forgot to add, and nothing but the wheel would show it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moco", "moco.*"]), "moco.configs"],
    package_dir={"moco.configs": "configs"},
    include_package_data=False,  # only what the next line names
    package_data={"moco.configs": ["**/*.yaml"], "moco.reporting": ["*.css", "*.js"]},
)
