"""Data sets and array files with their splits, and the order in which training reads them."""

import gzip
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evalp_fast import data
from evalp_fast.data import (
    DataError,
    DataOrder,
    ImageDataset,
    batch_at,
    batches,
    epoch_permutation,
    load_dataset,
    to_float,
)
from evalp_fast.images import to_uint8
from evalp_fast.kernels.philox import Stream, words

EXCERPT = Path(__file__).parent / "data" / "mnist_excerpt.npz"


def numbered(n: int, size: int = 4, channels: int | None = None) -> np.ndarray:
    """Images whose pixels are their number."""
    shape = (n, size, size) if channels is None else (n, size, size, channels)
    return np.broadcast_to(np.arange(n, dtype=np.uint8).reshape(-1, *[1] * (len(shape) - 1)), shape).copy()


def first_pixels(dataset: ImageDataset) -> list[int]:
    return dataset.images[:, 0, 0, 0].tolist()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data anywhere, and every download fails as it does without a network."""
    from urllib.error import URLError

    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.delenv("EVALP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    return tmp_path


# The excerpt


def test_excerpt() -> None:
    train = load_dataset("mnist", root=EXCERPT)
    validation = load_dataset("mnist", split="validation", root=EXCERPT)
    both = load_dataset("mnist", split="train+validation", root=EXCERPT)
    test = load_dataset("mnist", split="test", root=EXCERPT)
    assert [len(d) for d in (train, validation, both, test)] == [1375, 125, 1500, 500]
    assert train.name == "mnist"
    assert train.images.dtype == torch.uint8
    assert train.images.shape[1:] == (1, 32, 32)
    assert both.labels is not None
    assert both.labels.dtype == torch.int64
    # The first digits of MNIST are known to all.
    assert both.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert torch.equal(torch.cat([train.images, validation.images]), both.images)
    assert len(load_dataset("mnist", split="all", root=EXCERPT)) == 2000


def test_mnist_padding_is_zeros_all_around() -> None:
    padded = load_dataset("mnist", root=EXCERPT, limit=100).images
    plain = load_dataset("mnist", root=EXCERPT, limit=100, image_size=28).images
    assert plain.shape == (100, 1, 28, 28)
    assert torch.equal(padded[:, :, 2:30, 2:30], plain)
    assert padded.sum(dtype=torch.int64) == plain.sum(dtype=torch.int64) > 0


@pytest.mark.full_data
def test_whole_mnist() -> None:
    import os

    root = os.environ["EVALP_DATA"]
    train = load_dataset("mnist")
    validation = load_dataset("mnist", split="validation", root=root)
    test = load_dataset("mnist", split="test")
    assert [len(d) for d in (train, validation, test)] == [55_000, 5_000, 10_000]
    both = load_dataset("mnist", split="train+validation")
    assert torch.equal(both.images[55_000:], validation.images)
    assert both.labels is not None
    assert validation.labels is not None
    assert torch.equal(both.labels[55_000:], validation.labels)
    # What the repository ships is what everybody has.
    assert torch.equal(
        both.images[:1500], load_dataset("mnist", split="train+validation", root=EXCERPT).images
    )
    assert torch.equal(test.images[:500], load_dataset("mnist", split="test", root=EXCERPT).images)


# Named data sets


def idx(array: np.ndarray) -> bytes:
    """MNIST's own format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


def fake_mnist(root: Path, train_count: int = 120, test_count: int = 20) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train_count), ("t10k", test_count)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(numbered(count, 28)))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    for name, named in data._NAMED.items():
        monkeypatch.setitem(data._NAMED, name, dataclasses.replace(named, train_count=120))
    monkeypatch.setattr(data, "_TEST_COUNT", 20)


