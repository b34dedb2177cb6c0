"""Images as one uint8 tensor, and the order in which training reads them.

A data set is decoded once and held whole (on the device, where it fits): no worker processes and no
per-image Python afterwards. A `.npy` file is memory-mapped instead, so that it may be larger than memory.
The order is a function of (seed, epoch) by the noise contract, so training resumes at any step.
"""

import dataclasses
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evalp_fast.folders import (
    SPLIT_NAMES,
    SPLITS,
    TRAIN_SHARE,
    VALIDATION_SHARE,
    DataError,
    decode_files,
    find_files,
    import_extra,
)
from evalp_fast.kernels.philox import Stream, words

# As in the code of the papers that report CelebA at 64x64.
_CELEBA_CROP = 140
_Pair = tuple[Tensor, Tensor | None]  # images and labels


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Square images of one size.

    Attributes:
        images: uint8 `[N, C, H, W]`, C 1 (grey) or 3 (RGB). Of a `.npy` file it is a view that may be not
            contiguous and must not be written to.
        labels: int64 `[N]`, or None.
        name: what to call it in a report.
        skipped: the broken files that were left out.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: str | torch.device) -> "ImageDataset":
        """The same data set on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, images=self.images.to(device), labels=labels)


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1], on their device. `evalp_fast.images.to_uint8` is the inverse."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.to(torch.float32).div_(255)


def load_dataset(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    root: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> ImageDataset:
    """Load images from a named data set, a folder or an array file.

    Sources:

    - `"mnist"`: 28x28, padded with zeros to 32x32 (`image_size=28`: as they are). The last twelfth of the
      60,000 training images is the validation split: 55,000 and 5,000.
    - `"cifar10"`: 32x32. The last tenth is the validation split: 45,000 and 5,000.
    - `"celeba64"`: the aligned faces, centre crop of 140, resized to 64x64 (or `image_size`), with the
      published split; `root` may also be a folder of images, which are then treated in the same way.
    - a folder, searched recursively for png, jpg, jpeg, webp and bmp files; hidden ones are ignored. With
      `train/` and `validation/` or `test/` in it, these are the splits; otherwise a hash of each file's
      relative name decides (90 % train, 5 % validation, 5 % test), so that a file keeps its split when
      others are added. Where only `validation/` is absent, a hash takes it, 5 %, out of `train/`. Images are
      cropped to the centre square and resized with antialiasing.
    - a `.npy` file (memory-mapped) or `.npz` file of uint8 images `[N, H, W]`, `[N, H, W, C]` or
      `[N, C, H, W]`. An `.npz` file has `images` and perhaps `labels`, or `train_images`, `train_labels`,
      `test_images` and so on (`_x` and `_y` will do). Where a file has no splits, the first 90 % are train,
      the next 5 % validation and the last 5 % test; where only the validation split is absent, it is the
      last tenth of the training images.

    MNIST, CIFAR-10 and CelebA are looked for in `root`, else in `$EVALP_DATA`, else in the cache folder
    (`$XDG_CACHE_HOME/evalp_fast`), where torchvision downloads them.

    Args:
        source: as above.
        split: `"train"`, `"validation"`, `"test"`, several joined by `+` (`"train+validation"`), or `"all"`.
        image_size: height and width. Default: the source's own (of a folder: its first image's).
        channels: 1 or 3, for a folder. Default: as its first image.
        root: where a named data set lies. For `"mnist"` and `"cifar10"` also an `.npz` file as above.
        skip_broken: leave out files that cannot be decoded, with a warning, instead of raising.
        limit: at most so many images: the first ones; of a folder, evenly spaced over the sorted names.
        progress: show a progress bar while a folder is decoded.

    Returns:
        An `ImageDataset` in CPU memory, in a fixed order (that of the source; of a folder: by name).

    Raises:
        DataError: no or broken images, wrong sizes, missing data, failed download.
        ValueError: an argument is out of range.
        ImportError: a package of the `[data]` extra is missing.
    """
    parts = _parse_split(split)
    for argument, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")

    path = Path(source)
    if source in _NAMED:
        dataset = _load_named(str(source), parts, image_size, root)
    elif source == "celeba64" or path.is_dir():
        if source == "celeba64":
            files, folder = _celeba_files(parts, root)
            name, crop, image_size, channels = "celeba64", _CELEBA_CROP, image_size or 64, channels or 3
        else:
            files, folder = find_files(path, parts), path
            name, crop = path.resolve().name, None
        if limit is not None and limit < len(files):
            files = [files[i * len(files) // limit] for i in range(limit)]
        images, skipped = decode_files(
            files,
            folder,
            image_size=image_size,
            channels=channels,
            crop=crop,
            skip_broken=skip_broken,
            progress=progress,
        )
        return ImageDataset(images, None, name, skipped)
    elif not path.exists():
        raise DataError(
            f"{path} does not exist: pass mnist, cifar10, celeba64, a folder of images, a .npy or a .npz file"
        )
    elif path.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"{path} is neither a folder nor a .npy or .npz file")
    else:
        dataset = ImageDataset(*_load_arrays(path, parts, validation_part=10), path.stem)
        size = dataset.images.shape[-1]
        if image_size not in (None, size):
            raise DataError(f"{path} holds {size}x{size} images, not {image_size}: leave image_size out")
    found = dataset.images.shape[1]
    if channels not in (None, found):
        raise DataError(f"{source} has {found} channels, not {channels}: leave channels out")
    images, labels = _take((dataset.images, dataset.labels), slice(limit))
    return dataclasses.replace(dataset, images=images, labels=labels)


def _parse_split(split: str) -> tuple[str, ...]:
    parts = SPLITS if split == "all" else tuple(split.split("+"))
    unknown = [part for part in parts if part not in SPLITS]
    if unknown or len(set(parts)) != len(parts):
        raise ValueError(f"split must be train, validation, test, all, or several joined by +, got {split!r}")
    return tuple(part for part in SPLITS if part in parts)


def _take(pair: _Pair, part: slice) -> _Pair:
    images, labels = pair
    return images[part], None if labels is None else labels[part]


# ---------------------------------------------------------------------------------------------------------
# Named data sets


@dataclasses.dataclass(frozen=True)
class _Named:
    """What torchvision calls a data set, where its files lie, and what is in them."""

    kind: str
    inside: str
    shape: tuple[int, int, int]
    train_count: int
    # One in so many training images, the last, are the validation split: 5,000 in both data sets.
    validation_part: int
    sizes: tuple[int, ...]


_NAMED = {
    "mnist": _Named("MNIST", "MNIST/raw", (1, 28, 28), 60_000, 12, (28, 32)),
    "cifar10": _Named("CIFAR10", "cifar-10-batches-py", (3, 32, 32), 50_000, 10, (32,)),
}
_TEST_COUNT = 10_000


def _load_named(
    name: str, parts: tuple[str, ...], image_size: int | None, root: str | os.PathLike[str] | None
) -> ImageDataset:
    """MNIST and CIFAR-10."""
    named = _NAMED[name]
    if image_size not in (None, *named.sizes):
        raise DataError(f"{name} has image_size {' or '.join(map(str, named.sizes))}, not {image_size}")
    if root is not None and Path(root).suffix.lower() == ".npz":
        images, labels = _load_arrays(Path(root), parts, named.validation_part)
    else:
        halves = {}
        if {"train", "validation"} & set(parts):
            halves |= _split_train(_read_named(named, root, train=True), named.validation_part)
        if "test" in parts:
            halves["test"] = _read_named(named, root, train=False)
        images, labels = _join([halves[part] for part in parts])
    if images.shape[1:] != named.shape:
        raise DataError(f"{root} holds images of shape {tuple(images.shape[1:])}, {name} has {named.shape}")
    if name == "mnist" and image_size != 28:
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    return ImageDataset(images, labels, name)


def _read_named(named: _Named, root: str | os.PathLike[str] | None, *, train: bool) -> _Pair:
    dataset = _open_torchvision(named.kind, named.inside, root, train=train)
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
    count = named.train_count if train else _TEST_COUNT
    if images.shape[0] != count or labels.shape[0] != count:
        raise DataError(
            f"{Path(dataset.root) / named.inside} holds {images.shape[0]:,} images and {labels.shape[0]:,} "
            f"labels, not {count:,}: replace its files"
        )
    return images, labels


def _open_torchvision(kind: str, inside: str, root: str | os.PathLike[str] | None, **arguments: Any) -> Any:
    """A torchvision data set from `root`, from `$EVALP_DATA`, or else downloaded to the cache folder."""
    make = getattr(import_extra("torchvision.datasets"), kind)
    environment = os.environ.get("EVALP_DATA")
    if root is None and environment and (Path(environment) / inside).is_dir():
        root = environment
    if root is not None:
        if not (Path(root) / inside).is_dir():
            raise DataError(f"no {inside} in {root}: pass the folder that holds it, or none for a download")
        try:
            return make(root, download=False, **arguments)
        except Exception as error:
            raise DataError(f"{kind} in {Path(root) / inside} is incomplete or broken ({error})") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evalp_fast"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return make(cache, download=True, **arguments)
    except Exception as error:
        # torchvision lets through whatever urllib, gdown, the archive or the disk raise.
        reason = " ".join(str(error).split())[:300]
        if any((cache / inside).glob("*")):
            reason += f"; if an earlier download was cut off, remove {cache / inside}"
        raise DataError(
            f"cannot download {kind} to {cache} ({reason}): set EVALP_DATA to a folder that holds {inside}, "
            "or pass --data with a folder of images or an array file"
        ) from error


def _celeba_files(parts: tuple[str, ...], root: str | os.PathLike[str] | None) -> tuple[list[Path], Path]:
    if root is not None and not (Path(root) / "celeba").is_dir():
        return find_files(Path(root), parts), Path(root)
    files: list[Path] = []
    folder = Path()
    for part in parts:
        dataset = _open_torchvision("CelebA", "celeba", root, split="valid" if part == "validation" else part)
        folder = Path(dataset.root) / dataset.base_folder / "img_align_celeba"
        files += [folder / name for name in dataset.filename]
    return files, folder


# ---------------------------------------------------------------------------------------------------------
# Array files


def _load_arrays(path: Path, parts: tuple[str, ...], validation_part: int) -> _Pair:
    try:
        # Not copy-on-write: the kernel would want as much memory for it as the file is large.
        arrays = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            return _split_whole((_images_from_array(arrays, str(path)), None), parts)
        with arrays:
            return _load_members(arrays, path, parts, validation_part)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is truncated, corrupt, or not an array file ({error}): write it again"
        ) from error


def _load_members(arrays: Any, path: Path, parts: tuple[str, ...], validation_part: int) -> _Pair:
    """The splits in an .npz file."""

    def read(image_keys: Sequence[str], label_keys: Sequence[str]) -> _Pair | None:
        key = next((key for key in image_keys if key in arrays.files), None)
        if key is None:
            return None
        images = _images_from_array(arrays[key], f"{key} in {path}")
        key = next((key for key in label_keys if key in arrays.files), None)
        if key is None:
            return images, None
        labels = arrays[key]
        if labels.shape != (images.shape[0],) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{key} in {path} must be {images.shape[0]} integers, got {labels.dtype} {labels.shape}"
            )
        return images, torch.from_numpy(labels.astype(np.int64))

    def keys(part: str, *kinds: str) -> list[str]:
        return [f"{name}_{kind}" for name in SPLIT_NAMES[part] for kind in kinds]

    def read_part(part: str) -> _Pair | None:
        return read(keys(part, "images", "x"), keys(part, "labels", "y"))

    whole = read(("images", "x", "arr_0"), ("labels", "y"))
    if whole is not None:
        return _split_whole(whole, parts)
    halves = {part: read_part(part) for part in parts}
    if parts != ("test",) and not set(keys("validation", "images", "x")) & set(arrays.files):
        train = halves.get("train") or read_part("train")
        if train is not None:
            halves |= _split_train(train, validation_part)
    chosen = [half for part in parts if (half := halves[part]) is not None]
    if len(chosen) < len(parts):
        missing = next(part for part in parts if halves[part] is None)
        raise DataError(
            f"{path} has neither images nor {missing}_images, only {', '.join(arrays.files) or 'nothing'}"
        )
    return _join(chosen)


def _images_from_array(array: np.ndarray, what: str) -> Tensor:
    """`[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as a `[N, C, H, W]` view."""
    if array.dtype != np.uint8:
        raise DataError(
            f"{what} must be uint8, got {array.dtype}: for images in [0, 1] write (255 * x).round()"
        )
    shape = array.shape
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and shape[1] in (1, 3) and shape[2] == shape[3]:
        pass
    elif array.ndim == 4 and shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or array.shape[2] != array.shape[3]:
        raise DataError(
            f"{what} must be square images [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, got {shape}"
        )
    if array.size == 0:
        raise DataError(f"{what} holds no images, its shape is {shape}")
    with warnings.catch_warnings():
        # torch warns that a read-only array must not be written to. Nobody writes here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _split_whole(whole: _Pair, parts: tuple[str, ...]) -> _Pair:
    """Parts of a source without splits. Neighbouring parts are one slice, so that a memory map stays one."""
    n = whole[0].shape[0]
    bounds = [0, round(n * TRAIN_SHARE), round(n * (TRAIN_SHARE + VALIDATION_SHARE)), n]
    slices = {part: slice(bounds[i], bounds[i + 1]) for i, part in enumerate(SPLITS)}
    if parts == ("train", "test"):
        taken = _join([_take(whole, slices[part]) for part in parts])
    else:
        taken = _take(whole, slice(slices[parts[0]].start, slices[parts[-1]].stop))
    if taken[0].shape[0] == 0:
        raise DataError(f"of {n} images none is in split {'+'.join(parts)}: pass split='all', or more images")
    return taken


def _split_train(train: _Pair, validation_part: int) -> dict[str, _Pair]:
    n = train[0].shape[0]
    at = n - n // validation_part
    if at == n:
        raise DataError(f"{n} training images are too few to split off a validation split")
    return {"train": _take(train, slice(at)), "validation": _take(train, slice(at, None))}


def _join(halves: Sequence[_Pair]) -> _Pair:
    if len(halves) == 1:
        return halves[0]
    images = [half[0] for half in halves]
    if len({image.shape[1:] for image in images}) > 1:
        raise DataError(f"the splits differ in shape: {', '.join(str(tuple(i.shape)) for i in images)}")
    labels = [half[1] for half in halves if half[1] is not None]
    return torch.cat(images), torch.cat(labels) if len(labels) == len(halves) else None


# ---------------------------------------------------------------------------------------------------------
# Order


def epoch_permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """The order of `n` images in an epoch: sorted by their Philox words, ties by number.

    Args:
        n: number of images.
        seed: 64-bit seed.
        epoch: 0, 1, ... below 2^32; it is the noise's step, in stream `Stream.DATA_ORDER`.

    Returns:
        int64 `[n]` on the CPU.

    Raises:
        ValueError: n < 0, or an epoch or seed out of range.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must be in [0, 2^32), got {epoch}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    index = torch.arange(n, dtype=torch.int64)
    return words(seed, index, epoch, Stream.DATA_ORDER, 1)[:, 0].argsort(stable=True)


def batches(n: int, batch_size: int, *, seed: int, epoch: int, drop_last: bool = True) -> Iterator[Tensor]:
    """The batches of an epoch, int64 `[batch_size]` each; the last may be shorter where `drop_last=False`.

    Raises:
        ValueError: as `epoch_permutation`, or batch_size < 1.
    """
    _check_batch_size(batch_size)
    order = epoch_permutation(n, seed=seed, epoch=epoch)
    end = n - n % batch_size if drop_last else n
    return (order[start : min(start + batch_size, end)] for start in range(0, end, batch_size))


def batch_at(n: int, batch_size: int, step: int, *, seed: int) -> Tensor:
    """Batch number `step` of a whole training run, int64 `[batch_size]`: see `DataOrder`, which is faster."""
    return DataOrder(n, batch_size, seed).batch(step)


class DataOrder:
    """Which images each training step sees: a function of (seed, step), so a run resumes anywhere.

    Step s is batch `s % steps_per_epoch` of epoch `s // steps_per_epoch`; an epoch's last, short batch is
    dropped. Nothing needs to be saved in a checkpoint but the step. The current epoch's order is cached.

    Raises:
        ValueError: batch_size < 1, or larger than n.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        _check_batch_size(batch_size)
        if batch_size > n:
            raise ValueError(f"batch_size must be at most the number of images, {n}, got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.steps_per_epoch = n // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """The images of global step number `step` (from 0), int64 `[batch_size]` on the CPU."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_permutation(self.n, seed=self.seed, epoch=epoch)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


__all__ = [
    "DataError",
    "DataOrder",
    "ImageDataset",
    "batch_at",
    "batches",
    "epoch_permutation",
    "load_dataset",
    "to_float",
]
