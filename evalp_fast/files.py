"""Files that are either whole or not there: atomic writes, and reads with errors that say what to do."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class FileError(ValueError):
    """A file is missing, unreadable, truncated or of the wrong kind; the message says what to do."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Write a file beside its target and rename it when it is whole.

    `with atomic_write("model.safetensors") as temporary:` yields the path of an empty new file in the
    target's folder (which is made if need be). When the block ends, that file replaces the target in one
    step. On any exception, Ctrl-C included, it is removed and the target is left as it was. A symbolic link
    is followed: what it points to is replaced, not the link.

    Args:
        path: the target.
        durable: also wait for the disk (fsync), so that the file survives a power failure. False where
            thousands of small files are written: they still survive a crash of the program.

    Raises:
        OSError: no space left, no permission, and so on; it names the target, not the temporary file.
    """
    target = Path(os.path.realpath(path))
    # The name does not grow with the target's: that may already be as long as the file system allows.
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        # safetensors replaces the file by one that only its owner can read.
        os.chmod(temporary, target.stat().st_mode if target.exists() else mode)
        if durable:
            _sync(temporary)
        os.replace(temporary, target)
        if durable:
            _sync(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A failed write() names no file, and the name of the temporary file helps nobody.
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            raise OSError(error.errno, _reason(error), str(target)) from error
        raise


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; free some space or write elsewhere (nothing half-written was left)"
    return reason


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself was synced before.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def write_json_atomic(value: Any, path: str | os.PathLike[str]) -> None:
    """Write `value` as indented JSON in UTF-8.

    Dataclasses become objects, paths strings, tensors and numpy arrays (nested) numbers. NaN and infinities,
    which JSON does not have, become the strings "nan", "inf" and "-inf", so that nothing is lost and every
    reader accepts the file.

    Raises:
        TypeError: a value of another type, or a key that is not a string.
        OSError: the file cannot be written.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"JSON keys must be strings, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises FileError where it is missing, unreadable or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise FileError(f"{path} is not valid JSON ({error}): restore it or write it again") from error


def save_safetensors_atomic(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors (any device and layout) to a safetensors file.

    Tensors that share memory are each written whole.

    Args:
        tensors: name -> tensor.
        path: the target.
        metadata: text -> text, kept in the file's header; `read_metadata` gives it back.

    Raises:
        TypeError: a value that is not a tensor, or metadata that is not text.
        OSError: the file cannot be written.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] must be a tensor, got {type(tensor).__name__}")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map text to text, got {key!r}: {text!r}")
    with atomic_write(path) as temporary:
        try:
            save_file(_separate(tensors), temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:
            # Its writer reports a full disk as text: "I/O error: No space left on device (os error 28)".
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies where needed: safetensors refuses strides and two names for one storage."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def load_safetensors(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        FileError: the file is missing, unreadable, truncated, corrupt, or not a safetensors file.
        RuntimeError: torch does not know `device`.
    """
    path, device = Path(path), torch.device(device)
    with _safetensors_errors(path):
        return load_file(path, device=str(device))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text saved with the tensors, empty where there is none. Errors as for `load_safetensors`."""
    path = Path(path)
    with _safetensors_errors(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileError(f"{path} {kind}: pass the path of a .safetensors file")
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        size = path.stat().st_size
        raise FileError(
            f"{path} ({size:,} bytes) is truncated, corrupt, or not a safetensors file ({error}): "
            "copy or download it again, or use another checkpoint"
        ) from error


def _unreadable(path: Path, error: OSError) -> FileError:
    reason = (
        "does not exist"
        if isinstance(error, FileNotFoundError)
        else f"cannot be read ({error.strerror or error})"
    )
    return FileError(f"{path} {reason}: check the path and its permissions")


__all__ = [
    "FileError",
    "atomic_write",
    "load_safetensors",
    "read_json",
    "read_metadata",
    "save_safetensors_atomic",
    "write_json_atomic",
]
