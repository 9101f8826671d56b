import shutil
import subprocess
import sys

import pytest

from export.inspect import verify
from export.version import recorded

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture
def here(monkeypatch):
    """Without a process of its own, which takes seconds."""
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", recorded.repeat)


def test_a_process_without_keras_finds_the_same_answers(version):
    report = verify.verify(version)
    assert report.wrong == []
    assert set(report.differences) == set(report.signatures)
    assert set(report.about["versions"]) == {"keras", "tensorflow"}
    assert report.signatures["age"].outputs == {"age": "float32 (N, 1)"}


@pytest.mark.parametrize("module", ["keras", "keras_cross_stitch", "export"])
def test_the_process_cannot_import_keras_or_our_code(tmp_path, module):
    (tmp_path / "program.py").write_text(f"import sys, {module}")
    command = [sys.executable, "-I", "-c", verify._PROGRAM, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"import of {module} halted" in done.stderr


def test_broken_variables_are_an_error_that_says_which_version(version, tmp_path):
    copy = shutil.copytree(version, tmp_path / "1")
    (data,) = copy.glob("variables/*.data-*")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"'{copy}' is no SavedModel that TensorFlow"):
        verify.verify(copy)


def test_a_process_that_fails_is_an_error_that_says_why(version, tmp_path):
    copy = shutil.copytree(version, tmp_path / "1")
    (copy / recorded.RECORDED).write_bytes(bytes(range(100)))
    with pytest.raises(RuntimeError, match=f"'{copy}' cannot be run by tensorflow: "):
        verify.verify(copy)


def edited(version, path, about):
    copy = shutil.copytree(version, path / "1")
    (copy / "assets.extra" / "export.json").write_text(about)
    return copy


@pytest.mark.parametrize("difference", [1e-4, float("inf")])
def test_what_differs_is_wrong(version, monkeypatch, difference):
    found = {name: {"kind": 1e-7} for name in verify.signatures(version)}
    found["age"] = {"age": difference}
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", lambda *_: (found, []))
    (line,) = verify.verify(version).wrong
    assert line.startswith(f"'age' of signature 'age' differs by {difference:.2g}")


def test_whole_numbers_differ_by_how_many_do(version, monkeypatch):
    found = {name: {"kind": 0.0} for name in verify.signatures(version)}
    signature = verify.signatures(version)["age"]
    signature.outputs["age"] = "int64 (N, 1)"
    monkeypatch.setattr(verify, "signatures", lambda _: {**found, "age": signature})
    found["age"] = {"age": 1 / 8}
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", lambda *_: (found, []))
    (line,) = verify.verify(version).wrong
    assert "differs in 0.12 of its values, more than 1e-05" in line


def test_warmup_that_fails_is_wrong(version, tmp_path):
    copy = shutil.copytree(version, tmp_path / "1")
    (copy / recorded.WARMUP).write_bytes(bytes(range(100)))
    (line,) = verify.verify(copy).wrong
    assert line.startswith("The warm-up requests cannot be read: ")


def test_bfloat16_may_differ_by_more(version, tmp_path, monkeypatch):
    found = {name: {"kind": 0.01} for name in verify.signatures(version)}
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", lambda *_: (found, []))
    about = '{"dtype": "bfloat16", "tolerance": 0.02}'
    assert verify.verify(edited(version, tmp_path, about)).wrong == []


def test_a_signature_that_was_not_recorded_is_wrong(version, monkeypatch):
    found = {name: {} for name in [*verify.signatures(version), "depth"]}
    del found["kind"]
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", lambda *_: (found, []))
    assert verify.verify(version).wrong == [
        "Signature 'depth' was not there, or not recorded",
        "Signature 'kind' was not there, or not recorded",
    ]


@pytest.mark.usefixtures("here")
def test_openvino_is_asked_for_serving_default_alone(version):
    pytest.importorskip("openvino")
    report = verify.verify(version, "openvino")
    assert report.wrong == []
    assert set(report.differences) == {"serving_default"}


def test_openvino_takes_float32(version, tmp_path):
    pytest.importorskip("openvino")
    copy = edited(version, tmp_path, '{"dtype": "bfloat16", "tolerance": 0.02}')
    with pytest.raises(ValueError, match=r"versions in float32.* is in bfloat16"):
        verify.verify(copy, "openvino")


def test_openvino_that_is_not_installed_is_an_error(version, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install openvino"):
        verify.verify(version, "openvino")


def test_an_unknown_engine_is_an_error(version):
    with pytest.raises(ValueError, match=r"'openvino'\]. Received: onnx"):
        verify.verify(version, "onnx")


def test_a_version_of_another_program_is_an_error(version, tmp_path):
    shutil.copy(version / "saved_model.pb", tmp_path)
    with pytest.raises(ValueError, match="no record of its export: export the model"):
        verify.verify(tmp_path)
