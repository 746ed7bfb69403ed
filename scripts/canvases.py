"""Write canvases: handwritten digits on textured backgrounds, with known masks and boxes, to test without downloads.

python scripts/canvases.py CANVASES

CANVASES/train and CANVASES/test get the folders images and masks, and boxes.json: boxes and masks in COCO's format.
CANVASES/pretrain/images gets smaller canvases with one digit each, without labels.

A mask holds 0 for the background and 1 + d for the digit d. The digits are the scans of scikit-learn; those of the test
canvases are in no other canvas. The same arguments write the same files.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

SIDE = 64
CLASSES = ("background", *"0123456789")


def draw_canvas(
    rng: np.random.Generator,
    scans: NDArray[np.float64],
    labels: NDArray[np.int64],
    side: int = SIDE,
    alone: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[tuple[int, ...]]]:
    """Draw one to three light digits that do not overlap, or with `alone` one large digit on a canvas of half the side.

    Args:
        scans: scans of the digits to draw, (D, 8, 8) in 0 ... 16.
        labels: the digit of each scan, (D,).

    Returns:
        The canvas (side, side, 3), its mask (side, side), and (digit, left, top, right, bottom) of each digit.
    """
    sizes = (side * 3 // 8, side // 2 + 1 if alone else side * 5 // 8)
    side, most = (side // 2, 1) if alone else (side, 3)
    pixels, mask = _texture(rng, side), np.zeros((side, side), dtype=np.uint8)
    boxes = list[tuple[int, ...]]()
    for _ in range(int(rng.integers(1, most + 1))):
        i, size = int(rng.integers(len(scans))), int(rng.integers(*sizes))
        left, top = (int(rng.integers(0, side - size + 1)) for _ in range(2))
        if mask[top : top + size, left : left + size].any():
            continue
        scan = Image.fromarray((scans[i] * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        ink = np.asarray(scan, dtype=np.float64)[..., None] / 255  # (size, size, 1)
        part = pixels[top : top + size, left : left + size]
        part[:] = (1 - ink) * part + ink * rng.uniform(190, 255)
        written = ink[..., 0] > 0.4
        mask[top : top + size, left : left + size][written] = 1 + labels[i]
        rows, columns = np.flatnonzero(written.any(axis=1)), np.flatnonzero(written.any(axis=0))
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        boxes.append((int(labels[i]), *map(int, box)))
    return pixels.round().astype(np.uint8), mask, boxes


def _texture(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Draw a dark background (side, side, 3) of smooth noise.

    Its mean and its scale are the same on every canvas, so that only the digits tell canvases apart.
    """
    smooth = gaussian_filter(rng.normal(size=(side, side)), 1.5, mode="wrap")
    noise = rng.normal(0, 6, (side, side, 3))
    pixels: NDArray[np.float64] = np.clip(80 + 25 * (smooth / smooth.std())[..., None] + noise, 0, 255)
    return pixels


def write_canvases(root: Path, train: int, test: int, seed: int = 0, side: int = SIDE, pretrain: int = 0) -> None:
    """Write the canvases of all splits; see the top of this file."""
    bunch = load_digits()
    known, new = ((bunch.images[part], bunch.target[part]) for part in (slice(0, 1400), slice(1400, None)))
    if pretrain:
        (root / "pretrain" / "images").mkdir(parents=True, exist_ok=True)
    for number in range(pretrain):
        pixels, _, _ = draw_canvas(np.random.default_rng((seed, 2, number)), *known, side, alone=True)
        Image.fromarray(pixels).save(root / "pretrain" / "images" / f"{number:05}.png")
    for split, count, digits in (("train", train, known), ("test", test, new)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        found = []
        for number in range(count):
            rng = np.random.default_rng((seed, split == "test", number))
            pixels, mask, boxes = draw_canvas(rng, *digits, side)
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
    parser.add_argument("--train", type=int, default=50, help="training canvases (50)")
    parser.add_argument("--test", type=int, default=200, help="test canvases (200)")
    parser.add_argument("--pretrain", type=int, default=2000, help="canvases for pretraining, without labels (2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other canvases (0)")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} exists: name a new folder")
    if min(options.train, options.test) < 1:
        parser.error("--train and --test must be at least 1")
    try:
        write_canvases(options.folder, options.train, options.test, options.seed, pretrain=max(0, options.pretrain))
    except OSError as error:
        fix = "remove it and free some space, or name another folder"
        print(f"canvases: {options.folder} cannot be written ({error.strerror or error}): {fix}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
