"""What each command of the command line takes and does: a dataclass of its options, with `run`.

torch takes seconds to import, so nothing that needs it is imported before a command runs: its help, and its
errors in arguments, come at once.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

if TYPE_CHECKING:
    import torch

    from evalp_fast.metrics.features import FeatureExtractor
    from evalp_fast.pipeline import EVaLP

Config = TypeVar("Config")
Method = Literal["prior", "flow", "sir", "langevin"]
Precision = Literal["ieee", "tf32", "bf16"]
_Model = Annotated[Positional[str], arg(metavar="MODEL")]
_Switch = FlagCreatePairsOff[bool]
_SAMPLING_OPTIONS = (
    "temperature",
    "proposals",
    "weights",
    "n_steps",
    "step_size",
    "adjusted",
    "space",
    "initial",
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on what was finished and how to go on."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command that computes."""

    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())
    """Show progress bars (by default on a terminal)."""
    debug: _Switch = False
    """Show the traceback of an error."""


_Common = Annotated[Common, arg(name="")]


def _check_file(out: Path | None) -> None:
    """Before the work, not after it: a file cannot be written where a folder is."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: pass the path of a file")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images and write them. Image number i depends on the seed and i alone."""

    model: _Model
    """A model that ships with the package (mnist), a folder, a training run, or a hub id."""
    n: Annotated[int, arg(aliases=["-n"])] = 10_000
    """How many images."""
    method: Method = "flow"
    """prior: the Gaussian, as a plain VAE; flow: one pass of the flow; sir: one of --proposals draws of the
    flow, by its weight; langevin: chains on the prior's energy."""
    out: Path = Path("samples")
    """Folder to write to."""
    format: Literal["png", "npz", "npy", "grid"] = "png"
    """png: a file per image; npz, npy: one array uint8 [N, H, W, C]; grid: one picture of the first 256."""
    seed: int = 0
    """The series that images are drawn from."""
    start: int = 0
    """Number of the first image: goes on with a series."""
    batch_size: int | None = None
    """Images held in memory at once. It changes no image."""
    precision: Precision | None = None
    """Of matrix products. By default bf16 where that is faster and as good, else ieee, which is float32."""
    compile: _Switch = False
    """Compile the decoder first, which takes seconds. Changes images by rounding."""
    temperature: float = 1.0
    """T of the law p(z)^(1/T)."""
    proposals: int = 100
    """(sir) Draws of the flow per image."""
    weights: Literal["exact", "energy"] = "exact"
    """(sir) exact: density ratio of prior and flow; energy: exp(-f) alone, as in the published code."""
    n_steps: int = 60
    """(langevin) Steps of each chain."""
    step_size: float = 0.1
    """(langevin) Step size η in z - (η/2)∇U + √η ξ."""
    adjusted: bool = False
    """(langevin) Metropolis-adjusted: exact at any step size."""
    space: Literal["latent", "noise"] = "noise"
    """(langevin) Where chains move: in z, or in the flow's noise u."""
    initial: Literal["flow", "prior"] = "flow"
    """(langevin) Where chains start."""
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        import torch

        from evalp_fast.images import GRID_LIMIT, write_images
        from evalp_fast.pipeline import EVaLP
        from evalp_fast.priors import warn_of_low_ess

        model = EVaLP.from_pretrained(self.model, device=_device(self.common.device))
        if self.compile:
            model.compile()
        stream = model.stream(
            self.n,
            method=self.method,
            seed=self.seed,
            start=self.start,
            batch_size=self.batch_size,
            precision=self.precision,
            output="uint8",
            device="cpu",
            progress=self.common.progress,
            **{name: getattr(self, name) for name in _SAMPLING_OPTIONS},
        )
        drawn, written, drawing = 0, 0, 0.0
        sums: dict[str, float] = {}
        lowest_ess = float("inf")
        how = ""

        def batches() -> "Iterator[torch.Tensor]":
            nonlocal drawn, written, drawing, lowest_ess, how
            while True:
                begin = time.perf_counter()
                draws = next(stream, None)
                drawing += time.perf_counter() - begin
                if draws is None:
                    return
                drawn += len(draws.samples)
                if "precision" in draws.info:
                    how = f" in {draws.info['precision']}"
                for name, values in draws.diagnostics.items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                if "ess" in draws.diagnostics:
                    lowest_ess = min(lowest_ess, float(draws.diagnostics["ess"].min()))
                yield draws.samples
                written += len(draws.samples)  # the writer has come back for more

        begin = time.perf_counter()
        try:
            path = write_images(batches(), self.out, format=self.format, count=self.n, start=self.start)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(self._what_is_left(written)) from interrupt
        seconds = time.perf_counter() - begin

        shown = f"the first {min(drawn, GRID_LIMIT):,}" if self.format == "grid" else f"{self.n:,}"
        print(f"{path}: {shown} images, method {self.method}, seed {self.seed}, from number {self.start}")
        with_writing = f"{drawn / seconds:,.0f} images/s with writing"
        print(f"{drawn / drawing:,.0f} images/s drawn and decoded{how}, {with_writing}")
        if "ess" in sums:
            mean, bad = sums["ess"] / drawn, int(sums["non_finite"])
            print(
                f"effective sample size of {self.proposals} proposals: mean {mean:.1f}, lowest "
                f"{lowest_ess:.1f}; non-finite weights: {bad:,} of {drawn * self.proposals:,}"
            )
            warn_of_low_ess(torch.tensor(mean), self.proposals)
        if self.adjusted and "acceptance" in sums:
            print(f"acceptance: {sums['acceptance'] / drawn:.3f}")

    def _what_is_left(self, written: int) -> str:
        if self.format != "png":
            return "nothing was written"
        left = f"--start {self.start + written} -n {self.n - written} draws the others"
        return f"{written:,} images and perhaps a part of the next batch are in {self.out}; {left}"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model: Fréchet distance, MMD² of latents, ESS, log Z, likelihood, memorisation.

    Fréchet distances compare with real test images. They come with the model where it has a reference file;
    otherwise, or with --data, they are read from the data.
    """

    model: _Model
    """As for sample."""
    n: Annotated[int, arg(aliases=["-n"])] = 10_000
    """Images per method."""
    methods: tuple[Method, ...] = ("prior", "flow", "sir", "langevin")
    """Methods of sampling to measure."""
    features: Literal["auto", "mnist_cnn", "cifar_resnet56", "inception", "none"] = "auto"
    """Feature space of the Fréchet distance. inception gives FID; auto is mnist_cnn for 32x32 grey images and
    inception for others."""
    weights: Path | None = None
    """File with the weights of the features' network (inception: torch-fidelity's, else it is downloaded)."""
    data: str | None = None
    """mnist, cifar10, celeba64, a folder, or a .npy/.npz file. By default the reference beside the model,
    which leaves out memorisation; where there is none, what the model was trained on."""
    skip_broken: _Switch = False
    """Leave out image files that cannot be read."""
    seed: int = 0
    """Of all draws."""
    proposals: int = 100
    """(sir) Draws of the flow per image."""
    precision: Precision = "ieee"
    """Of matrix products."""
    out: Path | None = None
    """Also write the report to this JSON file."""
    json: _Switch = False
    """Print the report as JSON instead of a table."""
    write: _Switch = False
    """Keep the metrics in the model's config.json and model card, and what it was compared with beside it."""
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        from evalp_fast.evaluation import REFERENCE_FILE, evaluate_model, format_report
        from evalp_fast.files import write_json_atomic
        from evalp_fast.pipeline import EVaLP, model_folder, shipped_models

        if self.n < 2:
            raise ValueError(f"n must be at least 2, got {self.n}")
        _check_file(self.out)
        folder = model_folder(self.model)
        if self.write and not (Path(self.model).is_dir() or self.model in shipped_models()):
            raise ValueError(f"--write needs a model in a folder, {self.model} is on the hub")
        model = EVaLP.from_pretrained(folder, device=_device(self.common.device))
        gathered = self._gather(model, folder / REFERENCE_FILE)
        reference, extractor, train_images, test_images, not_measured = gathered
        report = evaluate_model(
            model,
            reference,
            methods=self.methods,
            n=self.n,
            seed=self.seed,
            proposals=self.proposals,
            precision=self.precision,
            extractor=extractor,
            train_images=train_images,
            test_images=test_images,
            not_measured=not_measured,
            progress=self.common.progress,
        )
        print(json.dumps(report, indent=2) if self.json else format_report(report))
        if self.out is not None:
            write_json_atomic(report, self.out)
        if self.write:
            if reference is not None:
                reference.save(folder / REFERENCE_FILE)
            model.info["metrics"] = report
            model.save_pretrained(folder)

    def _gather(
        self, model: "EVaLP", reference_file: Path
    ) -> "tuple[Any, FeatureExtractor | None, torch.Tensor | None, torch.Tensor | None, dict[str, str]]":
        """Reference, its features, the images for the memorisation check, and what is missing and why."""
        from evalp_fast.data import DataError, load_dataset
        from evalp_fast.evaluation import Reference
        from evalp_fast.metrics.features import features

        shape = model.config.vae
        name = self.features
        if name == "auto":
            name = "mnist_cnn" if (shape.image_channels, shape.image_size) == (1, 32) else "inception"
        extractor = None
        if name != "none":
            extractor = features(name, weights=self.weights, device=model.device)
        missing = {} if extractor else {"the Fréchet distance": "--features is none"}
        if self.data is None and reference_file.exists():
            reference = Reference.load(reference_file)
            if extractor is None or reference.features == extractor.name:
                reason = "it needs the training images: pass --data"
                return reference, extractor, None, None, missing | {"memorisation": reason}
        stages = model.info.get("training", [])
        source = self.data or (stages[0].get("source") if stages else None)
        everything = "Fréchet distance, MMD², likelihood, memorisation"
        if source is None:
            reason = "the model does not say what it was trained on: pass --data"
            return None, None, None, None, {everything: reason}
        try:
            train, test = (
                load_dataset(
                    source,
                    split=split,
                    image_size=shape.image_size,
                    channels=shape.image_channels,
                    skip_broken=self.skip_broken,
                    progress=self.common.progress,
                )
                for split in ("train", "test")
            )
        except (DataError, ImportError) as error:
            if self.data is not None:
                raise
            return None, None, None, None, {everything: f"{source} cannot be read ({one_line(error)})"}
        reference = Reference.from_data(
            model,
            test.images,
            train.images,
            name=f"{min(len(test), 10_000):,} test images of {test.name}",
            extractor=extractor,
            progress=self.common.progress,
        )
        return reference, extractor, train.images, test.images, missing


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what is in a model or a training run, how it was trained, and its metrics."""

    model: _Model
    """As for sample."""
    json: _Switch = False
    """Print JSON."""
    debug: _Switch = False
    """Show the traceback of an error."""

    def run(self) -> None:
        from evalp_fast.files import FileError, read_json
        from evalp_fast.pipeline import EVaLP, model_folder

        found: dict[str, Any] = {}
        run = Path(self.model)
        if (run / "config.json").is_file():
            config = read_json(run / "config.json")
            if isinstance(config, dict) and "method" in config:
                found["run"] = config | _progress_of(run)
        try:
            folder = model_folder(self.model)
        except FileError:
            if not found:
                raise
        else:
            model = EVaLP.from_pretrained(folder)
            found |= {"folder": str(folder), "parts": model.describe(), **model.info}
        print(json.dumps(found, indent=2, default=str) if self.json else "\n".join(_outline(found)))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Draw digits with the shipped model by four methods, measure each, and write a picture."""

    n: Annotated[int, arg(aliases=["-n"])] = 10_000
    """Images per method."""
    out: Path = Path("demo.png")
    """The picture."""
    seed: int = 0
    """Of all draws."""
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        if self.n < 2:
            raise ValueError(f"n must be at least 2, got {self.n}")
        _check_file(self.out)
        from evalp_fast.demo import run_demo

        run_demo(
            n=self.n,
            out=self.out,
            seed=self.seed,
            device=_device(self.common.device),
            progress=self.common.progress,
        )


