"""Does a version still answer as it did when it was exported?

Asks in a process that can import neither Keras nor our code.
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

from export.version import recorded
from export.version.signatures import Signature, signatures

# Of the largest value: an engine of its own sums in another order.
_TOLERANCE = {"tensorflow": 0.0, "openvino": 1e-4}

# -I: nothing of the working directory can be imported.
_PROGRAM = """
import runpy, sys
for name in ("keras", "tf_keras", "keras_cross_stitch", "export"):
    sys.modules[name] = None  # to import it is an error
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a version is, and how far its answers are from the recorded ones."""

    signatures: dict[str, Signature]
    about: dict  # the content of export.json
    bytes: int
    differences: dict[str, dict[str, float]]  # as `recorded.repeat` gives them
    wrong: list[str]  # in words; empty where all is as it was


def verify(version: pathlib.Path, engine: str = "tensorflow") -> Report:
    """Asks every signature for what was recorded, and compares; repeats the warm-up.

    Args:
        version: Path of a version that `python -m export savedmodel` wrote.
        engine: `"tensorflow"`, or `"openvino"`, which runs `serving_default` alone.
    """
    if engine not in _TOLERANCE:
        raise ValueError(
            f"--engine must be one of {list(_TOLERANCE)}. Received: {engine}"
        )
    if engine == "openvino" and not importlib.util.find_spec("openvino"):
        raise ValueError("--engine openvino needs OpenVINO: `pip install openvino`")
    about = version / "assets.extra" / "export.json"
    if not about.is_file():
        raise ValueError(
            f"'{version}' has no record of its export: export the model anew with "
            "`python -m export savedmodel`"
        )
    described = json.loads(about.read_text())
    if engine == "openvino" and described["dtype"] != "float32":
        raise ValueError(
            "--engine openvino is for versions in float32, which OpenVINO by itself "
            f"computes in bfloat16 where that is faster. '{version}' is in "
            f"{described['dtype']}"
        )
    found = signatures(version)
    tolerance = max(described["tolerance"], _TOLERANCE[engine])
    differences, failures = _in_a_process_of_its_own(version, engine)
    return Report(
        found,
        described,
        sum(path.stat().st_size for path in version.rglob("*") if path.is_file()),
        differences,
        _wrong(found, differences, tolerance, engine) + failures,
    )


def _in_a_process_of_its_own(
    version: pathlib.Path, engine: str
) -> tuple[dict[str, dict[str, float]], list[str]]:
    command = [sys.executable, "-I", "-c", _PROGRAM, recorded.__file__]
    done = subprocess.run(
        [*command, str(version.absolute()), engine],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"'{version}' cannot be run by {engine}: {why[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _wrong(
    found: Mapping[str, Signature],
    differences: Mapping[str, Mapping[str, float]],
    tolerance: float,
    engine: str,
) -> list[str]:
    wrong = [
        f"'{name}' of signature '{signature}' differs "
        f"{_share(difference, found.get(signature), name)}, more than {tolerance:.2g}"
        for signature, outputs in differences.items()
        for name, difference in outputs.items()
        if difference > tolerance
    ]
    asked = {"serving_default"} if engine == "openvino" else set(found)
    return wrong + [
        f"Signature '{signature}' was not there, or not recorded"
        for signature in sorted(asked ^ set(differences))
    ]


def _share(difference: float, signature: Signature | None, name: str) -> str:
    dtype = signature.outputs.get(name, "float") if signature else "float"
    if "float" in dtype:
        return f"by {difference:.2g} of its largest value"
    return f"in {difference:.2g} of its values"