@pytest.mark.usefixtures("small_counts")
def test_mnist_from_root_environment_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(tmp_path / "data")
    train = load_dataset("mnist", root=tmp_path / "data")
    assert first_pixels(train) == [0] * 110  # the padding
    assert train.images[:, 0, 2, 2].tolist() == list(range(110))
    assert load_dataset("mnist", split="validation", root=tmp_path / "data").images[0, 0, 2, 2] == 110
    monkeypatch.setenv("EVALP_DATA", str(tmp_path / "data"))
    assert len(load_dataset("mnist", split="test")) == 20
    monkeypatch.setenv("EVALP_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_mnist(tmp_path / "cache" / "evalp_fast")
    assert len(load_dataset("mnist", split="test")) == 20


def test_offline(offline: Path) -> None:
    for name, inside in (("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")):
        with pytest.raises(DataError, match=r"cannot download .* service not known") as caught:
            load_dataset(name)
        assert f"set EVALP_DATA to a folder that holds {inside}, or pass --data" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot download CelebA"):
        load_dataset("celeba64")


def test_download_that_was_cut_off(offline: Path) -> None:
    """torchvision takes a file that exists for a whole one, for ever."""
    fake_mnist(offline / "cache" / "evalp_fast")
    path = offline / "cache" / "evalp_fast" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"remove .*MNIST/raw"):
        load_dataset("mnist")


def test_root_without_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no MNIST/raw in"):
        load_dataset("mnist", root=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "labels", "short"])
def test_damaged_mnist(tmp_path: Path, damage: str) -> None:
    raw = tmp_path / "MNIST" / "raw"
    if damage == "short":
        fake_mnist(tmp_path)
    else:
        fake_mnist(tmp_path, 60_000)
    path = raw / ("train-labels-idx1-ubyte" if damage == "labels" else "train-images-idx3-ubyte")
    if damage in ("cut", "labels"):
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match=r"MNIST/raw (is incomplete or broken|holds 120 images)"):
        load_dataset("mnist", root=tmp_path)


def test_missing_torchvision_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"needs torchvision: pip install 'evalp-fast\[data\]'"):
        load_dataset("mnist", root=tmp_path)


