"""What happens between a run's epochs: backup, history, progress."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.progress import Progress

from training import files
from training.preemption import Preempted

Logs = dict[str, Any] | None


class Backup(keras.callbacks.Callback):
    """Keeps the run's state at the end of each epoch, in one file, never half of one.

    A run that is restored is the run that it continues: `BackupAndRestore` keeps the
    epoch in a second file, and dropout's random state not at all. Here the epoch is
    told from the optimizer's steps, and each epoch has its own random state. After
    `stop` the state is kept at the end of the step, with what the epoch has so far.

    Args:
        path: The file, `*.npz`. HDF5, when it cannot write for want of space, ends the
            process with a segmentation fault when that closes its files.
        steps: Steps of an epoch.
        seed: Seed of the run.
        writes: Whether this worker writes the file.
    """

    def __init__(self, path: Path, steps: int, seed: int, writes: bool = True) -> None:
        super().__init__()
        self.path = path
        self.steps = steps
        self.seed = seed
        self.writes = writes
        self.in_epoch: list[np.ndarray] = []
        self.must_stop = False

    def restore(self, model: keras.Model) -> int:
        """Loads the last backup, if any, and returns the step to go on with."""
        model.optimizer.build(model.trainable_variables)
        if self.path.exists():
            with np.load(self.path) as file:
                kept = [file[f"arr_{index}"] for index in range(len(file))]
            state = _state(model)
            for variable, value in zip(state, kept, strict=False):
                variable.assign(value)
            self.in_epoch = kept[len(state) :]
        return int(keras.ops.convert_to_numpy(model.optimizer.iterations))

    def stop(self) -> None:
        """Asks for a last backup, and then a `Preempted`."""
        self.must_stop = True

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        states = self._random_states()
        for index, state in enumerate(states):
            rng = np.random.default_rng([self.seed, 4, epoch, index])
            state.assign([rng.integers(2**31), 0])
        if self.in_epoch:
            variables = states + self.model.metrics_variables
            for variable, value in zip(variables, self.in_epoch, strict=True):
                variable.assign(value)
        self.in_epoch = []

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        # The last step of an epoch is kept with the epoch.
        if self.must_stop and self._step() % self.steps:
            self._save(self._random_states() + self.model.metrics_variables)
            self.end_if_asked()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._save()
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """Raises the `Preempted`; what is done must be kept already."""
        if self.must_stop:
            step = self._step()
            raise Preempted(f"Stopped, as asked, after step {step}, which is kept")

    def _step(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _random_states(self) -> list[keras.Variable]:
        return [x for x in self.model.variables if x.name == "seed_generator_state"]

    def _save(self, in_epoch: Sequence[keras.Variable] = ()) -> None:
        if self.writes:
            kept = [*_state(self.model), *in_epoch]
            with files.unfinished(self.path) as temporary:
                np.savez(temporary, *map(keras.ops.convert_to_numpy, kept))


def _state(model: keras.Model) -> list[keras.Variable]:
    """What training goes on from."""
    return [*model.variables, *model.optimizer.variables]


class History(keras.callbacks.Callback):
    """Writes the logs of each epoch, and its seconds, as a row of a CSV file.

    The rows of epochs that come again, since the run was stopped before their
    backup, are replaced. Of an epoch that was stopped within, and went on, the seconds
    are those since it went on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        if not self.rows and epoch:
            self.rows = [*files.read_csv(self.path)[:epoch]]
        self.began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        seconds = round(time.monotonic() - self.began, 1)
        self.rows.append({"epoch": epoch, **(logs or {}), "seconds": seconds})
        body = [tuple(row.values()) for row in self.rows]
        files.write_csv(self.path, self.rows[-1], body)


class StopAtNaN(keras.callbacks.Callback):
    """Ends a diverging run at once, before its state is backed up."""

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if logs and not np.isfinite(logs["loss"]):
            self._stop(f"The loss became {logs['loss']} at step {batch} of the epoch")

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        # No loss has seen the last step's update.
        if self._bad():
            self._stop(f"The last step of epoch {epoch} was too large")

    def _bad(self) -> list[keras.Variable]:
        """The variables that are not finite."""
        return [
            variable
            for variable in self.model.trainable_variables
            if not np.isfinite(keras.ops.convert_to_numpy(variable)).all()
        ]

    def _stop(self, what: str) -> None:
        first = next(map(self._named, self._bad()), "none yet")
        raise FloatingPointError(
            f"{what}: a learning rate is too high. The first variable that is not "
            f"finite: {first}. The last epoch's backup is kept"
        )

    def _named(self, variable: keras.Variable) -> str:
        """A variable's path, and the group that its learning rate is of."""
        optimizer = self.model.optimizer
        groups = getattr(optimizer, "multipliers", {})
        if getattr(variable, "is_cross_stitch_alpha", False):
            groups = {"alpha": getattr(optimizer, "alpha", 1)}
        for group, factor in groups.items():
            if re.search(group, variable.path):
                rate = f"learning rate x{factor}"
                return f"{variable.path} (of the group '{group}', {rate})"
        return f"{variable.path} (of no group, learning rate x1)"


class ShowProgress(keras.callbacks.Callback):
    """Shows the run on a rich progress bar, with the time that is left."""

    def __init__(
        self, bar: Progress, description: str, epochs: int, steps: int, done: int
    ) -> None:
        super().__init__()
        self.bar = bar
        self.description = description
        self.epochs = epochs
        self.line = bar.add_task(description, total=epochs * steps, completed=done)
        if done:
            bar.console.print(f"{description}: goes on after step {done}")

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.bar.advance(self.line)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        losses = ", ".join(
            f"{key} {value:.3f}"
            for key, value in (logs or {}).items()
            if key.endswith("loss")
        )
        text = f"{self.description}, epoch {epoch + 1}/{self.epochs}"
        if self.bar.console.is_terminal:
            self.bar.update(self.line, description=f"{text}: {losses}")
        else:
            self.bar.console.print(f"{text}: {losses}")
