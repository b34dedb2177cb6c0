"""`EVaLP`: a VAE and its energy-based prior, from latents to images, and to and from disk."""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from evalp_fast.configuration import from_dict
from evalp_fast.files import (
    FileError,
    atomic_write,
    load_safetensors,
    read_json,
    save_safetensors_atomic,
    write_json_atomic,
)
from evalp_fast.images import to_uint8
from evalp_fast.kernels import philox
from evalp_fast.kernels.checks import compiling
from evalp_fast.kernels.launch import compiled
from evalp_fast.kernels.matmul_precision import matmul_precision
from evalp_fast.kernels.mlp_reference import without_autocast
from evalp_fast.kernels.processor import precision_on, quick_precision
from evalp_fast.model_card import model_card
from evalp_fast.models.evaluation_mode import each_in_evaluation_mode, evaluation_mode
from evalp_fast.models.precision import Precision, check_precision
from evalp_fast.models.vae import VAE, VAEConfig
from evalp_fast.priors import (
    METHODS,
    EnergyPrior,
    Method,
    PriorConfig,
    SamplingOptions,
    sampling_options,
    warn_of_low_ess,
)
from evalp_fast.samplers.base import (
    Draws,
    Sampler,
    check_count,
    concatenate,
    default_tile,
    on_host,
    rebatch,
    tiles,
)
from evalp_fast.samplers.direct import GaussianSampler

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_SHIPPED = Path(__file__).parent / "pretrained"

Output = Literal["float", "uint8", "latent"]
OUTPUTS: tuple[str, ...] = typing.get_args(Output)


@dataclass(frozen=True)
class EVaLPConfig:
    """Shape of an `EVaLP`; `prior=None` is a VAE whose prior has not been trained."""

    vae: VAEConfig
    prior: PriorConfig | None = None

    def __post_init__(self) -> None:
        if self.prior is not None and self.prior.flow.dim != self.vae.latent_dim:
            raise ValueError(
                f"prior.flow.dim {self.prior.flow.dim} must be vae.latent_dim {self.vae.latent_dim}"
            )


