"""The memory limit: every cgroup between the process and the root of the hierarchy counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from litecache.machine_memory import available_memory_bytes, memory_limit_bytes

MB = 1 << 20
V2 = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def machine(root: Path, mount: str, cgroup: str, files: dict[str, object]) -> Path:
    """A root folder with `/proc/self` and the files of cgroups."""
    for name, content in {
        "proc/self/mountinfo": f"{OTHER}\n{mount}\n",
        "proc/self/cgroup": cgroup,
        "proc/meminfo": f"MemTotal: {1 << 40} kB\nMemAvailable: {4096 * 1024} kB\n",
        **{f"sys/fs/cgroup/{name}": value for name, value in files.items()},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_a_nested_group_of_version_2_is_seen(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        V2.format(root="/"),
        "0::/user.slice/job_7/step_0\n",
        {
            "user.slice/memory.max": 900 * MB,
            "user.slice/memory.current": 200 * MB,
            "user.slice/job_7/memory.max": 250 * MB,
            "user.slice/job_7/memory.current": 90 * MB,
            "user.slice/job_7/memory.stat": f"anon 1\ninactive_file {40 * MB}",
            "user.slice/job_7/step_0/memory.max": "max",
            "user.slice/job_7/step_0/memory.current": 90 * MB,
        },
    )
    assert memory_limit_bytes(root) == 250 * MB
    assert available_memory_bytes(root) == 200 * MB


def test_a_child_of_version_1_is_seen(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        V1.format(root="/"),
        "5:cpu,cpuacct:/\n4:memory:/slurm/uid_1/job_7\n0::/\n",
        {
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 4000 * MB,
            "memory/slurm/uid_1/memory.limit_in_bytes": 300 * MB,
            "memory/slurm/uid_1/memory.usage_in_bytes": 299 * MB,
            "memory/slurm/uid_1/job_7/memory.limit_in_bytes": 250 * MB,
            "memory/slurm/uid_1/job_7/memory.usage_in_bytes": 100 * MB,
        },
    )
    assert memory_limit_bytes(root) == 250 * MB
    assert available_memory_bytes(root) == 1 * MB


@pytest.mark.parametrize("path", ["/docker/1f", "/../../other", "/"])
def test_what_a_container_sees_is_the_top_of_its_mount(tmp_path: Path, path: str) -> None:
    top = "/docker/1f" if path.startswith("/docker") else "/"
    files = {"memory.max": 250 * MB, "memory.current": 260 * MB}
    root = machine(tmp_path, V2.format(root=top), f"0::{path}\n", files)
    assert memory_limit_bytes(root) == 250 * MB
    assert available_memory_bytes(root) == 0


def test_a_soft_limit_counts_and_a_mount_point_may_have_a_blank(tmp_path: Path) -> None:
    mount = V2.format(root="/").replace("/sys/fs/cgroup ", r"/sys/fs/cgroup/my\040groups ")
    files = {"my groups/a/memory.max": "max", "my groups/a/memory.high": 70 * MB}
    assert memory_limit_bytes(machine(tmp_path, mount, "0::/a\n", files)) == 70 * MB


def test_without_cgroups_it_is_the_machine(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) > 64 * MB
    assert available_memory_bytes(tmp_path) > 64 * MB
    assert 0 < available_memory_bytes() <= memory_limit_bytes()
