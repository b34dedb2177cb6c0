"""What is installed: the wheel's contents, and the mapping of `kernels/` to `evalp_fast.kernels`."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel, built from a copy, so that no build folder is left in the tree."""
    setuptools = importlib.util.find_spec("setuptools")
    if setuptools is None or int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building a wheel without a network needs setuptools >= 77 to be installed")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("evalp_fast", "kernels", "tests", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    (copy / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True)
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_nothing_but_evalp_fast_is_installed_at_the_top(wheel):
    """A module called kernels, bench or tests would overwrite somebody else's."""
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"evalp_fast"}


def test_the_wheel_holds_every_source_file(wheel):
    sources = {
        f"evalp_fast/{path.relative_to(ROOT / 'evalp_fast')}" for path in (ROOT / "evalp_fast").rglob("*.py")
    }
    sources |= {f"evalp_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources <= set(wheel), "name new packages in pyproject.toml: [tool.setuptools] packages"


def test_the_wheel_holds_models_types_licence_and_the_command(wheel):
    folders = [folder for folder in (ROOT / "evalp_fast" / "pretrained").iterdir() if folder.is_dir()]
    files = [file for folder in folders if folder.name != "__pycache__" for file in folder.iterdir()]
    shipped = {file.relative_to(ROOT).as_posix() for file in files}
    assert any(name.endswith("mnist_cnn/model.safetensors") for name in shipped)
    assert shipped <= set(wheel)
    assert "evalp_fast/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)


def test_kernels_are_part_of_the_package_here_too():
    package, kernels = (importlib.util.find_spec(name) for name in ("evalp_fast", "evalp_fast.kernels"))
    assert package is not None
    assert package.origin is not None
    assert kernels is not None
    assert kernels.origin is not None
    # In the tree where it is installed in editable mode, in the package otherwise.
    assert Path(kernels.origin).parent in (ROOT / "kernels", Path(package.origin).parent / "kernels")


def test_a_model_that_ships_is_at_most_six_megabytes():
    for folder in (ROOT / "evalp_fast" / "pretrained").iterdir():
        if folder.is_dir():
            assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) <= 6_000_000, (
                folder
            )
