"""The picture has the true boxes in the left column, and the confident detections in the right one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from moco.detection.images import BoxedImage
from moco.detection.predictions import write_predictions
from moco.detection.training import Detections
from moco.evaluation.strips import HEIGHT, voc_colors

CAT, DOG = (tuple(int(each) for each in voc_colors()[label]) for label in (1, 2))


def test_boxes_and_masks_are_drawn_in_the_colors_of_their_classes(tmp_path: Path) -> None:
    Image.new("RGB", (HEIGHT, HEIGHT)).save(tmp_path / "black.png")
    corners = np.array([[40, 50, 100, 120]], np.float32)
    image = BoxedImage(str(tmp_path / "black.png"), HEIGHT, HEIGHT, corners, np.array([1]), np.zeros(1, bool))
    mask = np.zeros((HEIGHT, HEIGHT), np.uint8)
    mask[90:110, 70:80] = 1
    found = Detections(
        np.array([[20, 30, 90, 140], [0, 0, 10, 150]], np.float32),
        np.array([0.9, 0.4], np.float32),
        np.array([2, 1]),
        tuple(coco.encode(np.asfortranarray(each)) for each in (mask, np.ones_like(mask))),
    )
    write_predictions(tmp_path / "x.png", [(image, found)], ("cat", "d\N{LATIN SMALL LETTER O WITH DIAERESIS}g\n"))
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture)[:HEIGHT]
    truth, prediction = pixels[:, :HEIGHT], pixels[:, HEIGHT + 4 : 2 * HEIGHT + 4]
    assert (truth[110, 40] == CAT).all()
    assert (truth[120, 80] == CAT).all()
    assert not truth[130:, :].any()
    assert (prediction[135, 20] == DOG).all()
    assert (prediction[100, 75] == np.array(DOG) // 2).all()  # of the mask, on black
    assert not prediction[145:, :].any()  # a detection with a score of 0.4 is not drawn


def test_the_box_of_an_ignored_object_is_dashed_and_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (HEIGHT, HEIGHT)).save(tmp_path / "black.png")
    corners = np.array([[10, 20, 70, 100], [80, 20, 150, 100]], np.float32)
    image = BoxedImage(str(tmp_path / "black.png"), HEIGHT, HEIGHT, corners, np.array([1, 2]), np.array([True, False]))
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    texts, draw_text = list[str](), ImageDraw.ImageDraw.text

    def record(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, **options: Any) -> None:
        texts.append(text)
        draw_text(draw, at, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    write_predictions(tmp_path / "x.png", [(image, nothing)], ("cat", "dog"))
    assert texts == ["cat (ignored)", "dog"]
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture)[:HEIGHT, :HEIGHT]
    left_sides = [(pixels[45:100, x] == color).all(axis=1) for x, color in ((10, CAT), (80, DOG))]  # below the texts
    assert 0.3 < left_sides[0].mean() < 0.7
    assert left_sides[1].all()
