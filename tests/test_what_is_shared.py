"""sharing: parts by hand, and the case that alpha alone gets wrong."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cross_stitch import LearningRateGroups, sharing, stitch

random = np.random.default_rng(0)


def tower(hidden=32, depth=1, inputs=8):
    x = keras.Input((inputs,), name="x")
    y = x
    for k in range(depth):
        y = keras.layers.Dense(hidden, activation="relu", name=f"h{k + 1}")(y)
    return keras.Model(x, keras.layers.Dense(1, name="out")(y))


def small(**unit):
    model = stitch({"b": tower(3), "a": tower(3)}, at=["h1"], **unit)
    model.compile("sgd", {"a": "mse", "b": "mse"})
    x = random.normal(size=(20, 8)).astype("float32")
    return model, (x, {"a": random.normal(size=(20, 1)), "b": x[:, :1]})


def maps_of(model, x):
    """What goes into the unit, in NumPy, in the order of its tasks: (T, N, C)."""
    return np.stack(
        [
            np.maximum(x @ kernel + bias, 0)
            for kernel, bias in (
                model.get_layer(f"{task}_h1").get_weights() for task in "ab"
            )
        ]
    )


@pytest.mark.parametrize("per", ["channel", "layer"])
def test_parts_weigh_alpha_by_the_spread_of_the_maps(per):
    model, (x, y) = small(per=per, same_task=0.8)
    unit = model.get_layer("cross_stitch_h1")
    alpha = random.normal(size=unit.alpha.shape)
    unit.alpha.assign(alpha)
    rows = sharing(model, (x, y))

    spread = maps_of(model, x).std(axis=1)
    by_channel = alpha if per == "channel" else alpha[..., None]
    for row, i in zip(rows, (0, 1), strict=True):
        assert (row["unit"], row["task"]) == ("cross_stitch_h1", "ab"[i])
        own = (abs(by_channel[i, i]) * spread[i]).sum()
        other = (abs(by_channel[i, 1 - i]) * spread[1 - i]).sum()
        assert row["part"] == pytest.approx(other / (own + other), rel=1e-4)
        own, other = 0.8 * spread[i].sum(), 0.2 * spread[1 - i].sum()
        assert row["part_at_start"] == pytest.approx(other / (own + other), rel=1e-4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("tasks", ["ab", "cab", "edcba"])
def test_parts_of_maps_weigh_alpha_by_the_spread_over_all_positions(tasks, data_format):
    def of_task():
        x = keras.Input((8,), name="x")
        y = keras.layers.Dense(60, activation="relu", name="hidden")(x)
        y = keras.layers.Reshape((3, 5, 4), name="map")(y)
        y = keras.layers.Flatten()(y)
        return keras.Model(x, keras.layers.Dense(1, name="out")(y))

    model = stitch({t: of_task() for t in tasks}, ["map"], data_format=data_format)
    model.compile("sgd", dict.fromkeys(tasks, "mse"))
    unit = model.get_layer("cross_stitch_map")
    alpha = random.normal(size=unit.alpha.shape)
    unit.alpha.assign(alpha)
    x = random.normal(size=(19, 8)).astype("float32")
    y = {task: random.normal(size=(19, 1)) for task in tasks}
    rows = {(r["task"], r["source"]): r for r in sharing(model, (x, y), batch_size=7)}

    def spread(task):
        kernel, bias = model.get_layer(f"{task}_hidden").get_weights()
        maps = np.maximum(x @ kernel + bias, 0).reshape(19, 3, 5, 4)
        channel = 1 if data_format == "channels_first" else 3
        return maps.std(axis=tuple({0, 1, 2, 3} - {channel}))

    for i, task in enumerate(unit.tasks):
        taken = [
            (abs(alpha[i, j]) * spread(of)).sum() for j, of in enumerate(unit.tasks)
        ]
        for j, source in enumerate(unit.tasks):
            if i != j:
                part = taken[j] / sum(taken)
                assert rows[task, source]["part"] == pytest.approx(part, rel=1e-4)


def test_projected_maps_of_unknown_sizes_are_measured():
    def of_task(filters, step):
        image = keras.Input((None, None, 3), name="image")
        y = keras.layers.Conv2D(filters, 3, strides=step, name="conv")(image)
        y = keras.layers.GlobalAveragePooling2D()(y)
        return keras.Model(image, keras.layers.Dense(1, name="out")(y))

    towers = {"a": of_task(4, 1), "b": of_task(6, 2)}
    model = stitch(towers, ["conv"], project=True, same_task=0.7)
    model.compile("sgd", {"a": "mse", "b": "mse"})
    x = random.normal(size=(5, 9, 11, 3)).astype("float32")
    rows = sharing(model, (x, {"a": np.ones((5, 1)), "b": np.ones((5, 1))}))
    assert all(0 < row["part"] < 1 for row in rows)


def test_one_pass_measures_the_maps_of_all_units(monkeypatch):
    model = stitch({"a": tower(depth=3), "b": tower(depth=3)}, at=["h1", "h2", "h3"])
    model.compile("sgd", {"a": "mse", "b": "mse"})
    passes = []
    predict = keras.Model.predict

    def counted(self, *arguments, **options):
        passes.append(predict(self, *arguments, **options))
        return passes[-1]

    monkeypatch.setattr(keras.Model, "predict", counted)
    sharing(model, (np.ones((20, 8)), {"a": np.ones((20, 1)), "b": np.ones((20, 1))}))
    (found,) = passes
    # Sums, no maps, which may be as large as the data.
    assert {x.shape for x in keras.tree.flatten(found)} == {(20, 2, 32)}


@pytest.mark.parametrize("channels", [(3, 5), (4, 2, 7)])
def test_parts_of_projected_maps_are_of_what_is_projected(channels):
    tasks = "abc"[: len(channels)]
    towers = {task: tower(c) for task, c in zip(tasks, channels, strict=True)}
    x = random.normal(size=(20, 8)).astype("float32")
    y = {task: random.normal(size=(20, 1)) for task in tasks}
    model = stitch(towers, at=["h1"], project=True, same_task=0.7)
    model.compile("sgd", dict.fromkeys(tasks, "mse"))
    unit = model.get_layer("cross_stitch_h1")
    alpha = random.normal(size=unit.alpha.shape)
    unit.alpha.assign(alpha)

    rows = {(row["task"], row["source"]): row for row in sharing(model, (x, y))}

    def spread(task, source):
        kernel, bias = model.get_layer(f"{source}_h1").get_weights()
        given = np.maximum(x @ kernel + bias, 0)
        if task != source:  # what projects vectors is a Dense layer
            kernel, bias = unit.projections[f"{task}_from_{source}"].get_weights()
            given = given @ kernel + bias
        return given.std(axis=0).sum()

    for i, task in enumerate(tasks):
        taken = [abs(alpha[i, j]) * spread(task, of) for j, of in enumerate(tasks)]
        for j, source in enumerate(tasks):
            if i != j:
                part = rows[task, source]["part"]
                assert part == pytest.approx(taken[j] / sum(taken), rel=1e-4)


@pytest.mark.parametrize("ends", [(10, 20), (7, 14, 20), (9, 12, 17, 20)])
def test_every_example_counts_once_whatever_the_batches(ends):
    model, (x, y) = small()
    y["a"][-1] += 9  # in a last batch that may be small
    weight = {task: random.uniform(size=20) for task in y}
    whole = sharing(model, (x, y, weight))
    starts = (0, *ends[:-1])

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(ends)

        def __getitem__(self, k):
            part = slice(starts[k], ends[k])
            return x[part], *({t: v[part] for t, v in z.items()} for z in (y, weight))

    dataset = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(ends[0])
    rows = [sharing(model, batches) for batches in (Batches(), dataset)]
    rows.append(sharing(model, (x, y, weight), batch_size=ends[0]))
    for of_batches in rows:
        for row, expected in zip(of_batches, whole, strict=True):
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_without_is_the_growth_of_the_loss_and_alpha_is_as_before():
    model, (x, y) = small()
    alpha = model.get_layer("cross_stitch_h1").alpha
    before = keras.ops.convert_to_numpy(alpha)
    rows = sharing(model, (x, y), batch_size=10)
    np.testing.assert_array_equal(alpha, before)

    maps = maps_of(model, x)

    def loss(i, alpha):
        kernel, bias = model.get_layer(f"{'ab'[i]}_out").get_weights()
        mixed = alpha[i, 0] * maps[0] + alpha[i, 1] * maps[1]
        return ((mixed @ kernel + bias - y["ab"[i]]) ** 2).mean()

    def growth(i, j):
        cut = before.copy()
        cut[i, j] = 0
        return loss(i, cut) / loss(i, before) - 1

    for row, i in zip(rows, (0, 1), strict=True):
        without = growth(i, 1 - i)
        assert row["without"] == pytest.approx(without, rel=1e-3, abs=1e-5)
        shared = max(0, min(without, growth(1 - i, 1 - i)))
        assert row["shared"] == pytest.approx(shared, rel=1e-3, abs=1e-5)


def below(bound):
    return lambda t, p: keras.losses.mean_squared_error(t, p) - bound


def test_a_loss_below_0_grows_upwards():
    model, data = small()
    grown = []
    for bound in (0.0, 50.0):
        loss = below(bound)
        model.compile("sgd", {"a": loss, "b": loss})
        logs = model.evaluate(*data, verbose=0, return_dict=True)
        rows = sharing(model, data)
        grown.append([x["without"] * abs(logs[f"{x['task']}_loss"]) for x in rows])
    assert np.abs(grown).max() > 1e-3
    np.testing.assert_allclose(*grown, rtol=1e-2, atol=1e-4)


def problem(n, seed):
    """Tasks a and b of one function, and labels that are noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 8)).astype("float32")
    f = np.sin(2 * x[:, :1]) * x[:, 1:2] + x[:, 2:3] * x[:, 3:4]
    a, b = (f + 0.1 * random.normal(size=f.shape) for _ in "ab")
    return x, {"a": a, "b": b, "noise": random.normal(size=f.shape)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_tasks_of_one_function_share_more_than_either_with_noise(seed):
    keras.utils.set_random_seed(seed)
    tasks = ["a", "b", "noise"]
    model = stitch({task: tower(depth=2) for task in tasks}, at=["h1", "h2"])
    model.compile(
        LearningRateGroups(keras.optimizers.Adam(3e-3), alpha=10),
        dict.fromkeys(tasks, "mse"),
    )
    model.fit(*problem(400, seed), epochs=40, batch_size=50, verbose=0)
    rows = sharing(model, problem(400, seed + 100), batch_size=400)

    for unit in ("cross_stitch_h1", "cross_stitch_h2"):
        of_pair = dict.fromkeys([("a", "b"), ("a", "noise"), ("b", "noise")], 0.0)
        for row in rows:
            if row["unit"] == unit:
                of_pair[tuple(sorted([row["task"], row["source"]]))] += row["shared"]
        assert max(of_pair, key=of_pair.get) == ("a", "b"), of_pair


def test_the_losses_of_a_task_with_several_outputs_are_summed():
    """By how much the sum grows is by how much the mean over both grows."""
    x = keras.Input((8,), name="x")
    hidden = keras.layers.Dense(3, activation="relu", name="h1")(x)
    two = {name: keras.layers.Dense(1)(hidden) for name in ("mean", "scale")}
    together = keras.layers.Concatenate()([two["mean"], two["scale"]])
    other, data, labels = tower(3), random.normal(size=(20, 8)), {}
    for name in ("b", "mean", "scale"):
        labels[name] = random.normal(size=(20, 1))
    alpha, found = random.normal(size=(2, 2, 3)), []
    for output, loss, label in (
        (two, {"mean": "mse", "scale": "mse"}, {k: labels[k] for k in two}),
        (together, "mse", np.hstack([labels[k] for k in two])),
    ):
        model = stitch({"b": other, "a": keras.Model(x, output)}, at=["h1"])
        model.get_layer("cross_stitch_h1").alpha.assign(alpha)
        model.compile("sgd", {"a": loss, "b": "mse"})
        found.append(sharing(model, (data, {"a": label, "b": labels["b"]})))

    for one, whole in zip(*found, strict=True):
        for key in ("without", "shared"):
            assert one[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-5)
    assert abs(found[0][0]["without"]) > 1e-3


def test_models_that_cannot_be_measured_are_refused():
    model, data = small()
    with pytest.raises(ValueError, match="no CrossStitch layer"):
        sharing(tower(), data)
    with pytest.raises(ValueError, match="compile the model first"):
        sharing(stitch({"a": tower(), "b": tower()}, at=["h1"]), data)
    for wrong, kind in (
        (list(data), "list"),
        (data[0], "ndarray"),
        (data[1], "dict"),
        (data[:1], "tuple of 1"),
    ):
        with pytest.raises(ValueError, match=f"must be a tuple .* Received: {kind}"):
            sharing(model, wrong)
    with pytest.raises(TypeError, match="2 positional arguments"):
        sharing(model, *data)  # as `evaluate` takes them
    model.compile("sgd", {"a": "mse"})
    with pytest.raises(ValueError, match=r"a loss of its own .* Received none for "):
        sharing(model, data)