@pytest.mark.usefixtures("small_counts")
def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision gives HWC arrays and a list of labels."""
    (tmp_path / "cifar-10-batches-py").mkdir()

    def make(root: Path, *, train: bool, download: bool) -> types.SimpleNamespace:
        n = 120 if train else 20
        images = numbered(n, 32, 3)
        images[:, 0, 1, 2] = 77
        return types.SimpleNamespace(root=root, data=images, targets=[3] * n)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", make)
    train = load_dataset("cifar10", root=tmp_path)
    assert train.images.shape == (108, 3, 32, 32)
    assert (train.images[:, 2, 0, 1] == 77).all()
    assert train.labels is not None
    assert train.labels.tolist() == [3] * 108
    assert first_pixels(load_dataset("cifar10", split="validation", root=tmp_path)) == list(range(108, 120))


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (178, 218), (10 * i, 0, 0)).save(folder / f"{i}.jpg", quality=100)
    files = {"train": ["0.jpg", "1.jpg", "2.jpg"], "valid": ["3.jpg"], "test": ["4.jpg", "5.jpg"]}

    def make(root: Path, *, split: str, download: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(root=root, base_folder="celeba", filename=files[split])

    monkeypatch.setattr("torchvision.datasets.CelebA", make)
    dataset = load_dataset("celeba64", split="validation+train", root=tmp_path)
    assert dataset.images.shape == (4, 3, 64, 64)
    assert dataset.name == "celeba64"
    assert np.abs(np.array(first_pixels(dataset)) - [0, 10, 20, 30]).max() <= 1
    # A folder of faces is treated in the same way.
    assert load_dataset("celeba64", split="all", root=folder).images.shape == (6, 3, 64, 64)


# Folders (how they are read is tested with folders.py)


def test_folder(tmp_path: Path) -> None:
    for i in range(40):
        Image.fromarray(numbered(40, 6)[i]).save(tmp_path / f"{i:02d}.png")
    dataset = load_dataset(tmp_path, split="all", image_size=3)
    assert dataset.name == tmp_path.name
    assert dataset.labels is None
    assert dataset.images.shape == (40, 1, 3, 3)
    assert first_pixels(dataset) == list(range(40))
    assert first_pixels(load_dataset(str(tmp_path), split="all", limit=4)) == [0, 10, 20, 30]
    assert len(load_dataset(tmp_path, split="all", limit=400)) == 40
    assert load_dataset(tmp_path, split="all", channels=3).images.shape == (40, 3, 6, 6)
    parts = [first_pixels(load_dataset(tmp_path, split=part)) for part in ("train", "validation+test")]
    assert sorted(parts[0] + parts[1]) == list(range(40))


def test_folder_with_broken_files(tmp_path: Path) -> None:
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    with pytest.raises(DataError, match=r"1 of 2 images .* b\.png"):
        load_dataset(tmp_path, split="all")
    with pytest.warns(UserWarning, match="skipped"):
        dataset = load_dataset(tmp_path, split="all", skip_broken=True)
    assert dataset.skipped == (str(tmp_path / "b.png"),)
    assert len(dataset) == 1


def test_a_folder_named_like_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mnist").mkdir()
    Image.fromarray(numbered(1)[0]).save("mnist/a.png")
    assert load_dataset("./mnist", split="all").images.shape == (1, 1, 4, 4)


# Array files


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ((20, 4, 4), (20, 1, 4, 4)),
        ((20, 4, 4, 1), (20, 1, 4, 4)),
        ((20, 4, 4, 3), (20, 3, 4, 4)),
        ((20, 1, 4, 4), (20, 1, 4, 4)),
        ((20, 3, 4, 4), (20, 3, 4, 4)),
        ((1, 4, 4), (1, 1, 4, 4)),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_array_layouts(tmp_path: Path, stored: tuple, shape: tuple, suffix: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, stored, dtype=np.uint8)
    path = tmp_path / f"größe.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    dataset = load_dataset(path, split="all")
    assert dataset.images.shape == shape
    assert dataset.name == "größe"
    channels_last = stored[-1] in (1, 3) and len(stored) == 4
    expected = array.transpose(0, 3, 1, 2) if channels_last else array.reshape(shape)
    assert torch.equal(dataset.images, torch.from_numpy(expected.copy()))


def test_array_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=numbered(100), labels=np.arange(100) % 7)
    parts = {part: load_dataset(tmp_path / "a.npz", split=part) for part in ("train", "validation", "test")}
    assert [len(d) for d in parts.values()] == [90, 5, 5]
    assert first_pixels(parts["test"]) == list(range(95, 100))
    assert parts["test"].labels is not None
    assert parts["test"].labels.tolist() == [i % 7 for i in range(95, 100)]
    assert first_pixels(load_dataset(tmp_path / "a.npz", split="test+train")) == [*range(90), *range(95, 100)]
    assert first_pixels(load_dataset(tmp_path / "a.npz", split="validation+test")) == list(range(90, 100))
    assert first_pixels(load_dataset(tmp_path / "a.npz", limit=3)) == [0, 1, 2]


@pytest.mark.parametrize("kinds", [("images", "labels"), ("x", "y")])
def test_named_splits_in_an_npz_file(tmp_path: Path, kinds: tuple[str, str]) -> None:
    arrays = {f"train_{kinds[0]}": numbered(30), f"train_{kinds[1]}": np.arange(30)}
    arrays |= {f"test_{kinds[0]}": numbered(5)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    assert first_pixels(load_dataset(tmp_path / "a.npz")) == list(range(27))
    validation = load_dataset(tmp_path / "a.npz", split="validation")
    assert first_pixels(validation) == [27, 28, 29]
    assert validation.labels is not None
    assert validation.labels.tolist() == [27, 28, 29]
    test = load_dataset(tmp_path / "a.npz", split="test")
    assert len(test) == 5
    assert test.labels is None
    assert load_dataset(tmp_path / "a.npz", split="all").labels is None
    np.savez(tmp_path / "b.npz", **arrays, **{f"val_{kinds[0]}": numbered(2)})
    assert len(load_dataset(tmp_path / "b.npz")) == 30
    assert len(load_dataset(tmp_path / "b.npz", split="validation")) == 2


def test_npy_is_memory_mapped(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A sparse file larger than the machine's memory can be opened and indexed, in any of its layouts."""
    path = tmp_path / "a.npy"
    n = 1 << 30
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 16, 16, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.seek(start + (n - 1) * 768)
        file.write(bytes([9]) * 768)
    dataset = load_dataset(path, split="all")
    assert dataset.images.shape == (n, 3, 16, 16)
    picked = dataset.images[torch.tensor([0, n - 1])]
    assert picked[:, 0, 0, 0].tolist() == [0, 9]
    assert load_dataset(path, split="test").images[-1].sum() == 9 * 768
    assert to_float(picked).max() == 9 / 255
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_array_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.save(path, noise) if suffix == "npy" else np.savez_compressed(path, images=noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"a\.np. is truncated, corrupt"):
        load_dataset(path)


