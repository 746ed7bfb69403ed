"""Write canvases: handwritten digits on textured backgrounds, with known masks and boxes, to test without downloads.

python scripts/canvases.py CANVASES

CANVASES/train and CANVASES/test get the folders images and masks, and boxes.json: boxes and masks in COCO's format.

A mask holds 0 for the background and 1 + d for the digit d. The digits are the scans of scikit-learn; those of the test
canvases are in no training canvas. The same arguments write the same files.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64
CLASSES = ("background", *"0123456789")


def draw_canvas(
    rng: np.random.Generator, scans: NDArray[np.float64], labels: NDArray[np.int64], side: int = SIDE
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[tuple[int, ...]]]:
    """Draw one to three digits that do not overlap.

    Args:
        scans: of the digits to draw, (D, 8, 8) in 0 ... 16, and their digits `labels` (D,).

    Returns:
        The canvas (side, side, 3), its mask (side, side), and (digit, left, top, right, bottom) of each digit.
    """
    pixels, mask = _texture(rng, side), np.zeros((side, side), dtype=np.uint8)
    boxes = list[tuple[int, ...]]()
    for _ in range(int(rng.integers(1, 4))):
        i, size = int(rng.integers(len(scans))), int(rng.integers(side * 3 // 8, side * 5 // 8))
        left, top = (int(rng.integers(0, side - size + 1)) for _ in range(2))
        if mask[top : top + size, left : left + size].any():
            continue
        scan = Image.fromarray((scans[i] * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        ink = np.asarray(scan, dtype=np.float64)[..., None] / 255  # (size, size, 1)
        part = pixels[top : top + size, left : left + size]
        part[:] = (1 - ink) * part + ink * rng.uniform(0, 255, 3)
        written = ink[..., 0] > 0.4
        mask[top : top + size, left : left + size][written] = 1 + labels[i]
        rows, columns = np.flatnonzero(written.any(axis=1)), np.flatnonzero(written.any(axis=0))
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        boxes.append((int(labels[i]), *map(int, box)))
    return pixels.round().astype(np.uint8), mask, boxes


def _texture(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Draw a background (side, side, 3): two colors, mixed by waves of random directions, and noise."""
    y, x = np.mgrid[:side, :side] / side
    waves = sum(
        np.sin(2 * np.pi * (rng.uniform(-6, 6) * x + rng.uniform(-6, 6) * y) + rng.uniform(0, 6)) for _ in range(3)
    )
    share = 0.5 + waves[..., None] / 6  # 0 ... 1
    colors = rng.uniform(0, 255, (2, 3))
    noise = rng.normal(0, 8, (side, side, 3))
    pixels: NDArray[np.float64] = np.clip(share * colors[0] + (1 - share) * colors[1] + noise, 0, 255)
    return pixels


def write_canvases(root: Path, train: int, test: int, seed: int = 0, side: int = SIDE) -> None:
    """Write the canvases of both splits; see the top of this file."""
    bunch = load_digits()
    for split, count, part in (("train", train, slice(0, 1400)), ("test", test, slice(1400, None))):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        found = []
        for number in range(count):
            rng = np.random.default_rng((seed, split == "test", number))
            pixels, mask, boxes = draw_canvas(rng, bunch.images[part], bunch.target[part], side)
            Image.fromarray(pixels).save(root / split / "images" / f"{number:05}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number:05}.png")
            found.append((mask, boxes))
        (root / split / "boxes.json").write_text(json.dumps(_coco(found)) + "\n")


def _coco(canvases: list[tuple[NDArray[np.uint8], list[tuple[int, ...]]]]) -> dict[str, Any]:
    """Return the objects of canvases in COCO's format; their masks are uncompressed run lengths."""
    images, annotations = [], list[dict[str, Any]]()
    for number, (mask, boxes) in enumerate(canvases):
        height, width = mask.shape
        images.append({"id": number, "file_name": f"{number:05}.png", "width": width, "height": height})
        for digit, left, top, right, bottom in boxes:
            inside = np.zeros_like(mask)
            inside[top:bottom, left:right] = mask[top:bottom, left:right] > 0
            # Columns first; the first run is of zeros.
            flat = np.concatenate([[0], inside.T.ravel(), [2]])
            edges = np.flatnonzero(np.diff(flat))
            runs = np.diff(np.concatenate([[0], edges])).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes 0 for "no object"
                    "image_id": number,
                    "category_id": digit + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(inside.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": runs},
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(arguments: list[str]) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to create")
    parser.add_argument("--train", type=int, default=400, help="training canvases (400)")
    parser.add_argument("--test", type=int, default=100, help="test canvases (100)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other canvases (0)")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} exists: name a new folder")
    if min(options.train, options.test) < 1:
        parser.error("--train and --test must be at least 1")
    write_canvases(options.folder, options.train, options.test, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
