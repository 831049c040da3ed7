"""Whole runs of the trainer under autocast, with the scaler of float16, and in channels-last."""

import csv

import pytest
import torch
from trainer_cases import last_state, run, write_config

from trainer import engine  # isort: skip

# Five steps: in the seventh this network's gradient jumps. Weights off by 2^-11 at random, without autocast, then end
# 1 or 25 times as far apart by their draw, so the end of a longer run says nothing about rounding.
STEPS = 5
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of one number: half its last bit


def weights(output):
    return torch.cat([x.double().flatten() for x in last_state(output)["model"].values() if x.is_floating_point()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights before and after a run in float32."""
    folder = tmp_path_factory.mktemp("plain")
    config = write_config(folder, steps=STEPS, optimizer={"rate": 1e-12})
    assert run(config, folder / "start") == 0
    assert run(write_config(folder, steps=STEPS), folder / "end") == 0
    return weights(folder / "start"), weights(folder / "end")


@pytest.mark.parametrize("amp", list(ROUNDING))
def test_a_run_under_autocast_ends_near_the_one_in_float32(amp, plain, tmp_path):
    start, end = plain
    config = write_config(tmp_path, steps=STEPS, precision={"amp": amp}, log={"every": 1})
    assert run(config, tmp_path / "out") == 0
    found, state = weights(tmp_path / "out"), last_state(tmp_path / "out")
    assert all(x.dtype == torch.float32 for x in state["model"].values() if x.is_floating_point())
    apart = float((found - end).norm() / (end - start).norm())
    assert 0 < apart < 10 * ROUNDING[amp]  # not 0: the run was under autocast
    with (tmp_path / "out" / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    if amp == "float16":
        assert state["scaler"]["_growth_tracker"] == STEPS  # no step was left out
        assert {float(row["scale"]) for row in rows} == {state["scaler"]["scale"]}
    else:
        assert state["scaler"] is None


def test_channels_last_holds_for_the_images_and_both_models(plain, tmp_path, monkeypatch):
    seen = []

    made = engine.Parts.__init__

    def watched(self, *rest, **more):
        made(self, *rest, **more)
        for model in (self.student, self.teacher):
            model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            kernels = [x for x in model.parameters() if x.ndim == 4 and min(x.shape[1], x.shape[2]) > 1]
            assert kernels and all(x.is_contiguous(memory_format=torch.channels_last) for x in kernels)

    monkeypatch.setattr(engine.Parts, "__init__", watched)
    assert run(write_config(tmp_path, steps=STEPS, precision={"channels_last": True}), tmp_path / "out") == 0
    assert len(seen) >= 2 * STEPS and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    torch.testing.assert_close(weights(tmp_path / "out"), plain[1], rtol=1e-4, atol=1e-6)
