"""Folders of images: every kind of file that people have, and the broken ones by name."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evalp_fast import folders
from evalp_fast.data import load_dataset
from evalp_fast.folders import DataError, decode_files, find_files

SPLITS = ("train", "validation", "test")


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)  # pyright: ignore
    return path


def grey(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size), value, dtype=np.uint8)


def decode_one(path: Path, **options: object) -> torch.Tensor:
    return decode_files([path], path.parent, **options)[0][0]  # pyright: ignore


# Kinds of image


def test_sixteen_bits(tmp_path: Path) -> None:
    """Pillow's own conversion of 16 bits clips at 255: everything but black turns white."""
    wide = np.array([[0, 257, 128 * 257], [255 * 257, 1000, 129]], dtype=np.uint16)
    wide = np.pad(wide, ((0, 1), (0, 0)))
    image = decode_one(save(tmp_path / "a.png", wide))
    assert image.shape == (1, 3, 3)
    assert image[0, :2].tolist() == [[0, 1, 128], [255, 4, 1]]


def test_thirty_two_bit_mode(tmp_path: Path) -> None:
    """Older versions of Pillow open a 16-bit PNG file in mode I."""
    path = save(tmp_path / "a.png", np.full((2, 2), 514, dtype=np.uint16))
    with Image.open(path) as image:
        wide = image.convert("I")
    real_open = Image.open

    class Opened:
        def __enter__(self) -> Image.Image:
            return wide

        def __exit__(self, *_: object) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda file: Opened())
        assert decode_one(path).tolist() == [[[2, 2], [2, 2]]]
    assert Image.open is real_open


def test_transparent_becomes_white(tmp_path: Path) -> None:
    """Dropping the alpha channel would show what lies hidden under transparent pixels."""
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 128)
    image = decode_one(save(tmp_path / "a.png", rgba))
    assert image.shape == (3, 2, 2)
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert image[:, 1, 0].tolist() == [127, 127, 127]


def test_grey_with_alpha_is_grey(tmp_path: Path) -> None:
    image = decode_one(save(tmp_path / "a.png", np.array([[[7, 255]]], dtype=np.uint8)))
    assert image.tolist() == [[[7]]]


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    decoded = decode_one(tmp_path / "a.png")
    assert decoded[:, 0, 0].tolist() == [1, 2, 3]
    assert decoded[:, 0, 1].tolist() == [40, 50, 60]
    image.save(tmp_path / "b.png", transparency=1)
    decoded = decode_one(tmp_path / "b.png")
    assert decoded[:, 0, 0].tolist() == [1, 2, 3]
    assert decoded[:, 0, 1].tolist() == [255, 255, 255]


def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False], [False, True]])).save(tmp_path / "a.png")
    assert decode_one(tmp_path / "a.png").tolist() == [[[255, 0], [0, 255]]]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=100)
    red = decode_one(tmp_path / "b.jpg")
    assert red.shape == (3, 8, 8)
    assert red[0].min() > 200
    assert red[1:].max() < 60


def test_turned_as_the_camera_says(tmp_path: Path) -> None:
    array = np.zeros((8, 8), dtype=np.uint8)
    array[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = decode_one(save(tmp_path / "a.jpg", array, exif=exif, quality=100))
    assert image[0, :3].max() < 30
    assert image[0, 5:].min() > 225


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "webp", "bmp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}", grey(100))
    images, skipped = decode_files(find_files(tmp_path, SPLITS), tmp_path, channels=1)
    assert images.shape == (1, 1, 8, 8)
    assert (images.int() - 100).abs().max() <= 2
    assert skipped == ()


def test_channels_by_the_first_image_or_by_argument(tmp_path: Path) -> None:
    colour = np.zeros((4, 4, 3), dtype=np.uint8)
    colour[..., 1] = 255
    files = [save(tmp_path / "a.png", grey(9, 4)), save(tmp_path / "b.png", colour)]
    images, _ = decode_files(files, tmp_path)
    assert images.shape == (2, 1, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [9, 150]  # 0.587 of 255
    assert decode_files(files[::-1], tmp_path)[0].shape == (2, 3, 4, 4)
    images, _ = decode_files(files, tmp_path, channels=3)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [0, 255, 0]]


# Crop and resize


