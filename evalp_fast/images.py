"""Writing generated images: PNG files, arrays and grids, as they are made and never half-written.

Images are uint8 `[N, C, H, W]`, C 1 (grey) or 3 (RGB), and their values are written as they are: nothing here
stretches contrast. The writers take an iterable of batches, so memory holds one batch at a time.
"""

import itertools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from evalp_fast.files import atomic_write

GRID_LIMIT = 256
_PADDING = 2
_WHITE = 255


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8: clamped, times 255, rounded to the nearest (never truncated).

    Args:
        images: floating point, any shape and device. 16-bit types are multiplied in float32.

    Raises:
        TypeError: not floating point.
        ValueError: NaN or infinite values, with their number.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
    bad = images.numel() - int(images.isfinite().sum())
    if bad:
        raise ValueError(f"{bad:,} of {images.numel():,} values of images are NaN or infinite")
    return images.to(torch.float32).clamp(0, 1).mul_(255).round_().to(torch.uint8)


def write_images(
    batches: Iterable[Tensor],
    out: str | os.PathLike[str],
    *,
    format: str,
    count: int,
    start: int = 0,
) -> Path:
    """Write batches in one of the formats, under the folder `out`.

    Args:
        batches: uint8 `[B, C, H, W]` each, any device.
        out: folder; it is made if need be.
        format: `"png"`: `out/0000000.png` and so on; `"npz"`: `out/images.npz`; `"npy"`: `out/images.npy`;
            `"grid"`: `out/grid.png` with the first 256 images at most.
        count: number of images to come.
        start: number of the first image, which names the PNG files.

    Returns:
        The folder (png) or the file.

    Raises:
        ValueError: unknown format, or another number of images than `count`.
        TypeError, OSError: as the writers.
    """
    out = Path(out)
    if format == "png":
        written = write_png(batches, out, start=start)
        if written != count:
            raise ValueError(f"batches held {written:,} images, count is {count:,}")
        return out
    if format == "npz":
        return write_npz(batches, out / "images.npz", count=count)
    if format == "npy":
        return write_npy(batches, out / "images.npy", count=count)
    if format == "grid":
        return save_grid(_collect(batches, min(count, GRID_LIMIT)), out / "grid.png")
    raise ValueError(f"format must be png, npz, npy or grid, got {format!r}")