@pytest.mark.parametrize("at", [1000, "stream"])
def test_corrupt_member(tmp_path: Path, at: int | str) -> None:
    """The directory at the end of the zip file is whole; the pixels are not, or the compressed stream."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    if isinstance(at, str):
        name_length, extra_length = content[26], content[28]
        at = 30 + name_length + extra_length
    content[at : at + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated, corrupt"):
        load_dataset(path)


def test_other_files_under_an_array_name(tmp_path: Path) -> None:
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "compressed.npz").write_bytes(gzip.compress(b"no zip"))
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("pickled.npy", "text.npy", "compressed.npz"):
        with pytest.raises(DataError, match="truncated, corrupt, or not an array file"):
            load_dataset(tmp_path / name)
    with pytest.raises(DataError, match=r"neither images nor train_images, only readme\.txt"):
        load_dataset(tmp_path / "foreign.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4), dtype=np.float32), r"must be uint8, got float32: .*\(255 \* x\)\.round\(\)"),
        (np.zeros((2, 4, 5), dtype=np.uint8), r"must be square .* got \(2, 4, 5\)"),
        (np.zeros((2, 4, 4, 4), dtype=np.uint8), "C 1 or 3"),
        (np.zeros((4, 4), dtype=np.uint8), r"got \(4, 4\)"),
        (np.zeros((0, 4, 4), dtype=np.uint8), "holds no images"),
        (np.zeros((2, 0, 0), dtype=np.uint8), "holds no images"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_of_the_wrong_kind(tmp_path: Path, array: np.ndarray, message: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, images=array)
    with pytest.raises(DataError, match=message):
        load_dataset(path)


def test_one_image_has_no_test_split(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(1))
    assert len(load_dataset(tmp_path / "a.npy")) == 1
    with pytest.raises(DataError, match="of 1 images none is in split test"):
        load_dataset(tmp_path / "a.npy", split="test")


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=numbered(10), labels=np.arange(9))
    with pytest.raises(DataError, match=r"labels in .* must be 10 integers, got int64 \(9,\)"):
        load_dataset(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=numbered(10), labels=np.zeros(10))
    with pytest.raises(DataError, match="got float64"):
        load_dataset(tmp_path / "a.npz")


def test_splits_that_differ(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=numbered(20), test_images=numbered(5, 8))
    with pytest.raises(DataError, match="the splits differ in shape"):
        load_dataset(tmp_path / "a.npz", split="all")
    np.savez(tmp_path / "b.npz", train_images=numbered(3))
    with pytest.raises(DataError, match="3 training images are too few"):
        load_dataset(tmp_path / "b.npz")
    with pytest.raises(DataError, match="test_images, only train_images"):
        load_dataset(tmp_path / "b.npz", split="test")


# Arguments


def test_wrong_sizes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(20, 4))
    with pytest.raises(DataError, match="holds 4x4 images, not 8: leave image_size out"):
        load_dataset(tmp_path / "a.npy", image_size=8)
    with pytest.raises(DataError, match="has 1 channels, not 3"):
        load_dataset(tmp_path / "a.npy", channels=3)
    with pytest.raises(DataError, match="mnist has image_size 28 or 32, not 64"):
        load_dataset("mnist", image_size=64)
    np.savez(tmp_path / "b.npz", images=numbered(20, 4))
    with pytest.raises(DataError, match=r"shape \(1, 4, 4\), mnist has \(1, 28, 28\)"):
        load_dataset("mnist", root=tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "split must be train, validation, test, all"),
        ({"split": "train+train"}, "split must be"),
        ({"split": ""}, "split must be"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("mnist", root=EXCERPT, **arguments)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagenet does not exist: pass mnist, cifar10, celeba64, a folder"):
        load_dataset("imagenet")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="neither a folder nor"):
        load_dataset(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"excerpt\.npz does not exist"):
        load_dataset("mnist", root=tmp_path / "excerpt.npz")


# Pixels


def test_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = to_float(every)
    assert values.dtype == torch.float32
    assert values[0] == 0
    assert values[255] == 1
    assert torch.equal(to_uint8(values), every)
    assert torch.equal(every, torch.arange(256, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"must be uint8, got torch\.float32"):
        to_float(values)


def test_dataset_on_another_device() -> None:
    dataset = load_dataset("mnist", root=EXCERPT, limit=2).to("meta")
    assert dataset.images.device.type == "meta"
    assert dataset.labels is not None
    assert dataset.labels.device.type == "meta"


# Order


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation(n: int) -> None:
    order = epoch_permutation(n, seed=3, epoch=1)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, epoch_permutation(n, seed=3, epoch=1))


def test_permutation_is_the_noise_contract() -> None:
    keys = words(5, torch.arange(300), 7, Stream.DATA_ORDER, 1)[:, 0].tolist()
    assert epoch_permutation(300, seed=5, epoch=7).tolist() == sorted(range(300), key=lambda i: (keys[i], i))


def test_ties_go_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """32-bit words collide in every epoch of 100,000 images; an unstable sort depends on the machine."""
    monkeypatch.setattr(data, "words", lambda seed, index, *_: (index % 3)[:, None])
    order = epoch_permutation(1000, seed=0, epoch=0)
    assert order.tolist() == [*range(0, 1000, 3), *range(1, 1000, 3), *range(2, 1000, 3)]


def test_epochs_and_seeds_are_independent() -> None:
    """Guards against an order that is shifted or repeated between neighbouring seeds and epochs.

    Spearman's rank correlation of two random orders of n has standard deviation 1/sqrt(n - 1); the bound is
    four and a half of them, over 15 pairs.
    """
    n = 4000
    orders = [
        epoch_permutation(n, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (-1, 0))
    ]
    ranks = torch.stack([order.argsort().double() for order in orders])
    correlation = torch.corrcoef(ranks) - torch.eye(6)
    assert correlation.abs().max() < 4.5 / n**0.5


def test_permutation_is_uniform() -> None:
    """Each image is as often at each place: chi-square of 20 x 20 counts over 4,000 epochs.

    361 degrees of freedom, so mean 361 and standard deviation 26.9. Guards against an order that favours
    places, such as one sorted by the wrong key.
    """
    counts = torch.zeros(20, 20)
    for epoch in range(4000):
        counts[torch.arange(20), epoch_permutation(20, seed=0, epoch=epoch)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 361 - 4.5 * 26.9 < chi_square < 361 + 4.5 * 26.9


def test_batches_cover_the_epoch() -> None:
    every = list(batches(10, 4, seed=0, epoch=2, drop_last=False))
    assert [len(batch) for batch in every] == [4, 4, 2]
    assert torch.equal(torch.cat(every), epoch_permutation(10, seed=0, epoch=2))
    kept = list(batches(10, 4, seed=0, epoch=2))
    assert len(kept) == 2
    assert torch.equal(kept[1], every[1])
    assert list(batches(0, 4, seed=0, epoch=0, drop_last=False)) == []
    assert list(batches(3, 4, seed=0, epoch=0)) == []
    assert len(list(batches(8, 4, seed=0, epoch=0, drop_last=False))) == 2


def test_order_resumes_at_any_step() -> None:
    through = [batch for epoch in range(4) for batch in batches(10, 3, seed=9, epoch=epoch)]
    order = DataOrder(10, 3, seed=9)
    assert order.steps_per_epoch == 3
    assert all(torch.equal(order.batch(step), batch) for step, batch in enumerate(through))
    for step in (11, 0, 7, 3, 2):
        assert torch.equal(order.batch(step), through[step])
        assert torch.equal(batch_at(10, 3, step, seed=9), through[step])
        assert torch.equal(DataOrder(10, 3, seed=9).batch(step), through[step])


def test_order_is_computed_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = data.words
    monkeypatch.setattr(data, "words", lambda *a: (calls.append(a[2]), original(*a))[1])
    order = DataOrder(100, 10, seed=0)
    for step in range(25):
        order.batch(step)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epoch_permutation(-1, seed=0, epoch=0), "n must not be negative"),
        (lambda: epoch_permutation(1, seed=0, epoch=-1), r"epoch must be in \[0, 2\^32\)"),
        (lambda: epoch_permutation(1, seed=0, epoch=1 << 32), "epoch must be"),
        (lambda: epoch_permutation(1, seed=1 << 63, epoch=0), "seed must fit in 64 bits"),
        (lambda: batches(5, 0, seed=0, epoch=0), "batch_size must be at least 1"),
        (lambda: DataOrder(5, 0, 0), "batch_size must be at least 1"),
        (lambda: DataOrder(5, 6, 0), "batch_size must be at most the number of images, 5, got 6"),
        (lambda: DataOrder(5, 2, 0).batch(-1), "step must not be negative"),
        (lambda: batch_at(0, 1, 0, seed=0), "batch_size must be at most"),
    ],
)
def test_order_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # pyright: ignore