@dataclass(frozen=True, kw_only=True)
class TrainVAE(Generic[Config]):
    """Train a VAE: stage one."""

    preset: str = "mnist"
    """What to start from; the options below override its values."""
    out: Path | None = None
    """Folder of the run; by default runs/PRESET-vae."""
    resume: _Switch = False
    """Go on with the run in --out; the other options must be the same."""
    config: Annotated[Config, arg(name="")]
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        from evalp_fast.training.vae import train_vae

        out = self.out or Path("runs") / f"{self.preset}-vae"
        begin = time.perf_counter()
        with _resumable(out):
            train_vae(
                self.config,  # type: ignore[arg-type]
                out,
                resume=self.resume,
                device=_device(self.common.device),
                progress=self.common.progress,
            )
        _finished(out, begin, f"evalp-fast train prior --vae {out}")


@dataclass(frozen=True, kw_only=True)
class TrainPrior(Generic[Config]):
    """Train the flow and the energy of a VAE's latent prior: stage two."""

    vae: str
    """Run or model whose encoder and decoder are used."""
    preset: str = "mnist"
    """What to start from; the options below override its values."""
    out: Path | None = None
    """Folder of the run; by default runs/PRESET-prior."""
    resume: _Switch = False
    """Go on with the run in --out; the other options must be the same."""
    data: str | None = None
    """Images; by default those that the VAE was trained on."""
    limit: int | None = None
    """Use only the first images."""
    skip_broken: _Switch = False
    """Leave out image files that cannot be read."""
    config: Annotated[Config, arg(name="")]
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        from evalp_fast.training.evalp import train_evalp_prior
        from evalp_fast.training.residual import ResidualTraining, train_residual_prior

        out = self.out or Path("runs") / f"{self.preset}-prior"
        train = train_residual_prior if isinstance(self.config, ResidualTraining) else train_evalp_prior
        begin = time.perf_counter()
        with _resumable(out):
            train(
                self.config,  # type: ignore[arg-type]
                self.vae,
                out,
                data=self.data,
                limit=self.limit,
                skip_broken=self.skip_broken,
                resume=self.resume,
                device=_device(self.common.device),
                progress=self.common.progress,
            )
        _finished(out, begin, f"evalp-fast evaluate {out}")


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(Generic[Config]):
    """Train the MNIST classifier whose features fd_mnist_cnn is measured in."""

    data: Path | None = None
    """Folder that holds MNIST/raw; by default $EVALP_DATA."""
    out: Path = Path("runs/mnist-cnn")
    """Folder for model.safetensors and config.json."""
    config: Annotated[Config, arg(name="")]
    common: _Common = field(default_factory=Common)

    def run(self) -> None:
        from evalp_fast.training.classifier import train_mnist_classifier
        from evalp_fast.training.run import command_line

        data = self.data or os.environ.get("EVALP_DATA")
        if data is None:
            raise ValueError("data must be given: pass --data DIR or set EVALP_DATA; it must hold MNIST/raw")
        result = train_mnist_classifier(
            data,
            self.out,
            self.config,  # type: ignore[arg-type]
            device=_device(self.common.device),
            progress=self.common.progress,
            command=command_line(),
        )
        print(f"{self.out}: test accuracy {result['test_accuracy']:.4f} after {result['seconds']:.0f} s")


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= found:
        raise ValueError(f"device {name} is not there, {found} GPUs were found: pass --device cpu")
    return torch.device(name)


