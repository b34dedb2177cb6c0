"""The Python examples of the documentation run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples(document: str) -> list[str]:
    """The Python blocks of a document."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, f"{document} has no Python block"
    return blocks


def smaller(code: str) -> str:
    """The code with its numbers of ten thousand and more divided by a hundred, for the time it takes.

    So is the one that `diagnostics` has by default.
    """
    code = code.replace("diagnostics()", "diagnostics(n=10_000)")
    return re.sub(r"\b\d{2,3}(_\d{3})+\b|\b\d(_\d{3}){2,}\b", lambda match: str(int(match[0]) // 100), code)


CASES = [
    pytest.param(code, id=f"{document}-{number}")
    for document in ("docs/kernels.md", "README.md")
    for number, code in enumerate(examples(document), start=1)
]


@pytest.mark.parametrize("code", CASES)
def test_example(code: str) -> None:
    exec(compile(smaller(code), "example", "exec"), {"__name__": "example"})


def test_every_family_has_an_example() -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    for family in text.split("\n## ")[1:]:
        assert "```python" in family, f"no example under {family.splitlines()[0]}"


def test_smaller_touches_large_numbers_only() -> None:
    assert smaller("f(1_000_000, 65_536, 10_000, 1_000, 100)") == "f(10000, 655, 100, 1_000, 100)"
