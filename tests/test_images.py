"""Generated images on disk: the right pixels, whole files only, and what was finished stays."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evalp_fast import images as images_module
from evalp_fast.data import load_dataset
from evalp_fast.images import (
    GRID_LIMIT,
    first_missing_png,
    labelled_grid,
    save_grid,
    to_uint8,
    write_images,
    write_npy,
    write_npz,
    write_png,
)


def random_images(n: int, channels: int = 3, height: int = 6, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def rows(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def interrupted(images: Tensor, batch_size: int, after: int, error: type[BaseException]) -> Iterator[Tensor]:
    yield from images.split(batch_size)[:after]
    raise error


class FullDisk:
    """Stands for `open` where the disk takes no more than so many bytes in each file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
        def limited_open(path: Path, mode: str) -> object:
            file = open(path, mode)  # noqa: SIM115 (closed by Limited)
            write = file.write

            class Limited:
                def write(self, content: bytes) -> int:
                    if file.tell() + len(memoryview(content).cast("B")) > capacity:
                        write(bytes(content)[: max(capacity - file.tell(), 0)])
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return write(content)

                def __enter__(self) -> "Limited":
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

            return Limited()

        monkeypatch.setattr(images_module, "open", limited_open, raising=False)


# Pixels


def test_to_uint8_rounds_and_clamps() -> None:
    """Truncation would darken every image by half a level."""
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.4 / 255, 254.6 / 255, 1.0, 1.5, -0.5])
    assert to_uint8(values).tolist() == [0, 0, 1, 1, 255, 255, 255, 0]
    assert to_uint8(values.double()).tolist() == [0, 0, 1, 1, 255, 255, 255, 0]
    noise = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    # The mean of the rounding error is 0 with standard deviation 0.29 / sqrt(1e5); truncation has -0.5.
    assert abs((to_uint8(noise).float() - 255 * noise).mean()) < 5 * 0.29 / 1e5**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_uint8_of_16_bit_types(dtype: torch.dtype) -> None:
    """255·x in bfloat16 has eight bits: half of the levels above 128 would be lost to its own rounding."""
    values = torch.linspace(0, 1, 1001).to(dtype)
    assert torch.equal(to_uint8(values), (values.double() * 255).round().to(torch.uint8))


def test_to_uint8_counts_nan() -> None:
    values = torch.zeros(2, 1, 4, 4)
    values[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(ValueError, match="3 of 32 values of images are NaN or infinite"):
        to_uint8(values)
    with pytest.raises(TypeError, match=r"floating point in \[0, 1\], got torch.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


def test_to_uint8_leaves_its_argument_and_takes_none() -> None:
    values = torch.full((2,), 0.5, requires_grad=True)
    assert to_uint8(values).tolist() == [128, 128]
    assert values.tolist() == [0.5, 0.5]
    assert to_uint8(torch.empty(0, 1, 4, 4)).shape == (0, 1, 4, 4)


# PNG


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 1), (1, 9), (9, 1), (64, 33)])
def test_png_pixels(tmp_path: Path, channels: int, height: int, width: int) -> None:
    """Read back by an independent reader, with checksums verified."""
    images = random_images(3, channels, height, width)
    images[1], images[2] = 0, 255
    assert write_png([images], tmp_path) == 3
    for i in range(3):
        path = tmp_path / f"{i:07d}.png"
        with Image.open(path) as image:
            image.verify()
        assert np.array_equal(read(path).reshape(height, width, channels), rows(images)[i])
        with Image.open(path) as image:
            assert image.mode == ("L" if channels == 1 else "RGB")


def test_png_is_not_stretched(tmp_path: Path) -> None:
    """Images between 100 and 101 stay there: published samples were stretched to full contrast one by one."""
    faint = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    faint[0, 0, 0, 0] = 101
    write_png([faint], tmp_path)
    save_grid(faint, tmp_path / "grid.png")
    assert np.array_equal(read(tmp_path / "0000000.png"), rows(faint)[0, :, :, 0])
    assert sorted(set(read(tmp_path / "grid.png").flatten().tolist())) == [100, 101, 255]


