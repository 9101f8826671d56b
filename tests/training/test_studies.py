"""Studies of runs that are only folders with metrics: nothing is trained here."""

import csv
import dataclasses
import json
import platform

import keras
import numpy as np
import pytest

from training import methods, provenance, recipes, runs
from training.study import raw_values, studies


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Experiment, "_data", {"examples": "digest"})
    monkeypatch.setattr(runs.Experiment, "data_digest", "these files")
    return runs.Experiment(recipes.find("scenes"), None, tmp_path / "runs")


def finish(run, value=50.0):
    """Makes the run's folder what a finished one has."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "metrics.json").write_text(
        json.dumps({"segmentation": {"miou": value}, "normals": {"mean_angle": 20}})
    )


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def methods_of(planned):
    return list(dict.fromkeys(run.method for run in planned))


def test_the_studies_are_the_papers_tables(scenes):
    def study(name):
        return methods_of(studies.plan(scenes, name, [0]))

    assert study("methods")[:3] == ["single_task", "ensemble", "single_task_longer"]
    assert study("methods")[-2:] == ["split@conv4", "cross_stitch_from_start"]
    assert study("init")[1:] == [
        "cross_stitch@same_task=0.1",
        "cross_stitch@same_task=0.5",
        "cross_stitch@same_task=0.7",
        "cross_stitch",
    ]
    assert study("alpha-rate")[1:] == [
        "cross_stitch@alpha_multiplier=1",
        "cross_stitch",
        "cross_stitch@alpha_multiplier=100",
        "cross_stitch@alpha_multiplier=1000",
    ]
    assert study("splits")[1] == "split@conv2"
    assert study("tower-init")[-1] == "cross_stitch_from_start@common_start=false"


@pytest.mark.parametrize("study", [*studies.STUDIES, "all"])
@pytest.mark.parametrize("name", ["scenes", "nyuv2_pretrained", "voc2008"])
def test_every_method_of_a_study_can_be_planned(scenes, study, name):
    experiment = dataclasses.replace(scenes, recipe=recipes.find(name))
    if (name, study) == ("voc2008", "label-fraction"):
        with pytest.raises(ValueError, match="'voc2008' has no label fraction"):
            studies.plan(experiment, study, [0])
        return

    for run in studies.plan(experiment, study, [0]):
        assert studies.methods.plan(run.method, run.experiment.recipe)


def test_a_search_gives_baseline_and_method_as_many_tries_on_a_part_of_train(scenes):
    recipe = scenes.recipe
    planned = studies.plan(scenes, "search", [0])
    tried = {run.method: methods.plan(run.method, recipe) for run in planned}
    of = {
        name: [x for x in tried.values() if x.spelled.partition("@")[0] == name]
        for name in (
            "single_task_as_long",
            "cross_stitch_from_start",
            "single_task_longer",
            "cross_stitch",
        )
    }

    assert len(tried) == len(planned) == sum(map(len, of.values()))
    assert planned[0].method == "single_task_as_long"
    for baseline, name, rate, epochs in (
        ("single_task_as_long", "cross_stitch_from_start", 0.05, 20),
        ("single_task_longer", "cross_stitch", 0.01, 6),
    ):
        assert len(of[baseline]) == len(of[name])
        assert of[name][0].recipe.units == recipe.units
        schedules = [x.schedule for x in of[baseline]]
        # Rates are rounded to two digits.
        np.testing.assert_allclose(
            [(x.learning_rate / rate, x.epochs / epochs) for x in schedules],
            studies.SCHEDULES_TRIED[: len(schedules)],
            rtol=0.05,
        )
        stitched = [(x.recipe.units, x.schedule) for x in of[name]]
        assert {
            round(units.alpha_multiplier * schedule.learning_rate, 6)
            for units, schedule in stitched
        } >= {of_alpha for of_alpha, _, _ in studies.UNITS_TRIED}
        assert {units.same_task for units, _ in stitched} == {0.9, 1.0}
        assert {units.per for units, _ in stitched} == {"channel", "layer"}
        assert {x.learning_rate / rate for _, x in stitched} == {1, 2}
        assert {x.epochs / epochs for _, x in stitched} == {1, 2}
    assert {run.experiment.recipe.data.train_split for run in planned} == {
        "train[:80%]"
    }
    assert {run.experiment.recipe.data.test_split for run in planned} == {"train[80%:]"}
    assert planned[0].folder.parts[-3] == "scenes-search"
    again = studies.plan(scenes, "search", [0])  # the same at every start
    assert [run.folder for run in planned] == [run.folder for run in again]
    part = recipes.change(scenes.recipe, "data", train_split="train[:50%]")
    with pytest.raises(ValueError, match=r"'train\[:50%\]' of .* Name a whole one"):
        studies.plan(dataclasses.replace(scenes, recipe=part), "search", [0])


def test_what_was_tried_is_told_best_first(scenes):
    planned = studies.plan(scenes, "search", [0])
    finish(planned[0], 50.0)
    finish(planned[1], 55.0)
    finish(planned[2], 40.0)
    finish(planned[3], float("nan"))  # of which nothing is better or worse

    assert studies.best_first(planned) == [
        (planned[1].method, pytest.approx(5.0)),
        ("single_task_as_long", 0.0),
        (planned[2].method, pytest.approx(-10.0)),
    ]
    of_two = studies.plan(scenes, "search", [0, 1])
    with_other_seed = of_two[len(planned) :]
    finish(with_other_seed[0], 50.0)
    finish(with_other_seed[1], 57.0)
    assert studies.best_first(of_two)[0] == (planned[1].method, pytest.approx(6.0))


def test_label_fractions_are_recipes_of_their_own(scenes):
    planned = studies.plan(scenes, "label-fraction", [0, 1])
    names = dict.fromkeys(run.experiment.recipe.name for run in planned)
    run = next(run for run in planned if run.method == "hard_sharing" and run.seed == 1)

    assert list(names) == [f"scenes-labels{x}" for x in (5, 10, 25, 50)] + ["scenes"]
    assert run.folder == scenes.runs / "scenes-labels5/hard_sharing/seed1"


def test_methods_of_ones_own_stand_behind_those_of_the_study(scenes):
    more = ["hard_sharing", "cross_stitch_from_start@same_task=0.5"]
    planned = studies.plan(scenes, "demo", [0, 3], more)

    assert [run.method for run in planned] == 2 * [*studies.DEMO, more[1]]


@pytest.mark.parametrize("study", ["methods", "label-fraction", "alpha"])
@pytest.mark.parametrize("machines", [1, 4, 8])
def test_shards_give_every_machine_runs_and_start_with_what_others_need(
    scenes, study, machines
):
    planned = studies.plan(scenes, study, range(3))
    shards = [studies.shard(planned, f"{k + 1}/{machines}") for k in range(machines)]
    dealt = [run.folder for shard in shards for run in shard]
    needed = {run.folder for of in planned for run in studies._starts(of)}

    assert len(dealt) == len(set(dealt))
    assert set(dealt) == {run.folder for run in planned} | needed
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        is_needed = [run.folder in needed for run in shard]
        assert is_needed == sorted(is_needed, reverse=True)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/x", "-1/2", "1/0"])
def test_a_shard_that_is_none_is_refused(scenes, part):
    with pytest.raises(ValueError, match=r"--shard must be k/n.* Received: "):
        studies.shard(studies.plan(scenes, "methods", [0]), part)


def test_a_study_that_there_is_not_is_refused(scenes):
    with pytest.raises(
        ValueError, match=r"no study 'table5'\. There are: demo, methods, "
    ):
        studies.plan(scenes, "table5", [0])


def test_what_is_missing_includes_what_the_runs_start_from(scenes):
    planned = studies.plan(scenes, "methods", [0])
    ensemble = [run for run in planned if run.method == "ensemble"]
    missing = [(run.method, run.seed) for run in studies.missing(ensemble)]

    assert missing == [("single_task", 0), ("single_task", 1000), ("ensemble", 0)]
    finish(next(run for run in planned if run.method == "single_task"))
    missing = [(run.method, run.seed) for run in studies.missing(ensemble)]
    assert missing == [("single_task", 1000), ("ensemble", 0)]


def test_the_time_of_a_run_is_estimated_from_those_before(scenes):
    planned = studies.plan(scenes, "methods", [0])
    by_method = {run.method: run for run in planned}

    assert studies.duration(by_method["cross_stitch"]) is None
    finish(by_method["single_task"])
    others = ("scenes_detection", "scenes-toy", "scenes-toy-labels10")
    for name in (*others, "scenes-labels10-search", "scenes-labels10-depth+normals"):
        other = scenes.runs / name / "single_task/seed0"
        other.mkdir(parents=True)
        (other / "history.csv").write_text("epoch,loss,seconds\n0,2,99\n1,1,99\n")
    history = by_method["single_task"].folder / "history.csv"
    history.write_text("epoch,loss,seconds\n0,2,9\n1,1,7\n2,1,8\n")
    assert studies.duration(by_method["cross_stitch"]) == 6 * 8
    assert studies.duration(by_method["hard_sharing"]) == 20 * 8
    assert studies.duration(by_method["ensemble"]) == 0
    (few,) = (
        run
        for run in studies.plan(scenes, "label-fraction", [0])
        if (run.experiment.recipe.name, run.method)
        == ("scenes-labels5", "cross_stitch")
    )
    assert studies.duration(few) == 6 * 8


def test_raw_values_are_tidy_and_other_runs_values_stay(scenes, tmp_path):
    results = tmp_path / "results"
    first = studies.plan(scenes, "splits", [0, 1])
    for run in first[:3]:
        finish(run)
    path = results / "scenes/splits.csv"

    assert raw_values.write(first, results) == [path]
    made = f"{scenes.digest},float32,these files,unknown,unknown,unknown"
    assert path.read_text().splitlines()[:6] == [
        "method,seed,task,metric,value,recipe,dtype,data,commit,versions,processor",
        f"single_task_as_long,0,segmentation,miou,50.0,{made}",
        f"single_task_as_long,0,normals,mean_angle,20,{made}",
        f"split@conv2,0,segmentation,miou,50.0,{made}",
        f"split@conv2,0,normals,mean_angle,20,{made}",
        f"split@conv2,0,all tasks,delta_m,0.0,{made}",
    ]
    assert len(rows(path)) == 3 * 2 + 2
    # Another machine, which has none of those runs, adds one and repeats one.
    other = dataclasses.replace(scenes, runs=tmp_path / "other")
    second = studies.plan(other, "splits", [0, 7])
    finish(second[0], value=60.0)
    finish(second[-1])
    raw_values.write(second, results)
    found = {
        (row["method"], row["seed"]): row["value"]
        for row in rows(path)
        if row["metric"] == "miou"
    }
    assert found == {
        ("single_task_as_long", "0"): "60.0",
        ("split@conv2", "0"): "50.0",
        ("split@conv3", "0"): "50.0",
        ("split@score", "7"): "50.0",
    }
    assert len([x for x in rows(path) if x["metric"] == "miou"]) == len(found)
    # Of the baseline that has changed, too; and seed 7 lacks one.
    found = {x["method"]: x["value"] for x in rows(path) if x["metric"] == "delta_m"}
    assert found == {"split@conv2": "-8.333", "split@conv3": "-8.333"}


def test_rows_stand_in_the_order_of_the_plan_whichever_run_ended_first(
    scenes, tmp_path
):
    planned = studies.plan(scenes, "splits", [0, 1])
    for run in (planned[9], planned[2], planned[0]):  # as shards ended
        finish(run)
        (path,) = raw_values.write(planned, tmp_path)
    of_runs = dict.fromkeys((row["method"], row["seed"]) for row in rows(path))

    assert list(of_runs) == [
        ("single_task_as_long", "0"),
        ("split@conv3", "0"),
        ("split@conv2", "1"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipes.change(recipe, "training", dtype="mixed_bfloat16"),
        lambda recipe: recipes.change(recipe, "finetuning", epochs=7),
    ],
)
def test_rows_of_another_recipe_or_dtype_are_not_mixed(scenes, tmp_path, change):
    first = studies.plan(scenes, "splits", [0, 1])
    for run in first[:2]:
        finish(run)
    (path,) = raw_values.write(first, tmp_path)
    before = path.read_text()
    other = dataclasses.replace(
        scenes, runs=tmp_path / "other", recipe=change(scenes.recipe)
    )
    second = studies.plan(other, "splits", [0])
    finish(second[0])

    with pytest.raises(ValueError, match=r"unknown, are: split@conv2, seed 0\. Make"):
        raw_values.write(second, tmp_path)
    assert path.read_text() == before
    finish(second[1])
    raw_values.write(second, tmp_path)  # both anew
    assert len({row["recipe"] for row in rows(path)}) == 1


def test_rows_of_other_data_are_not_mixed(scenes, tmp_path, monkeypatch):
    planned = studies.plan(scenes, "splits", [0])
    finish(planned[0])
    (path,) = raw_values.write(planned, tmp_path / "results")
    before = path.read_text()
    assert rows(path)[0]["data"] == "these files"

    monkeypatch.setattr(runs.Experiment, "data_digest", "others")
    other = dataclasses.replace(scenes, runs=tmp_path / "other")
    second = studies.plan(other, "splits", [1])
    finish(second[0])
    for of_before in (before, before.replace("these files", "unknown")):
        path.write_text(of_before)
        with pytest.raises(
            ValueError, match=r"(?s)the data others.*_as_long, seed 0\. Make"
        ):
            raw_values.write(second, tmp_path / "results")
        assert path.read_text() == of_before


def test_all_studies_of_a_label_fraction_are_planned_without_label_fractions(tmp_path):
    recipe = recipes.find("scenes-labels10")
    experiment = runs.Experiment(recipe, None, tmp_path)
    planned = studies.plan(experiment, "all", [0])

    assert {run.study for run in planned} >= {"methods", "alpha", "weightings"}
    assert "label-fraction" not in {run.study for run in planned}
    assert {run.experiment.recipe.name for run in planned} == {"scenes-labels10"}


def test_a_run_of_another_recipe_is_not_written(scenes, tmp_path):
    """It was finished before the recipe changed."""
    planned = studies.plan(scenes, "splits", [0])
    finish(planned[0])
    raw_values.write(planned, tmp_path)
    changed = recipes.change(scenes.recipe, "data", smallest_crop=0.5)
    planned = studies.plan(dataclasses.replace(scenes, recipe=changed), "splits", [0])

    with pytest.raises(
        ValueError, match=r"another recipe: data\.smallest_crop changed"
    ):
        raw_values.write(planned, tmp_path)


def test_what_would_not_be_written_is_found_before_a_run_is_trained(scenes, tmp_path):
    planned = studies.plan(scenes, "splits", [0])
    for run in planned[:2]:
        finish(run)
    raw_values.check(planned, tmp_path / "none")
    (path,) = raw_values.write(planned, tmp_path)
    before = path.read_text()
    changed = recipes.change(scenes.recipe, "finetuning", epochs=7)
    changed = dataclasses.replace(scenes, recipe=changed, runs=tmp_path / "other")
    other = studies.plan(changed, "splits", [0])

    raw_values.check(planned, tmp_path)
    message = r"unknown, are: single_task_as_long, seed 0; split@conv2, seed 0\. Make"
    with pytest.raises(ValueError, match=message):
        raw_values.check(other, tmp_path)
    for run in other[:2]:
        finish(run)
    raw_values.check(other, tmp_path)  # these replace them
    begun = planned[2]
    runs.claim(begun.folder, {**begun.experiment.depends_on(begun.method, 0), "x": 1})
    with pytest.raises(ValueError, match=rf"{begun.method}/seed0 was begun with ano"):
        raw_values.check(planned, tmp_path)
    assert path.read_text() == before


def test_a_row_says_what_made_it(scenes, tmp_path):
    planned = studies.plan(scenes, "splits", [0])
    finish(planned[0])
    by = provenance.of_this_process()
    (planned[0].folder / "made_by.json").write_text(json.dumps(by))
    (path,) = raw_values.write(planned, tmp_path)
    (row, *_) = rows(path)

    assert {name: row[name] for name in by} == by
    assert f"keras={keras.__version__}" in by["versions"]
    assert platform.machine() in by["processor"]
    assert len(by["commit"].removesuffix("-dirty")) == 12


def test_what_a_method_costs_stands_beside_its_rows(scenes, tmp_path):
    def sizes(multiply_adds, of, seed=0):
        planned = studies.plan(of, "splits", [seed])
        for run, value in zip(planned, multiply_adds, strict=False):
            finish(run)
            costs = {"parameters": 7, "multiply_adds": value}
            (run.folder / "costs.json").write_text(json.dumps(costs))
        finish(planned[len(multiply_adds)])  # of a version that counted nothing
        (path,) = raw_values.write(planned, tmp_path)
        known = rows(path.with_name("sizes.csv"))
        assert all(x["parameters"] == "7" for x in known)
        return {x["method"]: x["multiply_adds"] for x in known}

    first = sizes([300, 130], scenes)
    assert first == {"single_task_as_long": "300", "split@conv2": "130"}
    other = dataclasses.replace(scenes, runs=tmp_path / "other")
    assert sizes([301], other, seed=1) == {**first, "single_task_as_long": "301"}
    (tmp_path / "scenes" / "splits.csv").unlink()
    changed = recipes.change(scenes.recipe, "finetuning", epochs=7)
    other = dataclasses.replace(other, recipe=changed, runs=tmp_path / "third")
    assert sizes([302], other) == {"single_task_as_long": "302"}


def test_values_by_class_and_alphas_are_tidy_too(scenes, tmp_path):
    (alpha,) = [
        run
        for run in studies.plan(scenes, "alpha", [0])
        if run.method == "cross_stitch"
    ]
    finish(alpha)
    # (task that takes, task that gives, channel), the tasks in sorted order
    values = np.array([[[0.75, 0.25], [0.5, 0.0]], [[0.25, 0.125], [1.0, 1.0]]])
    np.savez(alpha.folder / "alpha.npz", cross_stitch_fc7=values)
    (alpha.folder / "per_class.csv").write_text(
        "task,class,metric,value\nsegmentation,lamp,iou,12.5\n"
        "segmentation,lamp,pixels,800\n"
    )
    by_class = dataclasses.replace(alpha, study="per-class")
    alpha_path, class_path = raw_values.write([alpha, by_class], tmp_path)

    found = {(row["task"], row["metric"]): row["value"] for row in rows(alpha_path)}
    assert found["normals", "alpha/fc7/from_segmentation/max"] == "0.5"
    assert found["segmentation", "alpha/fc7/from_normals/max"] == "0.25"
    assert found["segmentation", "alpha/fc7/from_segmentation/min"] == "1.0"
    found = {row["metric"]: row["value"] for row in rows(class_path)}
    assert found == {"iou/lamp": "12.5", "pixels/lamp": "800"}


def test_what_no_run_has_is_no_file_and_no_error(scenes, tmp_path):
    """Classes where no task has any, and alphas of a method without units."""
    alphas = studies.plan(scenes, "alpha", [0], ["hard_sharing"])
    for run in alphas:
        finish(run)
    by_class = [dataclasses.replace(run, study="per-class") for run in alphas]

    assert raw_values.write([*alphas, *by_class], tmp_path) == []
    assert not list(tmp_path.glob("*/*.csv"))
    values = np.zeros((2, 2, 1))
    np.savez(alphas[0].folder / "alpha.npz", cross_stitch_fc7=values)
    (path,) = raw_values.write([*alphas, *by_class], tmp_path)
    assert {row["method"] for row in rows(path)} == {alphas[0].method}
