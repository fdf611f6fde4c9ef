"""storage/ stays light: a shard process must not pay for torch or ray."""

from __future__ import annotations

import subprocess
import sys


def test_importing_storage_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, litecache.storage\n"
        "heavy = {'torch', 'ray', 'transformers', 'triton'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
