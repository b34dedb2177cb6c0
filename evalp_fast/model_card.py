"""The model card: what a person who finds a checkpoint wants to know, as Markdown."""

from collections.abc import Mapping
from typing import Any


def model_card(info: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """A model card from an `EVaLP`'s `info` and `describe()`."""
    lines = [
        "---",
        "library_name: evalp-fast",
        f"license: {info.get('license', 'other')}",
        "tags: [image-generation, vae, energy-based-model, normalizing-flow]",
        "---",
        "",
        f"# {info.get('name', 'EVaLP model')}",
        "",
        "A VAE with an energy-based latent prior and a normalizing-flow sampler "
        "(Dutta et al. 2025, arXiv:2510.00260), trained with evalp-fast.",
        "",
        "```python",
        "from evalp_fast import EVaLP",
        "",
        f'model = EVaLP.from_pretrained("{info.get("load_as", "path/to/this/folder")}")',
        'images = model.sample(16, method="sir", seed=0)',
        "```",
        "",
        "## Parts",
        "",
    ]
    for part, settings in description.items():
        if settings is not None:
            shown = ", ".join(f"{key} {_show(value)}" for key, value in settings.items())
            lines.append(f"- **{part}**: {shown}")
    stages = info.get("training", [])
    if stages:
        lines += ["", "## Training", ""]
        for stage in stages:
            lines.append(f"### {stage.get('stage', 'stage')}")
            lines.append("")
            lines += [
                f"- {key.replace('_', ' ')}: {_show(value)}" for key, value in stage.items() if key != "stage"
            ]
            lines.append("")
    metrics = info.get("metrics")
    if metrics:
        lines += ["## Metrics", "", *_metrics(metrics)]
    return "\n".join(lines).rstrip() + "\n"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "-".join(_show(item) for item in value)
    return f"`{value}`" if isinstance(value, str) and " " in value else str(value)


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics by sampling method as one table; all others as a list."""
    methods = metrics.get("methods", {})
    lines: list[str] = []
    if methods:
        columns = list(dict.fromkeys(key for row in methods.values() for key in row))
        lines.append("| method | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for method, row in methods.items():
            cells = [_cell(row.get(column)) for column in columns]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"- {key.replace('_', ' ')}: {_show(value)}" for key, value in metrics.items() if key != "methods"
    ]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping) and "value" in value:
        interval = f" ({value['low']:.4g} to {value['high']:.4g})" if "low" in value else ""
        return f"{value['value']:.4g}{interval}"
    return _show(value)