def test_png_numbers_go_on(tmp_path: Path) -> None:
    images = random_images(7)
    folder = tmp_path / "größe" / "数"
    assert first_missing_png(folder) == 0
    assert write_png(images[:5].split(2), folder, start=0) == 5
    assert first_missing_png(folder) == 5
    assert write_png([images[5:]], folder, start=5) == 2
    assert names(folder) == [f"{i:07d}.png" for i in range(7)]
    for i in range(7):
        assert np.array_equal(read(folder / f"{i:07d}.png"), rows(images)[i])
    assert write_png([images[:1]], folder, start=12_345_678) == 1
    assert (folder / "12345678.png").exists()
    assert first_missing_png(folder, start=3) == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_png_run_keeps_what_is_finished(tmp_path: Path, error: type[BaseException]) -> None:
    images = random_images(10)
    with pytest.raises(error):
        write_png(interrupted(images, 2, 3, error), tmp_path)
    assert names(tmp_path) == [f"{i:07d}.png" for i in range(6)]
    done = first_missing_png(tmp_path)
    write_png([images[done:]], tmp_path, start=done)
    for i in range(10):
        assert np.array_equal(read(tmp_path / f"{i:07d}.png"), rows(images)[i])


def test_interrupt_between_data_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = images_module._encode_png, []

    def encode_three(image: np.ndarray) -> bytes:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(images_module, "_encode_png", encode_three)
    with pytest.raises(KeyboardInterrupt):
        write_png([random_images(9)], tmp_path)
    assert names(tmp_path) == [f"{i:07d}.png" for i in range(3)]


def test_png_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(4, height=16, width=16)
    images[:2] = 0  # compresses to a few bytes
    FullDisk(monkeypatch, 400)
    with pytest.raises(OSError, match="No space left") as caught:
        write_png([images], tmp_path)
    assert caught.value.filename == str(tmp_path / "0000002.png")
    assert names(tmp_path) == ["0000000.png", "0000001.png"]


def test_png_of_nothing(tmp_path: Path) -> None:
    assert write_png([], tmp_path / "a") == 0
    assert write_png([random_images(0)], tmp_path / "a") == 0
    assert names(tmp_path / "a") == []


# Arrays


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_arrays(tmp_path: Path, channels: int, count: int) -> None:
    images = random_images(count, channels)
    assert write_npz(images.split(3), tmp_path / "é.npz", count=count) == tmp_path / "é.npz"
    assert write_npy(images.split(3), tmp_path / "é.npy", count=count) == tmp_path / "é.npy"
    with np.load(tmp_path / "é.npz") as file:
        assert file.files == ["images"]
        assert file["images"].dtype == np.uint8
        assert np.array_equal(file["images"], rows(images))
    mapped = np.load(tmp_path / "é.npy", mmap_mode="r")
    assert mapped.shape == (count, 6, 6, channels)
    assert np.array_equal(mapped, rows(images))
    assert names(tmp_path) == ["é.npy", "é.npz"]


