"""Where time goes: phases partition it, a data wait counts only where the device ran dry."""

from cv2jax.train.clock import Clock


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def batches(self, waits):
        for wait in waits:
            self.now += wait
            yield wait


def test_phases_partition_the_time():
    time = Time()
    clock = Clock(time)
    idle = iter([True, True, False, True])
    taken = []
    for wait in clock.waits(time.batches([7.0, 2.0, 3.0, 4.0]), 11, lambda: next(idle)):
        assert str(clock.phase) == f"device step {11 + len(taken)}"
        time.now += 1.0
        if wait == 3.0:
            clock.enter("save", 13)
            time.now += 0.25
            clock.enter("evaluate", 13)
            time.now += 10.0
        taken.append(clock.take())
    assert [t.get("data", 0.0) for t in taken] == [
        0.0,
        2.0,
        0.0,
        4.0,
    ]  # the first wait is start-up, the third was hidden
    assert [t["step"] for t in taken] == [1.0, 1.0, 4.0, 1.0]
    assert taken[0]["start"] == 7.0
    assert (taken[2]["save"], taken[2]["evaluate"]) == (0.25, 10.0)
    assert sum(sum(t.values()) for t in taken) == time.now
    assert clock.longest_evaluation == 10.0


def test_the_median_step_leaves_out_saves_evaluations_and_start_up():
    time = Time()
    clock = Clock(time)
    assert clock.median_step_seconds == 0.0
    for step, wait in enumerate(clock.waits(time.batches([50.0, 1.0, 1.0, 1.0]), 1, lambda: True), start=1):
        time.now += 1.0
        clock.enter("save", step)
        time.now += 30.0
        del wait
    assert clock.median_step_seconds == 2.0


def test_phases_say_what_they_are():
    clock = Clock()
    said = []
    for name in ("data", "step", "save", "evaluate", "start"):
        clock.enter(name, 3)
        said.append(str(clock.phase))
    assert said == [
        "data wait of step 3",
        "device step 3",
        "save of step 3",
        "evaluation at step 3",
        "start-up before step 3",
    ]
