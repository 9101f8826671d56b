"""Prepared data: built once, tied to the files that they were built from."""

import collections
import contextlib
import hashlib
import importlib
import io
import pkgutil
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from rich.console import Console

from training import datasets
from training.datasets.files import files_in
from training.files import read_json, write_json
from training.locks import lock
from training.recipes import Recipe


def prepare(
    recipe: Recipe, source: Path | None, directory: Path
) -> tfds.core.DatasetBuilder:
    """Builds the recipe's data set, once.

    Args:
        recipe: The `Recipe`. Its data set's module has the TFDS builder, `BUILDER`,
            and, if that reads a folder, `check_folder(path)`; and `config` where only
            the folder tells what is in it.
        source: Path of the folder with the original files, or `None` for a data set
            that needs none, or that is prepared.
        directory: Path of all prepared data.

    Returns:
        The TFDS builder, its data prepared.

    Raises:
        ValueError: If the folder is not complete, or not the one that the data were
            prepared from; if the prepared data are of another version, or lost bytes.
    """
    module = _module(recipe)
    builder = _builder(module, recipe, directory, source)
    folder, stamp = Path(builder.data_path), _stamp(builder)
    reads_files = hasattr(module, "check_folder")
    if reads_files and source is not None:
        module.check_folder(source)
    if not stamp.exists():
        if reads_files and source is None:
            raise ValueError(
                f"The recipe '{recipe.name}' needs the folder with the data set's "
                f"files: give it with --data DIR{_other_versions(folder)}"
            )
        with locked(recipe, directory):
            if not stamp.exists():
                _build(builder, source if reads_files else None, stamp)
        # Another process may have prepared what this builder has not seen.
        builder = _builder(module, recipe, directory, source)
    before = read_json(stamp)
    _check_whole(folder, before["sizes"])
    if reads_files and source is not None:
        _check_same(folder, before["source"], source)
    return builder


def locked(recipe: Recipe, directory: Path) -> contextlib.AbstractContextManager[None]:
    """One process at a time prepares a data set, or what is derived from it."""
    return lock(directory / f".{recipe.data.dataset}.lock", wait=True)


def digest(
    builder: tfds.core.DatasetBuilder, features: Iterable[str]
) -> dict[str, str]:
    """What identifies these features of the prepared examples, with what is in them.

    Raises:
        ValueError: For a feature that the data were prepared without.
    """
    known = read_json(_stamp(builder))["digests"]
    found: dict[str, str] = {}
    for feature in features:
        parts = [x for x in known if x == feature or x.startswith(f"{feature}/")]
        if not parts:
            raise ValueError(
                f"The data in {builder.data_path} were prepared without '{feature}'. "
                "Remove that folder to prepare them anew"
            )
        found |= {part: known[part] for part in parts}
    return dict(sorted(found.items()))


def read_files(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the data were prepared from files of the user's."""
    return bool(read_json(_stamp(builder))["source"])


def fingerprint(folder: Path) -> dict[str, list[float]]:
    """Each file's size and time of change, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime]
        for path in files_in(folder)
    }


def _module(recipe: Recipe) -> ModuleType:
    """The module of `training.datasets` that has the recipe's builder."""

    def read(name: str) -> ModuleType:
        return importlib.import_module(f"training.datasets.{name}")

    names = [x.name for x in pkgutil.iter_modules(datasets.__path__)]
    wanted = recipe.data.dataset
    if wanted not in names or not hasattr(read(wanted), "BUILDER"):
        known = [x for x in names if hasattr(read(x), "BUILDER")]
        raise ValueError(
            f"There is no data set '{wanted}', which the recipe '{recipe.name}' names. "
            f"There are: {', '.join(known)}. A folder of your own is 'folder'"
        )
    return read(wanted)


def _stamp(builder: tfds.core.DatasetBuilder) -> Path:
    return Path(builder.data_path) / "prepared_from.json"


def _builder(
    module: ModuleType, recipe: Recipe, directory: Path, source: Path | None
) -> tfds.core.DatasetBuilder:
    config: Any = recipe.data.config
    if hasattr(module, "config"):
        # Recipes of one file have one folder's data: scenes, scenes-toy-labels10.
        config = module.config(recipe.name.partition("-")[0], config, source)
    try:
        with _temporary_files_removed():
            return module.BUILDER(config=config, data_dir=str(directory))
    except AssertionError as error:  # TFDS's, for a folder under another version's name
        raise ValueError(
            f"The data set '{recipe.data.dataset}' in {directory} cannot be read: "
            f"{error}. Remove its folder there to prepare the data anew"
        ) from error


@contextlib.contextmanager
def _temporary_files_removed() -> Iterator[None]:
    """TFDS makes a folder for what it might load from elsewhere, and leaves it."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        try:
            yield
        finally:
            tempfile.tempdir = before


def _build(builder: tfds.core.DatasetBuilder, source: Path | None, stamp: Path) -> None:
    # Without the stamp, it is not known what they were made of.
    shutil.rmtree(stamp.parent, ignore_errors=True)
    files = fingerprint(source) if source is not None else {}
    config = tfds.download.DownloadConfig(manual_dir=str(source or ""))
    said = f"Preparing the data set {builder.name}, once, in {builder.data_path}"
    Console().print(said, soft_wrap=True, highlight=False)
    # TFDS says that it downloads, which no data set here does.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=config)
    content = {
        "digests": _digests(stamp.parent),
        "sizes": _sizes(stamp.parent),
        "source": files,
    }
    write_json(stamp, content)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.tfrecord*")}


def _check_whole(folder: Path, sizes: dict[str, int]) -> None:
    """A file that lost its end is only seen when an epoch comes to it."""
    now = _sizes(folder)
    for name, size in sizes.items():
        if now.get(name) != size:
            raise ValueError(
                f"{folder / name} has {now.get(name, 'no')} bytes, not the {size} that "
                f"were prepared. Remove {folder} to prepare the data anew"
            )


def _other_versions(folder: Path) -> str:
    versions = {path.name for path in folder.parent.glob("*.*.*")} - {folder.name}
    if not versions:
        return ""
    found = ", ".join(sorted(versions))
    return f". In {folder.parent} is version {found}, and {folder.name} is needed"


def _digests(folder: Path) -> dict[str, str]:
    """What identifies each feature's content, over all examples of all splits."""
    totals: dict[str, Any] = collections.defaultdict(hashlib.sha256)
    for path in sorted(folder.glob("*.tfrecord*")):
        for record in tf.data.TFRecordDataset(str(path)):
            features = tf.train.Example.FromString(record.numpy()).features.feature
            for name in features:
                totals[name].update(features[name].SerializeToString())
    return {name: total.hexdigest() for name, total in sorted(totals.items())}


def _check_same(prepared: Path, before: dict, source: Path) -> None:
    now = fingerprint(source)
    changed = [x for x in {**before, **now} if before.get(x) != now.get(x)]
    if changed:
        raise ValueError(
            f"The data in {prepared} were prepared from other files than those in "
            f"{source} now: {len(changed)} differ in name, size or time, the first: "
            f"{changed[0]}. Remove that folder to prepare them anew, leave out --data "
            "to use them as they are, or give another folder with --runs"
        )
