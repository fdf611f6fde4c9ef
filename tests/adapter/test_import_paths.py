from __future__ import annotations

import subprocess
import sys


def test_the_adapter_is_found_under_all_its_names() -> None:
    import litecache
    import litecache.adapter
    import litecache.models

    assert litecache.KVCacheAdapter is litecache.adapter.KVCacheAdapter
    assert litecache.models.KVCacheAdapter is litecache.adapter.KVCacheAdapter


def test_importing_the_package_and_the_actors_shells_loads_no_torch() -> None:
    code = (
        "import sys, litecache, litecache.cli, litecache.actors.storage_shard, "
        "litecache.actors.coordinator; "
        "print(sorted({'torch', 'transformers', 'triton'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
