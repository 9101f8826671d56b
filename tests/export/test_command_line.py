import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import keras
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from export.__main__ import app, path
from export.inspect import verify
from export.version import recorded

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr("export.__main__.console.width", 200)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """What `verify` does in a process of its own takes seconds."""
    monkeypatch.setattr(verify, "_in_a_process_of_its_own", recorded.repeat)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_savedmodel_tells_what_it_left_out_and_what_that_changed(cheaper, monkeypatch):
    asked = []

    def export(model, directory, progress=None, **options):
        asked.append((model, directory, options))
        return cheaper

    monkeypatch.setattr("export.make.savedmodel.export", export)
    options = ("--drop-below", 0.01, "--images", "i", "--dtype", "bfloat16")
    result = run("savedmodel", "m.keras", "out", *options, "--from-jpeg", "--warmup", 2)
    assert result.exit_code == 0
    assert asked == [
        (
            Path("m.keras"),
            Path("out"),
            {
                "drop_below": 0.01,
                "images": Path("i"),
                "dtype": "bfloat16",
                "from_jpeg": True,
                "warmup": 2,
            },
        )
    ]
    assert "cross_stitch_conv2 │ normals │ age" in result.stdout
    assert "% other classes" in result.stdout
    assert f"Wrote {cheaper[0]}" in result.stdout


def test_savedmodel_writes_the_next_version(tmp_path):
    x = keras.Input((4,), name="x")
    keras.Model(x, {"a": keras.layers.Dense(2)(x)}).save(tmp_path / "model.keras")
    (tmp_path / "served" / "7").mkdir(parents=True)
    result = run("savedmodel", tmp_path / "model.keras", tmp_path / "served")
    assert result.exit_code == 0
    assert result.stdout.endswith(f"Wrote {tmp_path / 'served' / '8'}\n")
    assert (tmp_path / "served" / "8" / recorded.RECORDED).is_file()


def test_savedmodel_writes_nothing_where_nothing_can_be_left_out(
    model_file, images_file, tmp_path
):
    options = ("--drop-below", 1e-9, "--images", images_file)
    result = run("savedmodel", model_file, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "No task can do without another within --drop-below 1e-09" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["avx512f", "avx512f avx512_bf16"])
def test_savedmodel_warns_where_bfloat16_is_not_computed(version, monkeypatch, flags):
    monkeypatch.setattr(
        "export.make.savedmodel.export", lambda *_, **__: (version, [], {})
    )
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: f"flags: {flags}")
    result = run("savedmodel", "m.keras", "out", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert ("Warning: this machine" in result.stderr) == ("bf16" not in flags)


def test_names_are_shown_as_they_are(cheaper, monkeypatch):
    written, (link, *_), changes = cheaper
    odd = [f"[{name}] :cat: [/{name}]" for name in ("red", "b", "nothing")]
    links = [dataclasses.replace(link, unit=odd[0], task=odd[1], source=odd[2])]
    change = dataclasses.replace(changes["kind"], metrics={odd[1]: odd[2]})
    result = (written / odd[0], links, {odd[0]: change})
    monkeypatch.setattr("export.make.savedmodel.export", lambda *_, **__: result)
    told = run("savedmodel", "m.keras", "out")
    assert told.exit_code == 0, told.output
    assert " │ ".join(odd) in told.stdout
    assert f"{odd[1]}: {odd[2]}" in told.stdout
    assert f"Wrote {written / odd[0]}" in told.stdout
    told = run("verify", odd[2])
    assert f"Received: '{odd[2]}'" in told.stderr


def test_names_are_folded_and_not_cut_off(cheaper, monkeypatch):
    written, (link, *_), changes = cheaper
    names = [f"{word}_of_whatever_has_a_long_name" for word in ("unit", "task", "kind")]
    links = [dataclasses.replace(link, unit=names[0], task=names[1], source=names[2])]
    changes = {names[0]: dataclasses.replace(changes["kind"], metrics={names[1]: "1"})}
    result = (written, links, changes)
    monkeypatch.setattr("export.make.savedmodel.export", lambda *_, **__: result)
    monkeypatch.setattr("export.__main__.console.width", 80)
    told = run("savedmodel", "m.keras", "out").stdout
    rows = [row.split("│")[1:-1] for row in told.splitlines() if "│" in row]
    of_links = [row for row in rows if len(row) == 4]
    of_changes = [row for row in rows if len(row) == 6]
    assert columns(of_links)[:3] == names
    assert columns(of_changes)[0] == names[0]
    assert columns(of_changes)[5] == f"{names[1]}:1"


def columns(rows):
    """A table's columns, with what is folded in them in one piece."""
    return [
        "".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)
    ]