class EVaLP(nn.Module, ModelHubMixin):
    """A VAE whose prior is energy-based, with a normalizing flow as its sampler (Dutta et al. 2025).

    Attributes:
        vae: encoder and decoder.
        prior: the latent prior, or None for a VAE alone (only `method="prior"` can be sampled).
        info: how it was trained: data, command, seed, time, metrics; saved with the model.
    """

    # Of the class, so that a model that was pickled without them has them.
    _compile_options: dict[str, Any] | None = None
    _compiled_decode: Callable[..., Tensor] | None = None

    def __init__(self, config: EVaLPConfig, info: Mapping[str, Any] | None = None):
        super().__init__()
        self.config = config
        self.info: dict[str, Any] = dict(info or {})
        self.vae = VAE(config.vae)
        self.prior = None if config.prior is None else EnergyPrior(config.prior)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.vae.to_posterior.weight.device

    def compile(self, **options: Any) -> "EVaLP":  # type: ignore[override]
        """Have samples and reconstructions decoded by `torch.compile`; returns the model, changed in place.

        It takes seconds. On Zen 4 images of the flow then come 1.07 times as fast in float32, and no faster
        in bfloat16 (bench/results, 2026-11-21); on a GPU nobody has measured it. (Flow and energy need none
        of it: they are kernels on a GPU, and on a CPU one call of oneDNN a layer.) Where torch cannot compile
        (on a CPU: no C++ compiler) the decoder stays as it is and one warning says so. Compiled images differ
        from the others by rounding.

        Args:
            options: of `torch.compile`.
        """
        self._compiled_decode, self._compile_options = None, options
        return self

    def _decode(self, z: Tensor, precision: Precision | None = None) -> Tensor:
        """As `self.vae` does, compiled where `compile` was called."""
        if self._compile_options is None or compiling():
            return self.vae.decode(z, precision=precision)
        if self._compiled_decode is None:
            self._compiled_decode = compiled(self._decode_plainly, **self._compile_options)
        return self._compiled_decode(z, precision)

    def _decode_plainly(self, z: Tensor, precision: Precision | None) -> Tensor:
        return self.vae.decode(z, precision=precision)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled, which belongs to this model: a copy compiles its own."""
        return super().__getstate__() | {"_compiled_decode": None}

    def sampler(self, method: Method = "flow", *, precision: Precision | None = None, **options) -> Sampler:
        """The latent sampler that `method` names; see `EnergyPrior.sampler`.

        Raises:
            ValueError: also when the model has no trained prior and `method` needs one.
        """
        check_precision(precision)
        settings = sampling_options(options)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if self.prior is None:
            if method != "prior":
                raise ValueError(
                    f"method {method!r} needs a trained prior; this model is a VAE alone: use method='prior'"
                )
            return GaussianSampler(self.config.vae.latent_dim, settings.temperature)
        return self.prior.sampler(method, precision=precision, options=settings)

    def stream(
        self,
        n: int,
        *,
        method: Method = "flow",
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        precision: Precision | None = None,
        output: Output = "float",
        device: torch.device | str | None = None,
        progress: bool = False,
        **options,
    ) -> Iterator[Draws]:
        """`sample` in batches, for more images than fit in memory.

        Returns:
            An iterator over `Draws`: `.samples` are images (or what `output` asks for), `.diagnostics` maps
            names to a value per image.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        _check_host(device)
        if output != "latent" and type(self.vae) is VAE:  # a user's own may convert
            dtype = self.vae.to_posterior.weight.dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"the model must be float32 or float64, got {dtype}: precision='bf16' rounds what may be"
                )
        if precision is None:
            precision = self._default_precision(method, sampling_options(options))
        latents = self.sampler(method, precision=precision, **options)
        check_count(n, start, batch_size, seed)
        decode = self._decoded(precision, output) if output != "latent" else None

        def batches() -> Iterator[Draws]:
            parts = tiles(
                latents,
                n,
                seed=seed,
                start=start,
                device=self.device,
                precision=precision,
                progress=progress,
            )
            size = default_tile(self.device) if batch_size is None else batch_size
            if decode is None:
                yield from rebatch((draws for _, draws in parts), size)
            else:
                yield from rebatch((draws for part in parts for draws in decode(*part)), size)

        # Batch norm of the decoder must not see the batch.
        images = each_in_evaluation_mode(self, batches())
        return images if device is None else on_host(images)

    def _default_precision(self, method: Method, options: SamplingOptions) -> Precision:
        """As of `EnergyPrior`; a VAE of a user's own class is decoded in float32."""
        if type(self.vae) is not VAE:
            return "ieee"
        if self.prior is None:
            return quick_precision(self.device)
        return self.prior.default_precision(method, options)

    def _decoded(self, precision: Precision, output: Output) -> Callable[[int, Draws], Iterator[Draws]]:
        """Latents, and the number of the first, to their images.

        Decoded like samples in whole tiles of their own, so that an image does not depend on its batch; what
        a tile lacks at either end is zeros.
        """
        rows = default_tile(self.device)
        decoded = {"precision": precision_on(self.device, precision)}  # noise alone has none

        def decode(first: int, draws: Draws) -> Iterator[Draws]:
            count = draws.samples.shape[0]
            for tile in range(first - first % rows, first + count, rows):
                begin, end = max(tile - first, 0), min(tile - first + rows, count)
                before = first + begin - tile
                z = draws.samples[begin:end]
                whole = F.pad(z, (0, 0, before, rows - before - (end - begin)))
                with torch.no_grad(), matmul_precision(precision):
                    images = self._decode(whole, precision)[before : before + end - begin]
                    images = to_uint8(images) if output == "uint8" else images
                diagnostics = {name: values[begin:end] for name, values in draws.diagnostics.items()}
                yield Draws(images, diagnostics, draws.info or decoded)

        return decode

    def sample(self, n: int, **arguments) -> Tensor:
        """`n` images `[n, C, H, W]`.

        Args:
            n: how many; 0 gives an empty tensor of the right shape.
            method: `"prior"` (the Gaussian: a plain VAE), `"flow"` (default), `"sir"` or `"langevin"`.
            seed, start: image i of the result is number `start + i` of the series `seed`: the same for any
                `n` and `batch_size`, to the last bit on one machine with one number of threads.
            batch_size: images held at once beside the result.
            precision: of matrix products and convolutions: `"ieee"` (float32), `"tf32"` or `"bf16"`. By
                default `"bf16"` where that is faster and as good, else `"ieee"`: see
                `EnergyPrior.default_precision`. Images are then a little off those of `vae.decode` alone.
            output: `"float"` (float32 in [0, 1]), `"uint8"` (rounded) or `"latent"` (`[n, D]`).
            device: `"cpu"` hands the images out there; each batch is copied from a GPU while the next one is
                computed, so that two are held. By default they stay where the model is.
            progress: show a progress bar.
            options: the fields of `evalp_fast.priors.SamplingOptions`: `temperature`, `proposals`,
                `weights`, `n_steps`, `step_size`, `adjusted`, `space`, `initial`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return self.sample_with_diagnostics(n, **arguments).samples

    def sample_with_diagnostics(self, n: int, **arguments) -> Draws:
        """`sample`, with the sampler's diagnostics per image (SIR: `ess`, ...; Langevin: `acceptance`)."""
        if n == 0:
            one = self.sample_with_diagnostics(1, **arguments)
            empty = {name: values[:0] for name, values in one.diagnostics.items()}
            return Draws(one.samples[:0], empty, one.info)
        batch = concatenate(list(self.stream(n, **arguments)))
        if "ess" in batch.diagnostics:
            proposals = sampling_options({k: v for k, v in arguments.items() if k == "proposals"}).proposals
            warn_of_low_ess(batch.diagnostics["ess"], proposals)
        return batch

    @torch.no_grad()
    def posterior(self, images: Tensor, *, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), `[N, D]` each, for images `[N, C, H, W]` (uint8, or in [0, 1])."""
        with evaluation_mode(self), without_autocast(self.device):
            parts = [self.vae.encode(_to_float(chunk.to(self.device))) for chunk in images.split(batch_size)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts])

    def posterior_sample(self, images: Tensor, *, seed: int = 0, batch_size: int = 1000) -> Tensor:
        """One draw of q(z|x) for each image, `[N, D]`: together, draws of the aggregate posterior."""
        mean, log_variance = self.posterior(images, batch_size=batch_size)
        return draw_posterior(mean, log_variance, torch.arange(len(mean), device=mean.device), seed=seed)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, batch_size: int = 1000) -> Tensor:
        """Each image through the posterior mean and the decoder: float32 `[N, C, H, W]` in [0, 1]."""
        mean, _ = self.posterior(images, batch_size=batch_size)
        with evaluation_mode(self), without_autocast(self.device):
            return torch.cat([self._decode(chunk) for chunk in mean.split(batch_size)])

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write `model.safetensors`, `README.md` (the model card) and `config.json`, each in one rename."""
        directory = Path(save_directory)
        self._save_pretrained(directory)
        with atomic_write(directory / "README.md") as temporary:
            temporary.write_text(model_card(self.info, self.describe()))
        write_json_atomic(
            {"format_version": FORMAT_VERSION, "model": dataclasses.asdict(self.config), "info": self.info},
            directory / CONFIG_FILE,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save_safetensors_atomic(self.state_dict(), save_directory / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        **hub_options: Any,
    ) -> "EVaLP":
        """Load a model that ships with the package (`"mnist"`), a folder, a training run, or a hub id.

        Args:
            pretrained_model_name_or_path: the name, path or id. Of a training run, the best model.
            device: where to put it.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, ... of
                `huggingface_hub.snapshot_download`.

        Returns:
            The model in evaluation mode.

        Raises:
            FileError: unknown name, missing, truncated or corrupt files, or a format that this version of
                the package does not know.
        """
        directory = model_folder(pretrained_model_name_or_path, **hub_options)
        description = read_json(directory / CONFIG_FILE)
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise FileError(
                f"{directory / CONFIG_FILE} has format version {version!r}, this version of evalp-fast reads "
                f"{FORMAT_VERSION}: install the version that wrote it, or train again"
            )
        try:
            config = from_dict(EVaLPConfig, description["model"])
        except KeyError as error:
            raise FileError(f"{directory / CONFIG_FILE} does not describe a model: no key {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{directory / CONFIG_FILE} does not describe a model: {error}") from error
        with _defaults():
            model = cls(config, description.get("info"))
            try:
                model.load_state_dict(load_safetensors(directory / WEIGHTS_FILE))
            except RuntimeError as error:
                raise FileError(
                    f"{directory / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {_first_line(error)}"
                ) from error
            return model.to(device).eval()

    def describe(self) -> dict[str, Any]:
        """Shape and size of the parts, for `evalp-fast info` and the model card."""

        def count(module: nn.Module | None) -> int:
            return 0 if module is None else sum(p.numel() for p in module.parameters())

        prior = self.prior
        return {
            "vae": dataclasses.asdict(self.config.vae) | {"parameters": count(self.vae)},
            "flow": None
            if prior is None
            else dataclasses.asdict(prior.config.flow) | {"parameters": count(prior.flow)},
            "energy": None
            if prior is None
            else dataclasses.asdict(prior.config.energy)
            | {
                "parameters": count(prior.energy_net),
                "base": prior.config.base,
                "kl_weight": prior.config.kl_weight,
            },
        }


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """torch's own defaults, in which a model is made and loaded whatever the caller's are: float32, on the
    CPU, of tensors that autograd can use."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def draw_posterior(mean: Tensor, log_variance: Tensor, index: Tensor, *, seed: int, step: int = 0) -> Tensor:
    """Reparameterised draws of q(z|x): row i takes the noise of `(seed, index[i], step)`."""
    noise = philox.normal(seed, index, step, philox.Stream.POSTERIOR, mean.shape[1])
    return mean + torch.exp(0.5 * log_variance) * noise


def shipped_models() -> list[str]:
    """Names that `from_pretrained` knows without a network."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}") if _is_model(path.parent))


