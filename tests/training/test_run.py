"""A run on disk: its state survives any kill, its metrics are whole lines, its errors say what differs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from evalp_fast.files import FileError
from evalp_fast.training import run as run_module
from evalp_fast.training.run import (
    DivergenceError,
    MovingAverage,
    Run,
    RunExistsError,
    cosine_schedule,
    flatten_state,
    parameter_norm,
    restore_state,
    set_learning_rate,
)


@dataclass(frozen=True)
class Config:
    width: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)


def new_run(folder: Path, *, config: Config = Config(), method: str = "test", resume: bool = False) -> Run:
    return Run(folder, method=method, config=config, resume=resume)


def trained(optimizer_type: type[torch.optim.Optimizer], steps: int, seed: int = 0, **options):
    """A small network, its optimiser and its average after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (3, 1, 1)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 1),
    )
    # Files hold contiguous tensors: moments that come back in another layout than their parameter are wrong.
    model.to(memory_format=torch.channels_last)
    optimizer = optimizer_type(model.parameters(), 0.01, **options)
    average = MovingAverage(model, 0.9)
    parts = {"model": model, "model_average": average, "optimizer": optimizer}
    step_on(parts, 0, steps)
    return parts


def step_on(parts: dict, first: int, last: int) -> None:
    for step in range(first, last):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        parts["optimizer"].zero_grad()
        parts["model"](data).square().mean().backward()
        parts["optimizer"].step()
        parts["model_average"].update(parts["model"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"fused": True, "betas": (0.5, 0.999)}),
        (torch.optim.AdamW, {"fused": True, "weight_decay": 0.05}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_state_continues_exactly(kind, options: dict, tmp_path: Path) -> None:
    """Saved after 3 steps and continued in new objects: the same as 7 steps in one go, to the last bit."""
    whole = trained(kind, 7, **options)
    half = trained(kind, 3, **options)
    new_run(tmp_path).save(3, {**half, "best": 1.5})

    parts = trained(kind, 0, seed=99, **options)
    saved = new_run(tmp_path, resume=True).load(parts)
    assert saved["step"] == 3
    assert saved["best"] == 1.5
    step_on(parts, 3, 7)
    expected, numbers = flatten_state(whole)
    found, found_numbers = flatten_state(parts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found_numbers == numbers


def test_names_that_begin_alike_are_kept_apart() -> None:
    parts = {"flow": nn.Linear(2, 2), "flow_average": MovingAverage(nn.Linear(2, 2), 0.5)}
    tensors, numbers = flatten_state(parts)
    other = {"flow": nn.Linear(2, 2), "flow_average": MovingAverage(nn.Linear(2, 2), 0.5)}
    restore_state(other, tensors, numbers)
    assert torch.equal(other["flow"].weight, parts["flow"].weight)
    assert torch.equal(other["flow_average"].average["weight"], parts["flow_average"].average["weight"])


def test_infinity_survives(tmp_path: Path) -> None:
    """The best score of a run before its first evaluation."""
    new_run(tmp_path).save(0, {"best": math.inf})
    assert new_run(tmp_path, resume=True).load({})["best"] == math.inf


def test_time_is_the_sum_of_the_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    run = new_run(tmp_path)
    clock[0] += 7
    run.save(1, {})
    clock[0] += 1000  # between the sessions
    run = new_run(tmp_path, resume=True)
    run.load({})
    clock[0] += 5
    assert run.seconds == pytest.approx(12.0)


def write_lines(run: Run, *steps: int) -> None:
    for step in steps:
        run.log(step, {"loss": step / 10})


def steps_of(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]


def test_metrics_beyond_the_state_are_removed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_lines(run, 10, 20)
    run.save(20, {})
    write_lines(run, 30)
    again = new_run(tmp_path, resume=True)
    again.load({})
    assert steps_of(again) == [10, 20]
    write_lines(again, 30)
    assert steps_of(again) == [10, 20, 30]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20, "seconds": 1.0, "loss": 2.0}', ""])
def test_torn_line_is_removed(torn: str, tmp_path: Path) -> None:
    """A line without its end was being written at the kill, even if what is there happens to be JSON."""
    run = new_run(tmp_path)
    write_lines(run, 10)
    run.save(20, {})
    with run.metrics_file.open("a") as file:
        file.write(torn)
    again = new_run(tmp_path, resume=True)
    again.load({})
    assert steps_of(again) == [10]


def test_metrics_of_a_run_without_state_are_removed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_lines(run, 10)
    again = new_run(tmp_path, resume=True)
    assert again.load({}) == {}
    assert steps_of(again) == []


def test_line_has_step_time_and_values(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.log(3, {"loss": 0.5, "ess": 9.0})
    run.close()
    line = json.loads(run.metrics_file.read_text())
    assert list(line) == ["step", "seconds", "loss", "ess"]


def test_folder_is_not_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    new_run(folder)
    assert not folder.exists()  # a run that fails before it begins leaves nothing behind
    new_run(folder).load({})
    with pytest.raises(RunExistsError, match="holds a run already: pass --resume"):
        new_run(folder)
    assert new_run(folder, resume=True).load({}) == {}
    # Resuming what was never begun begins it.
    new_run(tmp_path / "new", resume=True).load({})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["method"] == "test"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": Config(width=4)}, r"\(config.width was 3, now 4\)"),
        ({"config": Config(rates=(0.1, 0.3))}, r"\(config.rates was \[0.1, 0.2\], now \[0.1, 0.3\]\)"),
        ({"config": Config(width=4, rates=(1.0,))}, r"\(config.rates was"),  # the first that differs
        ({"method": "other"}, r"\(method was 'test', now 'other'\)"),
    ],
)
def test_other_configuration_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    new_run(tmp_path).load({})
    with pytest.raises(RunExistsError, match=message):
        new_run(tmp_path, resume=True, **changes)


