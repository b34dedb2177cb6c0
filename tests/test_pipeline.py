"""`EVaLP`: images by every method, to the last bit the same however they are drawn; to and from disk."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from evalp_fast import files, pipeline
from evalp_fast.files import FileError
from evalp_fast.images import to_uint8
from evalp_fast.kernels import launch, philox
from evalp_fast.models.energy import EnergyConfig
from evalp_fast.models.flow import FlowConfig
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.pipeline import EVaLP, EVaLPConfig, draw_posterior, shipped_models
from evalp_fast.priors import METHODS, PriorConfig
from evalp_fast.samplers.base import Draws
from evalp_fast.samplers.direct import FunctionSampler

VAE_SHAPE = VAEConfig(1, 16, 4, (8, 16), (16, 12, 8))
SHAPE = EVaLPConfig(VAE_SHAPE, PriorConfig(FlowConfig(4, 2, 32), EnergyConfig(4, 32), kl_weight=0.5))
OPTIONS = {"prior": {}, "flow": {}, "sir": {"proposals": 10}, "langevin": {"n_steps": 3, "adjusted": True}}


def random_model(config: EVaLPConfig = SHAPE) -> EVaLP:
    """Random weights everywhere, and running statistics that differ from any batch's."""
    torch.manual_seed(0)
    model = EVaLP(config, {"name": "test", "training": [{"stage": "VAE", "seed": 3}]})
    with torch.no_grad():
        if model.prior is not None:
            model.prior.flow.weight_out.normal_(std=0.2)
            for norm in (model.prior.flow.norm_log_scale, model.prior.flow.norm_shift):
                if norm is not None:
                    norm.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.05)
            elif name.endswith("running_var"):
                buffer.fill_(0.02)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> EVaLP:
    return random_model()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_image_is_a_function_of_its_number(method, precision, model: EVaLP) -> None:
    arguments = {"method": method, "precision": precision, "seed": 5, **OPTIONS[method]}
    whole = model.sample(520, **arguments)
    assert whole.shape == (520, 1, 16, 16)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert whole.std(dim=0).mean() > 0.01  # the decoder is alive
    for n, start, batch_size in ((1, 0, None), (1, 519, None), (200, 250, 7), (520, 0, 100)):
        part = model.sample(n, start=start, batch_size=batch_size, **arguments)
        assert torch.equal(part, whole[start : start + n])
    assert model.sample(0, **arguments).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("start", [255, 2047, 2100, (1 << 40) + 250])
