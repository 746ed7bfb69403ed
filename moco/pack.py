"""Pack images into tar shards with an index: `python -m moco.pack data.root=IMAGES output=DIR`."""

from moco.cli import Command
from moco.config.pack import PackConfig, check_pack

pack = Command("pack", PackConfig, check_pack, "moco.data.pack:pack")

if __name__ == "__main__":
    pack.main()
