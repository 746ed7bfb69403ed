"""moco: Momentum Contrast, from pretraining to evaluation."""

import sys

if sys.platform == "win32":
    raise SystemExit("moco runs on Linux and macOS: on Windows, use the Windows Subsystem for Linux (WSL)")

__version__ = "0.1.0"