def write_png(batches: Iterable[Tensor], folder: str | os.PathLike[str], *, start: int = 0) -> int:
    """Write each image to `folder/NNNNNNN.png`, numbered from `start`. Returns the number of images.

    A run that was interrupted leaves whole files only, and `first_missing_png` says where to go on. Files of
    the same number are replaced.

    Raises:
        TypeError, ValueError: a batch is not uint8 `[B, C, H, W]` with C 1 or 3, or start is negative.
        OSError: a file cannot be written.
    """
    if start < 0:
        raise ValueError(f"start must not be negative, got {start}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = start
    for batch in batches:
        for image in _as_rows(batch):
            _write_png(image, folder / f"{index:07d}.png", durable=False)
            index += 1
    return index - start


def first_missing_png(folder: str | os.PathLike[str], start: int = 0) -> int:
    """The first number from `start` on that `write_png` has not written to `folder`."""
    return next(i for i in itertools.count(start) if not (Path(folder) / f"{i:07d}.png").exists())


def write_npz(batches: Iterable[Tensor], path: str | os.PathLike[str], *, count: int) -> Path:
    """Write one array `images`, uint8 `[count, H, W, C]`, to an uncompressed `.npz` file. Returns its path.

    The batches go straight to the disk. Interrupted, nothing is left. The same images give the same bytes.

    Raises:
        TypeError, ValueError: a batch is not uint8 `[B, C, H, W]` with C 1 or 3; the batches differ in shape,
            or hold another number of images than `count`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
        archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as file,
    ):
        _write_array(batches, file, count)
    return path


def write_npy(batches: Iterable[Tensor], path: str | os.PathLike[str], *, count: int) -> Path:
    """Write one uint8 array `[count, H, W, C]` to a `.npy` file that can be memory-mapped. As `write_npz`."""
    path = Path(path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        _write_array(batches, file, count)
    return path


def _write_array(batches: Iterable[Tensor], file: IO[bytes], count: int) -> None:
    """A .npy stream. Plain writes, for a full disk kills a process that writes through a memory map."""
    shape, written = None, 0
    for batch in batches:
        rows = _as_rows(batch)
        if shape is None:
            shape = rows.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        if rows.shape[1:] != shape:
            raise ValueError(f"batches must all have images of shape {shape} (HWC), got {rows.shape[1:]}")
        written += rows.shape[0]
        if written > count:
            break
        file.write(rows.data)
    if shape is None or written != count:
        more = "more than " if written > count else ""
        raise ValueError(f"batches held {more}{min(written, count):,} images, count is {count:,}")


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None) -> Path:
    """Write images side by side to one PNG file, row by row, with white lines between. Returns its path.

    Args:
        images: uint8 `[N, C, H, W]`, N at least 1.
        path: the file.
        columns: images per row; by default the grid is as square as can be.

    Raises:
        TypeError, ValueError: images is not as above, or columns < 1.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _write_png(_tile(images, columns), path)
    return path


def _tile(images: Tensor, columns: int | None) -> np.ndarray:
    rows = _as_rows(images)
    n, height, width, channels = rows.shape
    if n == 0:
        raise ValueError("images must hold at least one image for a grid")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    across = min(columns or math.ceil(math.sqrt(n)), n)
    down = math.ceil(n / across)
    cell_height, cell_width = height + _PADDING, width + _PADDING
    grid = np.full(
        (down * cell_height + _PADDING, across * cell_width + _PADDING, channels), _WHITE, dtype=np.uint8
    )
    for i, image in enumerate(rows):
        top, left = _PADDING + i // across * cell_height, _PADDING + i % across * cell_width
        grid[top : top + height, left : left + width] = image
    return grid


def labelled_grid(
    panels: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    title: str | None = None,
    columns: int | None = None,
) -> Path:
    """Write several grids side by side, each under its caption, to one PNG figure. Returns its path.

    Args:
        panels: caption (several lines, if need be) -> uint8 `[N, C, H, W]`, N at least 1.
        path: the file.
        title: a line above all.
        columns: images per row in each grid, as in `save_grid`.

    Raises:
        ImportError: matplotlib (extra `[plot]`) is missing.
        TypeError, ValueError, OSError: as `save_grid`; no panels.
    """
    if not panels:
        raise ValueError("panels must hold at least one grid")
    grids = {caption: _tile(images, columns) for caption, images in panels.items()}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"this figure needs matplotlib: pip install 'evalp-fast[plot]' ({error})"
        ) from error
    path = Path(path)
    side = 3.2
    # Figure and canvas by hand: pyplot would keep a global list of figures and choose a window system.
    figure = Figure(figsize=(side * len(grids), side + 0.9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, (caption, grid) in zip(
        figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True
    ):
        # As RGB: a colour map would move some greys by one level.
        axis.imshow(np.broadcast_to(grid, (*grid.shape[:2], 3)), interpolation="nearest")
        axis.set_title(caption, fontsize=10)
        axis.set_axis_off()
    if title is not None:
        figure.suptitle(title, fontsize=12)
    with atomic_write(path) as temporary:
        canvas.print_figure(temporary, format="png", dpi=150)
    return path


def _as_rows(images: Tensor) -> np.ndarray:
    """uint8 `[N, C, H, W]` to a contiguous array `[N, H, W, C]` in CPU memory."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a uint8 tensor (see to_uint8), got {got}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, C, H, W] with C 1 or 3, got {tuple(images.shape)}")
    return images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()


def _collect(batches: Iterable[Tensor], limit: int) -> Tensor:
    """The first `limit` images; no batch is drawn beyond them."""
    chosen: list[Tensor] = []
    missing = limit
    for batch in batches:
        chosen.append(batch[:missing].cpu())
        missing -= chosen[-1].shape[0]
        if missing <= 0:
            break
    if not chosen:
        raise ValueError("batches held no images")
    return torch.cat(chosen)


def _write_png(image: np.ndarray, path: Path, *, durable: bool = True) -> None:
    with atomic_write(path, durable=durable) as temporary, open(temporary, "wb") as file:
        file.write(_encode_png(image))


def _encode_png(image: np.ndarray) -> bytes:
    """uint8 `[H, W, C]` as a PNG file (ISO/IEC 15948), so that sampling needs no image library."""
    height, width, channels = image.shape
    # Every line starts with its filter's number. 2 is "up": the difference to the line above, modulo 256.
    lines = np.empty((height, 1 + width * channels), dtype=np.uint8)
    flat = image.reshape(height, width * channels)
    lines[:, 0] = 2
    lines[:1, 1:] = flat[:1]
    lines[1:, 1:] = flat[1:] - flat[:-1]
    colour_type = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines.data)), (b"IEND", b""))
    )


__all__ = [
    "GRID_LIMIT",
    "first_missing_png",
    "labelled_grid",
    "save_grid",
    "to_uint8",
    "write_images",
    "write_npy",
    "write_npz",
    "write_png",
]
