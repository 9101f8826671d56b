"""A data set of one's own: what docs/experiments.md shows, and what does not fit."""

import re
import shlex
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image
from typer.testing import CliRunner

from training import batches, recipes
from training.__main__ import app
from training.runs import open_experiment

PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"
SHOWN = PAGE.read_text("utf-8").split("## Your own images")[1]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """The folder that the page makes, with depth and normals of the test's own."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(re.search(r"```python\n(.*?)```", SHOWN, re.S)[1], {})
    rng = np.random.default_rng(1)
    for split, count in (("train", 16), ("test", 8)):
        for feature in ("depth", "normals"):
            (folder / "things" / feature / split).mkdir(parents=True)
        for k in range(count):
            maps = rng.integers(0, 9000, (96, 128), np.uint16)
            normals = rng.integers(1, 255, (96, 128, 3), np.uint8)
            cv2.imwrite(f"{folder}/things/depth/{split}/{k:02d}.png", maps)
            cv2.imwrite(f"{folder}/things/normals/{split}/{k:02d}.png", normals)
    return folder / "things"


def recipe(tasks="shapes:segmentation,colours:segmentation"):
    return recipes.with_tasks(recipes.find("folder", toy=True), tasks.split(","))


@pytest.fixture
def broken(things, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(things, tmp_path / "things"))


def test_its_maps_are_the_targets_and_its_lists_the_classes(things, tmp_path):
    chosen = recipe("shapes:segmentation,colours:segmentation,depth,normals")
    open_experiment(chosen, things, tmp_path)
    experiment = open_experiment(chosen, None, tmp_path)  # as it is prepared
    tasks = experiment.tasks
    ((_, test),) = batches.test_passes(experiment.builder, chosen, tasks)
    examples = list(test.unbatch().as_numpy_iterator())  # in an order of TFDS's own

    def stored(name):
        files = sorted((things / name / "test").glob("*.png"))
        return [cv2.imread(str(path), -1)[::2, ::2] for path in files]

    def alike(ours, theirs):
        found = [[np.array_equal(x, y) for y in theirs] for x in ours]
        return len(ours) == len(theirs) and np.all(np.sum(found, axis=1) == 1)

    def targets(name):
        return [maps[name] for _, maps in examples]

    assert list(tasks) == ["shapes", "colours", "depth", "normals"]
    assert tasks["shapes"].classes == ("ground", "disc", "square")
    assert tasks["colours"].classes == ("ground", "red", "blue")
    assert {image.shape for image, _ in examples} == {(96, 128, 3)}
    for name in ("shapes", "colours"):
        assert alike(targets(name), stored(name))
    millimetres = [np.nan_to_num(1000 * x[..., 0]).round() for x in targets("depth")]
    assert alike(millimetres, stored("depth"))
    signs = [x[..., 0] > 0 for x in targets("normals")]
    assert alike(signs, [x[..., 2] > 127 for x in stored("normals")])  # BGR


@pytest.mark.slow
def test_what_the_page_shows_trains(things, tmp_path, monkeypatch):
    monkeypatch.chdir(things.parent)
    (line,) = re.findall(r"^python -m training (.*)$", SHOWN.split("## ")[0], re.M)
    options = ["--runs", str(tmp_path), "--method", "hard_sharing"]
    result = CliRunner().invoke(app, [*shlex.split(line), *options])

    assert result.exit_code == 0, result.output
    folder = tmp_path / "folder-toy-shapes+colours/hard_sharing/seed0"
    assert set(recipes.kinds(recipe().data)) == {"shapes", "colours"}
    for task in ("shapes", "colours"):
        assert f'"{task}"' in (folder / "metrics.json").read_text()
        assert (folder.parents[1] / f"gallery/{task}_seed0.png").exists()


def test_other_files_are_other_data_and_what_is_rendered_needs_none(
    things, broken, tmp_path
):
    def digest(kind, folder, runs):
        return open_experiment(kind, folder, tmp_path / runs).data_digest

    first = digest(recipe(), things, "a")
    assert digest(recipe(), things, "b") == first
    path = broken / "shapes/train/03.png"
    cv2.imwrite(str(path), (cv2.imread(str(path), -1) + 1) % 3)
    assert digest(recipe(), broken, "c") != first
    assert digest(recipes.find("scenes", toy=True), None, "d") == "unknown"


def test_toy_is_a_part_of_it_and_another_recipe_has_its_own(things, tmp_path):
    for k in range(16, 20):
        for name, end in (("images", "jpg"), ("shapes", "png"), ("colours", "png")):
            folder = tmp_path / "more" / name
            shutil.copytree(things / name, folder, dirs_exist_ok=True)
            first = folder / "train" / f"00.{end}"
            shutil.copy(first, folder / "train" / f"{k}.{end}")
    more = tmp_path / "more"
    toy = open_experiment(recipe(), more, tmp_path / "runs").builder

    assert toy.info.splits["train"].num_examples == 16
    assert toy.info.config_name == "folder_toy"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("shapes/train/03.png", r"shapes for each image.*03\.jpg has none in .*train"),
        ("images/test/03.jpg", r"for each image.*03\.png has none in .*images/test"),
        ("shapes/test", r"Expected image files in .*shapes/test\. There are none"),
        ("images", r"Expected image files in .*images/train.*has images/train"),
        ("shapes/classes.txt", r"Expected .*shapes/classes\.txt, since .*00\.png has"),
    ],
)
def test_what_is_missing_is_named(broken, tmp_path, path, message):
    target = broken / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()

    with pytest.raises(ValueError, match=message):
        open_experiment(recipe(), broken, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (64, 48)}, r"uint8 image of shape \(96, 128\) in .*03\.png.* \(48,"),
        ({"dtype": "uint16"}, r"Received: uint16 \(96, 128\)\. All files are to be"),
        ({"value": 3}, r"classes 0 to 2 in .*03\.png, or 255.*Received: 3\. Add its"),
        ({"colours": True}, r"Received: uint8 \(96, 128, 3\).* as grey values"),
    ],
)
def test_a_map_that_is_another_one_is_named(broken, tmp_path, change, message):
    path = broken / "shapes" / "train" / "03.png"
    stored = cv2.imread(str(path), -1)
    if "size" in change:
        stored = cv2.resize(stored, change["size"], interpolation=cv2.INTER_NEAREST)
    if "value" in change:
        stored[5, 7] = change["value"]
    if "colours" in change:
        stored = np.dstack([stored] * 3)
    cv2.imwrite(str(path), stored.astype(change.get("dtype", "uint8")))

    with pytest.raises(ValueError, match=message):
        open_experiment(recipe(), broken, tmp_path)


def write_grey(path, values, bits):
    """A grey PNG of so many bits a pixel, which OpenCV does not write."""
    rows = np.unpackbits(values[..., None], axis=-1)[..., -bits:]
    packed = np.packbits(rows.reshape(len(values), -1), axis=-1)
    raw = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">2I5B", *values.shape[::-1], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
        for kind, x in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits_are_the_same_classes(things, broken, tmp_path, bits):
    for k, path in enumerate(sorted(broken.glob("shapes/t*/*.png"))):
        stored = np.minimum(cv2.imread(str(path), -1), 2**bits - 1)
        cv2.imwrite(str(path), stored)
        if k % 3 or bits == 2:  # among others of 8 bits
            write_grey(path, stored, bits)
    experiment = open_experiment(recipe(), broken, tmp_path)

    (_, targets) = experiment.train_examples
    files = sorted(things.glob("shapes/train/*.png"))
    expected = [np.minimum(cv2.imread(str(x), -1), 2**bits - 1) for x in files]
    count = [np.sum(targets["shapes"].numpy() == k) for k in range(2**bits)]
    of_files = [np.sum(np.stack(expected)[:, ::2, ::2] == k) for k in range(2**bits)]
    assert count == of_files
    assert count[1] > 0


def test_a_photograph_that_exif_turns_is_refused(broken, tmp_path):
    path = broken / "images/train/05.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 3
        image.save(path, exif=exif)

    with pytest.raises(
        ValueError, match=r"upright image in .*05\.jpg.*: EXIF orien.* 3"
    ):
        open_experiment(recipe(), broken, tmp_path)


def test_masks_without_a_second_class_are_refused(broken, tmp_path):
    for path in broken.glob("shapes/t*/*.png"):
        mask = np.where(cv2.imread(str(path), -1), 255, 0)  # as it is seen best
        cv2.imwrite(str(path), mask.astype("uint8"))
    whole = recipes.with_tasks(
        recipes.find("folder"), ["shapes:segmentation", "colours:segmentation"]
    )

    with pytest.raises(ValueError, match=r"two classes .*shapes/train\. .*: 0 and 255"):
        open_experiment(whole, broken, tmp_path)


@pytest.mark.parametrize("name", ["id", "image"])
def test_labels_named_as_what_is_kept_of_an_image_are_refused(broken, tmp_path, name):
    (broken / "shapes").rename(broken / name)
    chosen = recipe(f"{name}:segmentation,colours:segmentation")

    with pytest.raises(ValueError, match=rf"another name.*things/{name}\. Rename"):
        open_experiment(chosen, broken, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("shapes", "03.jpg", r"label map as a PNG\. Received: .*03\.jpg, a JPEG"),
        ("normals", "03.jpg", r"label map as a PNG\. Received: .*03\.jpg, a JPEG"),
        (
            "images",
            "03.gif",
            r"JPEG or PNG image in .*03\.gif\. .* GIF or WebP\. Write",
        ),
        ("images", "03.webp", r"JPEG or PNG image in .*03\.webp\. .* GIF or WebP"),
    ],
)
def test_files_of_other_formats_are_refused(broken, tmp_path, kind, name, message):
    (before,) = (broken / kind / "train").glob("03.*")
    with Image.open(before) as image:
        image.convert("RGB" if kind != "shapes" else "L").save(before.with_name(name))
    before.unlink()

    with pytest.raises(ValueError, match=message):
        open_experiment(recipe(), broken, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"image of .*05\.jpg\. Received: no image\. Write the file anew"),
        (b"no image", r"image of .*05\.jpg\. Received: no image\. Write the file anew"),
        ("L", r"in .*05\.jpg\. Received: uint8 \(96, 128\)\. Photographs are RGB with"),
    ],
)
def test_photographs_that_cannot_be_read_say_what_to_do(
    broken, tmp_path, content, message
):
    path = broken / "images/train/05.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with Image.open(path) as image:
            image.convert(content).save(path)

    with pytest.raises(ValueError, match=message):
        open_experiment(recipe(), broken, tmp_path)


def test_sub_folders_may_be_links_and_links_to_nothing_are_named(broken, tmp_path):
    nested(broken)
    for split in broken.glob("*/train"):
        (split / "b").rename(split.with_name("elsewhere"))
        (split / "b").symlink_to("../elsewhere")
    builder = open_experiment(recipe(), broken, tmp_path / "linked").builder
    assert builder.info.splits["train"].num_examples == 16

    (broken / "images/elsewhere/01.jpg").unlink()
    (broken / "images/elsewhere/01.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ValueError, match=r"behind the link .*train/b/01\.jpg"):
        open_experiment(recipe(), broken, tmp_path / "broken")


def test_a_share_of_labels_is_of_a_task_that_is_there(things, tmp_path):
    tasks = ["shapes:segmentation", "colours:segmentation"]
    starved = recipes.find("folder-labels25", toy=True, tasks=tasks)

    assert starved == recipes.with_labels(recipe(), 25)
    assert starved.data.label_fraction == ("shapes", 0.25)
    open_experiment(starved, things, tmp_path)


def test_a_held_out_part_without_an_image_is_refused(broken, tmp_path):
    for path in broken.glob("*/train/*.*"):
        if int(path.stem) > 3:
            path.unlink()
    chosen = recipes.with_validation(recipe())
    chosen = recipes.change(chosen, "training", batch_size=2)
    experiment = open_experiment(chosen, broken, tmp_path)

    with pytest.raises(ValueError, match=r"no image in its split 'train\[90%:\]'"):
        batches.pipeline(chosen).check(experiment.builder, chosen)


def nested(folder):
    """Moves each split's images into two sub-folders, whose files have equal names."""
    for split in (x for kind in folder.iterdir() for x in kind.glob("t*/")):
        for k, path in enumerate(sorted(split.iterdir())):
            target = split / "ab"[k % 2] / f"{k // 2:02d}{path.suffix}"
            target.parent.mkdir(exist_ok=True)
            path.rename(target)


