"""Lists the packages of the wheel; pyproject.toml holds everything else.

A list in pyproject.toml cannot express "every package of moco/, and configs/ as moco.configs". A forgotten subpackage
would be missing from the wheel, and only the wheel would show it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moco", "moco.*"]), "moco.configs"],
    package_dir={"moco.configs": "configs"},
    include_package_data=False,  # only what the next line names
    package_data={
        "moco": ["py.typed"],
        "moco.configs": ["**/*.yaml"],
        "moco.reporting": ["*.css", "*.js", "templates/*.html"],
    },
)
