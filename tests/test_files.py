"""Files are whole or not there: on a full disk, on Ctrl-C, and however a block ends."""

import builtins
import dataclasses
import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from evalp_fast import files
from evalp_fast.files import (
    FileError,
    atomic_write,
    load_safetensors,
    read_json,
    read_metadata,
    save_safetensors_atomic,
    write_json_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_target_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "größe 数.bin"
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.read_bytes() == b""
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_exception_leaves_the_target_as_it_was(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    target = tmp_path / "model.bin"
    if existing:
        target.write_bytes(b"old")
    with pytest.raises(error), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise error
    assert names(tmp_path) == (["model.bin"] if existing else [])
    assert not existing or target.read_bytes() == b"old"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    monkeypatch.setattr(files.os, failing, full_disk)
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert "free some space" in str(caught.value)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]


def test_full_disk_during_a_write_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.bin") as caught, atomic_write(tmp_path / "model.bin"):
        full_disk()
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_errors_of_other_files_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "model.bin"):
        (tmp_path / "elsewhere").read_bytes()


def test_synced_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the data leaves an empty file after a power failure."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))
        )
    with atomic_write(tmp_path / "a"):
        pass
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    with atomic_write(tmp_path / "a", durable=False):
        pass
    assert calls == ["replace"]


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "a")
    with atomic_write(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"


def test_folders_are_made_and_long_names_fit(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / ("n" * 255)
    with atomic_write(target):
        pass
    assert target.exists()


def test_target_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match=r"d'$"), atomic_write(tmp_path / "d"):
        pass
    assert names(tmp_path) == ["d"]


def test_permissions_follow_the_umask_and_the_old_file(tmp_path: Path) -> None:
    """safetensors makes files that only their owner can read; a shared run folder needs better."""
    target = tmp_path / "model.safetensors"
    old = os.umask(0o022)
    try:
        save_safetensors_atomic({"a": torch.zeros(1)}, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        target.chmod(0o640)
        save_safetensors_atomic({"a": torch.zeros(1)}, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
    finally:
        os.umask(old)


@dataclasses.dataclass
class Configuration:
    name: str
    path: Path


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    value = {
        "float": 0.1,
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "numpy": np.float32(0.5),
        "array": np.array([[1, 2], [3, 4]]),
        "tensor": torch.tensor([1.0, math.nan]),
        "configuration": Configuration("größe", Path("a/b")),
        "none": None,
        "flag": True,
        "tuple": (1, 2),
    }
    write_json_atomic(value, path)
    assert read_json(path) == {
        "float": 0.1,
        "nan": "nan",
        "inf": ["inf", "-inf"],
        "numpy": 0.5,
        "array": [[1, 2], [3, 4]],
        "tensor": [1.0, "nan"],
        "configuration": {"name": "größe", "path": "a/b"},
        "none": None,
        "flag": True,
        "tuple": [1, 2],
    }
    assert "größe" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, {"a": {1, 2}}, Configuration])
def test_json_of_other_types(tmp_path: Path, value: object) -> None:
    write_json_atomic("old", tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json_atomic(value, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == "old"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"nothing"])
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"config\.json does not exist"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path)


def test_safetensors_of_any_layout(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "plain": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
    }
    path = tmp_path / "模型.safetensors"
    save_safetensors_atomic(tensors, path, {"seed": "0", "名": "é"})
    loaded = load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert read_metadata(path) == {"seed": "0", "名": "é"}
    assert names(tmp_path) == [path.name]


def test_safetensors_without_metadata_or_tensors(tmp_path: Path) -> None:
    save_safetensors_atomic({}, tmp_path / "a")
    assert load_safetensors(tmp_path / "a") == {}
    assert read_metadata(tmp_path / "a") == {}


def test_loaded_tensors_survive_a_new_file(tmp_path: Path) -> None:
    """Loaded tensors may lie in the mapped file: writing into it would change them, replacing it does not."""
    save_safetensors_atomic({"a": torch.zeros(4096)}, tmp_path / "a")
    loaded = load_safetensors(tmp_path / "a")
    save_safetensors_atomic({"a": torch.ones(4096)}, tmp_path / "a")
    assert loaded["a"].sum() == 0


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": 1.0}, None, "tensors\\['a'\\] must be a tensor, got float"),
        ({}, {"seed": 0}, "metadata must map text to text, got 'seed': 0"),
    ],
)
def test_safetensors_bad_arguments(tmp_path: Path, tensors: dict, metadata: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_safetensors_atomic(tensors, tmp_path / "a", metadata)
    assert names(tmp_path) == []


def test_safetensors_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reports a full disk as text in an exception of its own."""
    save_safetensors_atomic({"a": torch.zeros(3)}, tmp_path / "a")

    def save(tensors: dict, path: Path, metadata: dict | None) -> None:
        path.write_bytes(b"half")
        raise files.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(files, "save_file", save)
    with pytest.raises(OSError, match="free some space") as caught:
        save_safetensors_atomic({"a": torch.ones(3)}, tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert load_safetensors(tmp_path / "a")["a"].sum() == 0
    assert names(tmp_path) == ["a"]


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors_atomic({"a": torch.randn(64), "b": torch.zeros(3)}, path, {"k": "v"})
    whole = path.read_bytes()
    for size in (0, 3, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for read in (load_safetensors, read_metadata):
            with pytest.raises(FileError, match=r"model\.safetensors \(.* bytes\) is truncated, corrupt"):
                read(path)


@pytest.mark.parametrize("content", [b"not a model", b"\xff" * 100, b"PK\x03\x04" + bytes(60)])
def test_corrupt_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileError, match="copy or download it again"):
        load_safetensors(tmp_path / "a")


def test_missing_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"model\.safetensors does not exist"):
        load_safetensors(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="is a folder"):
        load_safetensors(tmp_path)


def test_unknown_device_is_not_a_corrupt_file(tmp_path: Path) -> None:
    save_safetensors_atomic({"a": torch.zeros(1)}, tmp_path / "a")
    with pytest.raises(RuntimeError, match="device"):
        load_safetensors(tmp_path / "a", device="nonsense")


def test_no_space_to_create_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = builtins.open

    def refuse(file: object, *arguments: object, **keywords: object) -> object:
        if str(file).endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real_open(file, *arguments, **keywords)  # pyright: ignore

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(OSError, match=r"a\.json") as caught:
        write_json_atomic({}, tmp_path / "a.json")
    assert ".tmp" not in str(caught.value)
