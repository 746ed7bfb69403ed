"""The command as a person calls it."""

import subprocess
import sys


def test_no_run_is_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "moco.report"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "moco: run='' must not be empty, e.g. run=runs/digits\n"
    assert done.stdout == ""