def test_files_of_one_name_in_two_sub_folders_are_two_images(things, broken, tmp_path):
    nested(broken)
    chosen = recipe()
    plain = open_experiment(chosen, things, tmp_path / "plain")
    other = open_experiment(chosen, broken, tmp_path / "nested")

    def pairs(experiment):
        images, targets = experiment.train_examples
        parts = zip(images.numpy(), targets["shapes"].numpy(), strict=True)
        return sorted(image.tobytes() + maps.tobytes() for image, maps in parts)

    assert len(pairs(plain)) == 16
    assert pairs(other) == pairs(plain)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("images/train/03.jpg", "images/train/03.jpeg"),
        ("shapes/test/03.png", "shapes/test/03.tif"),
    ],
)
def test_two_files_of_one_name_are_named(broken, tmp_path, first, second):
    for path in (first, second):
        shutil.copy(broken / "shapes/train/03.png", broken / path)

    with pytest.raises(ValueError, match=r"one file named '\w+' in ") as refused:
        open_experiment(recipe(), broken, tmp_path)
    assert all(str(broken / path) in str(refused.value) for path in (first, second))


def test_what_is_wrong_in_a_sub_folder_is_named_as_well(broken, tmp_path):
    nested(broken)
    path = broken / "shapes/train/b/02.png"
    path.rename(path.with_name("99.png"))
    with pytest.raises(ValueError, match=r"b/02\.jpg has none in .*shapes/train\. "):
        open_experiment(recipe(), broken, tmp_path)
    path.with_name("99.png").rename(path)
    cv2.imwrite(str(path), np.full((96, 128), 7, np.uint8))
    with pytest.raises(ValueError, match=r": 7\. .* to .*things/shapes/classes\.txt"):
        open_experiment(recipe(), broken, tmp_path)


