"""What a model's samples are worth: measured against held-out data, method by method.

`Reference` is what they are measured against; it fits in a megabyte, so that it can lie beside a model and an
evaluation needs no data. `evaluate_model` measures, `format_report` prints.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from evalp_fast.files import FileError, load_safetensors, read_metadata, save_safetensors_atomic
from evalp_fast.images import to_uint8
from evalp_fast.kernels import philox
from evalp_fast.metrics.features import FeatureExtractor
from evalp_fast.metrics.frechet import FeatureStatistics, frechet_distance, frechet_interval
from evalp_fast.metrics.mmd import mmd2
from evalp_fast.metrics.neighbours import memorisation
from evalp_fast.models.precision import Precision
from evalp_fast.pipeline import EVaLP, draw_posterior
from evalp_fast.priors import METHODS, Method

REFERENCE_FILE = "reference.safetensors"
_FORMAT = "1"
# The steps of the noise for the held-out and the training posterior: training itself stays below 2^31, where
# its validation is. Two steps, because row i of both would otherwise have the same noise.
_HELD_OUT_STEP, _TRAIN_STEP = 2**31 + 1, 2**31 + 2
_ROWS = 10_000
_KEPT_IMAGES = 1000
_CHUNK = 1000
# The bootstrap of a larger covariance (Inception's: 2,048) takes hours on a CPU.
_LARGEST_BOOTSTRAP = 512

# Chains are adjusted, so that what is measured is the prior and not the bias of a step size.
LANGEVIN: dict[str, Any] = {"n_steps": 60, "step_size": 0.1, "adjusted": True}

Measured = dict[str, float]
"""`value`, and the ends `low` and `high` of its 95 % interval where there is one."""


@dataclass(frozen=True)
class Reference:
    """What a model is compared with. Made by `from_data`, kept beside the model by `save`.

    Latents are those of the model's own VAE. They are rounded to float16, a hundredth of the width of a
    posterior at most, so that a saved reference measures the same numbers.

    Attributes:
        name: the data, in words.
        mean, log_variance: of q(z|x) of the test images, float32 `[M, D]`.
        train_draws: draws of q(z|x) of training images, `[M', D]`: what MMD² between two halves of the
            aggregate posterior can reach. None where there were no training images.
        vae: digest of the VAE that encoded.
        features: name of the feature space, or None.
        probe: its features of fixed noise, by which its weights are recognised.
        statistics: of the test images in that space.
        reconstructions: Fréchet distance of the VAE's reconstructions of the test images to these.
    """

    name: str
    mean: Tensor
    log_variance: Tensor
    train_draws: Tensor | None
    vae: str
    features: str | None = None
    probe: Tensor | None = None
    statistics: FeatureStatistics | None = None
    reconstructions: Measured | None = None

    @classmethod
    def from_data(
        cls,
        model: EVaLP,
        test_images: Tensor,
        train_images: Tensor | None = None,
        *,
        name: str,
        extractor: FeatureExtractor | None = None,
        rows: int = _ROWS,
        progress: bool = False,
    ) -> "Reference":
        """Encode, and extract features.

        Args:
            model: whose VAE encodes and reconstructs.
            test_images: uint8 `[N, C, H, W]`, held out from training; the first `rows` are used.
            train_images: uint8; `rows` at even spacing are used.
            name: what to call the data in a report.
            extractor: the feature space of the Fréchet distance; None leaves it out.
            rows: how many images.
            progress: show a progress bar.

        Raises:
            ValueError, TypeError: images that the model or the extractor does not take.
        """
        test_images = test_images[:rows]
        if len(test_images) < 2:
            raise ValueError(f"a reference needs at least 2 test images, got {len(test_images)}")
        mean, log_variance = (_half(part) for part in model.posterior(test_images))
        train_draws = None
        if train_images is not None:
            chosen = torch.linspace(0, len(train_images) - 1, min(rows, len(train_images))).round().long()
            parts = model.posterior(train_images[chosen])
            index = torch.arange(len(chosen), device=parts[0].device)
            train_draws = _half(draw_posterior(*parts, index, seed=0, step=_TRAIN_STEP))
        reference = cls(name, mean, log_variance, train_draws, digest_of_vae(model))
        if extractor is None:
            return reference
        statistics = extractor.statistics(
            tqdm(test_images.split(_CHUNK), "test images", unit="k", disable=not progress, leave=False)
        )
        rebuilt = (to_uint8(model.reconstruct(chunk)) for chunk in test_images.split(_CHUNK))
        distance = _Distance(extractor, statistics)
        for chunk in tqdm(
            rebuilt,
            "reconstructions",
            total=-(-len(test_images) // _CHUNK),
            unit="k",
            disable=not progress,
            leave=False,
        ):
            distance.update(chunk)
        return dataclasses.replace(
            reference,
            features=extractor.name,
            probe=_probe(extractor),
            statistics=statistics,
            reconstructions=distance.measure(seed=0),
        )

    def held_out(self, device: str | torch.device = "cpu") -> Tensor:
        """Draws of the aggregate posterior of the test images, one each, always the same: `[M, D]`."""
        index = torch.arange(len(self.mean))
        draws = draw_posterior(self.mean, self.log_variance, index, seed=0, step=_HELD_OUT_STEP)
        return draws.to(device)

    def check(self, model: EVaLP, extractor: FeatureExtractor | None = None) -> None:
        """Raise `FileError` unless this is a reference of `model`, and of the weights of `extractor`."""
        if self.vae != digest_of_vae(model):
            raise FileError("the reference beside the model is that of another VAE: pass --data to renew it")
        if extractor is not None and self.features == extractor.name:
            assert self.probe is not None
            if not torch.allclose(_probe(extractor), self.probe, rtol=1e-2, atol=1e-2):
                raise FileError(
                    f"the reference beside the model was made with other weights of {extractor.name}: "
                    "pass --data to make it anew"
                )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: latents in float16, statistics in float64."""
        tensors = {"mean": self.mean.half(), "log_variance": self.log_variance.half()}
        if self.train_draws is not None:
            tensors["train_draws"] = self.train_draws.half()
        if self.statistics is not None and self.probe is not None:
            tensors["probe"] = self.probe
            tensors |= {f"statistics.{key}": value for key, value in self.statistics.to_dict().items()}
        described = {
            "format": _FORMAT,
            "name": self.name,
            "vae": self.vae,
            "features": self.features,
            "reconstructions": self.reconstructions,
        }
        save_safetensors_atomic(tensors, path, {key: json.dumps(value) for key, value in described.items()})

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            FileError: missing, truncated or corrupt, or of another version.
        """
        tensors, metadata = load_safetensors(path), read_metadata(path)
        try:
            described = {key: json.loads(text) for key, text in metadata.items()}
            if described["format"] != _FORMAT:
                raise FileError(f"{path} has format {described['format']}, this version reads {_FORMAT}")
            prefix = "statistics."
            parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            train_draws = tensors.get("train_draws")
            return cls(
                described["name"],
                tensors["mean"].float(),
                tensors["log_variance"].float(),
                None if train_draws is None else train_draws.float(),
                described["vae"],
                described["features"],
                tensors.get("probe"),
                FeatureStatistics.from_dict(parts) if parts else None,
                described["reconstructions"],
            )
        except FileError:
            raise
        except (KeyError, ValueError) as error:
            raise FileError(f"{path} is not a reference ({error}): pass --data to make it anew") from error


def _half(values: Tensor) -> Tensor:
    """Rounded to float16, in float32 on the CPU."""
    return values.half().float().cpu()


def digest_of_vae(model: EVaLP) -> str:
    """SHA-256 of the VAE's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _probe(extractor: FeatureExtractor) -> Tensor:
    """Features of two images of fixed noise, `[2, dim]`."""
    sizes = zip(extractor.image_shape, (3, 32, 32), strict=True)
    channels, height, width = (size or fallback for size, fallback in sizes)
    words = philox.words(0, torch.arange(2), 0, philox.Stream.BOOTSTRAP, channels * height * width)
    return extractor((words % 256).to(torch.uint8).view(2, channels, height, width)).cpu()