def _finished(out: Path, begin: float, next_step: str) -> None:
    print(f"{out}: done after {(time.perf_counter() - begin) / 60:.1f} minutes. Next: {next_step}")


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        message = f"what was saved is in {out}; the same command with --resume goes on"
        raise Interrupted(message) from interrupt


def _progress_of(run: Path) -> dict[str, Any]:
    """The last line of a run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return {"evaluations": len(lines), "last": json.loads(lines[-1])}
    except (OSError, IndexError, json.JSONDecodeError):
        return {"evaluations": 0}


def _outline(value: Any, indent: str = "") -> Iterator[str]:
    """Nested JSON values as indented lines."""
    for key, item in value.items():
        if isinstance(item, dict) and any(isinstance(inner, dict | list) for inner in item.values()):
            yield f"{indent}{key}:"
            yield from _outline(item, indent + "  ")
        elif isinstance(item, dict):
            shown = ", ".join(f"{name} {_plain(inner)}" for name, inner in item.items())
            yield f"{indent}{key}: {shown}"
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for number, inner in enumerate(item, start=1):
                yield f"{indent}{key} {number}:"
                yield from _outline(inner, indent + "  ")
        else:
            yield f"{indent}{key}: {_plain(item)}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "-".join(_plain(item) for item in value)
    return "none" if value is None else str(value)


def one_line(error: BaseException) -> str:
    """Its message without line breaks, or its name."""
    return " ".join(str(error).split()) or type(error).__name__


__all__ = [
    "Common",
    "Demo",
    "Evaluate",
    "Info",
    "Interrupted",
    "Sample",
    "TrainClassifier",
    "TrainPrior",
    "TrainVAE",
    "one_line",
]
