import os

from training import comparison


def test_a_retrained_model_is_exported_anew_and_an_unchanged_one_is_not(
    fit, runs, tiny, tasks, builder
):
    def modified():
        comparison.compare(
            tiny,
            ["one_task", "cross_stitch"],
            0,
            tasks=tasks,
            builder=builder,
            runs=runs,
        )
        return exported.stat().st_mtime_ns

    exported = runs / "tiny/comparison/seed0/serving/1"
    fit("one_task")
    fit("cross_stitch")
    first = modified()

    assert modified() == first
    os.utime(exported, (0, 0))  # as if the model had been trained after it
    assert modified() > first
