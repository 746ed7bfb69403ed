#!/usr/bin/env python3
"""Takes the flags of the official main_lincls.py, prints the equivalent command of moco, and runs it.

    python scripts/main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained checkpoint_0199.pth.tar \
        --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 /data/imagenet

docs/howto/from_official.md explains each flag. Fields of moco may follow the folder: /data/imagenet output=runs/linear.
"""

import sys

from moco.interop.official_flags import main

if __name__ == "__main__":
    sys.exit(main("main_lincls", sys.argv[1:]))
