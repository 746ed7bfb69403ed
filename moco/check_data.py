"""Check a folder of images before a run: `python -m moco.check_data data.root=IMAGES`."""

from moco.cli import Command
from moco.config.check_data import CheckDataConfig, check_check_data

check_data = Command("check_data", CheckDataConfig, check_check_data, "moco.data.check:check_data")

if __name__ == "__main__":
    check_data.main()
