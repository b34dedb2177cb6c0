"""The command line: what it draws and trains, and that every mistake costs one line and exit code 2."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")

from evalp_fast import EVaLP
from evalp_fast.cli import main
from evalp_fast.commands import Sample
from evalp_fast.images import save_grid
from evalp_fast.priors import SamplingOptions

Text = pytest.CaptureFixture[str]


def fail(capsys: Text, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail: the one line that it prints, without its beginning."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    start = "evalp-fast: interrupted: " if code == 130 else "evalp-fast: error: "
    assert lines[0].startswith(start)
    return lines[0].removeprefix(start)


def words(text: str) -> list[str]:
    return text.split()


def images_in(folder: Path) -> torch.Tensor:
    from PIL import Image

    files = sorted(folder.glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])[:, None]


# ---------------------------------------------------------------------------------------------------------
# Help


def test_help_is_quick_and_lists_the_commands():
    code = (
        "import sys; from evalp_fast.cli import main; "
        "codes = [main(a) for a in (['--help'], ['sample', '--help'], ['evaluate', '--help'])]; "
        "assert codes == [0, 0, 0]; assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for word in ("train vae", "train prior", "train classifier", "evaluate", "info", "demo", "--proposals"):
        assert word in shown


@pytest.mark.parametrize("command", ["vae", "prior", "classifier"])
def test_help_of_training_shows_the_presets_values(command, capsys):
    preset = [] if command == "classifier" else ["--preset", "celeba64"]
    assert main(["train", command, *preset, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--learning-rate" in shown or "--flow-learning-rate" in shown
    if command == "vae":
        assert "0.05024" in shown
    if preset:
        assert "mnist-published" in shown


def test_without_a_command_the_usage_is_shown(capsys):
    assert main([]) == 2
    assert main(["train"]) == 2
    assert capsys.readouterr().out.count("usage: evalp-fast COMMAND") == 2


def test_python_dash_m_and_the_console_script_are_the_same():
    shown = subprocess.run(
        [sys.executable, "-m", "evalp_fast", "--version"], check=True, capture_output=True, text=True
    ).stdout
    assert shown.strip() == "0.1.0"


def test_sampling_options_are_those_of_the_package():
    options = {field.name: field.default for field in dataclasses.fields(SamplingOptions)}
    offered = {field.name: field.default for field in dataclasses.fields(Sample) if field.name in options}
    assert offered == options


# ---------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("method", ["prior", "flow", "sir", "langevin"])
def test_files_hold_the_images_of_the_python_interface(method, tiny_model, tmp_path, capsys):
    options = {"sir": {"proposals": 7}, "langevin": {"n_steps": 3, "adjusted": True}}.get(method, {})
    expected = EVaLP.from_pretrained(tiny_model).sample(20, method=method, seed=3, output="uint8", **options)
    arguments = ["sample", str(tiny_model), "-n", "20", "--method", method, "--seed", "3", "--device", "cpu"]
    arguments += ["--proposals", "7", "--n-steps", "3", "--adjusted"]
    for format in ("png", "npz", "npy", "grid"):
        assert main([*arguments, "--format", format, "--out", str(tmp_path / format)]) == 0
    assert images_in(tmp_path / "png").equal(expected)
    with np.load(tmp_path / "npz" / "images.npz") as arrays:
        assert torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).equal(expected)
    assert torch.from_numpy(np.load(tmp_path / "npy" / "images.npy")).permute(0, 3, 1, 2).equal(expected)
    grid = save_grid(expected, tmp_path / "expected.png")
    assert (tmp_path / "grid" / "grid.png").read_bytes() == grid.read_bytes()
    shown = capsys.readouterr().out
    assert "images/s drawn and decoded in ieee, " in shown
    assert ("effective sample size of 7 proposals: mean" in shown) == (method == "sir")
    assert ("acceptance" in shown) == (method == "langevin")


def test_start_goes_on_with_a_series_and_the_batch_changes_nothing(tiny_model, tmp_path):
    model = str(tiny_model)
    assert main(["sample", model, "-n", "300", "--out", str(tmp_path / "whole")]) == 0
    assert main(["sample", model, "-n", "90", "--batch-size", "7", "--out", str(tmp_path / "parts")]) == 0
    rest = ["-n", "210", "--start", "90", "--batch-size", "100"]
    assert main(["sample", model, *rest, "--out", str(tmp_path / "parts")]) == 0
    assert len(list((tmp_path / "parts").iterdir())) == 300
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_images_are_written_as_they_are_drawn(tiny_model, tmp_path, monkeypatch):
    """Guards against collecting all images first: memory would grow with n."""
    sizes = []

    def consume(batches, out, **_):
        sizes.extend(len(batch) for batch in batches)
        return out

    monkeypatch.setattr("evalp_fast.images.write_images", consume)
    assert main(["sample", str(tiny_model), "-n", "1000", "--batch-size", "64", "--out", str(tmp_path)]) == 0
    assert sum(sizes) == 1000
    assert max(sizes) == 64


def test_a_low_effective_sample_size_is_warned_of_in_one_line(tiny_model, tmp_path, capsys, monkeypatch):
    model = EVaLP.from_pretrained(tiny_model)
    with torch.no_grad():
        model.prior.energy_net.layers[-1].weight.normal_(0, 300)
    model.save_pretrained(tmp_path / "model")
    assert (
        main(["sample", str(tmp_path / "model"), "-n", "50", "--method", "sir", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr()
    assert "lowest 1.0" in printed.out
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("evalp-fast: warning: the mean effective sample size is")


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "-n", "5"], "MODEL"),
        (["sample", "nothing"], "unknown model 'nothing': shipped models"),
        (["sample", "MODEL", "-n", "0"], "n must be at least 1, got 0"),
        (["sample", "MODEL", "-n", "-3"], "n must be at least 1, got -3"),
        (["sample", "MODEL", "-n", "many"], "'many'"),
        (
            ["sample", "MODEL", "--method", "gibbs"],
            "'gibbs' for argument '--method'. Expected one of ('prior'",
        ),
        (["sample", "MODEL", "--method", "sir", "--proposals", "0"], "proposals must be at least 1, got 0"),
        (["sample", "MODEL", "--method", "sir", "--weights", "wrong"], "--weights"),
        (["sample", "MODEL", "--format", "gif"], "--format"),
        (["sample", "MODEL", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["sample", "MODEL", "--start", "-1"], "start must be at least 0, got -1"),
        (["sample", "MODEL", "--temperature", "0"], "temperature must be positive"),
        (["sample", "MODEL", "--method", "langevin", "--step-size", "0"], "step_size must be positive"),
        (["sample", "MODEL", "--method", "langevin", "--n-steps", "-1"], "n_steps must be at least 0"),
        (["sample", "MODEL", "--precision", "fp8"], "--precision"),
        (["sample", "MODEL", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["sample", "MODEL", "--device", "cuda:99"], "device cuda:99 is not there"),
        (["sample", "MODEL", "--propsals", "3"], "Perhaps you meant: --proposals?"),
        (["sample", "VAE", "--method", "sir"], "needs a trained prior"),
        (["draw"], "unknown command 'draw': pass one of sample"),
        (["train", "gan"], "train needs one of vae, prior, classifier, got 'gan'"),
        (["train", "vae", "--preset", "imagenet"], "preset must be one of mnist, mnist-hole"),
        (["train", "prior", "--vae", "VAE", "--preset=imagenet"], "preset must be one of mnist, cifar10"),
        (["train", "vae", "--preset"], "--preset"),
        (["train", "vae", "--epochs", "0"], "epochs must be positive, got 0"),
        (["train", "vae", "--model.image-size", "30"], "image_size 30 cannot be halved"),
        (["train", "vae", "--data", "/nowhere"], "/nowhere does not exist"),
        (["train", "prior"], "--vae"),
        (["train", "prior", "--vae", "nothing"], "unknown model 'nothing'"),
        (
            ["train", "prior", "--vae", "VAE", "--preset", "mnist-evalp", "--kl-weight", "2"],
            "kl_weight must be",
        ),
        (["train", "classifier", "--data", "/nowhere"], "MNIST/raw"),
        (["train", "classifier", "--max-shift", "9"], "max_shift"),
        (["evaluate", "MODEL", "-n", "1"], "n must be at least 2"),
        (["evaluate", "MODEL", "--methods", "flow", "gibbs"], "gibbs"),
        (["evaluate", "MODEL", "--features", "vgg"], "--features"),
        (["evaluate", "MODEL", "--features", "cifar_resnet56"], "pass --weights FILE"),
        (["evaluate", "MODEL", "--data", "/nowhere"], "/nowhere does not exist"),
        (["info"], "MODEL"),
        (["info", "nothing"], "unknown model 'nothing'"),
        (["demo", "-n", "0"], "n must be at least 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, said, tiny_model, tiny_vae, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(tiny_model), "VAE": str(tiny_vae)}
    message = fail(capsys, *[places.get(argument, argument) for argument in arguments])
    assert said in message
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [], "a command that cannot start must not leave files"


def test_debug_shows_the_traceback(tiny_model, tmp_path, capsys):
    with pytest.raises(ValueError, match="proposals must be at least 1"):
        main(
            [
                "sample",
                str(tiny_model),
                "--method",
                "sir",
                "--proposals",
                "0",
                "--debug",
                "--out",
                str(tmp_path),
            ]
        )


def damage(kind: str, folder: Path) -> str:
    """Spoil a model and return what the error must say."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return "is truncated, corrupt, or not a safetensors file"
    if kind == "corrupt":
        weights.write_bytes(b"\xff" * 1000)
        return "is truncated, corrupt, or not a safetensors file"
    if kind == "missing weights":
        weights.unlink()
        return "holds no model"
    if kind == "config is not JSON":
        config.write_text("{")
        return "is not valid JSON"
    description = json.loads(config.read_text())
    if kind == "another version":
        description["format_version"] = 99
        said = "has format version 99"
    elif kind == "unknown key":
        description["model"]["vae"]["dropout"] = 0.1
        said = "unknown key 'dropout'"
    else:
        description["model"]["vae"]["latent_dim"] = 5
        said = "does not describe a model"
        if kind == "another shape":
            description["model"]["prior"]["flow"]["hidden"] = 17
            description["model"]["vae"]["latent_dim"] = 4
            said = "does not fit config.json"
    config.write_text(json.dumps(description))
    return said


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "corrupt",
        "missing weights",
        "config is not JSON",
        "another version",
        "unknown key",
        "contradiction",
        "another shape",
    ],
)
def test_a_damaged_model_is_refused_with_its_name(kind, tiny_model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model / "best", folder)
    said = damage(kind, folder)
    for command in (["sample", folder, "-n", 2, "--out", tmp_path / "out"], ["info", folder]):
        message = fail(capsys, *command)
        assert said in message
        assert str(folder) in message
    assert not (tmp_path / "out").exists()


