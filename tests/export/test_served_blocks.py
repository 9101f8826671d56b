"""The shell blocks that serve a model run as they stand in README and docs/serving.md.

Changed are the ports, and what is trained: a model of random weights stands where
`make demo` puts its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from training import recipes
from training.study.studies import DEMO

# One process runs all that share the server.
pytestmark = [pytest.mark.xdist_group("serving"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# `serve` in the background, at other ports; what asks, asks there.
SHELL = """
make() { [ "$*" = demo ]; }
python() {
    case "$*" in
    *"export serve"*)
        command python "$@" --port $PORT --rest-port $REST_PORT >serve.log 2>&1 &
        echo $! >serve.pid ;;
    *"export predict"*) command python "$@" --address 127.0.0.1:$PORT ;;
    *) command python "$@" ;;
    esac
}
"""


def blocks(page):
    """The shell blocks of a page, which have no language."""
    text = (ROOT / page).read_text("utf-8")
    found = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.S | re.M)
    return [block for language, block in found if not language]


def block(page, words):
    (only,) = (block for block in blocks(page) if words in block)
    return only


class Clone:
    """A clone after `make demo`, whose blocks are run."""

    def __init__(self, folder, ports):
        self.folder, self.ports = folder, ports
        for name in ("training", "export", "keras_cross_stitch", "docs"):
            (folder / name).symlink_to(ROOT / name)
        # Where the tests run in no virtual environment, there is nothing to activate.
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        (folder / "photos").mkdir()
        shutil.copy(ROOT / "docs" / "room.jpg", folder / "photos")

    def run(self, script):
        script = script.replace("127.0.0.1:8501", f"127.0.0.1:{self.ports[1]}")
        script = script.replace("127.0.0.1:8500", f"127.0.0.1:{self.ports[0]}")
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PORT": str(self.ports[0]),
            "REST_PORT": str(self.ports[1]),
        }
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", SHELL + script],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, script + run.stdout + run.stderr
        return run.stdout

    def serves(self):
        address = f"http://127.0.0.1:{self.ports[1]}/v1/models/cross_stitch"
        try:
            return httpx.get(address).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self):
        file = self.folder / "serve.pid"
        if file.exists():
            os.kill(int(file.read_text()), signal.SIGKILL)
            file.unlink()


@pytest.fixture
def clone(tmp_path, free_port, served):
    clone = Clone(tmp_path, (free_port(), free_port()))
    recipe, method = "scenes-labels10", "cross_stitch_from_start"
    assert recipes.find(recipe)
    assert method in DEMO
    model = tmp_path / "runs" / recipe / method / "seed0" / "model.keras"
    model.parent.mkdir(parents=True)
    served.models[1].save(model)
    model.with_name("answers.json").write_text(json.dumps(served.answers))
    yield clone
    clone.stop()


def test_the_readme_serves_as_the_page_does_that_is_run_below():
    readme, page = (
        [
            line.partition("#")[0].strip()
            for line in block(path, "export serve serving/rooms").splitlines()
            if line.startswith("python")
        ]
        for path in ("README.md", "docs/serving.md")
    )
    assert len(readme) == 2
    assert readme == page


def test_the_page_goes_from_a_clone_to_an_answer_and_a_checked_version(clone, wait_for):
    page = "docs/serving.md"
    clone.run(block(page, "export serve serving/rooms"))
    wait_for(clone.serves, seconds=120)

    answer = json.loads(clone.run(block(page, "normals_from_jpeg")))
    assert len(answer["predictions"]) == 1
    clone.run(block(page, "export predict"))
    assert (clone.folder / "room.segmentation.png").is_file()

    (model,) = clone.folder.glob("runs/**/model.keras")
    checks = block(page, "export verify").replace("MODEL.keras", str(model))
    told = clone.run(checks)
    assert "The same answers, by tensorflow." in told
    assert "gRPC" in told


def test_boxes_without_the_client_are_asked_for_with_curl(tmp_path, region_addresses):
    clone = Clone(tmp_path, [address.split(":")[-1] for address in region_addresses])
    script = block("docs/serving.md", '"signature_name": "detection"')
    answer = json.loads(clone.run(script.replace("(256, 192)", "(64, 48)")))
    assert answer["outputs"].keys() >= {"boxes", "num_detections"}
