"""Rank the checkpoints of runs without labels: `python -m moco.choose 'runs=[runs/a,runs/b]'`."""

from moco.cli import Command
from moco.config.choose import ChooseConfig, check_choose

choose = Command("choose", ChooseConfig, check_choose, "moco.analysis.studies.choose:choose")

if __name__ == "__main__":
    choose.main()