def test_a_list_of_classes_is_of_different_names(broken, tmp_path):
    (broken / "shapes" / "classes.txt").write_text("ground\nground\n")

    with pytest.raises(ValueError, match=r"from 2 to 255 names in .*: ground, ground"):
        open_experiment(recipe(), broken, tmp_path)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            "shapes:segmentation,leaves:segmentation",
            r"no labels of leaves\. Each .*shapes.* Name .*, with --tasks or in",
        ),
        ("shapes:segmentation,colours:depth", r"Expected millimetres.*'colours'"),
        ("shapes:segmentation,colours:normals", r"Expected normals.*'colours'"),
        ("shapes:segmentation,depth:segmentation", r"Expected classes.*'depth'"),
        ("shapes,colours:segmentation", r"Expected two or more tasks of segmentation"),
        ("shapes:segmentation,shapes:depth", r"Expected two or more tasks of segm"),
        ("shapes:letters,colours:segmentation", r"Received: shapes:letters,colours"),
    ],
)
def test_tasks_that_the_folder_does_not_have_are_refused(
    things, tmp_path_factory, tasks, message
):
    runs = tmp_path_factory.getbasetemp() / "of_tasks"  # prepared once
    with pytest.raises(ValueError, match=message):
        _ = open_experiment(recipe(tasks), things, runs).tasks


@pytest.mark.parametrize("name", ["leaves", "images"])  # a module that has no builder
def test_a_data_set_that_there_is_not_is_refused(tmp_path, name):
    chosen = recipes.change(recipe(), "data", dataset=name)

    message = rf"no data set '{name}', .* There are: folder, nyuv2, scenes, voc2008\."
    with pytest.raises(ValueError, match=message):
        open_experiment(chosen, None, tmp_path)


def test_preparing_is_a_line_and_says_nothing_of_downloads(things, tmp_path, capfd):
    tfds.enable_progress_bar()  # which other tests leave off
    try:
        builder = open_experiment(recipe(), things, tmp_path).builder
    finally:
        tfds.disable_progress_bar()

    said = f"Preparing the data set folder, once, in {builder.data_path}\n"
    assert capfd.readouterr() == (said, "")
    open_experiment(recipe(), things, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_sizes_that_do_not_fit_say_which_would(things, tmp_path):
    chosen = recipes.change(recipe(), "data", target_size=(36, 64))
    experiment = open_experiment(chosen, things, tmp_path)

    with pytest.raises(ValueError, match=r"stored at 96x128.* 48x64\. Received.*36x64"):
        batches.pipeline(chosen).check(experiment.builder, chosen)
