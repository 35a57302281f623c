"""A module of lipgan.compat whose package is missing says so in one sentence."""

import subprocess
import sys


def test_torchmetrics_is_missing() -> None:
    code = "import sys; sys.modules['torchmetrics'] = None; import lipgan.compat; import lipgan.compat.torchmetrics"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
        "ImportError: lipgan.compat.torchmetrics needs the package torchmetrics (pip install torchmetrics): "
    )
