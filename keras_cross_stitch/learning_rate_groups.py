"""A learning rate multiplier per group of variables, for any Keras optimizer."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_cross_stitch")
class LearningRateGroups(keras.optimizers.Optimizer):
    """Multiplies the learning rate of an optimizer, group by group.

    A variable's learning rate is `learning_rate * multiplier`, whatever sets the
    `learning_rate`: a schedule, a callback or an assignment. Begin where alpha's own
    learning rate is about 0.1: `alpha=10` beside `SGD(0.01)`, `alpha=100` beside
    `Adam(0.001)`.

    Gradient clipping, gradient accumulation, the moving average, loss scaling and
    `tf.distribute` work over all variables, as in `inner_optimizer`. Each attribute of
    `inner_optimizer` is an attribute of this optimizer, too.

    Weight decay (`weight_decay`, the decoupled one) follows a variable's learning
    rate, so that a multiplier of 0 freezes it. The alpha of `CrossStitch` units is
    never decayed, nor is what `exclude_from_weight_decay` names.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` that updates the variables,
            or what `keras.optimizers.get` takes for one, such as `"adam"`.
        multipliers: Dict of regular expressions, searched in `variable.path`, to
            non-negative numbers. A variable that none of them matches has
            multiplier 1.
        alpha: Non-negative number, the multiplier of the alpha of all `CrossStitch`
            units, whatever their names are. The expressions of `multipliers` are
            then searched in the other variables only. The model may also have no
            units. Defaults to `None`: alpha is a variable like the others.
        projections: The same for the weights of the projections between unequal
            maps, which `stitch(..., project=True)` makes. They start at random, beside
            towers that may be trained.
        name: String, the name of the optimizer.

    Raises:
        ValueError: If `inner_optimizer` is no optimizer, or is one that only wraps
            others; if an expression or a multiplier is invalid; or, when the optimizer
            is built, if an expression matches no trainable variable, or if two match
            the same one.

    Example:

    >>> from keras_cross_stitch import CrossStitch
    >>> units = CrossStitch(same_task=0.9)
    >>> a, b = units([keras.ops.ones((1, 1)), keras.ops.ones((1, 1))])
    >>> bias = keras.Variable(0.9, name="bias")
    >>> kernel = keras.Variable(0.9, name="kernel")
    >>> sgd = keras.optimizers.SGD(0.001)
    >>> optimizer = LearningRateGroups(sgd, {"bias": 2}, alpha=100)
    >>> variables = [units.alpha, bias, kernel]
    >>> optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
    >>> [round(float(keras.ops.convert_to_numpy(v).max()), 4) for v in variables]
    [0.8, 0.898, 0.899]

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539), which takes 100 to 1000
      times the learning rate of the network, and does not print that rate
    """

    built: bool

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict[str, Any],
        multipliers: Mapping[str, float] | None = None,
        *,
        alpha: float | None = None,
        projections: float | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(inner_optimizer, str | dict):
            inner_optimizer = keras.optimizers.get(inner_optimizer)
        # An optimizer that only wraps others has no step whose rate could change.
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer) or (
            type(inner_optimizer).update_step is keras.optimizers.Optimizer.update_step
        ):
            raise ValueError(
                "`inner_optimizer` must be a Keras optimizer that updates variables "
                "itself; wrap LearningRateGroups in a LossScaleOptimizer, not the "
                f"reverse. Received: inner_optimizer={inner_optimizer!r}"
            )
        multipliers = dict(multipliers or {})
        for pattern, multiplier in multipliers.items():
            why = _why_no_pattern(pattern)
            if why:
                raise ValueError(
                    "The keys of `multipliers` must be regular expressions, as "
                    f"strings. Received: {pattern!r} ({why})"
                )
            if not _is_multiplier(multiplier):
                raise ValueError(
                    "The values of `multipliers` must be finite numbers, 0 or more. "
                    f"Received: {multiplier!r} for {pattern!r}"
                )
        for group, value in {"alpha": alpha, "projections": projections}.items():
            if value is not None and not _is_multiplier(value):
                raise ValueError(
                    f"`{group}` must be a finite number, 0 or more. "
                    f"Received: {group}={value!r}"
                )
        super().__init__(learning_rate=0.0, name=name)
        # What every optimizer has is the inner one's: see `__getattr__`.
        for setting in super().get_config().keys() - {"name", "learning_rate"}:
            delattr(self, setting)
        self.inner_optimizer = inner_optimizer
        self.multipliers = {key: _plain(x) for key, x in multipliers.items()}
        self.alpha = _plain(alpha)
        self.projections = _plain(projections)
        # What `apply_gradients` returns.
        self._iterations = inner_optimizer._iterations

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        self._multiplier_of = self._match(variables)
        self.inner_optimizer.build(variables)
        # Not the base class's `build`, which would make a second moving average.
        self._trainable_variables = variables[:]
        self.built = True

    def _match(self, variables: list[keras.Variable]) -> dict[Any, float]:
        """The multiplier of each variable, by the variable's key."""
        multiplier_of: dict[Any, float] = {}
        others = []
        for variable in variables:
            multiplier = self._multiplier_in_units(variable)
            if multiplier is None:
                others.append(variable)
            else:
                multiplier_of[self._var_key(variable)] = multiplier
        paths = [variable.path for variable in others]
        for pattern in self.multipliers:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    "Each pattern of `multipliers` must match a trainable variable: "
                    "correct it, leave it out, or unfreeze what it names. "
                    f"Received: {pattern!r}, which matches none of {paths}"
                )
        for variable in others:
            matches = [p for p in self.multipliers if re.search(p, variable.path)]
            if len(matches) > 1:
                raise ValueError(
                    "A variable must match one pattern of `multipliers` at most: make "
                    f"them narrower. Received: {matches}, which all match "
                    f"{variable.path!r} (of {paths})"
                )
            multiplier_of[self._var_key(variable)] = (
                self.multipliers[matches[0]] if matches else 1
            )
        return multiplier_of

    def _multiplier_in_units(self, variable: keras.Variable) -> float | None:
        """That of `alpha` or `projections`; None where the patterns are searched."""
        if _is_alpha_of_unit(variable):
            return self.alpha
        if getattr(variable, "is_cross_stitch_projection", False):
            return self.projections
        return None

    def _update_at_own_rate(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        # By key: under `tf.distribute` a replica's variable has no path.
        key = self._var_key(variable)
        if not self._multiplier_of[key]:
            return  # frozen; Ftrl would divide by the rate
        rate = learning_rate * self._multiplier_of[key]
        inner = self.inner_optimizer
        if decay := self._decay_of[key]:
            # w <- (1 - rate * decay) * w, before the step, as Keras decays.
            inner.assign_sub(
                variable, variable * ops.cast(rate * decay, variable.dtype)
            )
        # The class's `update_step`: the instance's is this.
        type(inner).update_step(inner, gradient, variable, rate)

    def apply(
        self,
        grads: list[Any],
        trainable_variables: Iterable[keras.Variable] | None = None,
    ) -> None:
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        if not self.built:
            self.build(trainable_variables or [])
        # Now, since what is decayed, and how much, may have changed since the build.
        self._decay_of = {
            self._var_key(v): _weight_decay(self.inner_optimizer, v)
            for v in self._trainable_variables
        }
        with self._in_charge():
            self.inner_optimizer.apply(grads, trainable_variables)

    @contextlib.contextmanager
    def _in_charge(self) -> Iterator[None]:
        """The inner optimizer's `apply` calls these; used by itself, it has its own."""
        inner = self.inner_optimizer
        methods: dict[str, Callable[..., Any]] = {
            "update_step": self._update_at_own_rate,
            "_apply_weight_decay": lambda variables: None,  # each update decays
        }
        if hasattr(inner, "_parallel_update_step"):
            # PyTorch's variant never calls `update_step`; the class it varies does.
            keras_class = getattr(keras.optimizers, type(inner).__name__)
            methods["_backend_update_step"] = functools.partial(
                keras_class._backend_update_step, inner
            )
        vars(inner).update(methods)
        try:
            yield
        finally:
            for name in methods:
                vars(inner).pop(name, None)  # replicas, which are threads, all do it

    # All that follows belongs to the inner optimizer.

    def __getattr__(self, name: str) -> Any:
        if name == "inner_optimizer":  # before the constructor has set it
            raise AttributeError(name)
        return getattr(self.inner_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = vars(self).get("inner_optimizer")
        own = inner is None or name in vars(self) or hasattr(type(self), name)
        if own or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    @property
    def variables(self) -> list[keras.Variable]:
        return self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def exclude_from_weight_decay(
        self,
        var_list: list[keras.Variable] | None = None,
        var_names: list[str] | None = None,
    ) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def set_weights(self, weights: list[Any]) -> None:
        self.inner_optimizer.set_weights(weights)

    # Keras saves the inner optimizer by itself, as an attribute of this one.

    def save_own_variables(self, store: Any) -> None:
        pass

    def load_own_variables(self, store: Any) -> None:
        pass

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inner_optimizer": keras.optimizers.serialize(self.inner_optimizer),
            "multipliers": dict(self.multipliers),
            "alpha": self.alpha,
            "projections": self.projections,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "LearningRateGroups":
        inner_optimizer = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "inner_optimizer": inner_optimizer})


def _why_no_pattern(pattern: Any) -> str | None:
    if not isinstance(pattern, str):
        return f"a {type(pattern).__name__}"
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _is_multiplier(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _plain(value: Any) -> Any:
    """A number as Python's, which a config can hold."""
    return value.item() if hasattr(value, "item") else value


def _is_alpha_of_unit(variable: Any) -> bool:
    return getattr(variable, "is_cross_stitch_alpha", False)


def _weight_decay(optimizer: keras.optimizers.Optimizer, variable: Any) -> float | None:
    """The optimizer's weight decay of a variable; a unit's alpha has none."""
    if _is_alpha_of_unit(variable) or not optimizer._use_weight_decay(variable):
        return None
    # Muon has another decay for the variables that it leaves to AdamW.
    if isinstance(optimizer, keras.optimizers.Muon) and optimizer._should_use_adamw(
        variable
    ):
        return optimizer.adam_weight_decay
    return optimizer.weight_decay