def test_state_that_does_not_fit_is_named(tmp_path: Path) -> None:
    new_run(tmp_path).save(1, {"model": nn.Linear(2, 3)})
    with pytest.raises(FileError, match=r"state\.safetensors does not fit this configuration"):
        new_run(tmp_path, resume=True).load({"model": nn.Linear(2, 4)})
    with pytest.raises(FileError, match=r"state\.safetensors does not fit"):
        new_run(tmp_path, resume=True).load({"average": MovingAverage(nn.Linear(2, 3), 0.5)})
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(FileError, match="truncated, corrupt"):
        new_run(tmp_path, resume=True).load({"model": nn.Linear(2, 3)})


def test_divergence_is_named(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.require_finite(5, loss=1.0, other=torch.tensor(2.0))
    with pytest.raises(
        DivergenceError, match=r"diverged at step 6: energy is nan; no state had been saved yet"
    ):
        run.require_finite(6, loss=1.0, energy=torch.tensor(math.nan))
    run.save(5, {})
    with pytest.raises(
        DivergenceError, match=r"loss is inf; the last good state and the best model are kept in"
    ):
        run.require_finite(6, loss=math.inf)


def test_parameter_norm() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    everything = torch.cat([p.flatten() for m in (first, second) for p in m.parameters()])
    torch.testing.assert_close(parameter_norm(first, second), everything.detach().norm())
    with torch.no_grad():
        second.bias[1] = math.nan
    assert not parameter_norm(first, second).isfinite()


def test_moving_average_is_the_recursion() -> None:
    model = nn.Linear(2, 1, bias=False)
    average = MovingAverage(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)
    other = nn.Linear(2, 1, bias=False)
    average.copy_to(other)
    assert torch.equal(other.weight, average.average["weight"])
    assert other.weight.data_ptr() != average.average["weight"].data_ptr()
    assert not torch.equal(model.weight, other.weight)


def test_no_averaging_keeps_the_last_iterate() -> None:
    model = nn.Linear(2, 1)
    average = MovingAverage(model, 0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model)
    assert torch.equal(average.average["weight"], model.weight)


def test_cosine_schedule() -> None:
    assert cosine_schedule(0, 100) == 1.0
    assert cosine_schedule(50, 100) == pytest.approx(0.5)
    assert cosine_schedule(100, 100) == pytest.approx(0.0)
    assert cosine_schedule(130, 100) == pytest.approx(0.0)
    assert cosine_schedule(0, 1000, warmup=10) == pytest.approx(0.1)
    assert cosine_schedule(9, 1000, warmup=10) == pytest.approx(1.0, abs=1e-3)
    values = [cosine_schedule(step, 100) for step in range(101)]
    assert values == sorted(values, reverse=True)


def test_learning_rate_of_every_group() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.1)
    set_learning_rate(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03]
