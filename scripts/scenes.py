"""Write scenes with known spectra, in 16 bits, to try out images with any number of bands.

python scripts/scenes.py SCENES --bands 13

Each of the four classes is a material whose spectrum differs from the others' by a random factor per band. A scene
mixes 40 to 100 % of its material with one of two materials that belong to no class, under light of random strength,
with noise. So single values say little about the class, and their ratios between bands say much.
SCENES/train and SCENES/test get one folder per class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASSES, OTHERS = 4, 2


def scene(label: int, bands: int, size: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Return one scene, (size, size, bands)."""
    materials = np.random.default_rng(bands)
    spread = bands**-0.5  # the factors of more bands differ less: otherwise raw pixels would tell the classes apart
    factors = materials.uniform(1 - spread, 1 + spread, (CLASSES + OTHERS, bands))
    spectra = materials.uniform(1000, 5000, bands) * factors
    share, other = rng.uniform(0.4, 1.0), rng.integers(CLASSES, CLASSES + OTHERS)
    spectrum = spectra[label] * share + spectra[other] * (1 - share)  # (bands,)
    waves = np.sin(np.arange(size) * rng.uniform(0.4, 2.0) + rng.uniform(0, 6))  # light and shade, (size,)
    light = rng.uniform(0.3, 2.0) * (1 + 0.3 * waves)
    values = spectrum * light[:, None, None] + rng.normal(0, 100, (size, size, bands))
    pixels: NDArray[np.uint16] = values.clip(0, 65535).astype(np.uint16)
    return pixels


def write_scenes(root: Path, bands: int, per_class: dict[str, int], size: int = 16) -> Path:
    """Write root/SPLIT/CLASS/NUMBER.npy for each split and its number of scenes per class; return root."""
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for label in range(CLASSES):
            folder = root / split / f"material_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                np.save(folder / f"{number:03}.npy", scene(label, bands, size, rng))
    return root


def main(arguments: list[str]) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to create")
    parser.add_argument("--bands", type=int, default=13, help="channels of a scene (13)")
    parser.add_argument(
        "--count", type=int, default=60, help="training scenes per class (60); a third of it is written for testing"
    )
    parser.add_argument("--size", type=int, default=16, help="pixels per side (16)")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} exists: name a new folder")
    if min(options.bands, options.count, options.size) < 1:
        parser.error("--bands, --count and --size must be at least 1")
    try:
        write_scenes(
            options.folder, options.bands, {"train": options.count, "test": -(-options.count // 3)}, options.size
        )
    except OSError as error:
        fix = "remove it and free some space, or name another folder"
        print(f"scenes: {options.folder} cannot be written ({error.strerror or error}): {fix}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
