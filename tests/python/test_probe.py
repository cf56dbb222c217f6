"""Facts of the host, read from trees that stand in for /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offload
from offload._probe import DeviceFacts, probe_device, probe_host

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host of 16 GiB, 8 of them available, two NUMA nodes and no cgroup."""
    return write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n",
            "sys/devices/system/node/node0/x": "",
            "sys/devices/system/node/node1/x": "",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )


def test_a_host_without_limits(host: Path) -> None:
    facts = probe_host(host)
    assert (facts.total_bytes, facts.available_bytes) == (16 * GIB, 8 * GIB)
    assert (facts.cgroup_limit_bytes, facts.cpu_quota) == (None, None)
    assert (facts.numa_node_count, facts.huge_pages) == (2, "madvise")
    assert facts.cpu_count >= 1


def test_cgroup_v2_takes_the_tightest_of_the_ancestors(host: Path) -> None:
    write(
        host,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
        },
    )
    facts = probe_host(host)
    # 3 GiB used, of which 1 GiB is page cache that goes when asked: 2 of 4 GiB are left.
    assert (facts.cgroup_limit_bytes, facts.available_bytes) == (4 * GIB, 2 * GIB)
    assert facts.cpu_quota == 1.5


def test_cgroup_v1(host: Path) -> None:
    write(
        host,
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
    )
    facts = probe_host(host)
    assert (facts.cgroup_limit_bytes, facts.available_bytes, facts.cpu_quota) == (2 * GIB, GIB, 0.5)


def test_a_cgroup_over_its_limit_leaves_nothing(host: Path) -> None:
    write(
        host, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100\n", "sys/fs/cgroup/memory.current": "200"}
    )
    assert probe_host(host).available_bytes == 0


def test_an_empty_tree_gives_no_facts(tmp_path: Path) -> None:
    facts = probe_host(tmp_path)
    assert (facts.total_bytes, facts.cgroup_limit_bytes, facts.huge_pages, facts.numa_node_count) == (0, None, None, 1)


def test_this_host() -> None:
    facts = probe_host()
    assert 0 < facts.available_bytes <= facts.total_bytes


def test_the_cpu_device_has_the_memory_of_the_host() -> None:
    facts = probe_device("cpu")
    assert (facts.name, facts.kind) == ("cpu", "cpu")
    assert 0 < facts.free_bytes <= facts.total_bytes


def test_the_device_is_that_of_torch(device: torch.device) -> None:
    facts = probe_device()
    assert (facts.name, facts.kind) == (str(device), device.type)
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert probe_device(device.type).name == probe_device(str(device)).name == str(device)


def test_what_torch_caches_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 30, "memory_allocated": 10}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: value if index == 1 else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("cuda", "cuda:1"):
        assert probe_device(name) == DeviceFacts("cuda:1", "cuda", 1000, 120)


@pytest.mark.parametrize("name", ["warp", "meta", "cuda:99"])
def test_devices_that_do_not_exist_are_named(name: str) -> None:
    before = torch.cuda.is_initialized()  # another test of this process may have used a card
    with pytest.raises(offload.DeviceError, match=name):
        probe_device(name)
    assert torch.cuda.is_initialized() == before
