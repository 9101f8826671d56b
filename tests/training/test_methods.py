import dataclasses
import sys
import types

import pytest

from training import methods, recipes


@pytest.fixture
def scenes():
    return recipes.find("scenes")


def test_options_change_the_units_of_the_recipe(scenes):
    planned = methods.plan("cross_stitch@same_task=0.5,per=layer", scenes)

    assert planned.recipe.units == dataclasses.replace(
        scenes.units, same_task=0.5, per="layer"
    )
    assert planned.recipe.tower == scenes.tower
    assert planned.schedule == scenes.finetuning


def test_a_method_from_the_start_can_have_other_towers(scenes):
    spelled = "cross_stitch_from_start@common_start=false"
    planned = methods.plan(spelled, scenes)

    assert planned.recipe.tower.common_start is False
    assert planned.schedule == recipes.Schedule(20, 0.05)


def test_what_is_spelled_is_what_is_planned(scenes):
    name = "cross_stitch_from_start"
    spelled = methods.spell(name, scenes, alpha_multiplier=1000, common_start=False)

    assert spelled == f"{name}@alpha_multiplier=1000,common_start=false"
    planned = methods.plan(spelled, scenes).recipe
    assert planned.units.alpha_multiplier == 1000
    assert planned.tower.common_start is False
    taps = methods.plan("cross_stitch@at=pool1+pool5,per=layer", scenes).recipe.units
    assert (taps.at, taps.per) == (("pool1", "pool5"), "layer")
    weighed = methods.plan("hard_sharing@loss_weights=1+0.5", scenes).recipe.training
    assert weighed.loss_weights == (1.0, 0.5)
    rates = methods.plan("cross_stitch@learning_rate_multipliers=1+3", scenes).recipe
    assert rates.training.learning_rate_multipliers == (1.0, 3.0)
    for spelled in ("single_task", "cross_stitch", "cross_stitch_from_start"):
        assert methods.plan(f"{spelled}@epochs=9", scenes).schedule.epochs == 9
    split = methods.plan("split@conv4,epochs=9,learning_rate=0.5", scenes)
    assert (split.layer, split.schedule) == ("conv4", recipes.Schedule(9, 0.5))
    assert split.depends_on["layer"] == "conv4"
    # The recipe's own value is no other method.
    assert methods.spell("cross_stitch", scenes, same_task=0.9) == "cross_stitch"


@pytest.mark.parametrize(
    ("recipe", "options", "text"),
    [
        ("scenes", {"loss_weighting": "uncertainty"}, "loss_weighting=uncertainty"),
        ("scenes", {"at": ("pool1", "pool5")}, "at=pool1+pool5"),
        ("scenes", {"loss_weights": (1.0, 0.5)}, "loss_weights=1.0+0.5"),
        ("scenes", {"learning_rate": 1e-5}, "learning_rate=1e-05"),
        ("scenes", {"epochs": 7}, "epochs=7"),
        ("scenes", {"common_start": False}, "common_start=false"),
        ("nyuv2_pretrained", {"frozen_to": "block3"}, "frozen_to=block3"),
        ("nyuv2_pretrained", {"frozen_to": "7"}, 'frozen_to="7"'),
        ("nyuv2_pretrained", {"frozen_to": "null"}, 'frozen_to="null"'),
    ],
)
def test_what_is_spelled_is_as_one_types_it_and_read_back(recipe, options, text):
    recipe = recipes.find(recipe)
    spelled = methods.spell("cross_stitch_from_start", recipe, **options)
    (name, value) = next(iter(options.items()))
    plan = methods.plan(spelled, recipe)
    parts = (plan.recipe.units, plan.recipe.tower, plan.recipe.training, plan.schedule)

    assert spelled == f"cross_stitch_from_start@{text}"
    assert value in [getattr(part, name, None) for part in parts]


