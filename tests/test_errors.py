"""Each message that docs/errors.md quotes is what its code raises, or prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
# A block of code, and the text below it, where there is one.
BLOCKS = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
SETUP, *SECTIONS = PAGE.read_text().split("\n## ")


def said(code, namespace):
    """What the code raises, as a traceback's last line says it, or else prints."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return printed.getvalue()


def pattern(quoted):
    """The text in any lines, `...` for what differs from run to run."""
    words = r"\s+".join(map(re.escape, quoted.split()))
    return words.replace(re.escape("..."), ".*")


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    namespace = {}
    exec(BLOCKS.search(SETUP)[1], namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda x: x.split("\n")[0])
def test_the_page_quotes_what_is_said(section, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCKS.findall(section)

    assert blocks
    for code, quoted in blocks:
        message = said(code, namespace)
        assert re.fullmatch(pattern(quoted), message.strip(), re.S), message
