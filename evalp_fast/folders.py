"""A folder of images: which files belong to which split, and decoding them into one uint8 tensor."""

import hashlib
import importlib
import os
import unicodedata
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
# Shares of the training and validation split where the source has none; the rest is the test split.
TRAIN_SHARE, VALIDATION_SHARE = 0.90, 0.05
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_FILES_PER_TASK = 32
_NAMED = 5


class DataError(ValueError):
    """Images that are missing, broken, or not of the size or type asked for. The message says what to do."""


def import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading this data needs {name.partition('.')[0]}: pip install 'evalp-fast[data]' ({error})"
        ) from error


def find_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """The image files of the splits `parts`, sorted by name within each.

    With `train/` and `validation/` or `test/` in the folder, these are the splits; otherwise a hash of each
    file's relative name decides (90 %, 5 %, 5 %). Where only `validation/` is absent, a hash takes it, 5 %,
    out of `train/`. The search is recursive; hidden files and folders are ignored.

    Raises:
        DataError: no such folder or split, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    own = {
        part: next((folder / n for n in names if (folder / n).is_dir()), None)
        for part, names in SPLIT_NAMES.items()
    }
    if own["train"] is None or (own["validation"] is None and own["test"] is None):
        return _files_by_hash(folder, parts, TRAIN_SHARE, VALIDATION_SHARE)
    files: list[Path] = []
    for part in parts:
        own_folder = own[part]
        if own["validation"] is None and part != "test":
            files += _files_by_hash(own["train"], (part,), 1 - VALIDATION_SHARE, VALIDATION_SHARE)
        elif own_folder is None:
            raise DataError(f"{folder} has no {part}/ beside train/: make one, or ask for another split")
        else:
            files += _list_images(own_folder)
    return files


def _files_by_hash(folder: Path, parts: Sequence[str], train: float, validation: float) -> list[Path]:
    files = _list_images(folder)
    chosen = []
    for file in files:
        share = _hash_share(file.relative_to(folder).as_posix())
        part = "train" if share < train else "validation" if share < train + validation else "test"
        if part in parts:
            chosen.append(file)
    if not chosen:
        raise DataError(
            f"of {len(files)} images in {folder} none is in split {'+'.join(parts)} (a hash of the name "
            "decides): sort them into train/, validation/ and test/, or pass split='all'"
        )
    return chosen


def _hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, however a file system spells its accents."""
    digest = hashlib.blake2b(
        unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape"), digest_size=8
    )
    return (int.from_bytes(digest.digest(), "big") >> 11) * 2.0**-53


def _list_images(folder: Path) -> list[Path]:
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        # Links may form a circle.
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _SUFFIXES
        ]
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}): check the path")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error