def write_folder(folder: Path, broken: tuple[str, ...] = ()) -> None:
    """Noise images of 8x8, with splits."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    for name in broken:
        (folder / name).write_bytes(b"not an image")


_SMALL = words("--epochs 1 --batch-size 4 --model.image-size 8 --model.latent-dim 2")
_SMALL += words("--model.encoder-channels 4 --model.decoder-channels 4 4")


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = fail(capsys, "train", "vae", "--data", tmp_path / "empty", "--out", tmp_path / "run", *_SMALL)
    assert "holds no images" in message
    assert not (tmp_path / "run").exists()


def test_broken_images_are_named_and_skipped_on_request(tmp_path, capsys):
    folder = tmp_path / "images"
    write_folder(folder, broken=("train/bad.png", "validation/worse.jpg"))
    command = ["train", "vae", "--data", folder, "--out", tmp_path / "run", *_SMALL]
    assert "bad.png" in fail(capsys, *command)
    # The failed attempt left no run that would be in the way of this one.
    assert main([str(argument) for argument in (*command, "--skip-broken")]) == 0
    warned = capsys.readouterr().err
    assert "bad.png" in warned
    assert warned.count("evalp-fast: warning: ") == len(warned.splitlines()) == 2
    stage = EVaLP.from_pretrained(tmp_path / "run").info["training"][0]
    assert (stage["images"], stage["skipped_files"]) == (8, 1)


def test_a_run_is_not_overwritten(tiny_vae, padded_excerpt, capsys):
    message = fail(capsys, "train", "vae", "--data", padded_excerpt, "--out", tiny_vae)
    assert "holds a run already: pass --resume" in message
    message = fail(capsys, "train", "vae", "--data", padded_excerpt, "--out", tiny_vae, "--resume")
    assert "another configuration" in message


def test_a_full_disk_is_one_line_and_finished_files_stay(tiny_model, tmp_path, capsys, monkeypatch):
    written = 0

    class Full:
        """A file on a disk that is full after 10,000 bytes, all files together."""

        def __init__(self, file: IO[bytes]):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            nonlocal written
            written += memoryview(data).nbytes
            if written > 10_000:
                self.file.write(bytes(data)[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    def open_full(path: Path, mode: str) -> Full:
        return Full(open(path, mode))

    monkeypatch.setattr("evalp_fast.images.open", open_full, raising=False)
    message = fail(capsys, "sample", tiny_model, "-n", 500, "--out", tmp_path / "png")
    assert "No space left on device; free some space" in message
    files = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert files == [f"{i:07d}.png" for i in range(len(files))]
    assert 0 < len(files) < 500
    assert len(images_in(tmp_path / "png")) == len(files)  # all can be read

    message = fail(capsys, "sample", tiny_model, "-n", 500, "--format", "npy", "--out", tmp_path / "npy")
    assert "No space left on device" in message
    assert list((tmp_path / "npy").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tiny_model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fail(capsys, "sample", tiny_model, "-n", 2, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in message
    assert "another path" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "lower --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --batch-size"),
        (ImportError("this needs matplotlib: pip install 'evalp-fast[plot]'"), "evalp-fast[plot]"),
    ],
)
def test_what_the_machine_lacks_is_said_with_a_hint(error, said, tiny_model, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise error
        yield

    monkeypatch.setattr(EVaLP, "stream", refuse)
    assert said in fail(capsys, "sample", tiny_model, "--out", tmp_path)


def test_a_fault_of_the_program_is_told_apart(tiny_model, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise KeyError("oops")
        yield

    monkeypatch.setattr(EVaLP, "stream", refuse)
    assert main(["sample", str(tiny_model), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("evalp-fast: internal error: KeyError: 'oops'")


# ---------------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_while_sampling_leaves_whole_files(tiny_model, tmp_path):
    out = tmp_path / "png"
    command = [
        sys.executable,
        "-m",
        "evalp_fast",
        "sample",
        str(tiny_model),
        "-n",
        "1000000",
        "--out",
        str(out),
    ]
    # A shell starts its background jobs with SIGINT ignored, and a child of the tests would inherit that.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    deadline = time.monotonic() + 120
    while not (out / "0000300.png").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown == ""
    files = sorted(path.name for path in out.iterdir())
    assert files == [f"{i:07d}.png" for i in range(len(files))]  # no temporary file, no gap
    assert len(images_in(out)) == len(files)
    written = int(errors.split("interrupted: ")[1].split()[0].replace(",", ""))
    assert len(files) - 256 <= written <= len(files)
    assert errors == (
        f"evalp-fast: interrupted: {written:,} images and perhaps a part of the next batch are in {out}; "
        f"--start {written} -n {1_000_000 - written} draws the others\n"
    )


@pytest.mark.parametrize("format", ["npz", "npy", "grid"])
def test_ctrl_c_leaves_no_half_of_an_array(format, tiny_model, tmp_path, capsys, monkeypatch):
    stream = EVaLP.stream

    def interrupted(self, n, **options):
        batches = stream(self, n, **options)
        yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(EVaLP, "stream", interrupted)
    command = ["sample", tiny_model, "-n", 600, "--batch-size", 100, "--format", format, "--out", tmp_path]
    assert fail(capsys, *command, code=130) == "nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_training_says_how_to_go_on(padded_excerpt, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evalp_fast.data.DataOrder.batch", interrupt)
    message = fail(capsys, "train", "vae", "--data", padded_excerpt, "--out", tmp_path / "run", code=130)
    assert "--resume" in message


# ---------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("command", ["vae", "prior"])
def test_a_preset_gives_the_values_that_no_option_overrides(command, tmp_path, monkeypatch):
    from evalp_fast.training.presets import PRIOR_PRESETS, VAE_PRESETS

    calls: list[tuple[str, Any, Path]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda config, *rest, **_: calls.append((name, config, rest[-1]))

    monkeypatch.setattr("evalp_fast.training.vae.train_vae", record("vae"))
    monkeypatch.setattr("evalp_fast.training.residual.train_residual_prior", record("residual"))
    monkeypatch.setattr("evalp_fast.training.evalp.train_evalp_prior", record("evalp"))
    presets = VAE_PRESETS if command == "vae" else PRIOR_PRESETS
    vae = [] if command == "vae" else ["--vae", "runs/x"]
    for name, preset in presets.items():
        assert main(["train", command, "--preset", name, *vae, "--seed", "7"]) == 0
        kind, config, out = calls.pop()
        assert config == dataclasses.replace(preset, seed=7)  # type: ignore[type-var]
        assert kind == {"VAETraining": "vae", "ResidualTraining": "residual"}.get(
            type(preset).__name__, "evalp"
        )
        assert out == Path("runs") / f"{name}-{command}"
    nested = ["--model.latent-dim", "3"] if command == "vae" else ["--couplings", "3"]
    assert main(["train", command, *vae, *nested, "--out", str(tmp_path)]) == 0
    _, config, out = calls.pop()
    assert out == tmp_path
    assert (config.model.latent_dim if command == "vae" else config.couplings) == 3


# ---------------------------------------------------------------------------------------------------------
# Evaluate and info


def test_evaluate_prints_writes_and_keeps_its_report(tiny_model, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_model / "best", model)
    arguments = ["evaluate", str(model), "-n", "200", "--proposals", "5", "--methods", "flow", "sir"]
    assert main([*arguments, "--write", "--out", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    for word in ("fd_mnist_cnn", "MMD2", "(reconstructions)", "log Z", "memorised"):
        assert word in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["methods"]) == ["flow", "sir"]
    assert EVaLP.from_pretrained(model).info["metrics"] == report
    assert "fd mnist cnn" in (model / "README.md").read_text()

    # The reference file now stands in for the data, and gives the same figures.
    monkeypatch.setattr("evalp_fast.data.load_dataset", None)
    assert main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for method in ("flow", "sir"):
        for metric in ("fd_mnist_cnn", "mmd2"):
            assert again["methods"][method][metric] == report["methods"][method][metric]
    assert again["nll"] == report["nll"]
    assert again["not_measured"] == {"memorisation": "it needs the training images: pass --data"}


def test_evaluate_measures_what_it_can_without_the_data(tiny_model, tmp_path, capsys):
    model = EVaLP.from_pretrained(tiny_model)
    model.info["training"][0]["source"] = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), "-n", "50", "--methods", "sir", "--proposals", "5"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "not measured: Fréchet distance, MMD², likelihood, memorisation, because" in shown
    assert "gone does not exist" in shown
    assert "log Z" in shown


def test_inception_offline_says_what_to_pass(tiny_model, capsys, monkeypatch):
    from urllib.error import URLError

    import torch_fidelity.feature_extractor_inceptionv3 as inception

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(inception, "FeatureExtractorInceptionV3", offline)
    message = fail(capsys, "evaluate", tiny_model, "--features", "inception", "-n", 10)
    assert "pass --weights FILE" in message
    message = fail(capsys, "evaluate", tiny_model, "--features", "inception", "--weights", "none.pth")
    assert "none.pth" in message


def test_info_shows_parts_training_and_metrics(tiny_model, tiny_vae, tmp_path, capsys):
    assert main(["info", str(tiny_model)]) == 0
    shown = capsys.readouterr().out
    for word in ("method: residual", "evaluations: ", "parameters", "training 2:", "seed: 0", "minutes: "):
        assert word in shown
    assert main(["info", str(tiny_model), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parts"]["flow"]["couplings"] == 2
    assert described["run"]["last"]["step"] > 0
    assert main(["info", str(tiny_vae / "best")]) == 0
    assert "training 2" not in capsys.readouterr().out

    # A run that was killed before its first evaluation.
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "run")
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "evaluations: 0" in capsys.readouterr().out
