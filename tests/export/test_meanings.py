import json
import re
from pathlib import Path

import pytest

from export import meanings

ROOMS = {
    "rooms": {
        "kind": "classes",
        "names": ["wall", "Fenster — öffen"],
        "colours": [[0, 1, 2], [255, 0, 7]],
        "units": "probability",
        "description": "",
        "drawn_from": 0.5,
        "of_someone_else": None,
    },
    "age": {},
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_is_written_is_read_beside_a_model_and_in_a_version(tmp_path, encoding):
    path = meanings.beside(tmp_path / "model.keras")
    assert meanings.read(path) == meanings.of_version(tmp_path) == {}
    (tmp_path / "assets.extra").mkdir()
    for each in (path, tmp_path / "assets.extra" / "answers.json"):
        each.write_text(json.dumps(ROOMS, ensure_ascii=False), encoding)
        assert meanings.read(each) == ROOMS
    assert meanings.of_version(tmp_path) == ROOMS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must be JSON in UTF-8"),
        (b"", "must be JSON in UTF-8"),
        (b'{"rooms": {"names": ["\xfc"]}}', "must be JSON in UTF-8"),
        (b"[" * 100_000, "must be JSON in UTF-8"),
        (b"[]", "must hold {task: {'kind': ...}}. Received: []"),
        (b'{"rooms": "classes"}', "what 'rooms' means as {'kind': ...}. Received: 'cl"),
        (b'{"rooms": {"kind": 1}}', "'kind' of 'rooms' in '"),
        (b'{"rooms": {"names": null}}', "must be a list of strings; leave it out"),
        (b'{"rooms": {"names": "wall"}}', "must be a list of strings"),
        (b'{"rooms": {"names": ["wall", 2]}}', "must be a list of strings"),
        (b'{"rooms": {"colours": ["red"]}}', "must be a list of [red, green, blue]"),
        (b'{"rooms": {"colours": [[1, 2]]}}', "must be a list of [red, green, blue]"),
        (b'{"rooms": {"colours": [[1, 2, 256]]}}', "whole numbers to 255"),
        (b'{"rooms": {"colours": [[1, 2, true]]}}', "whole numbers to 255"),
        (b'{"rooms": {"drawn_from": "0.5"}}', "must be a number from 0 to 1"),
        (b'{"rooms": {"drawn_from": 50}}', "must be a number from 0 to 1"),
        (b'{"rooms": {"drawn_from": NaN}}', "must be a number from 0 to 1"),
        (b'{"rooms": {"range": [10, 0]}}', "must be two numbers, the smaller first"),
        (b'{"rooms": {"range": [5, 5]}}', "must be two numbers, the smaller first"),
        (b'{"rooms": {"range": [0, NaN]}}', "must be two numbers, the smaller first"),
        (b'{"rooms": {"units": []}}', "'units' of 'rooms'"),
        (b'{"rooms": {"description": {}}}', "'description' of 'rooms'"),
    ],
)
def test_an_error_names_the_file_the_task_and_what_is_expected(
    tmp_path, content, message
):
    path = tmp_path / "answers.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        meanings.read(path)
    assert str(path) in str(raised.value)


def test_the_docs_say_what_may_stand_there(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", page, re.S)
    path = tmp_path / "answers.json"
    path.write_text(example)
    assert meanings.read(path) == json.loads(example)
    entries = set(re.findall(r"`(\w+)`", page)) | set(re.findall(r'"(\w+)":', example))
    assert meanings.Meaning.__annotations__.keys() <= entries
