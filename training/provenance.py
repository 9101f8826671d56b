"""What made a result: commit, versions and processor of the process that trained it."""

import functools
import hashlib
import importlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"
PACKAGES = ("keras", "tensorflow", "numpy")
# How a CPU multiplies, the fastest first: results differ by rounding between these.
_KINDS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


class Made(NamedTuple):
    """What a row of raw values was made by; what is not known of it is "unknown"."""

    recipe: str = UNKNOWN  # a digest of all that the recipe says
    dtype: str = UNKNOWN
    data: str = UNKNOWN  # a digest of what the user's own files have, if they are read
    commit: str = UNKNOWN
    versions: str = UNKNOWN
    processor: str = UNKNOWN


@functools.cache  # files may change while it runs, its code does not
def of_this_process() -> dict[str, str]:
    """Commit, versions and kind of processor, as they are kept beside a run.

    As they are when it is first asked for: ask early.
    """
    return {"commit": _commit(), "versions": versions(), "processor": _processor()}


def digest(content: Any) -> str:
    """Twelve digits that tell one JSON value from another."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _commit() -> str:
    """The clone's commit, with "-dirty" behind it where files are changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN  # no clone, or no git
    return told.stdout.decode().strip()


def versions() -> str:
    """The packages that results depend on."""
    # By the module: its distribution may be keras-nightly, or tensorflow-cpu.
    return " ".join(f"{x}={importlib.import_module(x).__version__}" for x in PACKAGES)


def _processor() -> str:
    """ "NVIDIA H100 80GB HBM3", or "x86_64 avx512_bf16"."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        return details.get("device_name", "GPU")
    cpuinfo = Path("/proc/cpuinfo")
    known = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.exists() else set()
    kind = next((x for x in _KINDS if x in known), "")
    return f"{platform.machine()} {kind}".strip()