def test_the_same_images_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip file holds the time of day, unless it is told not to."""
    first = write_npz([random_images(2)], tmp_path / "a.npz", count=2).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write_npz([random_images(2)], tmp_path / "b.npz", count=2).read_bytes() == first


def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    images = random_images(20, 1)
    write_png([images], tmp_path / "png")
    paths = [tmp_path / "png", write_npz([images], tmp_path / "a.npz", count=20)]
    paths.append(write_npy([images], tmp_path / "a.npy", count=20))
    for path in paths:
        assert torch.equal(load_dataset(path, split="all").images, images)


WRITERS = pytest.mark.parametrize("write", [write_npz, write_npy])


@WRITERS
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_array(tmp_path: Path, write: object, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write(interrupted(random_images(10), 2, 3, error), path, count=10)  # pyright: ignore
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


@WRITERS
@pytest.mark.parametrize(
    ("n", "message"),
    [(9, "held 9 images, count is 10"), (14, "held more than 10 images"), (0, "held 0 images")],
)
def test_wrong_count(tmp_path: Path, write: object, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(random_images(n).split(4), tmp_path / "a", count=10)  # pyright: ignore
    assert names(tmp_path) == []


@WRITERS
def test_array_of_no_batches(tmp_path: Path, write: object) -> None:
    with pytest.raises(ValueError, match="held 0 images"):
        write([], tmp_path / "a", count=0)  # pyright: ignore


@WRITERS
def test_batches_that_differ(tmp_path: Path, write: object) -> None:
    batches = [random_images(2, 1), random_images(2, 3)]
    with pytest.raises(ValueError, match=r"shape \(6, 6, 1\) \(HWC\), got \(6, 6, 3\)"):
        write(batches, tmp_path / "a", count=4)  # pyright: ignore
    assert names(tmp_path) == []


def test_npy_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, 1000)
    with pytest.raises(OSError, match="No space left") as caught:
        write_npy(random_images(100).split(5), tmp_path / "a.npy", count=100)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.npy")
    assert names(tmp_path) == []


REAL_LIMIT = """
import resource, signal, sys, torch
from evalp_fast.images import write_npy, write_npz, write_png
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
images = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
for write, name in ((write_npy, "a.npy"), (write_npz, "a.npz")):
    try:
        write(images.split(10), sys.argv[1] + "/" + name, count=200)
    except OSError as error:
        print(error.errno, error.filename)
"""


def test_real_write_error(tmp_path: Path) -> None:
    """The operating system itself refuses to write on, as it does on a full disk; also inside a zip file."""
    done = subprocess.run(
        [sys.executable, "-c", REAL_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{errno.EFBIG} {tmp_path / name}" for name in ("a.npy", "a.npz")]
    assert names(tmp_path) == []


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Batches are drawn one at a time, and none is kept."""
    import weakref

    alive: list[weakref.ref] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(20):
            batch = random_images(4)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(ref() is not None for ref in alive) <= 1

    write_npz(stream(), tmp_path / "a.npz", count=80)
    alive.clear()
    write_png(stream(), tmp_path / "png")


# Grids


def test_grid_layout(tmp_path: Path) -> None:
    images = random_images(5, 3, 4, 6)
    save_grid(images, tmp_path / "a.png", columns=3)
    grid = read(tmp_path / "a.png").copy()
    assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert np.array_equal(grid[top : top + 4, left : left + 6], rows(images)[i])
        grid[top : top + 4, left : left + 6] = 255
    assert (grid == 255).all()


@pytest.mark.parametrize(("n", "columns", "shape"), [(1, None, (8, 8)), (1, 9, (8, 8)), (10, None, (26, 34))])
def test_grid_shapes(tmp_path: Path, n: int, columns: int | None, shape: tuple[int, int]) -> None:
    save_grid(random_images(n, 1, 4 if n == 1 else 6, 4 if n == 1 else 6), tmp_path / "a.png", columns)
    assert read(tmp_path / "a.png").shape == shape


def test_grid_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        save_grid(random_images(0), tmp_path / "a.png")
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        save_grid(random_images(1), tmp_path / "a.png", columns=0)
    assert names(tmp_path) == []