def test_image_does_not_depend_on_the_tile_it_is_asked_from(start: int, model: EVaLP) -> None:
    """Across the edges of the flow's tiles and of the decoder's, to the last bit: a tile that begins where
    the request does would round otherwise, and one that is decoded from its beginning is another image."""
    images = model.sample(10, seed=3, start=start)
    latents = model.sample(10, seed=3, start=start, output="latent")
    torch.testing.assert_close(model.vae.decode(latents), images, rtol=0, atol=1e-6)
    for n, offset, batch_size in ((1, 0, None), (1, 9, None), (4, 3, 3), (10, 0, 1)):
        part = model.sample(n, seed=3, start=start + offset, batch_size=batch_size)
        assert torch.equal(part, images[offset : offset + n])
    assert (images[1:] != images[:-1]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("method", METHODS)
def test_decoder_sees_whole_tiles_alone(method, model: EVaLP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always of one size, with each latent in the row of its number: its products have one shape."""
    decoded = []

    def decode(z: torch.Tensor, *, precision: str | None = None) -> torch.Tensor:
        decoded.append(z)
        return torch.zeros(len(z), 1, 16, 16)

    arguments = {"method": method, "seed": 5, "start": 700, **OPTIONS[method]}
    latents = model.sample(100, output="latent", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(model.vae, "decode", decode)
        assert model.sample(100, **arguments).shape == (100, 1, 16, 16)
    assert [tuple(z.shape) for z in decoded] == [(256, 4)] * 2
    numbers = torch.arange(512, 1024)
    asked = (numbers >= 700) & (numbers < 800)
    assert torch.equal(torch.cat(decoded)[asked], latents)
    assert not torch.cat(decoded)[~asked].any()


def test_diagnostics_stay_with_their_images(model: EVaLP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where latents come in larger tiles than images are decoded in."""

    def numbered(seed: int, index: torch.Tensor) -> Draws:
        return Draws(philox.normal(seed, index, 0, philox.Stream.PROPOSAL, 4), {"number": index})

    monkeypatch.setattr(model, "sampler", lambda *_, **__: FunctionSampler(numbered, {}, tiles=4))
    draws = model.sample_with_diagnostics(900, start=500)
    assert torch.equal(draws.diagnostics["number"], torch.arange(500, 1400))
    monkeypatch.undo()
    assert torch.equal(draws.samples, model.sample(900, method="prior", start=500))


@pytest.mark.parametrize("method", METHODS)
def test_images_say_how_their_latents_were_drawn(method, model: EVaLP) -> None:
    """In every batch, decoded or not, and in an empty one."""
    arguments = {"method": method, **OPTIONS[method]}
    assert model.prior is not None
    expected = model.prior.draw(3, **arguments).info
    assert set(expected) == (set() if method == "prior" else {"path", "reason", "precision"})
    for output in ("float", "uint8", "latent"):
        if method == "prior":  # the noise has no precision, and the decoder has one
            expected = {} if output == "latent" else {"precision": "ieee"}
        for n in (0, 3):
            assert model.sample_with_diagnostics(n, output=output, **arguments).info == expected
        batches = list(model.stream(300, batch_size=200, output=output, **arguments))
        assert [batch.info for batch in batches] == [expected] * 2


@pytest.mark.parametrize("method", METHODS)
def test_images_are_decoded_in_the_precision_of_their_latents(
    method, model: EVaLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the quick one, but of chains; of a VAE alone the decoder's."""
    in_float32 = {name: model.sample(20, method=name, **OPTIONS[name]) for name in METHODS}
    monkeypatch.setattr("evalp_fast.kernels.processor.BFLOAT16_PAYS", True)
    images = model.sample(20, method=method, **OPTIONS[method])
    precision = "ieee" if method == "langevin" else "bf16"
    assert torch.equal(images, model.sample(20, method=method, precision=precision, **OPTIONS[method]))
    assert torch.equal(images, in_float32[method]) == (method == "langevin")
    assert model.sample_with_diagnostics(3, method=method, **OPTIONS[method]).info["precision"] == precision
    alone = EVaLP(EVaLPConfig(model.config.vae)).eval()
    alone.vae.load_state_dict(model.vae.state_dict())
    quick = model.sample(20, method="prior", precision="bf16")
    assert torch.equal(alone.sample(20, method="prior"), quick)
    alone.vae.__class__ = type("OwnVAE", (VAE,), {})
    assert torch.equal(alone.sample(20, method="prior"), in_float32["prior"])


def test_images_are_handed_out_on_the_host(model: EVaLP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `on_host`, which copies beside the computation (`samplers/test_base.py`), where asked for."""
    through: list[int] = []

    def on_host(batches):
        for draws in batches:
            through.append(len(draws.samples))
            yield draws

    monkeypatch.setattr("evalp_fast.pipeline.on_host", on_host)
    expected = model.sample(300)
    assert through == []
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert torch.equal(model.sample(300, device=device, batch_size=200), expected)
    assert through == [200, 100] * 3
    for wrong in ("cuda", "meta", "gpu", 3.5):
        with pytest.raises(ValueError, match="device must be None"):
            model.sample(3, device=wrong)


@pytest.mark.gpu
def test_images_of_a_gpu_on_the_host() -> None:
    """Those of the model's device, with their diagnostics."""
    model = EVaLP.from_pretrained("mnist", device="cuda")
    arguments = {"method": "sir", "proposals": 8, "seed": 3}
    expected = model.sample_with_diagnostics(9000, **arguments)
    found = model.sample_with_diagnostics(9000, device="cpu", **arguments)
    assert expected.samples.is_cuda
    assert torch.equal(found.samples, expected.samples.cpu())
    for name, values in expected.diagnostics.items():
        assert torch.equal(found.diagnostics[name], values.cpu())


def test_new_weights_give_new_images(model: EVaLP, tmp_path: Path) -> None:
    """In bfloat16 too, where the kernels take copies of the matrices: `.data` raises no version counter."""
    model = copy.deepcopy(model)
    assert model.prior is not None
    for method in ("flow", "sir"):
        arguments = {"method": method, "precision": "bf16", **OPTIONS[method]}
        before = model.sample(20, **arguments)
        for network in (model.prior.flow, model.prior.energy_net):
            for parameter in network.parameters():
                parameter.data.mul_(1.3)
        after = model.sample(20, **arguments)
        assert not torch.equal(after, before)
        model.save_pretrained(tmp_path)
        assert torch.equal(EVaLP.from_pretrained(tmp_path).sample(20, **arguments), after)


def test_training_mode_changes_no_image(model: EVaLP) -> None:
    """Guards against the decoder's batch norm seeing, and learning from, what is sampled."""
    expected = model.sample(20)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        assert torch.equal(model.sample(20), expected)
        assert model.training
        assert model.vae.training
        batches = model.stream(600)
        next(batches)
        batches.close()  # a consumer that stops early
        assert model.training
        images = torch.rand(8, 1, 16, 16)
        model.posterior(images)
        model.reconstruct(images)
        assert model.training
    finally:
        model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_modes_of_a_model_are_the_callers_between_batches(model: EVaLP) -> None:
    """Guards against a stream that ends while another goes on, and against `train()` of what was frozen."""
    expected = model.sample(600)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.vae.encoder.eval()  # frozen
    modes = [part.training for part in model.modules()]
    try:
        first, second = model.stream(256, batch_size=256), model.stream(600, batch_size=256)
        next(first)
        assert [part.training for part in model.modules()] == modes
        found = [next(second).samples]
        list(first)
        for draws in second:
            found.append(draws.samples)
            model.train()
        assert torch.equal(torch.cat(found), expected)
        model.vae.encoder.eval()
        for call in (model.posterior, model.reconstruct):
            with pytest.raises(ValueError, match="images must have shape"):
                call(torch.rand(8, 3, 5, 5))
        assert [part.training for part in model.modules()] == modes
    finally:
        model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_autocast_changes_no_posterior(model: EVaLP) -> None:
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = *model.posterior(images), model.reconstruct(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = *model.posterior(images), model.reconstruct(images)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_half_precision_is_named(model: EVaLP, method: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"must be float32 or float64, got {dtype}: precision='bf16'"):
            copy.deepcopy(model).to(dtype).sample(2, method=method)
    mixed = copy.deepcopy(model)
    mixed.vae.bfloat16()
    latents = mixed.sample(2, method="flow", output="latent")
    assert torch.equal(latents, model.sample(2, method="flow", output="latent"))


def test_a_frozen_part_of_torchscript_is_sampled(model: EVaLP) -> None:
    """It has no flag of its mode."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    expected = frozen.sample(20)
    frozen.vae.decoder = torch.jit.freeze(torch.jit.script(frozen.vae.decoder.eval()))
    torch.testing.assert_close(frozen.sample(20), expected, rtol=0, atol=1e-5)


def test_outputs(model: EVaLP) -> None:
    images = model.sample(30, seed=2)
    assert torch.equal(model.sample(30, seed=2, output="uint8"), to_uint8(images))
    latents = model.sample(30, seed=2, output="latent")
    assert model.prior is not None
    assert torch.equal(latents, model.prior.sample(30, seed=2))
    torch.testing.assert_close(model.vae.decode(latents), images, rtol=0, atol=1e-6)


def test_methods_differ(model: EVaLP) -> None:
    drawn = [model.sample(20, method=method, **OPTIONS[method]) for method in METHODS]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j])


def test_stream_and_diagnostics(model: EVaLP) -> None:
    arguments = {"method": "sir", "proposals": 10, "seed": 3}
    batches = list(model.stream(25, batch_size=10, output="uint8", **arguments))
    assert [len(batch.samples) for batch in batches] == [10, 10, 5]
    assert torch.equal(
        torch.cat([batch.samples for batch in batches]), model.sample(25, output="uint8", **arguments)
    )
    draws = model.sample_with_diagnostics(25, **arguments)
    assert set(draws.diagnostics) == {"ess", "log_mean_weight", "non_finite"}
    assert torch.equal(torch.cat([batch.diagnostics["ess"] for batch in batches]), draws.diagnostics["ess"])
    assert list(model.stream(0)) == []
    empty = model.sample_with_diagnostics(0, **arguments)
    assert empty.diagnostics["ess"].shape == (0,)
    chains = model.sample_with_diagnostics(4, method="langevin", n_steps=2)
    assert set(chains.diagnostics) == {"acceptance"}


def test_low_ess_warns_with_the_number_of_proposals() -> None:
    model = random_model()
    assert model.prior is not None
    with torch.no_grad():
        for parameter in model.prior.energy_net.parameters():
            parameter.mul_(20)
    with pytest.warns(UserWarning, match="of 200 proposals"):
        model.sample(4, method="sir", proposals=200)


def test_vae_alone() -> None:
    model = random_model(EVaLPConfig(VAE_SHAPE))
    noise = philox.normal(4, torch.arange(10), 0, philox.Stream.PROPOSAL, 4)
    torch.testing.assert_close(model.sample(10, method="prior", seed=4, output="latent"), noise)
    cold = model.sample(10, method="prior", seed=4, output="latent", temperature=0.25)
    torch.testing.assert_close(cold, 0.5 * noise)
    for method in ("flow", "sir", "langevin"):
        with pytest.raises(ValueError, match=f"method '{method}' needs a trained prior"):
            model.sample(1, method=method)


def test_posterior(model: EVaLP) -> None:
    images = torch.randint(
        0, 256, (23, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, log_variance = model.posterior(images, batch_size=10)
    with torch.no_grad():
        expected = model.vae.encode(images.float() / 255)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(log_variance, expected[1])
    torch.testing.assert_close(model.posterior(images.float() / 255)[0], mean)
    torch.testing.assert_close(
        model.reconstruct(images, batch_size=7), model.vae.decode(mean).detach(), rtol=0, atol=1e-5
    )
    draws = model.posterior_sample(images, seed=3)
    torch.testing.assert_close(draws, model.posterior_sample(images, seed=3, batch_size=5))
    assert not torch.equal(draws, model.posterior_sample(images, seed=4))


def test_posterior_draws_have_the_posterior_law() -> None:
    """Guards against exp(log_variance) taken for the deviation."""
    n = 20_000
    mean, log_variance = torch.full((n, 2), 3.0), torch.tensor([-2.0, 1.0]).expand(n, 2)
    draws = draw_posterior(mean, log_variance, torch.arange(n), seed=0, step=5)
    deviation = torch.exp(0.5 * log_variance[0])
    assert ((draws.mean(0) - 3).abs() < 4 * deviation / math.sqrt(n)).all()
    assert ((draws.std(0) / deviation - 1).abs() < 4 * math.sqrt(0.5 / n)).all()
    rows = torch.tensor([7, 19_999])
    again = draw_posterior(mean[rows], log_variance[rows], rows, seed=0, step=5)
    assert torch.equal(again, draws[rows])
    assert not torch.equal(draw_posterior(mean[rows], log_variance[rows], rows, seed=0, step=6), again)


ACTNORM = EVaLPConfig(
    VAE_SHAPE, PriorConfig(FlowConfig(4, 2, 32, normalization="actnorm"), EnergyConfig(4, 32))
)


@pytest.mark.parametrize("config", [SHAPE, ACTNORM, EVaLPConfig(VAE_SHAPE)], ids=["whole", "actnorm", "vae"])
def test_save_and_load(config: EVaLPConfig, tmp_path: Path) -> None:
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    loaded = EVaLP.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.info == model.info
    assert not loaded.training
    method = "prior" if config.prior is None else "sir"
    options = OPTIONS[method]
    assert torch.equal(loaded.sample(8, method=method, **options), model.sample(8, method=method, **options))
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: evalp-fast\n")
    assert "- seed: 3" in card
    assert f"{sum(p.numel() for p in model.vae.parameters())}" in card


def test_a_run_gives_its_best_model(model: EVaLP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "best")
    (tmp_path / "config.json").write_text('{"method": "vae", "config": {}}')
    assert torch.equal(EVaLP.from_pretrained(tmp_path).sample(3), model.sample(3))


def test_failed_save_keeps_the_old_model(model: EVaLP, tmp_path: Path, monkeypatch) -> None:
    model.save_pretrained(tmp_path)
    other = random_model()
    with torch.no_grad():
        other.vae.from_latent.weight.add_(1.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(EVaLP.from_pretrained(tmp_path).sample(3), model.sample(3))
    assert not list(tmp_path.glob(".*tmp"))


def edit(path: Path, change) -> None:
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_broken_models_are_named(model: EVaLP, tmp_path: Path) -> None:
    def fresh() -> Path:
        model.save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    with pytest.raises(FileError, match="unknown model 'no-such-model'"):
        EVaLP.from_pretrained("no-such-model")
    with pytest.raises(FileError, match="holds no model"):
        EVaLP.from_pretrained(tmp_path)

    edit(fresh() / "config.json", lambda d: d.update(format_version=99))
    with pytest.raises(FileError, match="format version 99, this version of evalp-fast reads 1"):
        EVaLP.from_pretrained(tmp_path / "m")
    edit(fresh() / "config.json", lambda d: d["model"]["vae"].update(depth=3))
    with pytest.raises(FileError, match="unknown key 'depth' for VAEConfig"):
        EVaLP.from_pretrained(tmp_path / "m")
    edit(fresh() / "config.json", lambda d: d.pop("model"))
    with pytest.raises(FileError, match="does not describe a model"):
        EVaLP.from_pretrained(tmp_path / "m")
    edit(fresh() / "config.json", lambda d: d["model"]["prior"]["flow"].update(hidden=33))
    with pytest.raises(FileError, match=r"does not fit config\.json: size mismatch for prior\.flow"):
        EVaLP.from_pretrained(tmp_path / "m")
    (fresh() / "config.json").write_text("{")
    with pytest.raises(FileError, match="not valid JSON"):
        EVaLP.from_pretrained(tmp_path / "m")

    weights = fresh() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileError, match="truncated, corrupt, or not a safetensors file"):
        EVaLP.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "gibbs"}, ValueError, "method must be one of prior, flow, sir, langevin"),
        ({"output": "png"}, ValueError, "output must be one of float, uint8, latent"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
        ({"steps": 3}, TypeError, "unknown sampling option 'steps'"),
        ({"n": -1}, ValueError, "n must be at least 0"),
        ({"n": 1.5}, TypeError, "n must be an int"),
        ({"start": -1}, ValueError, "start must be at least 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"method": "sir", "proposals": 0}, ValueError, "proposals must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error, message: str, model: EVaLP) -> None:
    with pytest.raises(error, match=message):
        model.sample(**({"n": 4} | arguments))


def test_parts_must_fit() -> None:
    with pytest.raises(ValueError, match=r"prior.flow.dim 4 must be vae.latent_dim 5"):
        EVaLPConfig(VAEConfig(latent_dim=5), SHAPE.prior)


def test_shipped_models_are_models() -> None:
    for name in shipped_models():
        assert (pipeline._SHIPPED / name / "model.safetensors").is_file()
        assert EVaLP.from_pretrained(name).sample(1, output="uint8").dtype == torch.uint8


def test_hub_ids_ask_the_hub(monkeypatch, model: EVaLP, tmp_path: Path) -> None:
    asked = []

    def download(name: str, **options) -> str:
        asked.append((name, options["revision"]))
        return str(tmp_path)

    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pipeline, "snapshot_download", download)
    loaded = EVaLP.from_pretrained("user/model", revision="v1")
    assert asked == [("user/model", "v1")]
    assert torch.equal(loaded.sample(2), model.sample(2))


def test_unreachable_hub_is_an_error_of_one_line(monkeypatch) -> None:
    def download(name: str, **options) -> str:
        raise OSError("connection refused")

    monkeypatch.setattr(pipeline, "snapshot_download", download)
    with pytest.raises(FileError, match=r"cannot load 'user/model' from the hub \(.*connection refused"):
        EVaLP.from_pretrained("user/model")


def test_describe_counts_every_parameter(model: EVaLP) -> None:
    described = model.describe()
    counted = sum(described[part]["parameters"] for part in ("vae", "flow", "energy"))
    assert counted == sum(p.numel() for p in model.parameters())
    assert described["energy"]["kl_weight"] == 0.5
    assert random_model(EVaLPConfig(VAE_SHAPE)).describe()["flow"] is None


def test_compile_changes_samples_by_rounding_only(model: EVaLP) -> None:
    plain = model.sample(20, method="flow")
    compiled = copy.deepcopy(model).compile(backend="aot_eager")
    torch.testing.assert_close(compiled.sample(20, method="flow"), plain, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_compiled_model_has_its_own_weights(model: EVaLP) -> None:
    """Guards against averages of weights that are decoded with those of the model they were copied from."""
    compiled = copy.deepcopy(model).compile(backend="aot_eager")
    images = compiled.sample(4)
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in twin.vae.parameters():
            parameter.zero_()
    assert torch.equal(twin.sample(4), torch.full_like(images, 0.5))
    assert torch.equal(twin.reconstruct(images), torch.full_like(images, 0.5))
    assert torch.equal(compiled.sample(4), images)
    assert torch.equal(pickle.loads(pickle.dumps(compiled)).sample(4), images)
    whole = torch.compile(copy.deepcopy(compiled).reconstruct, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(images), compiled.reconstruct(images))
    compiled.vae = twin.vae
    assert torch.equal(compiled.sample(4), torch.full_like(images, 0.5))


def test_compile_without_a_compiler_stays_eager_and_says_so_once(
    model: EVaLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_missing_compiler", lambda kind: "no C++ compiler was found")
    monkeypatch.setattr(launch, "_eager_on", set())
    eager = copy.deepcopy(model).compile()
    with pytest.warns(RuntimeWarning, match="not used on cpu.* no C.. compiler") as caught:
        samples = [eager.sample(20, method=method) for method in ("flow", "sir")]
    assert len(caught) == 1
    assert torch.equal(samples[0], model.sample(20, method="flow"))
