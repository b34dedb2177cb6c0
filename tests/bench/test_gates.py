"""Every suite's check lets the right result pass and refuses wrong ones that have been mistaken for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import (
    test_chain,
    test_decode,
    test_energy,
    test_fid,
    test_flow,
    test_generate,
    test_resampling,
    test_sir,
    test_train,
    textbook,
)
from bench.flow_peers import FLOW_PEERS
from bench.harness import Problem, Provider, Workload, absent

ROWS = 1024
RESULTS = {"an energy": 0, "a gradient": 1}


class Gate:
    """A problem's check, and what its providers give."""

    def __init__(self, problem: Problem):
        self.problem, self.gradients = problem, problem.gradients
        with torch.set_grad_enabled(self.gradients):
            self.workload: Workload = problem.setup()

    def provider(self, name: str) -> Provider:
        (found,) = [provider for provider in self.problem.providers if provider.name == name]
        return found

    def result(self, name: str) -> Any:
        """Of the first inputs."""
        with torch.set_grad_enabled(self.gradients):
            return self.provider(name).make(self.workload.data)(*self.workload.inputs[0])

    def passes(self, name: str, result: Any) -> None:
        """`result` is what the provider of this name should give."""
        self.workload.check(self.provider(name), result, *self.workload.inputs[0])

    def refuses(self, name: str, result: Any, match: str | None = None) -> None:
        """Declared as the result of the provider of this name."""
        with pytest.raises(AssertionError, match=match):
            self.passes(name, result)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows beyond those that are checked need no large batch."""
    torch.manual_seed(0)
    monkeypatch.setattr(test_flow, "CHECKED", 256)
    monkeypatch.setattr(test_energy, "CHECKED", 256)
    monkeypatch.setattr(test_chain, "CHECKED", 64)
    monkeypatch.setattr(test_sir, "CHECKED", 32)
    monkeypatch.setattr(test_generate, "CHECKED", 16)
    monkeypatch.setattr(test_decode, "CHECKED", 16)


def damaged(rows: Tensor, value: float | None = None) -> Tensor:
    """All but the first quarter: of another order, or `value`."""
    rows, first = rows.clone(), len(rows) // 4
    rows[first:] = rows[first:].roll(1, 0) if value is None else value
    return rows


# --- flow and energy ----------------------------------------------------------------------------------------


def scaled(weights: textbook.FlowWeights, factor: float) -> textbook.FlowWeights:
    """Of another last layer."""
    return dataclasses.replace(weights, weight_out=factor * weights.weight_out)


def test_samples_of_the_flow() -> None:
    gate = Gate(test_flow.sample_problem(64, ROWS, "small"))
    ours, (eager, noise) = gate.result("evalp_fast"), gate.result("torch eager")
    gate.passes("evalp_fast", ours)
    gate.refuses("evalp_fast", damaged(ours, torch.nan), "not finite")
    gate.refuses("evalp_fast", damaged(ours), "a sample is off")
    gate.refuses("evalp_fast", ours.roll(1, 0), "a sample is off")
    gate.refuses("evalp_fast", gate.result("evalp_fast bf16"), "a sample is off")
    gate.refuses("evalp_fast", ours.double(), "dtype")
    gate.passes("torch eager", (eager, noise))
    gate.refuses("torch eager", gate.result("torch eager bf16"), "a sample is off")
    gate.refuses("torch eager", (eager, 1.1 * noise), "is off")
    order = textbook.shuffle(64)
    for name in ("torch eager", "torch eager bf16"):
        wrong = textbook.flow_forward(scaled(gate.workload.data, 1.03), order, noise)[0]
        gate.refuses(name, (wrong, noise), "a sample is off")


@pytest.mark.parametrize("name", FLOW_PEERS)
def test_samples_of_the_libraries(name: str) -> None:
    missing = absent(FLOW_PEERS[name][0])()
    if missing is not None:
        pytest.skip(missing)
    gate = Gate(test_flow.sample_problem(64, ROWS, "small"))
    gate.passes(name, gate.result(name))
    wrong = gate.provider(name).make(scaled(gate.workload.data, 1.03))
    with torch.no_grad():
        gate.refuses(name, wrong(*gate.workload.inputs[0]), "a sample is off")


def test_densities_of_the_flow() -> None:
    gate = Gate(test_flow.density_problem(64, ROWS, "small"))
    (x,) = gate.workload.inputs[0]
    right = gate.result("evalp_fast")
    gate.passes("evalp_fast", right)
    gate.refuses("evalp_fast", damaged(right, torch.nan), "not finite")
    gate.refuses("evalp_fast", damaged(right), "a log-density is off")
    gate.refuses("evalp_fast", right + 1e-3, "a log-density is off")
    for name in ("evalp_fast bf16", "torch eager bf16"):
        rounded = gate.result(name)
        gate.passes(name, rounded)
        gate.refuses("torch eager", rounded, "a log-density is off")
        for wrong in (rounded + 1, rounded - 0.1):
            gate.refuses(name, wrong, "a log-density is off")
        u, log_det = textbook.flow_inverse(gate.workload.data, textbook.shuffle(64), x)
        for sign in (0, -1):
            gate.refuses(name, textbook.standard_normal_log_prob(u) + sign * log_det, "a log-density is off")


@pytest.mark.parametrize("which", RESULTS)
def test_energies(which: str) -> None:
    gate = Gate(test_energy.problem(ROWS, True, "small"))
    right = list(gate.result("evalp_fast"))
    gate.passes("evalp_fast", tuple(right))
    gate.refuses("evalp_fast", gate.result("evalp_fast bf16"), "is off")
    place = RESULTS[which]
    for value in (0.0, torch.nan, None):
        wrong = list(right)
        wrong[place] = damaged(right[place], value)
        gate.refuses("evalp_fast", tuple(wrong), which)
    gate.refuses("evalp_fast", tuple(right[:1]), "results")


# --- samplers -----------------------------------------------------------------------------------------------


def steps_of(name: str, steps: int, gate: Gate) -> Tensor:
    """The ends of shorter chains."""
    other = Gate(test_chain.problem(256, steps, False, "small"))
    return test_chain.samples_of(other.provider(name).make(gate.workload.data)(*gate.workload.inputs[0]))


@pytest.mark.parametrize("name", ["evalp_fast", "torch eager", "torchebm"])
def test_chains(name: str) -> None:
    missing = absent("torchebm.samplers")() if name == "torchebm" else None
    if missing is not None:
        pytest.skip(missing)
    gate = Gate(test_chain.problem(256, 20, False, "small"))
    with torch.no_grad():
        right = test_chain.samples_of(gate.result(name))
        gate.passes(name, right)
        for steps in (19, 16):
            gate.refuses(name, steps_of(name, steps, gate), "the end of a chain is off")
        gate.refuses(name, right[:32].repeat(8, 1), "the end of a chain is off")
        gate.refuses(name, damaged(right), "the end of a chain is off")
        gate.refuses(name, damaged(right, torch.inf), "not finite")
        gate.refuses(name, gate.workload.inputs[0][0], "the end of a chain is off")
        for rounded in ("evalp_fast bf16", "torch eager bf16"):
            gate.refuses(name, test_chain.samples_of(gate.result(rounded)), "the end of a chain is off")


def test_adjusted_chains() -> None:
    gate = Gate(test_chain.problem(256, 10, True, "small"))
    free = Gate(test_chain.problem(256, 10, False, "small"))
    with torch.no_grad():
        right = test_chain.samples_of(gate.result("evalp_fast"))
        gate.passes("evalp_fast", right)
        gate.refuses("evalp_fast", damaged(right), "of the rows")
        gate.refuses("evalp_fast", test_chain.samples_of(free.result("evalp_fast")), "of the rows")


def test_races() -> None:
    n, proposals, dim = 64, 12, 64
    gate = Gate(test_sir.problem(dim, n, proposals, "small"))
    with torch.no_grad():
        for name in ("evalp_fast", "evalp_fast composed", "torch all at once", "torch in batches"):
            result = gate.result(name)
            gate.passes(name, result)
            samples = result if isinstance(result, Tensor) else result[0]
            gate.refuses(name, damaged(samples), "of the rows")
            gate.refuses(name, samples[:1].expand(n, dim), "of the rows")
            gate.refuses(name, samples + torch.nan, "not finite")
        for name in ("evalp_fast", "evalp_fast bf16"):
            for fewer in (1, proposals - 4):
                wrong = test_sir.ours("ieee", n, fewer)(gate.workload.data)(*gate.workload.inputs[0])
                gate.refuses(name, wrong.z, "of the rows")
        result = gate.result("evalp_fast")
        shifted = result.diagnostics._replace(log_mean_weight=result.diagnostics.log_mean_weight + 0.2)
        for name in ("evalp_fast", "evalp_fast bf16"):
            gate.refuses(name, result._replace(diagnostics=shifted), "the mean log-weight")


@pytest.mark.parametrize("method", test_generate.OPTIONS)
def test_generated_images(method: str) -> None:
    n = 32
    gate = Gate(test_generate.problem(method, n, "small"))
    for name in ("evalp_fast", "evalp_fast bf16"):
        images = gate.result(name)
        gate.passes(name, images)
        gate.refuses(name, images.float() / 255, "dtype")
        gate.refuses(name, images.roll(1, 0), "of the images")
        for other in test_generate.OPTIONS:
            if other != method:
                wrong = gate.workload.data.sample(
                    n, method=other, output="uint8", **test_generate.OPTIONS[other]
                )
                gate.refuses(name, wrong, "of the images")


# --- resampling ---------------------------------------------------------------------------------------------


def test_draws_of_another_shape() -> None:
    gate = Gate(test_resampling.resample_problem(1, 1 << 12, "multinomial"))
    drawn = gate.result("torch.multinomial")
    gate.passes("evalp_fast", drawn)
    for wrong in (drawn[:, : drawn.shape[1] // 2], drawn[:, :64], drawn.T, drawn[0]):
        gate.refuses("evalp_fast", wrong, "draws have shape")
    gate.refuses("evalp_fast", drawn.int(), "not int64")


def test_one_draw_a_row() -> None:
    gate = Gate(test_resampling.categorical_problem(500, 100))
    (log_weights,) = gate.workload.inputs[0]
    drawn = test_resampling.multinomial(log_weights, 1)
    gate.passes("evalp_fast", drawn)
    gate.passes("evalp_fast", drawn[:, 0])
    gate.refuses("evalp_fast", drawn.expand(-1, 2), "draws have shape")
    gate.refuses("evalp_fast", drawn[:250], "draws have shape")
    gate.refuses("evalp_fast", log_weights.argmax(dim=1), "chi-square")


@pytest.mark.parametrize("shape", [(1, 4096), (64, 100)])
def test_summaries(shape: tuple[int, int]) -> None:
    gate = Gate(test_resampling.summarize_problem(*shape))
    right = tuple(gate.result("evalp_fast"))
    gate.passes("evalp_fast", right)
    gate.passes("evalp_fast", gate.result("torch eager"))
    for place in range(4):
        for change in (torch.zeros_like, lambda t: t + 1):
            wrong = [*right]
            wrong[place] = change(right[place])
            gate.refuses("evalp_fast", tuple(wrong))


# --- images -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin_model() -> Callable[[], Any]:
    """The wide decoder with an eighth of its channels."""
    preset = test_decode.VAE_PRESETS["celeba64"]
    shape = preset.model
    thin = dataclasses.replace(
        shape,
        encoder_channels=tuple(8 for _ in shape.encoder_channels),
        decoder_channels=tuple(c // 8 for c in shape.decoder_channels),
    )
    return lambda: dataclasses.replace(preset, model=thin)


@pytest.mark.parametrize("model", ["mnist", "celeba64, untrained"])
def test_decoded_images(model: str, thin_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_decode.VAE_PRESETS, "celeba64", thin_model())
    with torch.no_grad():
        gate = Gate(test_decode.problem(model, 64, "small"))
        names = ("evalp_fast", "evalp_fast bf16", "torch eager", "torch eager bf16 channels last")
        for name in names:
            images = gate.result(name)
            gate.passes(name, images)
            gate.refuses(name, torch.full_like(images, 0.5), "an image is off")
            gate.refuses(name, images.mean(dim=0, keepdim=True).expand_as(images), "an image is off")
            gate.refuses(name, images.flip(0), "an image is off")
            gate.refuses(name, images.flip(3), "an image is off")
            gate.refuses(name, damaged(images), "an image is off")
            gate.refuses(name, damaged(images, torch.nan), "not finite")
        gate.refuses("evalp_fast", gate.result("evalp_fast bf16"), "an image is off")


def test_features() -> None:
    gate = Gate(test_fid.problem("mnist_cnn", 200))
    (images,) = gate.workload.inputs[0]
    extractor = gate.workload.data
    mean, covariance = gate.result("evalp_fast")
    gate.passes("evalp_fast", (mean, covariance))
    gate.refuses("evalp_fast", (1.001 * mean, covariance), "the mean")
    gate.refuses("evalp_fast", (mean, covariance * 199 / 200), "the covariance")
    gate.refuses("evalp_fast", test_fid.ours(extractor)(images[:199]))


def test_features_of_mirrored_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of our extractor must not make the others wrong."""
    original = test_fid.our_extractor

    def mirroring(name: str) -> Any:
        extractor = original(name)
        return dataclasses.replace(extractor, compute=lambda images: extractor.compute(images.flip(3)))

    monkeypatch.setattr(test_fid, "our_extractor", mirroring)
    gate = Gate(test_fid.problem("mnist_cnn", 200))
    gate.refuses("evalp_fast", gate.result("evalp_fast"))
    if absent("torch_fidelity.metric_fid")() is None:
        gate.passes("torch-fidelity without workers", gate.result("torch-fidelity without workers"))