def test_a_recipe_whose_sizes_do_not_fit_is_refused_where_it_is_read(
    scenes, monkeypatch
):
    def find(image, target, toy=False):
        changed = recipes.change(scenes, "data", image_size=image, target_size=target)
        monkeypatch.setattr("training.recipes.scenes.RECIPE", changed)
        return recipes.find("scenes", toy=toy).data.target_size

    assert find((256, 320), (128, 160)) == (128, 160)
    assert find((192, 256), (96, 128), toy=True) == (48, 64)
    for image, target in (
        ((256, 320), (120, 160)),  # enlarged by 15
        ((256, 320), (128, 80)),  # by two factors
        ((192, 256), (75, 100)),
    ):
        shown = "x".join(map(str, target))
        with pytest.raises(ValueError, match=rf"one factor .* target_size={shown}"):
            find(image, target)
    with pytest.raises(ValueError, match=r"halves its target_size.* 75x100"):
        find((150, 200), (75, 100), toy=True)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "data",
            {"label_fraction": ("depth", 1.0)},
            r"of the recipe 'scenes' .* tasks, segmentation, normals\. Rec.*: 'depth'",
        ),
        ("single_task", {"epochs": 0}, r"single_task in .* 'scenes'.* epochs=0"),
        (
            "training",
            {"loss_weights": (1.0, 2.0, 3.0)},
            r"loss_weights of .* a number for each of segmentation, normals\. .*3\.0",
        ),
        ("finetuning", {"epochs": 0}, r"finetuning in .* 'scenes'.* epochs=0"),
    ],
)
def test_a_recipe_that_would_fail_late_is_refused_where_it_is_read(
    scenes, monkeypatch, part, values, message
):
    changed = recipes.change(scenes, part, **values)
    monkeypatch.setattr("training.recipes.scenes.RECIPE", changed)

    for name in ("scenes", "scenes-labels10"):
        with pytest.raises(ValueError, match=message):
            recipes.find(name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("rooms", "scenes"),  # a copy, its name forgotten
        ("my-rooms", "my-rooms"),  # data would be those of `my`
    ],
)
def test_a_recipe_that_would_be_filed_under_another_is_refused(
    scenes, monkeypatch, file, name
):
    module = types.SimpleNamespace(RECIPE=dataclasses.replace(scenes, name=name))
    monkeypatch.setitem(sys.modules, f"training.recipes.{file}", module)
    monkeypatch.setattr(recipes, "names", lambda: ["scenes", file])

    with pytest.raises(ValueError, match=rf"recipes/{file}\.py must .* name='{name}'"):
        recipes.find(f"{file}-labels10")


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("stich", "There is no method 'stich'. There are: single_task, "),
        ("split", "as in 'split@conv4'. Received: 'split'"),
        ("split@", "as in 'split@conv4'"),
        ("split@epochs=3", "needs the first layer .* as in 'split@conv4'"),
        ("split@conv4,rate=3", "no option 'rate' in 'split@conv4,rate=3'"),
        ("split@conv4,", "no option ''"),
        ("hard_sharing@learning_rate=-0.01", "rate above 0 in .* Received: '-0.01'"),
        ("single_task@learning_rate=0", "learning rate above 0"),
        ("cross_stitch@learning_rate=1e400", "finite learning_rate .*: '1e400'"),
        ("cross_stitch_from_start@weights=3", "no option 'weights'"),
        ("cross_stitch@rate=3", "no option 'rate' in .* There are: at, per, same_task"),
        ("cross_stitch@width=0.5", "no option 'width'"),  # has its towers already
        ("single_task_longer@same_task=0.5", "no option 'same_task'"),
        ("nddr@per=layer", "no option 'per' in .* There are: at, same_task"),
        ("cross_stitch@same_task=much", "like 0.9 in .* Received: 'much'"),
        ("cross_stitch@same_task=NaN", "finite same_task in .* Received: 'NaN'"),
        ("nddr@alpha_multiplier=Infinity", "finite alpha_multiplier"),
        ("cross_stitch@same_task=", "like 0.9 in .* Received: ''"),
        ("cross_stitch@", "no option ''"),
        ("ensemble@loss_weighting=uncertainty", "no option 'loss_weighting'"),
        ("hard_sharing@loss_weighting=often", "uncertainty, dynamic_average .*'often'"),
        ("hard_sharing@loss_weights=1", "each of segmentation, normals .*=1.1. .*'1'"),
        ("hard_sharing@loss_weights=1+-2", "a positive number .* Received: '1.-2'"),
        ("single_task@loss_weights=1+nan", "a positive number"),
        (
            "nddr@learning_rate_multipliers=0+1",
            "learning_rate_multipliers=1.1. .*'0.1'",
        ),
        ("single_task@epochs=0", "whole number of epochs .* Received: '0'"),
        ("hard_sharing@epochs=2.5", "whole number of epochs .* Received: '2.5'"),
        ("hard_sharing@gradients=sum", "pcgrad as the gradients .*: 'sum'"),
        (
            "hard_sharing@loss_weighting=uncertainty,loss_weights=1+2",
            "by uncertainty: leave loss_weights",
        ),
    ],
)
def test_a_method_that_there_is_not_is_refused(scenes, spelled, message):
    with pytest.raises(ValueError, match=message):
        methods.plan(spelled, scenes)


