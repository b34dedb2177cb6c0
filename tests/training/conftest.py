"""Shared by the tests of training: data, an untrained VAE, runs that are killed, runs that are compared."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evalp_fast.data import DataOrder
from evalp_fast.files import load_safetensors, read_metadata
from evalp_fast.models.vae import VAEConfig
from evalp_fast.pipeline import EVaLP, EVaLPConfig
from evalp_fast.training import latents
from evalp_fast.training.run import Run

EXCERPT = Path(__file__).parents[1] / "data" / "mnist_excerpt.npz"
SMALL_VAE = VAEConfig(1, 28, 4, (4, 8), (8, 6, 4))


@pytest.fixture
def excerpt() -> str:
    """1,500 real digits: 1,350 for training and 150 for validation, beside 500 of the test split."""
    return str(EXCERPT)


@pytest.fixture
def small_vae() -> VAEConfig:
    return SMALL_VAE


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with random weights that says it was trained on the excerpt; its latents will do."""
    torch.manual_seed(0)
    model = EVaLP(EVaLPConfig(SMALL_VAE), {"training": [{"stage": "VAE", "source": str(EXCERPT)}]})
    with torch.no_grad():
        model.vae.to_posterior.weight.mul_(10.0)
        model.vae.to_posterior.bias.copy_(torch.tensor([0.0] * 4 + [-3.0] * 4))
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate a prior on fewer samples."""
    monkeypatch.setattr(latents, "_MMD_ROWS", 150)


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Callable[[], object]], None]:
    """`kill(moment, evaluation, train)`: run `train` and interrupt it at that evaluation (from 1).

    The moments: "training", a step into it; "before save", between its line of metrics and its state; "after
    save".
    """

    def kill(moment: str, evaluation: int, train: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            seen = {"evaluations": 0, "lookups": 0}
            save = Run.save

            def interrupted_save(self: Run, *arguments) -> None:
                seen["evaluations"] += 1
                if seen["evaluations"] == evaluation and moment == "before save":
                    raise KeyboardInterrupt
                save(self, *arguments)
                if seen["evaluations"] == evaluation and moment == "after save":
                    raise KeyboardInterrupt

            patch.setattr(Run, "save", interrupted_save)
            if moment == "training":
                batch = DataOrder.batch

                def interrupted_batch(self: DataOrder, step: int) -> torch.Tensor:
                    seen["lookups"] += seen["evaluations"] == evaluation - 1
                    if seen["lookups"] == 2:
                        raise KeyboardInterrupt
                    return batch(self, step)

                patch.setattr(DataOrder, "batch", interrupted_batch)
            with pytest.raises(KeyboardInterrupt):
                train()

    return kill


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Two runs have the same state, models and metrics, to the last bit."""

    def check(a: Path, b: Path) -> None:
        assert metrics(a) == metrics(b)
        for name in ("state.safetensors", "best/model.safetensors", "last/model.safetensors"):
            left, right = load_safetensors(a / name), load_safetensors(b / name)
            assert left.keys() == right.keys()
            for key, value in left.items():
                assert torch.equal(value, right[key]), f"{name}: {key}"
            numbers = [read_metadata(folder / name) for folder in (a, b)]
            for saved in numbers:
                saved.pop("seconds", None)
            assert numbers[0] == numbers[1]

    return check
