"""Fields and values as a person can paste them into a shell: quoted for Hydra, then for the shell."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

# Text that needs no quotes for Hydra to read it unchanged. (Quotes would always be correct, but they are hard to read.)
_UNQUOTED = re.compile(r"[A-Za-z_./][A-Za-z0-9_./:@%+-]*")
_KEYWORDS = {"true", "false", "null", "nan", "inf"}  # without quotes, Hydra does not read these words as text


def override(name: str, value: Any) -> str:
    """Return `name=value` in the grammar of Hydra's overrides, quoted for a shell."""
    return shlex.quote(f"{name}={value_text(value)}")


def value_text(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return value if _UNQUOTED.fullmatch(value) and value.lower() not in _KEYWORDS else quoted(value)
    return json.dumps(value)


def quoted(text: str) -> str:
    """Quote text for Hydra: escape each quote, and double the backslashes directly before a quote or at the end."""
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text) + '"'