def test_the_pixels_of_a_saved_backbone_are_no_option_of_a_method():
    recipe = recipes.find("nyuv2_pretrained")
    recipe = recipes.change(recipe, "tower", pixel_range=(-1.0, 1.0))
    with pytest.raises(ValueError, match=r"no option 'pixel_range' .* There are: at,"):
        methods.plan("cross_stitch_from_start@pixel_range=-1+1", recipe)


@pytest.mark.parametrize("name", ["nyuv2", "nyuv2_pretrained", "scenes"])
def test_every_recipe_has_a_toy_size_and_label_fractions(name):
    recipe = recipes.find(name)
    toy = recipes.find(f"{name}-labels25", toy=True)

    assert recipe.name == name
    assert recipe.training.dtype == "float32"
    assert toy.name == f"{name}-toy-labels25"
    assert toy.data.label_fraction == ("segmentation", 0.25)
    assert toy.data.config == "toy"
    assert recipe.best_split in recipe.splits


@pytest.mark.parametrize("toy", [False, True])
def test_a_recipe_has_one_name_whichever_way_it_is_made(toy):
    tasks = ["segmentation", "normals", "depth"]
    recipe = recipes.find("nyuv2", toy)
    found = {
        recipes.with_tasks(recipes.find("nyuv2-labels10", toy), tasks),
        recipes.with_tasks(recipes.find("nyuv2-labels010", toy), tasks),
        recipes.with_labels(recipes.with_tasks(recipe, tasks), 10),
    }

    (one,) = found
    size = "-toy" if toy else ""
    assert one.name == f"nyuv2{size}-labels10-segmentation+normals+depth"
    assert recipes.whatever_labels(one.name) == f"nyuv2{size}-{'+'.join(tasks)}"


@pytest.mark.parametrize("name", ["scenes_detection", "voc2008", "voc2008_alexnet"])
def test_every_recipe_of_regions_has_a_toy_size_and_no_label_fraction(name):
    recipe, toy = recipes.find(name), recipes.find(name, toy=True)

    assert toy.data.config == "toy"
    assert toy.data.image_size[0] == recipe.data.image_size[0] // 2
    assert toy.single_task.epochs == 2
    assert recipe.best_split in recipe.splits
    with pytest.raises(ValueError, match=f"'{name}' has no label fraction"):
        recipes.find(f"{name}-labels10")


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize(
    "name", ["scenes-labels", "scenes-labels0", "scenes-labels1e1"]
)
def test_a_label_fraction_that_is_none_is_refused(name, toy):
    message = r"a whole number of per cent, from 1 to 99, as in 'scenes-labels10'\."
    with pytest.raises(ValueError, match=message):
        recipes.find(name, toy)


def test_a_recipe_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"no recipe 'kitti'\. There are: .*scenes"):
        recipes.find("kitti-labels10")


def test_an_unknown_key_of_a_recipe_raises(scenes):
    with pytest.raises(TypeError, match="dropuot"):
        recipes.change(scenes, "tower", dropuot=0.5)
