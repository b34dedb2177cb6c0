"""The demo: the shipped model's digits, drawn in four ways, and what each is worth. No data, no network."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalp_fast.evaluation import (
    LANGEVIN,
    REFERENCE_FILE,
    Reference,
    evaluate_method,
    format_table,
    mmd2_floor,
)
from evalp_fast.images import labelled_grid
from evalp_fast.metrics.features import features
from evalp_fast.models.precision import Precision
from evalp_fast.pipeline import EVaLP, model_folder
from evalp_fast.priors import METHODS

_PANEL_IMAGES = 100
_TITLES = {
    "prior": "Gaussian prior",
    "flow": "flow",
    "sir": "SIR, {proposals} proposals",
    "langevin": "Langevin, {n_steps} steps",
}


def run_demo(
    *,
    model_name: str = "mnist",
    n: int = 10_000,
    out: str | Path = "demo.png",
    seed: int = 0,
    proposals: int = 100,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw `n` images by each method on the same seeds, print a table, and write the first hundred of each.

    Args:
        model_name: a model with a reference beside it, as the shipped ones have.
        n: images per method.
        out: the picture, four grids side by side.
        seed, proposals, precision: as for `evaluate_method`.
        device: where to compute.
        progress: show progress bars.

    Returns:
        The metrics of each row of the table.

    Raises:
        FileError: no such model, or no reference beside it.
        ImportError: matplotlib (extra `[plot]`) is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:  # better now than after a minute
        raise ImportError("the picture needs matplotlib: pip install 'evalp-fast[plot]'")
    begin = time.perf_counter()
    model = EVaLP.from_pretrained(model_name, device=device)
    reference = Reference.load(model_folder(model_name) / REFERENCE_FILE)
    extractor = None if reference.features is None else features(reference.features, device=device)
    reference.check(model, extractor)
    name = model.info.get("name", model_name)
    print(f"{name}: {n:,} images by each method, seed {seed}, against {reference.name}")
    rows: dict[str, dict[str, Any]] = {}
    panels: dict[str, Tensor] = {}
    for method in METHODS:
        rows[method], images = evaluate_method(
            model,
            method,  # type: ignore[arg-type]
            reference,
            n=n,
            seed=seed,
            proposals=proposals,
            precision=precision,
            extractor=extractor,
            progress=progress,
        )
        panels[_caption(method, rows[method], extractor and extractor.distance_name, proposals)] = images[
            :_PANEL_IMAGES
        ]
    if extractor is not None and reference.reconstructions is not None:
        rows["(reconstructions)"] = {extractor.distance_name: reference.reconstructions}
    if reference.train_draws is not None:
        rows["(train posterior)"] = {"mmd2": mmd2_floor(reference, model.device)}
    print(format_table(rows))
    print("(reconstructions) are the VAE's, of test images; (train posterior) is the floor of MMD2: what the")
    print("aggregate posterior of the training images has itself. Brackets: 95 % intervals.")
    path = labelled_grid(panels, out)
    seconds = time.perf_counter() - begin
    print(f"{path.resolve()}: the first {_PANEL_IMAGES} images of each. All took {seconds:.0f} s.")
    return rows


def _caption(method: str, metrics: dict[str, Any], distance: str | None, proposals: int) -> str:
    lines = [_TITLES[method].format(proposals=proposals, n_steps=LANGEVIN["n_steps"])]
    if distance is not None:
        lines.append(f"{distance} {metrics[distance]['value']:.3g}")
    lines.append(f"{metrics['samples_per_second']:,.0f} images/s")
    return "\n".join(lines)