class _Distance:
    """The Fréchet distance of images that arrive in batches. Their features are kept, for the interval."""

    def __init__(self, extractor: FeatureExtractor, reference: FeatureStatistics):
        self.extractor, self.reference = extractor, reference
        self.statistics = FeatureStatistics(extractor.dim)
        self.bootstrap = extractor.dim <= _LARGEST_BOOTSTRAP or extractor.device.type != "cpu"
        self.features: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        features = self.extractor(images)
        self.statistics.update(features)
        if self.bootstrap:
            self.features.append(features)

    def measure(self, seed: int) -> Measured:
        measured = {"value": frechet_distance(self.statistics, self.reference)}
        if self.bootstrap:
            interval = frechet_interval(torch.cat(self.features), self.reference, seed=seed)
            measured |= {"low": interval.low, "high": interval.high}
        return measured


class MethodResult(NamedTuple):
    """What `evaluate_method` found.

    Attributes:
        metrics: by name; those with an interval are `Measured`.
        images: the first images, uint8 `[min(n, 1000), C, H, W]` on the CPU.
    """

    metrics: dict[str, Any]
    images: Tensor


def evaluate_method(
    model: EVaLP,
    method: Method,
    reference: Reference | None = None,
    *,
    n: int = 10_000,
    seed: int = 0,
    proposals: int = 100,
    precision: Precision | None = None,
    extractor: FeatureExtractor | None = None,
    train_images: Tensor | None = None,
    control: Tensor | None = None,
    progress: bool = False,
) -> MethodResult:
    """Draw `n` images by one method, in a stream, and measure them.

    Args:
        model: in evaluation mode, as `EVaLP.from_pretrained` gives it.
        method: `"prior"`, `"flow"`, `"sir"` or `"langevin"` (with the options `LANGEVIN`).
        reference: what to measure against; without one only speed and diagnostics are reported.
        n: images, at least 2. The same numbers of the series `seed` for every method.
        seed, proposals: of sampling.
        precision: of sampling and decoding; by default "ieee", so that numbers can be compared.
        extractor: the feature space of `reference`.
        train_images, control: for the memorisation check, uint8 on the CPU: is a sample closer to a training
            image than `control` images, which are new? The control is best the reconstructions of
            held-out images: it has the model's blur, which by itself brings an image closer to all others.
        progress: show a progress bar.

    Returns:
        `MethodResult` with the metrics `samples_per_second` (latents and decoder, after one warm-up tile);
        `mmd2` of the latents to draws of the held-out aggregate posterior; the Fréchet distance, named for
        its features; `ess` and `lowest_ess` of `proposals` and `non_finite_weights` (sir); `acceptance`
        (langevin); `memorised_share`, the share of samples closer to a training image than 99 % of the
        control, and `nearest_ratio`, their median distance over the control's.

    Raises:
        ValueError: naming the argument.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    precision = "ieee" if precision is None else precision
    options = {"sir": {"proposals": proposals}, "langevin": LANGEVIN}.get(method, {})
    arguments: dict[str, Any] = {"method": method, "seed": seed, "precision": precision, **options}
    _decode(model, next(iter(model.stream(1, output="latent", **arguments))).samples, precision)

    distance = None
    if extractor is not None and reference is not None and reference.statistics is not None:
        distance = _Distance(extractor, reference.statistics)
    latents: list[Tensor] = []
    images: list[Tensor] = []
    diagnostics: dict[str, list[Tensor]] = {}
    seconds, missing = 0.0, _KEPT_IMAGES
    stream = iter(model.stream(n, output="latent", **arguments))
    with tqdm(total=n, desc=f"sample ({method})", unit=" images", disable=not progress, leave=False) as bar:
        while True:
            _wait(model.device)
            begin = time.perf_counter()
            draws = next(stream, None)
            if draws is None:
                break
            batch = _decode(model, draws.samples, precision)
            _wait(model.device)
            seconds += time.perf_counter() - begin
            bar.update(len(batch))
            latents.append(draws.samples)
            for name, values in draws.diagnostics.items():
                diagnostics.setdefault(name, []).append(values)
            if distance is not None:
                distance.update(batch)
            if missing > 0:
                images.append(batch[:missing].cpu())
                missing -= len(images[-1])
    kept = torch.cat(images)

    metrics: dict[str, Any] = {}
    if distance is not None:
        metrics[distance.extractor.distance_name] = distance.measure(seed)
    if reference is not None:
        metrics["mmd2"] = _mmd2(torch.cat(latents), reference.held_out(model.device))
    if "ess" in diagnostics:
        ess = torch.cat(diagnostics["ess"])
        metrics |= {"ess": float(ess.mean()), "lowest_ess": float(ess.min())}
        metrics["non_finite_weights"] = int(torch.cat(diagnostics["non_finite"]).sum())
    if "acceptance" in diagnostics:
        metrics["acceptance"] = float(torch.cat(diagnostics["acceptance"]).mean())
    if train_images is not None and control is not None:
        found = memorisation(kept, train_images, control)
        metrics |= {"memorised_share": found.fraction_close, "nearest_ratio": found.median_ratio}
    metrics["samples_per_second"] = n / seconds
    return MethodResult(metrics, kept)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _decode(model: EVaLP, latents: Tensor, precision: Precision) -> Tensor:
    return to_uint8(model.vae.decode(latents, precision=precision))


def _mmd2(samples: Tensor, held_out: Tensor) -> Measured:
    found = mmd2(samples, held_out)
    return {"value": found.value, "low": found.low, "high": found.high}


def evaluate_model(
    model: EVaLP,
    reference: Reference | None = None,
    *,
    methods: Sequence[Method] = METHODS,  # type: ignore[assignment]
    n: int = 10_000,
    seed: int = 0,
    proposals: int = 100,
    precision: Precision | None = None,
    extractor: FeatureExtractor | None = None,
    train_images: Tensor | None = None,
    test_images: Tensor | None = None,
    not_measured: Mapping[str, str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a model method by method, and its prior.

    Args:
        model: in evaluation mode.
        methods, n, seed, proposals, precision: see `evaluate_method`. A model without a trained prior is
            measured by `"prior"` alone.
        reference, extractor: see `evaluate_method`.
        train_images, test_images: for the memorisation check, uint8.
        not_measured: what the caller could not provide, and why; repeated in the report.
        progress: show progress bars.

    Returns:
        What a model keeps as `info["metrics"]`: `methods` (the metrics of each), `mmd2_floor` (training
        against held-out posterior draws), `reconstructions` (Fréchet distance of the reconstructed test
        images), `log_partition` (log Z with its interval and variational bounds), `nll` of the held-out
        posterior draws (nats), `conditions`, `not_measured`.

    Raises:
        ValueError: naming the argument, or a reference of other features than `extractor`.
        FileError: a reference of another model.
    """
    left_out = dict(not_measured or {})
    precision = "ieee" if precision is None else precision
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"methods must be of {', '.join(METHODS)}, got {method!r}")
    if model.prior is None:
        for method in methods:
            if method != "prior":
                left_out[method] = "the model has no trained prior"
        methods = ("prior",)
    if reference is not None:
        reference.check(model, extractor)
        found = reference.features
        if extractor is not None and found != extractor.name:
            raise ValueError(f"reference holds features {found}, not {extractor.name}: pass --data")
    control = None
    if train_images is not None and test_images is not None:
        control = to_uint8(model.reconstruct(test_images[:_KEPT_IMAGES])).cpu()

    report: dict[str, Any] = {"methods": {}}
    for method in methods:
        result = evaluate_method(
            model,
            method,
            reference,
            n=n,
            seed=seed,
            proposals=proposals,
            precision=precision,
            extractor=extractor,
            train_images=train_images,
            control=control,
            progress=progress,
        )
        report["methods"][method] = result.metrics
    if reference is not None and reference.reconstructions is not None and extractor is not None:
        report["reconstructions"] = {extractor.distance_name: reference.reconstructions}
    if reference is not None and reference.train_draws is not None:
        report["mmd2_floor"] = mmd2_floor(reference, model.device)
    if model.prior is not None:
        report |= _measure_prior(model, reference, seed)
    report["conditions"] = {
        "images": n,
        "seed": seed,
        "proposals": proposals,
        "langevin": LANGEVIN,
        "precision": precision,
        "reference": "none" if reference is None else reference.name,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if left_out:
        report["not_measured"] = left_out
    return report


def mmd2_floor(reference: Reference, device: str | torch.device = "cpu") -> Measured:
    """MMD² between training and held-out posterior draws: what a perfect prior of the training data has.

    Raises:
        ValueError: the reference has no training draws.
    """
    if reference.train_draws is None:
        raise ValueError("reference has no draws of the training posterior")
    return _mmd2(reference.train_draws.to(device), reference.held_out(device))


@torch.no_grad()
def _measure_prior(model: EVaLP, reference: Reference | None, seed: int) -> dict[str, Any]:
    prior = model.prior
    assert prior is not None
    partition = prior.log_partition(seed=seed)
    report: dict[str, Any] = {"log_partition": partition._asdict()}
    if reference is not None:
        latents = reference.held_out(model.device)
        gaussian = 0.5 * (latents.square().sum(1) + prior.dim * torch.log(torch.tensor(2 * torch.pi)))
        report["nll"] = {
            "gaussian": float(gaussian.double().mean()),
            "flow": -float(prior.flow.log_prob(latents).double().mean()),
            "prior": partition.value - float(prior.log_prob_unnormalized(latents).double().mean()),
        }
    return report


_HEADINGS = {
    "samples_per_second": "images/s",
    "mmd2": "MMD2 x 1e4",
    "ess": "ESS",
    "lowest_ess": "lowest ESS",
    "non_finite_weights": "non-finite",
    "memorised_share": "memorised",
    "nearest_ratio": "nearest",
}


def format_report(report: Mapping[str, Any]) -> str:
    """A report of `evaluate_model` as aligned plain text."""
    rows = dict(report["methods"])
    if "reconstructions" in report:
        rows["(reconstructions)"] = report["reconstructions"]
    if "mmd2_floor" in report:
        rows["(train posterior)"] = {"mmd2": report["mmd2_floor"]}
    lines = [format_table(rows), ""]
    if "log_partition" in report:
        z = report["log_partition"]
        lines.append(
            f"log Z {z['value']:.4f} ({z['low']:.4f} to {z['high']:.4f}), variational bounds "
            f"{z['lower_bound']:.4f} and {z['upper_bound']:.4f}, by {z['n']:,} draws of the flow"
        )
    if "nll" in report:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in report["nll"].items())
        lines.append(f"negative log-likelihood of held-out latents, nats: {shown}")
    if any("memorised_share" in metrics for metrics in report["methods"].values()):
        lines.append(
            "memorised: share of samples closer to a training image than 99 % of the reconstructions of test "
            "images, of which 0.01 are; nearest: median distance to a training image, over theirs"
        )
    if "conditions" in report:
        shown = {key: value for key, value in report["conditions"].items() if key != "langevin"}
        lines.append(", ".join(f"{name} {value}" for name, value in shown.items()))
        chains = report["conditions"]["langevin"]
        lines.append(f"langevin: {chains['n_steps']} Metropolis-adjusted steps of {chains['step_size']}")
    for name, reason in report.get("not_measured", {}).items():
        lines.append(f"not measured: {name}, because {reason}")
    return "\n".join(lines)


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by row and column as aligned plain text."""
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    columns.sort(key=lambda name: name != "samples_per_second")
    table = [["", *(_HEADINGS.get(name, name) for name in columns)]]
    for row, metrics in rows.items():
        table.append([row, *(_cell(name, metrics.get(name)) for name in columns)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(_align(line, widths) for line in table)


def _align(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        scale = 1e4 if name == "mmd2" else 1.0
        shown = f"{scale * value['value']:.4g}"
        if "low" in value:
            shown += f" ({scale * value['low']:.4g} to {scale * value['high']:.4g})"
        return shown
    if name == "samples_per_second":
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


__all__ = [
    "LANGEVIN",
    "REFERENCE_FILE",
    "Measured",
    "MethodResult",
    "Reference",
    "digest_of_vae",
    "evaluate_method",
    "evaluate_model",
    "format_report",
    "format_table",
    "mmd2_floor",
]
