#!/usr/bin/env python3
"""Takes the flags of the official main_moco.py, prints the equivalent command of moco, and runs it.

    python scripts/main_moco.py -a resnet50 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos \
        --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 /data/imagenet
    python scripts/main_moco.py ... --print-command      # print only

docs/howto/from_official.md explains each flag. Fields of moco may follow the folder: /data/imagenet run=runs/mine.
"""

import sys

from moco.interop.official_flags import main

if __name__ == "__main__":
    sys.exit(main("main_moco", sys.argv[1:]))
