"""Check that every place names the version of a release: `python scripts/release_version.py refs/tags/v0.1.0`.

The tag is v and `moco.__version__`; CITATION.cff has the same version, and CHANGELOG.md has a section for it. For a
branch (refs/heads/main, a rehearsal) only CITATION.cff is checked.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(ref: str, root: Path = ROOT) -> list[str]:
    """Return a sentence for each place that has another version than `moco.__version__`; none if all agree."""
    version = _found(root / "moco" / "__init__.py", r'^__version__ = "(.+)"$')
    cited = _found(root / "CITATION.cff", r"^version: (\S+)$")
    found = []
    if cited != version:
        found.append(f"CITATION.cff has version {cited}, moco/__init__.py {version}: set both to the same")
    if ref.startswith("refs/tags/"):
        tag = ref.removeprefix("refs/tags/")
        if tag != f"v{version}":
            found.append(f"the tag is {tag}, but moco/__init__.py has {version}: tag v{version}, or change the version")
        if not re.search(rf"^## {re.escape(version)}\b", (root / "CHANGELOG.md").read_text(), re.MULTILINE):
            found.append(f"CHANGELOG.md has no section '## {version}': rename '## Unreleased'")
    return found


def _found(file: Path, pattern: str) -> str:
    found = re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "none"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="refs/tags/TAG or refs/heads/BRANCH")
    ref = parser.parse_args().ref
    if not ref.startswith(("refs/tags/", "refs/heads/")):
        parser.error(f"{ref} must begin with refs/tags/ or refs/heads/")
    sys.exit("\n".join(problems(ref)) or 0)
