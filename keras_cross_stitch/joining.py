"""Calls of opened towers built into one model.

Knows nothing of taps and splits: `networks` says what is shared, and what is mixed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_cross_stitch.copying import carry_over, copy_layer, pairs
from keras_cross_stitch.opening import Call, Tower, Value
from keras_cross_stitch.shared_calls import named, weights_named


class Joined:
    """The joined model while it is built.

    Attributes:
        tensors: {task: {`Value` of the tower: the new tensor}}, as far as built.
        read: Set of `Value` that what is built has read.
        layers: {name of a new layer: what it is, in words}.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        inputs: Mapping[str, list],
        same: dict[Call, Call],
    ) -> None:
        self.towers = towers
        self.inputs = inputs
        self.same = same  # see `shared_calls.built_once`
        self.tensors: dict[str, dict[Value, Any]] = {
            task: dict(zip(tower.inputs.values(), inputs[task], strict=True))
            for task, tower in towers.items()
        }
        self.read: set[Value] = set()
        self.layers: dict[str, str] = {}
        claimed: dict[int, str] = {}
        for task, xs in inputs.items():
            for x in xs:
                if claimed.setdefault(id(x), task) == task:
                    self.claim(x.name, f"an input of the tower of '{task}'")
        self._outputs: dict[Call, list] = {}  # {call: what its copy gives}
        # {"shared" or a task: {layer: its copy}}, those within layers included.
        self._copies: dict[str, dict[Any, Any]] = {"shared": {}}
        self._copies |= {task: {} for task in towers}
        # {("shared" or a task, layer): the first call of it}
        self._called: dict[tuple[str, Any], Call] = {}

    def run(self, task: str, values: Iterable[Value]) -> list:
        """Builds what the tower's `values` need, and returns the new tensors."""
        values = list(values)
        tensors = self.tensors[task]
        for call in self.towers[task].needed_for(values, tensors):
            tensors |= zip(call.outputs, self._build(call), strict=True)
            self.read.update(call.reads)
        return [tensors[x] for x in values]

    def _build(self, call: Call) -> list:
        first = self.same.get(call, call)
        if first not in self._outputs:
            owner = "shared" if call in self.same else call.task
            tensors = self.tensors[call.task]
            args, kwargs = keras.tree.map_structure(
                lambda x: tensors[x] if isinstance(x, Value) else x,
                (call.args, call.kwargs),
            )
            copy = self._copy(call, first.layer, owner)
            with named(call):
                self._outputs[first] = keras.tree.flatten(copy(*args, **kwargs))
            # Parts of it may be called by themselves, or be parts of other layers.
            with weights_named(call):
                for part, copied in pairs(first.layer, copy):
                    self._copies[owner].setdefault(part, copied)
        return self._outputs[first]

    def _copy(self, call: Call, layer: Any, owner: str) -> Any:
        """The copy of a layer, one for all of its calls."""
        if (owner, layer) not in self._called:
            name = f"{owner}_{call.path.replace('/', '_')}"
            self.claim(name, f"layer '{call.path}' of the tower of '{call.task}'")
            self._called[owner, layer] = call
            copies = self._copies[owner]
            if layer in copies:
                copies[layer].name = name  # a part of another layer until now
            else:
                with named(call):
                    copies[layer] = copy_layer(layer, name, copies)
        return self._copies[owner][layer]

    def claim(self, name: str, what: str) -> None:
        """Takes a name for a new layer; what it is, in words, is for the error."""
        if name in self.layers:
            raise ValueError(
                f"Two layers of the joined model would be called '{name}': "
                f"{self.layers[name]}, and {what}. Give a task or a layer another name"
            )
        self.layers[name] = what

    def model(self, name: str) -> keras.Model:
        """The model, all that is missing built, with the towers' weights."""
        outputs = {}
        for task, tower in self.towers.items():
            new = self.run(task, keras.tree.flatten(tower.output))
            outputs[task] = keras.tree.pack_sequence_as(tower.output, new)
        model = keras.Model(self._input(), outputs, name=name)
        for (owner, layer), call in self._called.items():
            with weights_named(call):
                carry_over(layer, self._copies[owner][layer])
        self._check_what_is_tied()
        return model

    def _input(self) -> Any:
        flat = {x.name: x for xs in self.inputs.values() for x in xs}
        task, tower = next(iter(self.towers.items()))
        first = self.inputs[task]
        if len(flat) == 1:
            return first[0]
        if len(flat) > len(first):
            return flat
        # All towers read the same: the model takes it as the first tower does.
        return keras.tree.pack_sequence_as(tower.input_structure, first)

    def _check_what_is_tied(self) -> None:
        """Raises where weights that two layers have in common are no more so."""
        copied: dict[tuple[str, int], tuple[Any, Any]] = {}
        for owner, layer in self._called:
            copy = self._copies[owner][layer]
            old, new = getattr(layer, "weights", []), getattr(copy, "weights", [])
            for weight, own in zip(old, new, strict=True):
                key = (owner, id(weight))
                other, first = copied.setdefault(key, (own, layer))
                if other is not own:
                    raise ValueError(
                        f"Layers '{first.name}' and '{layer.name}' have the weight "
                        f"'{weight.path}' in common, and their copies would not: "
                        "a layer that others hold must be an argument of theirs that "
                        "their `get_config` has, under the attribute's name"
                    )


