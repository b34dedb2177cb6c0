"""Measurements of the kernels, samplers and training steps. Run in the repository; nothing here is installed.

    python -m pytest bench [--scale small|medium|large|sweep] [--budget SECONDS] [-k "flow and zuko"]
    python -m bench.report bench/results/DEVICE/DATE.json     # table and plots
    python -m bench.report --compare OLD.json NEW.json        # what got slower beyond the noise

`harness.py` says how a problem is measured; a suite is a `test_*.py` with `problems(scale)`. RESULTS names
the folder of the results, WHEELS that of wheels of the libraries that are compared with (`make wheels`).
"""

import os

# What the package compiles on a CPU after a while is measured compiled, from the first call on.
os.environ.setdefault("EVALP_COMPILE_AFTER", "0")
