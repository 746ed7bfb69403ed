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
from moco.kernels import batch_norm as batch_norm_kernels
from moco.kernels import crop as crop_kernels
from moco.kernels import info_nce as info_nce_kernels
from moco.losses import info_nce_streamed
from moco.models.norm import GroupedBatchNorm

DEVICE = torch.device("cuda", 0)


def use() -> None:
    """Launch each kernel, so that Triton compiles it."""
    view = View(
        size=32, crop_scale=(0.2, 1), jitter_p=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_p=1,
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    index = np.arange(16)
    images = torch.zeros(16, 3, 40, 50, dtype=torch.uint8, device=DEVICE)
    query = torch.zeros(16, 128, device=DEVICE, requires_grad=True)
    queue, own = (
        torch.zeros(4096, 128, device=DEVICE),
        (torch.zeros(16, device=DEVICE), torch.zeros(4096, device=DEVICE)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        info_nce_streamed(query.to(dtype), query.detach().to(dtype), queue.to(dtype), 0.2, samples=own).loss.backward()
    x = torch.zeros(16, 64, 8, 8, device=DEVICE, requires_grad=True).to(
        torch.bfloat16, memory_format=torch.channels_last
    )
    for affine in (True, False):
        GroupedBatchNorm(64, 8, affine=affine).to(DEVICE)(x).sum().backward()
    augment(crop_batch(images, draw_crop(0, 0, index, 0), view), draw(view, 0, 0, index, 0), view)


def assembly() -> dict[str, str]:
    """Return the PTX of each compiled kernel by name; several forms of a kernel are joined."""
    found: dict[str, str] = {}
    for module in (augment_kernels, batch_norm_kernels, crop_kernels, info_nce_kernels):
        for name, function in vars(module).items():
            if isinstance(function, JITFunction):
                forms = [form for cache in function.device_caches.values() for form in cache[0].values()]
                found |= {name: "\n".join(form.asm["ptx"] for form in forms)} if forms else {}
    return found


if __name__ == "__main__":
    use()
    Path(sys.argv[1]).write_text(json.dumps(assembly()))
