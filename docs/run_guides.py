"""Runs the guides and writes their outputs into them: `make guides`.

Not a test: `tests/test_guides.py` runs the same cells in less time.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": 3600, "resources": resources, "record_timing": False}
    NotebookClient(notebook, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if not _is_notice(x)]
    notebook.metadata = {"language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def _is_notice(output) -> bool:
    """TensorFlow's; an error would have ended the run."""
    text = output.get("text", "")
    return output.get("name") == "stderr" or text.startswith("INFO:tensorflow")


for path in [Path(x) for x in sys.argv[1:]] or sorted(
    (ROOT / "docs/guides").glob("*.ipynb")
):
    print(path.name, flush=True)
    run(path)