def test_labelled_grid(tmp_path: Path) -> None:
    """The panels' pixels are in the figure as they are: its only greys are those of the images."""
    panels = {
        f"panel {i}\nFréchet {i}": torch.full((4, 1, 8, 8), 60 * i, dtype=torch.uint8) for i in range(4)
    }
    path = labelled_grid(panels, tmp_path / "démo.png", title="MNIST")
    figure = read(path)[:, :, :3].reshape(-1, 3)
    assert names(tmp_path) == ["démo.png"]
    values, counts = np.unique(figure, axis=0, return_counts=True)
    common = {tuple(v) for v, c in zip(values.tolist(), counts, strict=True) if c > 10_000}
    assert common == {(60 * i,) * 3 for i in range(4)} | {(255, 255, 255)}


def test_labelled_grid_of_colours_and_one_panel(tmp_path: Path) -> None:
    labelled_grid({"colour": random_images(1)}, tmp_path / "a.png")
    assert read(tmp_path / "a.png").ndim == 3
    with pytest.raises(ValueError, match="at least one grid"):
        labelled_grid({}, tmp_path / "b.png")
    with pytest.raises(ValueError, match="at least one image"):
        labelled_grid({"none": random_images(0)}, tmp_path / "b.png")
    assert names(tmp_path) == ["a.png"]


def test_labelled_grid_leaves_pyplot_alone(tmp_path: Path) -> None:
    """pyplot would choose a window system and keep every figure."""
    code = (
        "import sys, torch; from evalp_fast.images import labelled_grid; "
        "labelled_grid({'a': torch.zeros(1, 1, 2, 2, dtype=torch.uint8)}, sys.argv[1]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False", done.stderr


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'evalp-fast\[plot\]'"):
        labelled_grid({"a": random_images(1)}, tmp_path / "a.png")


# All formats


@pytest.mark.parametrize(
    ("format", "file"), [("png", ""), ("npz", "images.npz"), ("npy", "images.npy"), ("grid", "grid.png")]
)
def test_write_images(tmp_path: Path, format: str, file: str) -> None:
    images = random_images(9)
    written = write_images(images.split(4), tmp_path / "out", format=format, count=9, start=100)
    assert written == tmp_path / "out" / file
    expected = [f"{i:07d}.png" for i in range(100, 109)] if format == "png" else [file]
    assert names(tmp_path / "out") == expected


def test_large_grid_draws_no_more_than_it_shows(tmp_path: Path) -> None:
    drawn: list[int] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(100):
            drawn.append(100)
            yield random_images(100, 1, 2, 2)

    write_images(stream(), tmp_path, format="grid", count=10_000)
    assert sum(drawn) == 300
    assert GRID_LIMIT == 256
    assert read(tmp_path / "grid.png").shape == (16 * 4 + 2, 16 * 4 + 2)


def test_write_images_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be png, npz, npy or grid, got 'jpg'"):
        write_images([random_images(1)], tmp_path, format="jpg", count=1)
    with pytest.raises(ValueError, match="batches held 1 images, count is 2"):
        write_images([random_images(1)], tmp_path, format="png", count=2)
    with pytest.raises(ValueError, match="batches held no images"):
        write_images([], tmp_path, format="grid", count=1)
    with pytest.raises(ValueError, match="start must not be negative"):
        write_png([random_images(1)], tmp_path, start=-1)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 2), TypeError, r"uint8 tensor \(see to_uint8\), got torch.float32"),
        (np.zeros((1, 1, 2, 2), dtype=np.uint8), TypeError, "got ndarray"),
        (
            torch.zeros(1, 2, 2, dtype=torch.uint8),
            ValueError,
            r"\[N, C, H, W\] with C 1 or 3, got \(1, 2, 2\)",
        ),
        (torch.zeros(1, 4, 2, 2, dtype=torch.uint8), ValueError, "C 1 or 3"),
    ],
)
@pytest.mark.parametrize("format", ["png", "npz", "npy"])
def test_batches_of_the_wrong_kind(
    tmp_path: Path, batch: object, error: type[Exception], message: str, format: str
) -> None:
    with pytest.raises(error, match=message):
        write_images([batch], tmp_path, format=format, count=1)  # pyright: ignore
    assert names(tmp_path) == []