def _is_model(directory: Path) -> bool:
    description = read_json(directory / CONFIG_FILE)
    return isinstance(description, dict) and "model" in description


def model_folder(name: str | Path, **hub_options: Any) -> Path:
    """The folder of a model that is shipped, local, a run's (its best), or on the hub (downloaded).

    Raises:
        FileError: there is none.
    """
    path = Path(name)
    if path.is_file():
        raise FileError(f"{path} is a file: pass the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if path.is_dir():
        if (path / "best" / CONFIG_FILE).is_file():
            return path / "best"
        if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
            return path
        raise FileError(
            f"{path} holds no model ({CONFIG_FILE} and {WEIGHTS_FILE}), and no run with a best model yet"
        )
    known = shipped_models()
    if str(name) in known:
        return _SHIPPED / str(name)
    hint = (
        f"shipped models: {', '.join(known) or 'none'}; else pass a folder or a hub id such as 'user/model'"
    )
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FileError(f"unknown model {str(name)!r}: {hint}")
    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.md"], **hub_options)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileError(f"cannot load {str(name)!r} from the hub ({_first_line(error)}): {hint}") from error


def _check_host(device: Any) -> None:
    """Raise `ValueError` unless it is None or the CPU."""
    with contextlib.suppress(RuntimeError, TypeError):
        if device is None or torch.device(device).type == "cpu":
            return
    raise ValueError(f"device must be None (where the model is) or 'cpu', got {device!r}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)] if lines else type(error).__name__


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()