def test_centre_square(tmp_path: Path) -> None:
    wide = np.arange(3 * 7, dtype=np.uint8).reshape(3, 7)
    assert decode_one(save(tmp_path / "a.png", wide))[0].tolist() == wide[:, 2:5].tolist()
    assert decode_one(save(tmp_path / "b.png", wide.T))[0].tolist() == wide.T[2:5].tolist()


def test_resize_is_antialiased(tmp_path: Path) -> None:
    """Without antialiasing single columns are picked, and a fine stripe pattern turns into black or white."""
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::4] = 255
    image = decode_one(save(tmp_path / "a.png", stripes), image_size=8)
    assert image.shape == (1, 8, 8)
    assert (image[0, :, 1:-1].float() - 255 / 4).abs().max() < 8


def test_resize_as_torchvision(tmp_path: Path) -> None:
    """CelebA as in the published code: CenterCrop(140), Resize(64), in torchvision's words."""
    from torchvision import transforms

    array = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", array)
    with Image.open(path) as image:
        expected = transforms.Compose(
            [transforms.CenterCrop(140), transforms.Resize(64), transforms.PILToTensor()]
        )(image)
    assert torch.equal(decode_one(path, image_size=64, crop=140), expected)


def test_crop_larger_than_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", grey(5, 64))
    assert torch.equal(
        decode_one(path, image_size=64, crop=140), torch.full((1, 64, 64), 5, dtype=torch.uint8)
    )


def test_enlarged(tmp_path: Path) -> None:
    assert decode_one(save(tmp_path / "a.png", grey(5, 4)), image_size=9).shape == (1, 9, 9)


def test_different_sizes(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.png", grey(0, 8 if i else 6)) for i in range(9)]
    with pytest.raises(
        DataError, match=r"8 of 9 images .* not 6x6 .*: 1\.png \(8x8\), .*5\.png .*, \.\.\.; pass"
    ):
        decode_files(files, tmp_path)
    assert decode_files(files, tmp_path, image_size=6)[0].shape == (9, 1, 6, 6)


# Broken files


def broken_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Good and broken files: empty, cut off (PNG and JPEG), text, and one that is a folder."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    good = [save(folder / f"good{i}.png", noise) for i in range(3)]
    broken = [folder / n for n in ("a_empty.png", "b_cut.png", "c_cut.jpg", "d_text.webp")]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(good[0].read_bytes()[:2000])
    whole = save(folder / "whole.jpg", noise)
    broken[2].write_bytes(whole.read_bytes()[:1500])
    whole.unlink()
    broken[3].write_text("no image")
    return good, broken


def test_broken_files_are_named(tmp_path: Path) -> None:
    _, broken = broken_folder(tmp_path)
    with pytest.raises(DataError, match=r"4 of 7 images .* cannot be decoded") as caught:
        decode_files(find_files(tmp_path, SPLITS), tmp_path)
    for path in broken:
        assert path.name in str(caught.value)
    assert "skip_broken=True" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_are_skipped(tmp_path: Path) -> None:
    good, broken = broken_folder(tmp_path)
    files = find_files(tmp_path, SPLITS)
    for i, path in enumerate(good):
        save(path, grey(i + 1, 64))
    with pytest.warns(UserWarning, match="4 of 7 images .* skipped"):
        images, skipped = decode_files(files, tmp_path, skip_broken=True)
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert skipped == tuple(map(str, broken))


def test_many_broken_files_are_counted(tmp_path: Path) -> None:
    files = [save(tmp_path / "0.png", grey(0))]
    for i in range(1, 100):
        files.append(tmp_path / f"{i}.png")
        files[-1].touch()
    with pytest.raises(DataError, match="99 of 100") as caught:
        decode_files(files, tmp_path)
    assert str(caught.value).count(".png") == 5
    assert ", ...;" in str(caught.value)


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"none of the 1 images .* a\.png"):
        decode_files([tmp_path / "a.png"], tmp_path, skip_broken=True)


def test_out_of_memory_is_not_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(folders, "_decode", fail)
    with pytest.raises(MemoryError):
        decode_files([tmp_path / "a.png"], tmp_path, skip_broken=True)