def _decode(file: Path, image_size: int | None, channels: int | None, crop: int | None) -> np.ndarray:
    """One file as uint8 `[C, H, W]`, H = W: cropped to the centre and, if `image_size` is given, resized."""
    image_module = import_extra("PIL.Image")
    with image_module.open(file) as opened:
        grey = opened.mode in ("1", "L", "LA", "La") or opened.mode.startswith("I")
        channels = channels or (1 if grey else 3)
        image = import_extra("PIL.ImageOps").exif_transpose(opened)
        if image.mode.startswith("I"):
            # 16 bits. Pillow's own conversion clips at 255, which turns all but black into white.
            wide = np.asarray(image).astype(np.float64) / 257.0
            image = image_module.fromarray(wide.clip(0, 255).round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = image_module.new("RGBA", image.size, "white")
            image = image_module.alpha_composite(white, image)
        image = image.convert("L" if channels == 1 else "RGB")
        side = min(*image.size, crop or image.width)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if image_size not in (None, side):
            image = image.resize((image_size, image_size), image_module.Resampling.BILINEAR)
        array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def decode_files(
    files: Sequence[Path],
    folder: Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    crop: int | None = None,
    skip_broken: bool = False,
    progress: bool = False,
) -> tuple[Tensor, tuple[str, ...]]:
    """Decode image files, in threads (Pillow lets them run side by side), into one tensor.

    Images are turned as their EXIF data say, put on white where they are transparent, cropped to the centre
    square, and resized with a bilinear filter that widens as it shrinks (antialiasing, as torchvision does by
    default). 16-bit grey becomes 8-bit by rounding.

    Args:
        files: what to read.
        folder: error messages name the files relative to it.
        image_size: height and width; by default the first image's, which all must then have.
        channels: 1 or 3; by default the first image's.
        crop: side of the centre square, where an image is larger; by default as large as can be.
        skip_broken: leave out files that cannot be decoded, with a warning, instead of raising.
        progress: show a progress bar.

    Returns:
        uint8 `[N, C, H, W]` in the order of `files`, and the files that were left out.

    Raises:
        DataError: files that cannot be decoded, or of different sizes.
        ImportError: Pillow is missing.
    """
    broken: dict[int, str] = {}
    wrong_size: dict[int, str] = {}

    def decode(i: int, channels: int | None) -> np.ndarray | None:
        try:
            return _decode(files[i], image_size, channels, crop)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers let through whatever a broken file makes them raise
            unidentified = type(error).__name__ == "UnidentifiedImageError"
            broken[i] = "not an image" if unidentified else " ".join(str(error).split()) or repr(error)
            return None

    probes = (decode(i, channels) for i in range(len(files)))
    first = next((array for array in probes if array is not None), None)
    if first is None:
        raise DataError(
            f"none of the {len(files)} images in {folder} can be decoded: {_name(broken, files, folder)}"
        )
    images = np.empty((len(files), *first.shape), dtype=np.uint8)

    def decode_some(start: int) -> int:
        stop = min(start + _FILES_PER_TASK, len(files))
        for i in range(start, stop):
            array = decode(i, first.shape[0])
            if array is not None and array.shape == first.shape:
                images[i] = array
            elif array is not None:
                wrong_size[i] = f"{array.shape[2]}x{array.shape[1]}"
        return stop - start

    with (
        tqdm(total=len(files), desc="reading images", unit=" images", disable=not progress) as bar,
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
    ):
        # Leaving this loop, as by Ctrl-C, cancels the tasks that have not started.
        for done in pool.map(decode_some, range(0, len(files), _FILES_PER_TASK)):
            bar.update(done)

    if wrong_size:
        raise DataError(
            f"{len(wrong_size)} of {len(files)} images in {folder} are not {first.shape[2]}x{first.shape[1]} "
            f"as the first is: {_name(wrong_size, files, folder)}; pass image_size to resize all"
        )
    if broken:
        listed = _name(broken, files, folder)
        message = f"{len(broken)} of {len(files)} images in {folder} cannot be decoded: {listed}"
        if not skip_broken:
            raise DataError(f"{message}; remove them, or skip them with skip_broken=True")
        warnings.warn(f"{message}; skipped", stacklevel=3)
        good = [i for i in range(len(files)) if i not in broken]
        for target, i in enumerate(good):
            images[target] = images[i]  # in place: a copy would need the memory twice
        images = images[: len(good)]
    return torch.from_numpy(images), tuple(str(files[i]) for i in sorted(broken))


def _name(reasons: dict[int, str], files: Sequence[Path], folder: Path) -> str:
    """The first few files, each with its reason."""
    listed = [f"{files[i].relative_to(folder)} ({reasons[i]})" for i in sorted(reasons)[:_NAMED]]
    return ", ".join(listed) + (", ..." if len(reasons) > _NAMED else "")


__all__ = [
    "SPLITS",
    "SPLIT_NAMES",
    "TRAIN_SHARE",
    "VALIDATION_SHARE",
    "DataError",
    "decode_files",
    "find_files",
    "import_extra",
]
