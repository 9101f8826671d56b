"""Draws a served answer by what answers.json says that it means."""

import colorsys
import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_ROW = 20  # pixels, of a legend's line


@dataclasses.dataclass
class Drawing:
    """An answer for people: a map with its legend, or rows of numbers."""

    map: np.ndarray | None = None  # (H, W, 3), uint8
    legend: list[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def draw(outputs, meaning):
    """The answer to one image, {output name: array without a batch axis}."""
    values = next(iter(outputs.values()))
    if len(outputs) == 1 and meaning.get("kind") == "classes":
        if values.ndim == 3:
            return _classes(values.argmax(axis=-1), meaning)
        if values.ndim == 1:
            best = values.argsort()[::-1][:5]
            return Drawing(rows=[(_name(i, meaning), f"{values[i]:.3f}") for i in best])
    if len(outputs) == 1 and meaning.get("kind") == "normals" and values.ndim == 3:
        return _normals(values)
    units = meaning.get("units", "")
    return Drawing(
        rows=[row for name in outputs for row in _rows(name, outputs, units)]
    )


def _classes(classes, meaning):
    numbers, counts = np.unique(classes, return_counts=True)
    colours = meaning.get("colours") or [_hue(i) for i in range(numbers.max() + 1)]
    legend: list[tuple[str, tuple[int, ...]]] = [
        (f"{_name(n, meaning)} {_percent(counts[i] / classes.size)}", tuple(colours[n]))
        for i, n in sorted(enumerate(numbers), key=lambda pair: -counts[pair[0]])
    ]
    return Drawing(np.asarray(colours, "uint8")[classes], legend)


def _percent(share):
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _name(number, meaning):
    names = meaning.get("names", [])
    return names[number] if number < len(names) else f"class {number}"


def _hue(number):
    # Steps of the golden ratio: no two neighbours are alike.
    return [round(255 * c) for c in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.7, 0.9)]


def _normals(normals):
    # The customary colours: red is right, green is up, blue is to the camera.
    image = (normals * (1, -1, -1) + 1) / 2 * 255
    image[~normals.any(axis=-1)] = 0
    legend: list[tuple[str, tuple[int, ...]]] = [
        ("faces right", (255, 128, 128)),
        ("faces up", (128, 255, 128)),
        ("faces the camera", (128, 128, 255)),
    ]
    return Drawing(image.round().clip(0, 255).astype("uint8"), legend)


def _rows(name, outputs, units):
    values = outputs[name]
    if values.size <= 8:
        numbers = " ".join(f"{value:.4g}" for value in values.ravel())
        return [(name, f"{numbers} {units}".strip())]
    return [
        (f"{name}, {statistic}", f"{getattr(values, statistic)():.4g} {units}".strip())
        for statistic in ("min", "mean", "max")
    ]


def over(picture, drawing, opacity=0.6):
    """The map over the picture, an RGB PIL image, with the legend below."""
    answer = Image.fromarray(drawing.map).resize(picture.size, Image.Resampling.NEAREST)
    width = max(picture.width, 200)
    height = picture.height + _ROW * len(drawing.legend)
    page = Image.new("RGB", (width, height), "white")
    page.paste(Image.blend(picture, answer, opacity))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for number, (text, colour) in enumerate(drawing.legend):
        top = picture.height + _ROW * number
        pen.rectangle((4, top + 4, 16, top + 16), fill=colour)
        pen.text((24, top + 2), text, fill="black", font=font)
    return page