def test_interrupt_does_not_wait_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving a thread pool waits for every task that was handed to it, unless they are cancelled."""
    files = [save(tmp_path / "0.png", grey(0))] * 10_000
    decode, count, lock = folders._decode, [0], threading.Lock()

    def counting(*arguments: object) -> np.ndarray:
        with lock:
            count[0] += 1
        if count[0] == 100:
            raise KeyboardInterrupt
        return decode(*arguments)  # pyright: ignore

    monkeypatch.setattr(folders, "_decode", counting)
    with pytest.raises(KeyboardInterrupt):
        decode_files(files, tmp_path)
    assert count[0] < 5_000


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = save(tmp_path / "a.png", grey(0))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs PIL: pip install 'evalp-fast\[data\]'"):
        decode_files([path], tmp_path)


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i:03d}.png", grey(i, 4)) for i in range(200)]
    images, _ = decode_files(find_files(tmp_path, SPLITS), tmp_path)
    assert len(files) == 200
    assert images.dtype == torch.uint8
    order = [int(path.stem) for path in find_files(tmp_path, SPLITS)]
    assert images[:, 0, 0, 0].tolist() == order == list(range(200))


# Which files


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="holds no images"):
        find_files(tmp_path, SPLITS)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        find_files(tmp_path / "nowhere", SPLITS)


def test_recursive_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    wanted = ["Ärger/数 1.png", "a/b/c.JPG", "z.bmp"]
    for name in [*wanted, ".hidden.png", "a/._b.png", ".cache/d.png", "e.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, SPLITS)]
    assert found == sorted(wanted)


def test_circular_links_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(find_files(tmp_path, SPLITS)) == 1


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk passes over what it may not read, and training would go on with fewer images than there are."""

    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read"):
        find_files(tmp_path, SPLITS)


def test_hash_split(tmp_path: Path) -> None:
    """Every file in one split; shares as promised; and none changes its split when files are added."""
    for i in range(2000):
        (tmp_path / f"{i}.png").touch()
    before = {part: set(find_files(tmp_path, (part,))) for part in SPLITS}
    assert sum(map(len, before.values())) == 2000
    assert set.union(*before.values()) == set(find_files(tmp_path, SPLITS))
    # Five standard deviations of the binomial counts.
    for part, share in zip(SPLITS, (0.9, 0.05, 0.05), strict=True):
        assert abs(len(before[part]) - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5
    for i in range(100):
        (tmp_path / f"new{i}.png").touch()
    for part in SPLITS:
        assert before[part] <= set(find_files(tmp_path, (part,)))
    assert len(find_files(tmp_path, ("train", "validation"))) > len(find_files(tmp_path, ("train",)))


def test_hash_split_is_the_same_everywhere() -> None:
    """These numbers must never change: a checkpoint's training files would become test files."""
    assert folders._hash_share("a.png") == pytest.approx(0.882865517843342, abs=1e-15)
    composed, decomposed = "\u00e4.png", "a\u0308.png"
    assert folders._hash_share(composed) == folders._hash_share(decomposed)
    assert 0 <= folders._hash_share("\udcff.png") < 1  # a name that is not UTF-8


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_split_folders(tmp_path: Path, name: str) -> None:
    for part in ("train", name, "test"):
        save(tmp_path / part / "sub" / "1.png", grey(0))
    assert [p.parts[-3] for p in find_files(tmp_path, SPLITS)] == ["train", name, "test"]
    for part, folder in zip(SPLITS, ("train", name, "test"), strict=True):
        assert [p.parts[-3] for p in find_files(tmp_path, (part,))] == [folder]


def test_split_folders_without_validation(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{i}.png").touch()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").touch()
    train, validation, test = (set(find_files(tmp_path, (part,))) for part in SPLITS)
    assert len(train) + len(validation) == 200
    assert 0 < len(validation) < 30
    assert not train & validation
    assert {path.parent.name for path in train | validation} == {"train"}
    assert test == {tmp_path / "test" / "0.png"}


def test_split_folders_without_test(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png", grey(0))
    save(tmp_path / "val" / "1.png", grey(0))
    with pytest.raises(DataError, match="no test/ beside train/"):
        find_files(tmp_path, ("test",))


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png", grey(0))
    save(tmp_path / "car" / "1.png", grey(0))
    assert len(find_files(tmp_path, SPLITS)) == 2


def test_one_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png", grey(7))
    assert load_dataset(tmp_path, split="all").images.shape == (1, 1, 8, 8)
    share = folders._hash_share("a.png")
    own = "train" if share < 0.9 else "validation" if share < 0.95 else "test"
    assert len(load_dataset(tmp_path, split=own)) == 1
    for part in set(SPLITS) - {own}:
        with pytest.raises(DataError, match=r"of 1 images .* none is in split"):
            load_dataset(tmp_path, split=part)