def new_inputs(towers: Mapping[str, Tower], shared_input: bool) -> dict[str, list]:
    """New inputs of the model: {task: list of `keras.Input`}."""
    if shared_input:
        names = _input_names(towers)
    else:
        names = {task: _input_names({task: x})[task] for task, x in towers.items()}
    layers = {
        task: dict(zip(names[task], tower.inputs, strict=True))
        for task, tower in towers.items()
    }
    if not shared_input:
        return {
            task: [
                _new_input(x, f"{task}_{name}" if len(of_task) > 1 else task)
                for name, x in of_task.items()
            ]
            for task, of_task in layers.items()
        }
    # Several inputs belong together by name; a single one may have any.
    specs = {
        task: {
            name if len(of_task) > 1 else "": _spec(x) for name, x in of_task.items()
        }
        for task, of_task in layers.items()
    }
    first = next(iter(towers))
    if any(spec != specs[first] for spec in specs.values()):
        raise ValueError(
            "Towers that share an input must take the same shape and dtype, and "
            "several inputs the same names. If they see the same picture in other "
            "sizes, put a layer in front of one, `keras.Sequential([keras.Input("
            "shape_of_the_other), keras.layers.Resizing(height, width), tower])`; if "
            "each has data of its own, `stitch(..., shared_input=False)` gives each "
            f"its own input. Received: {_in_words(layers)}"
        )
    shared = {
        key: _new_input(x, name)
        for key, (name, x) in zip(specs[first], layers[first].items(), strict=True)
    }
    return {task: [shared[key] for key in spec] for task, spec in specs.items()}


def _input_names(towers: Mapping[str, Tower]) -> dict[str, list[str]]:
    """The names of the inputs that towers have in common, those made up numbered."""
    own = {task: _own_names(tower) for task, tower in towers.items()}
    numbered = {
        task: own[task] if _by_key(tower) else _numbered(own[task])
        for task, tower in towers.items()
    }
    first = next(iter(own))
    if any(set(names) != set(own[first]) for names in own.values()):
        return numbered  # Keras counts on: what belongs together is at the same place
    new = dict(zip(own[first], numbered[first], strict=True))
    if set(new) == set(new.values()):
        return own  # "input_2" and "input_1" would change places
    return {task: [new[name] for name in names] for task, names in own.items()}


def _by_key(tower: Tower) -> bool:
    """Whether it is called with a dict, whose keys need not be the inputs' names."""
    structure = tower.input_structure
    return isinstance(structure, dict) and len(structure) == len(tower.inputs)


def _own_names(tower: Tower) -> list[str]:
    if _by_key(tower):
        return [str(key) for key in sorted(tower.input_structure)]
    return [layer.output.name for layer in tower.inputs]


def _numbered(names: list[str]) -> list[str]:
    """The names, fixed where Keras made them up: it would count them on."""
    made_up = r"(keras_tensor|input_layer|input)(_\d+)?"
    several = len(names) > 1
    return [
        (f"input_{k}" if several else "input") if re.fullmatch(made_up, name) else name
        for k, name in enumerate(names, 1)
    ]


def _in_words(layers: Mapping[str, Mapping[str, keras.layers.InputLayer]]) -> str:
    def words(layer: keras.layers.InputLayer) -> str:
        shape, dtype, *flags = _spec(layer).items()
        return " ".join([str(shape[1]), dtype[1], *(flag for flag, _ in flags)])

    return "; ".join(
        f"'{task}' takes "
        + ", ".join(f"'{name}' {words(layer)}" for name, layer in of_task.items())
        for task, of_task in layers.items()
    )


def _spec(layer: keras.layers.InputLayer) -> dict[str, Any]:
    """What an input takes, as the arguments of `keras.Input`."""
    spec = {"batch_shape": layer.batch_shape, "dtype": layer.dtype}
    flags = {
        "sparse": layer.output.sparse,
        "ragged": layer.output.ragged,
        "optional": layer.optional,
    }
    return {**spec, **{flag: True for flag, value in flags.items() if value}}


def _new_input(layer: keras.layers.InputLayer, name: str) -> Any:
    return keras.Input(name=name, **_spec(layer))
