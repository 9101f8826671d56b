"""Signatures of encoded images, and each task's part of what that of all answers."""

from collections.abc import Iterable, Mapping

import numpy as np

from .protocol import IMAGES

SIGNATURE = "from_jpeg"  # of encoded images, beside each task's


def takes_files(signature: str) -> bool:
    """Whether a signature is one of encoded images, by its name."""
    return signature == SIGNATURE or signature.endswith(IMAGES)


def of_files(signature: str) -> str:
    """The signature that takes what another takes, as encoded images."""
    if signature == "serving_default":
        return SIGNATURE
    return signature if takes_files(signature) else signature + IMAGES


def of_task(
    task: str, outputs: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """A task's outputs from those of all tasks.

    Args:
        task: String.
        outputs: Of all tasks, named `<task>`, or `<task>_<name>` for a task of several.
        names: Of the outputs of the task's own signature.
    """
    alone = [*names] == [task] and task in outputs
    return {x: outputs[task if alone else f"{task}_{x}"] for x in sorted(names)}