# --- training -----------------------------------------------------------------------------------------------


def averaged_problem() -> Problem:
    """A small step with a moving average."""
    return test_train.problem(
        "likelihood", 64, lambda dtype: test_train.likelihood_step(16, 3, 32, 64, dtype), "small"
    )


def moved(done: test_train.Stepped, factor: float) -> None:
    """In place, the parameters as if the optimiser had moved them so many times as far."""
    with torch.no_grad():
        for parameter, start in zip(test_train.parameters(done.networks), done.before, strict=True):
            parameter.copy_(start + factor * (parameter - start))


def test_steps() -> None:
    gate = Gate(averaged_problem())
    gate.passes("evalp_fast", gate.result("evalp_fast"))
    for factor in (0.0, 0.9, 2.0, -1.0):
        done = gate.result("evalp_fast")
        moved(done, factor)
        gate.refuses("evalp_fast", done, "what the optimiser moved")
    done = gate.result("evalp_fast")
    gate.refuses("evalp_fast", done._replace(loss=1.001 * done.loss), "the loss")
    for value, start in zip(done.averages[0].average.values(), done.before, strict=True):
        value.copy_(start)
    gate.refuses("evalp_fast", done, "the moving average")
    for parameter in done.networks[0].parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad.flip(0)
    gate.refuses("evalp_fast", done, "the gradient")


@pytest.mark.parametrize("name", ["torch eager", *FLOW_PEERS])
def test_steps_of_the_libraries(name: str) -> None:
    missing = absent(FLOW_PEERS[name][0])() if name in FLOW_PEERS else None
    if missing is not None:
        pytest.skip(missing)
    gate = Gate(test_train.peer_problem(8, 64, "small"))
    done = gate.result(name)
    gate.passes(name, done)
    moved(done, 0.0)
    gate.refuses(name, done, "what the optimiser moved")
