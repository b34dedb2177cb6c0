"""Pure-Python wheels from a folder, for machines where nothing can be installed."""

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path


def use_wheels(folder: str | Path) -> list[str]:
    """Unpack the wheels in `folder` and append them to `sys.path`, behind what is installed.

    They go to a folder beside the system's temporary files, one for each content, and are unpacked once.

    Returns:
        The names of the wheels.

    Raises:
        ValueError: there is no such folder, or no wheel in it.
    """
    folder = Path(folder)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"WHEELS must name a folder that holds wheels, {folder} has none (make wheels)")
    content = hashlib.sha256()
    for wheel in wheels:
        content.update(wheel.name.encode() + str(wheel.stat().st_size).encode())
    target = Path(tempfile.gettempdir()) / f"evalp-bench-wheels-{content.hexdigest()[:16]}"
    if not (target / ".complete").exists():
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        (target / ".complete").touch()
    if str(target) not in sys.path:
        sys.path.append(str(target))
    return [wheel.name for wheel in wheels]
