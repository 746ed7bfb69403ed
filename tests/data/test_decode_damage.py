"""Files of every format and mode with cut or changed bytes: pixels or one ImageError, and nothing on stderr."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moco.data.decode import FAULTS, ImageError, decode, decode_scaled
from moco.data.image_facts import ODDITIES, image_facts
from tests.data.unreadable_files import encoded, noise, tiff, without_palette

MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
    "GIF": ("L", "P", "RGB"),
}
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")


@functools.cache
def files() -> dict[str, bytes]:
    """Return readable files of 40 x 30 pixels by format, mode and option."""
    gray = np.linspace(0, 65535, 1200).reshape(30, 40)
    deep = {"I;16": gray.astype("<u2"), "I;16B": gray.astype(">u2"), "I": gray.astype(np.int32)}
    deep["F"] = (gray / 65535).astype(np.float32)
    made = {}
    for kind, modes in MODES.items():
        for mode in modes:
            image = Image.fromarray(deep[mode]) if mode in deep else noise().convert(mode)
            made[f"{kind} {mode}"] = encoded(image, kind)
    for compression in COMPRESSIONS:
        made[f"TIFF {compression}"] = encoded(noise(), "TIFF", compression=compression)
    several = {"save_all": True, "append_images": [noise(1), noise(2)]}
    made |= {f"{kind} frames": encoded(noise(), kind, **several) for kind in ("GIF", "TIFF", "PNG", "WEBP")}
    made |= {"JPEG progressive": encoded(noise(), "JPEG", progressive=True), "PNG without palette": without_palette()}
    made |= {f"TIFF {bands} bands": tiff(9, 9, bands, extra=0) for bands in (2, 4, 5, 13)}
    return made


def check(path: Path, data: bytes) -> bool:
    """Decode a file in every way, and return whether it is readable."""
    path.write_bytes(data)
    facts = image_facts(str(path))
    if facts.fault:
        assert facts.fault in FAULTS
        with pytest.raises(ImageError) as caught:
            decode(path)
        assert caught.value.kind == facts.fault
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return False
    image = decode(path)
    decode_scaled(path, data, lambda height, width: 2)
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    assert facts.size == (image.shape[2], image.shape[1])
    assert set(facts.odd) <= set(ODDITIES)
    return True


@pytest.mark.parametrize("name", files())
def test_every_format_and_mode(name: str, tmp_path: Path) -> None:
    readable = check(tmp_path / "image.bin", files()[name])
    assert readable == (name not in ("TIFF 5 bands", "TIFF 13 bands"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest replaces the filter of moco.data.decode
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_an_error_or_an_image(tmp_path_factory: pytest.TempPathFactory, given_data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    data = bytearray(files()[given_data.draw(st.sampled_from(sorted(files())))])
    end = given_data.draw(st.integers(0, len(data)))
    # Headers decide more than pixels: half of the changes are in the first 200 bytes.
    places = st.integers(0, min(200, len(data) - 1)) | st.integers(0, len(data) - 1)
    for at in given_data.draw(st.lists(places, max_size=4)):
        data[at] = given_data.draw(st.integers(0, 255))
    check(path, bytes(data[:end] if given_data.draw(st.booleans()) else data))
