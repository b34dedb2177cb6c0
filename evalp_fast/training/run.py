"""One training run on disk: its state, its best model, its metrics; written so that a kill loses nothing.

A run is a folder:

    config.json          what was asked for: method, configuration, command
    state.safetensors    everything that the next step needs (networks, optimisers, averages, counters)
    best/  last/         models as `EVaLP.save_pretrained` writes them
    metrics.jsonl        one line per evaluation
    samples/             a grid of samples per evaluation
    tensorboard/         the same metrics, where tensorboard is installed

All noise of training is a function of (seed, step), so no generator's state is saved, and a run that was
killed and resumed repeats the losses of one that was not, to the last bit on the same machine.
"""

import dataclasses
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evalp_fast
from evalp_fast.files import (
    FileError,
    atomic_write,
    load_safetensors,
    read_json,
    read_metadata,
    save_safetensors_atomic,
    write_json_atomic,
)

STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"


class DivergenceError(RuntimeError):
    """Training has diverged; the last good state and the best model are on disk."""


class RunExistsError(FileExistsError):
    """The folder holds a run already, and resuming it was not asked for, or is not possible."""


def versions() -> dict[str, str]:
    """What a measurement depends on beside the code's arguments."""
    return {
        "evalp_fast": evalp_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def command_line() -> str:
    """The command that started this process, as a person would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def cosine_schedule(step: int, total: int, warmup: int = 0) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` steps, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def parameter_norm(*modules: nn.Module) -> Tensor:
    """Norm of all parameters together: not finite where one of them is not, though the last loss was."""
    return nn.utils.get_total_norm([p.detach() for module in modules for p in module.parameters()])


class MovingAverage:
    """Exponential moving average of a module's parameters (buffers are the module's own).

    The decay rises as `min(decay, (1 + t) / (10 + t))`, so that the first steps do not linger.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.count = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move a step towards the module's present parameters."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1.0 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, **self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        for name, value in self.average.items():
            value.copy_(state[name])


def flatten_state(parts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State of modules, optimisers, averages and plain numbers as named tensors and JSON metadata."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, str] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                put(f"{name}/{key}", item)
        else:
            numbers[name] = json.dumps(value)

    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            put(name, part.state_dict()["state"])
        elif hasattr(part, "state_dict"):
            put(name, part.state_dict())
        else:
            put(name, part)
    return tensors, numbers


def restore_state(
    parts: Mapping[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[str, str]
) -> None:
    """Undo `flatten_state` into the same parts; plain numbers are left to the caller."""
    saved: dict[str, Any] = {**tensors, **{name: json.loads(text) for name, text in numbers.items()}}
    for name, part in parts.items():
        if not hasattr(part, "load_state_dict"):
            continue
        own = {
            key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")
        }
        if isinstance(part, torch.optim.Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            for key, value in own.items():
                index, field = key.split("/", 1)
                like = parameters[int(index)]
                if isinstance(value, Tensor) and value.shape == like.shape:
                    # Files hold contiguous tensors. A fused optimizer walks through a parameter and its
                    # moments in the order of memory: moments of another layout would be mixed up.
                    value = torch.empty_like(like, dtype=value.dtype).copy_(value)
                state.setdefault(int(index), {})[field] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
        else:
            part.load_state_dict(own)


class Run:
    """The folder of a run, open for one process."""

    def __init__(
        self,
        directory: str | Path,
        *,
        method: str,
        config: Any,
        resume: bool,
        inputs: Mapping[str, str | int | bool | None] | None = None,
    ):
        """Open the folder. Nothing is written before `load`, so that a run that cannot start leaves nothing.

        Args:
            directory: the run's folder.
            method: what is trained, as `evalp-fast info` shows it.
            config: a dataclass; resuming demands an equal one.
            resume: continue from `state.safetensors` if it is there.
            inputs: what else the result depends on (the VAE, the images); resuming demands the same.

        Raises:
            RunExistsError: the folder holds a run and `resume` is False, or holds another run.
        """
        self.directory = Path(directory)
        self.method = method
        self.config = dataclasses.asdict(config)
        self.state_file = self.directory / STATE_FILE
        self.metrics_file = self.directory / METRICS_FILE
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._board: Any = None
        described = json.loads(json.dumps({"method": method, "config": self.config, **(inputs or {})}))
        self._described = described
        config_file = self.directory / "config.json"
        if config_file.exists():
            if not resume:
                raise RunExistsError(
                    f"{directory} holds a run already: pass --resume to continue it, or another --out"
                )
            found = read_json(config_file)
            known = {key: found.get(key) for key in described}
            if known != described:
                raise RunExistsError(
                    f"{directory} holds a run of another configuration ({_difference(known, described)}): "
                    "pass the same arguments to resume it, or another --out"
                )

    @property
    def seconds(self) -> float:
        """Time spent training, all sessions together."""
        return self._seconds_before + time.monotonic() - self._started

    def save(self, step: int, parts: Mapping[str, Any]) -> None:
        """Write the state after `step` steps, replacing the last one in a single rename."""
        tensors, numbers = flatten_state({**parts, "step": step, "seconds": self.seconds})
        save_safetensors_atomic(tensors, self.state_file, numbers)

    def load(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Restore the last saved state into `parts`; make the folder of a new run.

        Returns:
            The plain numbers that were saved with it, `step` among them; empty for a new run. Lines of
            metrics that were written after that state are removed: they are written again.
        """
        config_file = self.directory / "config.json"
        if not config_file.exists():
            described = {**self._described, "command": command_line(), "versions": versions()}
            write_json_atomic(described, config_file)
        if not self.state_file.exists():
            self._trim_metrics(0)
            return {}
        tensors, numbers = load_safetensors(self.state_file), read_metadata(self.state_file)
        try:
            restore_state(parts, tensors, numbers)
        except (KeyError, RuntimeError, ValueError) as error:
            raise FileError(f"{self.state_file} does not fit this configuration: {error}") from error
        plain = {name: json.loads(text) for name, text in numbers.items() if "/" not in name}
        self._seconds_before = plain["seconds"]
        self._trim_metrics(plain["step"])
        return plain

    def _trim_metrics(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines(keepends=True):
            # The last line may be half-written if the process was killed while it was.
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        with atomic_write(self.metrics_file) as temporary:
            temporary.write_text("".join(kept))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics (null where one is not finite), and show them in TensorBoard."""
        self.directory.mkdir(parents=True, exist_ok=True)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "seconds": round(self.seconds, 1), **finite}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        board = self._tensorboard()
        if board is not None:
            for name, value in metrics.items():
                board.add_scalar(name, value, step)
            board.flush()

    def _tensorboard(self) -> Any:
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._board = False
            else:
                self._board = SummaryWriter(str(self.directory / "tensorboard"))
        return self._board or None

    def require_finite(self, step: int, **values: Tensor | float) -> None:
        """Stop the run if a loss is not finite.

        Raises:
            DivergenceError: naming the loss, the step and what is kept.
        """
        for name, value in values.items():
            if not math.isfinite(float(value)):
                kept = (
                    f"the last good state and the best model are kept in {self.directory}"
                    if self.state_file.exists()
                    else "no state had been saved yet"
                )
                raise DivergenceError(
                    f"training diverged at step {step}: {name} is {float(value)}; {kept}. "
                    "Try a lower learning rate."
                )

    def close(self) -> None:
        """Flush and close what is open."""
        if self._board:
            self._board.close()


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {found!r}, now {wanted!r}"