def test_sigterm_leaves_nothing_half_done(model_file, tmp_path, monkeypatch):
    def echo(line):
        assert list((tmp_path / "out").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("export.__main__.typer.echo", echo)
    before = signal.getsignal(signal.SIGTERM)
    result = run("savedmodel", model_file, tmp_path / "out")
    assert result.exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_savedmodel_on_a_full_disk_ends_in_one_line(monkeypatch):
    def export(*_, **__):
        message = "/out/1/saved_model.pb;\nNo space left on device"
        raise tf.errors.ResourceExhaustedError(None, None, message)

    monkeypatch.setattr("export.make.savedmodel.export", export)
    result = run("savedmodel", "m.keras", "out")
    assert result.exit_code == 1
    expected = "Error: /out/1/saved_model.pb; No space left on device\n"
    assert result.stderr == expected


def test_savedmodel_checks_what_answers_mean_before_anything_else(tmp_path):
    (tmp_path / "answers.json").write_text('{"kind": {"names": null}}')
    (tmp_path / "model.keras").write_text("is not read")
    result = run("savedmodel", tmp_path / "model.keras", tmp_path / "out")
    assert result.exit_code == 2
    assert "'names' of 'kind' in" in result.stderr
    assert not (tmp_path / "out").exists()


def test_verify_lists_signatures_and_versions(version):
    shutil.copytree(version, version.parent / "0")
    try:
        result = run("verify", version.parent)
    finally:
        shutil.rmtree(version.parent / "0")
    assert result.exit_code == 0
    assert f"{version}: " in result.stdout
    assert "there are also versions 0" in result.stdout
    assert "│ kind_from_jpeg    │ image_bytes: string (N,) " in result.stdout
    assert "The same answers, by tensorflow" in result.stdout


def test_verify_finds_a_version_with_zeros_before_its_number(version, tmp_path):
    shutil.copytree(version, tmp_path / "0007")
    result = run("verify", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert f"{tmp_path / '0007'}: " in result.stdout
    assert "there are also versions" not in result.stdout


def test_verify_ends_with_1_where_an_answer_differs(version, monkeypatch):
    def repeat(version, engine):
        differences, failed = recorded.repeat(version, engine)
        return {**differences, "age": {"age": 0.5}}, failed

    monkeypatch.setattr(verify, "_in_a_process_of_its_own", repeat)
    result = run("verify", version)
    assert result.exit_code == 1
    assert "'age' of signature 'age' differs by 0.5" in result.stderr
    assert "The same answers" not in result.stdout


def test_bench_prints_times_ratios_and_ops(version, model_file):
    result = run("bench", version, "--model", model_file, "--rounds", 2)
    assert result.exit_code == 0
    assert "unstitched      │ in process" in result.stdout
    assert "batch 32: all tasks in one request take" in result.stdout
    assert "serving_default: " in result.stdout


def test_bad_input_ends_in_one_line(model_file, version, tmp_path):
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    out = tmp_path / "out"
    for arguments, message in (
        (("savedmodel", tmp_path / "none.keras", out), "There is no file"),
        (("savedmodel", text, out), "Expected a multi-task model"),
        (("savedmodel", model_file, text), "must be a folder that can be written to"),
        (("savedmodel", model_file, out, "--dtype", "int4"), "--dtype must be one of"),
        (("verify", tmp_path / "[red]"), "[red]"),
        (("verify", out), "Expected a folder of versions"),
        (("verify", version, "--engine", "onnx"), "--engine must be one of"),
        (("bench", out), "Expected a folder of versions"),
        (("bench", version, "--model", text), "Expected a multi-task model"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert result.stderr.strip().count("\n") == 0
    assert os.listdir(tmp_path) == ["text.keras"]


def test_a_server_that_is_not_there_ends_in_one_line(version):
    result = run("bench", version, "--address", "127.0.0.1:1", "--rounds", 2)
    assert result.exit_code == 1
    assert "Error: UNAVAILABLE: " in result.stderr
    assert "(from 127.0.0.1:1)" in result.stderr
    assert "`python -m export serve FOLDER` starts one" in result.stderr


def test_every_path_begins_at_home_where_it_says_so(monkeypatch, tmp_path):
    hints = [
        hint
        for command in app.registered_commands
        for hint in get_type_hints(command.callback, include_extras=True).values()
        if get_origin(hint) is Annotated and "Path" in str(hint.__origin__)
    ]
    assert len(hints) > 5
    assert {hint.__metadata__[0].parser for hint in hints} == {path}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/there") == tmp_path / "there"
    assert path("~no_such_user/there") == Path("~no_such_user/there")
