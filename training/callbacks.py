"""What happens between a run's epochs: backup, history, progress."""

import csv
import os
import time

import keras
import numpy as np


class Backup(keras.callbacks.Callback):
    """Keeps the run's state at the end of each epoch, in one file, never half of one.

    A run that is restored is the run that it continues: `BackupAndRestore` keeps the
    epoch in a second file, and dropout's random state not at all. Here the epoch is
    told from the optimizer's steps, and each epoch has its own random state.

    Args:
        path: Path of the file, `*.weights.h5`.
        steps: Integer, steps of an epoch.
        seed: Integer.
    """

    def __init__(self, path, steps, seed):
        super().__init__()
        self.path = path
        self.steps = steps
        self.seed = seed

    def restore(self, model):
        """Loads the last backup, if any, and returns the epoch to go on with."""
        model.optimizer.build(model.trainable_variables)
        if self.path.exists():
            model.load_weights(self.path)
        steps = keras.ops.convert_to_numpy(model.optimizer.iterations)
        return int(steps) // self.steps

    def on_epoch_begin(self, epoch, logs=None):
        states = [x for x in self.model.variables if x.name == "seed_generator_state"]
        for index, state in enumerate(states):
            rng = np.random.default_rng([self.seed, 4, epoch, index])
            state.assign([rng.integers(2**31), 0])

    def on_epoch_end(self, epoch, logs=None):
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name("unfinished.weights.h5")
        self.model.save_weights(unfinished)
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
            bad = [
                variable.path
                for variable in self.model.trainable_variables
                if not np.isfinite(keras.ops.convert_to_numpy(variable)).all()
            ]
            raise FloatingPointError(
                f"The loss became {logs['loss']} at step {batch} of the epoch: a "
                "learning rate is too high. The first variable that is not finite: "
                f"{bad[0] if bad else 'none yet'}. The last epoch's backup is kept"
            )


class ShowProgress(keras.callbacks.Callback):
    """Shows the run on a rich progress bar, with the time that is left."""

    def __init__(self, bar, description):
        super().__init__()
        self.bar = bar
        self.description = description

    def on_train_begin(self, logs=None):
        total = self.params["epochs"] * self.params["steps"]
        self.line = self.bar.add_task(self.description, total=total)

    def on_epoch_begin(self, epoch, logs=None):
        self.bar.update(self.line, completed=epoch * self.params["steps"])

    def on_train_batch_end(self, batch, logs=None):
        self.bar.advance(self.line)

    def on_epoch_end(self, epoch, logs=None):
        losses = ", ".join(
            f"{key} {value:.3f}" for key, value in logs.items() if key.endswith("loss")
        )
        text = f"{self.description}, epoch {epoch + 1}/{self.params['epochs']}"
        if self.bar.console.is_terminal:
            self.bar.update(self.line, description=f"{text}: {losses}")
        else:
            self.bar.console.print(f"{text}: {losses}")
