"""Compile moco's kernels for an H200 (sm_90): python -m tests.rehearsal.compiled FILE

FILE becomes the PTX assembly of each kernel by name, in JSON. The process must have the environment of
`tests.rehearsal.build` with `null`: Triton and ptxas are real, and the GPU is not.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from triton.runtime import JITFunction

from moco.data.augment import augment, crop_batch
from moco.data.view import View, draw, draw_crop
from moco.kernels import augment as augment_kernels
from moco.kernels import crop as crop_kernels

DEVICE = torch.device("cuda", 0)


def use() -> None:
    """Launch each kernel, so that Triton compiles it."""
    view = View(
        size=32, crop_scale=(0.2, 1), jitter_p=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_p=1,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    index = np.arange(16)
    images = torch.zeros(16, 3, 40, 50, dtype=torch.uint8, device=DEVICE)
    augment(crop_batch(images, draw_crop(0, 0, index, 0), view), draw(view, 0, 0, index, 0), view)


def assembly() -> dict[str, str]:
    """Return the PTX of each compiled kernel by name; several forms of a kernel are joined."""
    found: dict[str, str] = {}
    for module in (augment_kernels, crop_kernels):
        for name, function in vars(module).items():
            if isinstance(function, JITFunction):
                forms = [form for cache in function.device_caches.values() for form in cache[0].values()]
                found |= {name: "\n".join(form.asm["ptx"] for form in forms)} if forms else {}
    return found


if __name__ == "__main__":
    use()
    Path(sys.argv[1]).write_text(json.dumps(assembly()))
