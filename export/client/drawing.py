"""Draws a served answer by what answers.json says that it means."""

from __future__ import annotations

import colorsys
import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import all_tasks

if TYPE_CHECKING:  # the client's wheel has no meanings
    from export.meanings import Meaning, Meanings

_ROW = 20  # pixels, of a legend's line
_WIDTH = 480  # pixels, at least, of a picture with boxes
_FEW = 8  # values that are shown one by one, at most
_BEST = 5  # classes of a picture or attributes of an object, at most
_LIKELY = 0.5  # a score or probability to be drawn, where answers.json says none


@dataclasses.dataclass
class Box:
    """An object that was found."""

    corners: list[float]  # left, top, right, bottom in pixels of the picture
    text: str
    colour: tuple[int, ...]


@dataclasses.dataclass
class Drawing:
    """An answer for people: a map or boxes with a legend, or rows of numbers."""

    map: np.ndarray | None = None  # (H, W, 3), uint8
    boxes: list[Box] = dataclasses.field(default_factory=list)
    legend: list[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def served(answers: Meanings, signatures: Container[str]) -> Meanings:
    """Without tasks that these signatures lack, which nothing could be asked about."""
    return {
        task: meaning
        for task, meaning in answers.items()
        if task in signatures or all_tasks.of_files(task) in signatures
    }


def drawn_with(task: str, answers: Meanings) -> str:
    """The task in whose drawing a task stands: attributes, with the objects found."""
    kinds = {each: meaning.get("kind") for each, meaning in answers.items()}
    found = [each for each, kind in kinds.items() if kind == "detection"]
    return found[0] if found and kinds.get(task) == "attributes" else task


def answer(
    ask: Callable[..., Mapping[str, np.ndarray]], task: str, answers: Meanings
) -> Drawing:
    """A task's answer to one picture, drawn; objects with their attributes.

    Args:
        ask: Function of a task and, for attributes, `rois` (1, R, 4), which gives
            {output name: array with a batch axis}; boxes in pixels of the picture.
        task: String.
        answers: What the tasks' answers mean.
    """
    drawing = draw(_first(ask(task)), answers.get(task, {}))
    if drawing.boxes:
        rois = np.array([[box.corners for box in drawing.boxes]], "float32")
        for other, meaning in answers.items():
            if meaning.get("kind") == "attributes":
                _tell(drawing, _first(ask(other, rois=rois))[other], meaning)
    return drawing


def _first(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the first example, without the regions that were asked about."""
    return {
        # What has no batch axis is of all examples; the others stay arrays.
        name: array[0, ...] if array.ndim else array
        for name, array in outputs.items()
        if name != "rois"
    }


def _tell(drawing: Drawing, attributes: np.ndarray, meaning: Meaning) -> None:
    """Adds the likely attributes of each object, (R, attributes), to the legend."""
    least = meaning.get("drawn_from", _LIKELY)
    for number, probabilities in enumerate(attributes):
        text, colour = drawing.legend[number]
        best = probabilities.argsort()[::-1][:_BEST]
        best = [i for i in best if probabilities[i] >= least]
        names = ", ".join(_name(i, meaning) for i in best) or "no attribute is likely"
        drawing.legend[number] = (f"{text}: {names}", colour)


def draw(outputs: Mapping[str, np.ndarray], meaning: Meaning) -> Drawing:
    """The answer to one image, {output name: array without a batch axis}."""
    if {"boxes", "classes", "scores", "num_detections"} <= outputs.keys():
        return _objects(outputs, meaning)
    name, values = next(iter(outputs.items()))
    if len(outputs) == 1 and meaning.get("kind") == "classes":
        if values.dtype.kind in "biu":
            return _numbered(name, values.astype("int64"), meaning)
        if values.ndim == 3:
            return _classes(values.argmax(axis=-1), meaning)
        if values.ndim == 1 and not _is_text(values):
            best = values.argsort()[::-1][:_BEST]
            return Drawing(rows=[(_name(i, meaning), f"{values[i]:.3f}") for i in best])
    if len(outputs) == 1 and meaning.get("kind") == "normals" and values.ndim == 3:
        return _normals(values)
    if len(outputs) == 1 and "range" in meaning and values.shape[2:] == (1,):
        return _numbers(values[..., 0], meaning)
    units = meaning.get("units", "")
    return Drawing(
        rows=[row for name in sorted(outputs) for row in _rows(name, outputs, units)]
    )


def _objects(outputs: Mapping[str, np.ndarray], meaning: Meaning) -> Drawing:
    least = meaning.get("drawn_from", _LIKELY)
    # Some models count and number in floats.
    scores = outputs["scores"][: int(outputs["num_detections"])]
    classes = outputs["classes"].astype(int)
    boxes = [
        Box(
            outputs["boxes"][i].tolist(),
            f"{i + 1} {_name(classes[i], meaning)} {scores[i]:.0%}",
            _colour(classes[i], meaning),
        )
        for i in np.flatnonzero(scores >= least)
    ]
    if not boxes:
        return Drawing(rows=[("nothing found", f"with a score of {least:.0%} or more")])
    return Drawing(boxes=boxes, legend=[(box.text, box.colour) for box in boxes])


def _numbered(name: str, classes: np.ndarray, meaning: Meaning) -> Drawing:
    """Classes by their numbers, and not by a score of each."""
    if classes.ndim == 2 or classes.shape[2:] == (1,):
        return _classes(classes.reshape(classes.shape[:2]), meaning)
    if classes.size > _FEW:
        return Drawing(rows=_rows(name, {name: classes}, ""))
    return Drawing(rows=[(name, ", ".join(_name(i, meaning) for i in classes.flat))])


def _classes(classes: np.ndarray, meaning: Meaning) -> Drawing:
    numbers, places, counts = np.unique(
        classes, return_inverse=True, return_counts=True
    )
    colours = [_colour(int(number), meaning) for number in numbers]
    legend = [
        (f"{_name(numbers[i], meaning)} {_percent(counts[i] / classes.size)}", colour)
        for i, colour in sorted(enumerate(colours), key=lambda pair: -counts[pair[0]])
    ]
    image = np.asarray(colours, "uint8")[places.reshape(classes.shape)]
    return Drawing(image, legend=legend)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _name(number: int, meaning: Meaning) -> str:
    names = meaning.get("names", [])
    return names[number] if 0 <= number < len(names) else f"class {number}"


def _colour(number: int, meaning: Meaning) -> tuple[int, ...]:
    colours = meaning.get("colours", [])
    return tuple(colours[number] if 0 <= number < len(colours) else _hue(number))


def _hue(number: int) -> list[int]:
    # Steps of the golden ratio: no two neighbours are alike.
    return [round(255 * c) for c in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.7, 0.9)]


def _normals(normals: np.ndarray) -> Drawing:
    # The customary colours: red is right, green is up, blue is to the camera.
    image = (normals * (1, -1, -1) + 1) / 2 * 255
    image[~normals.any(axis=-1)] = 0
    legend: list[tuple[str, tuple[int, ...]]] = [
        ("faces right", (255, 128, 128)),
        ("faces up", (128, 255, 128)),
        ("faces the camera", (128, 128, 255)),
    ]
    return Drawing(image.round().clip(0, 255).astype("uint8"), legend=legend)


def _numbers(values: np.ndarray, meaning: Meaning) -> Drawing:
    """A map of numbers, such as metres, in colours from end to end of its range."""
    low, high = meaning["range"]
    given = meaning.get("colours", [])
    colours = np.array(given if len(given) > 1 else [[255] * 3, [0] * 3], "float32")
    steps = np.linspace(low, high, len(colours))

    def painted(numbers: np.ndarray) -> np.ndarray:
        parts = [np.interp(numbers, steps, x) for x in colours.T]
        return np.stack(parts, axis=-1).round().astype("uint8")

    told = np.linspace(low, high, 5)
    legend = [
        (f"{number:.3g} {meaning.get('units', '')}".strip(), tuple(colour))
        for number, colour in zip(told, painted(told).tolist(), strict=True)
    ]
    return Drawing(painted(np.nan_to_num(values, nan=low)), legend=legend)


def _rows(
    name: str, outputs: Mapping[str, np.ndarray], units: str
) -> list[tuple[str, str]]:
    values = outputs[name]
    if _is_text(values):
        texts = [_in_words(value) for value in values.flat[:_FEW]]
        return [(name, ", ".join(texts + ["..."] * (values.size > _FEW)))]
    if values.size <= _FEW:
        numbers = " ".join(_in_words(value) for value in values.ravel())
        return [(name, f"{numbers} {units}".strip())]
    return [
        (
            f"{name}, {statistic}",
            f"{_in_words(getattr(values, statistic)())} {units}".strip(),
        )
        for statistic in ("min", "mean", "max")
    ]


def _is_text(values: np.ndarray) -> bool:
    return values.dtype.kind in "OSU"


def _in_words(value: Any) -> str:
    """Text decoded, whole numbers and truths as they are, others in four digits."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str | np.integer | np.bool_):
        return str(value)
    return f"{float(value):.4g}"


def over(picture: Image.Image, drawing: Drawing, opacity: float = 0.6) -> Image.Image:
    """The map or boxes over the picture, a PIL image, with the legend below."""
    picture = _rgb(picture)
    if drawing.map is not None:
        answer = Image.fromarray(drawing.map)
        answer = answer.resize(picture.size, Image.Resampling.NEAREST)
        picture = Image.blend(picture, answer, opacity)
    if drawing.boxes:
        picture = _with_boxes(picture, drawing.boxes)
    width = max(picture.width, 200)
    height = picture.height + _ROW * len(drawing.legend)
    page = Image.new("RGB", (width, height), "white")
    page.paste(picture)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for number, (text, colour) in enumerate(drawing.legend):
        top = picture.height + _ROW * number
        pen.rectangle((4, top + 4, 16, top + 16), fill=colour)
        pen.text((24, top + 2), text, fill="black", font=font)
    return page


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # of 16 bits, which PIL would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype("uint8"))
    return picture.convert("RGB")


def _with_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The picture, enlarged where labels would cover it, with labelled boxes."""
    scale = math.ceil(_WIDTH / picture.width)
    picture = picture.resize([scale * size for size in picture.size])
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    # No box over a label, and nothing over what is likelier.
    for box in reversed(boxes):
        corners = [scale * x for x in box.corners]
        pen.rectangle(corners, outline=box.colour, width=3)
    for box in reversed(boxes):
        _, _, right, bottom = pen.textbbox((0, 0), box.text, font=font)
        x = min(scale * box.corners[0], picture.width - right - 4)
        y = scale * box.corners[1]
        y = y - bottom - 4 if y > bottom + 4 else y
        pen.rectangle((x, y, x + right + 4, y + bottom + 4), fill=box.colour)
        pen.text((x + 2, y + 1), box.text, fill=_ink(box.colour), font=font)
    return picture


def _ink(colour: tuple[int, ...]) -> str:
    """Black or white, whichever is read on a colour."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 128 else "white"
