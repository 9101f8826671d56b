"""What happens between a run's epochs: backup, history, progress."""

import contextlib
import csv
import os
import re
import signal
import time

import h5py
import keras
import numpy as np


class Preempted(Exception):
    """The program was asked to end (SIGTERM): what is begun can go on later."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextlib.contextmanager
def at_sigterm(call):
    """Calls a function of no arguments when SIGTERM comes, until the block ends."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Backup(keras.callbacks.Callback):
    """Keeps the run's state at the end of each epoch, in one file, never half of one.

    A run that is restored is the run that it continues: `BackupAndRestore` keeps the
    epoch in a second file, and dropout's random state not at all. Here the epoch is
    told from the optimizer's steps, and each epoch has its own random state. After
    `stop` the state is kept at the end of the step, with what the epoch has so far.

    Args:
        path: Path of the file, `*.weights.h5`.
        steps: Integer, steps of an epoch.
        seed: Integer.
        writes: Boolean, whether this worker writes the file.
    """

    def __init__(self, path, steps, seed, writes=True):
        super().__init__()
        self.path = path
        self.steps = steps
        self.seed = seed
        self.writes = writes
        self.in_epoch = None
        self.must_stop = False

    def restore(self, model):
        """Loads the last backup, if any, and returns the step to go on with."""
        model.optimizer.build(model.trainable_variables)
        if self.path.exists():
            model.load_weights(self.path)
            with h5py.File(self.path) as file:
                self.in_epoch = [x[()] for x in file.get("in_epoch", {}).values()]
        return int(keras.ops.convert_to_numpy(model.optimizer.iterations))

    def stop(self):
        """Asks for a last backup, and then a `Preempted`."""
        self.must_stop = True

    def on_epoch_begin(self, epoch, logs=None):
        states = self._random_states()
        for index, state in enumerate(states):
            rng = np.random.default_rng([self.seed, 4, epoch, index])
            state.assign([rng.integers(2**31), 0])
        if self.in_epoch:
            variables = states + self.model.metrics_variables
            for variable, value in zip(variables, self.in_epoch, strict=True):
                variable.assign(value)
        self.in_epoch = None

    def on_train_batch_end(self, batch, logs=None):
        # The last step of an epoch is kept with the epoch.
        if self.must_stop and self._step() % self.steps:
            self._save(self._random_states() + self.model.metrics_variables)
            self._end()

    def on_epoch_end(self, epoch, logs=None):
        self._save()
        if self.must_stop:
            self._end()

    def _end(self):
        raise Preempted(f"Stopped, as asked, after step {self._step()}, which is kept")

    def _step(self):
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _random_states(self):
        return [x for x in self.model.variables if x.name == "seed_generator_state"]

    def _save(self, in_epoch=()):
        if not self.writes:
            return
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name("unfinished.weights.h5")
        self.model.save_weights(unfinished)
        with h5py.File(unfinished, "a") as file:
            for index, variable in enumerate(in_epoch):
                # Groups are read in the order of their names.
                value = keras.ops.convert_to_numpy(variable)
                file[f"in_epoch/{index:04}"] = value
        os.replace(unfinished, self.path)


class History(keras.callbacks.Callback):
    """Writes the logs of each epoch, and its seconds, as a row of a CSV file.

    The rows of epochs that come again, since the run was stopped before their
    backup, are replaced.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.rows = []

    def on_epoch_begin(self, epoch, logs=None):
        if not self.rows and epoch:
            with open(self.path, newline="") as file:
                self.rows = list(csv.DictReader(file))[:epoch]
        self.began = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = round(time.monotonic() - self.began, 1)
        self.rows.append({"epoch": epoch, **logs, "seconds": seconds})
        unfinished = self.path.with_name(f"unfinished-{self.path.name}")
        with open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[-1], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(unfinished, self.path)


class StopAtNaN(keras.callbacks.Callback):
    """Ends a diverging run at once, before its state is backed up."""

    def on_train_batch_end(self, batch, logs=None):
        if not np.isfinite(logs["loss"]):
            self._stop(f"The loss became {logs['loss']} at step {batch} of the epoch")

    def on_epoch_end(self, epoch, logs=None):
        # No loss has seen the last step's update.
        if self._bad():
            self._stop(f"The last step of epoch {epoch} was too large")

    def _bad(self):
        """The variables that are not finite."""
        return [
            variable
            for variable in self.model.trainable_variables
            if not np.isfinite(keras.ops.convert_to_numpy(variable)).all()
        ]

    def _stop(self, what):
        first = next(map(self._named, self._bad()), "none yet")
        raise FloatingPointError(
            f"{what}: a learning rate is too high. The first variable that is not "
            f"finite: {first}. The last epoch's backup is kept"
        )

    def _named(self, variable):
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

    def __init__(self, bar, description, epochs, steps, done):
        super().__init__()
        self.bar = bar
        self.description = description
        self.epochs = epochs
        self.line = bar.add_task(description, total=epochs * steps, completed=done)

    def on_train_batch_end(self, batch, logs=None):
        self.bar.advance(self.line)

    def on_epoch_end(self, epoch, logs=None):
        losses = ", ".join(
            f"{key} {value:.3f}" for key, value in logs.items() if key.endswith("loss")
        )
        text = f"{self.description}, epoch {epoch + 1}/{self.epochs}"
        if self.bar.console.is_terminal:
            self.bar.update(self.line, description=f"{text}: {losses}")
        else:
            self.bar.console.print(f"{text}: {losses}")
