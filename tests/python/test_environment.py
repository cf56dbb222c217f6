"""`offload.environment()` and `offload env`: what is found, and that each thing in the way comes with its remedy."""

from __future__ import annotations

import copy
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import offload
from offload import _environment, _native
from offload._environment import environment, findings
from offload.cli import main

GOOD: dict[str, Any] = {
    "versions": {"offload": "1", "torch": "2.11", "cuda": "13.0", "driver": "580.1", "machine": "x86_64"},
    "host": {
        "total_bytes": 64 << 30,
        "cgroup_limit_bytes": None,
        "cpu_count": 16,
        "cpu_quota": None,
        "huge_pages": "madvise",
    },
    "device": {"kind": "cuda"},
    "gpus": [{"name": "H200", "link": {"width": 16, "max_width": 16, "max_speed": "32.0 GT/s PCIe"}}],
    "isa": "avx512",
    "isa_forced": None,
    "poison": False,
    "kernel_refusal": None,
    "uring_refusal": None,
    "disks": [{"directory": "/nvme", "uring_refusal": None, "direct": True, "direct_refusal": None}],
    "copies": {"pin_refusal": None},
}


def no_driver(facts: dict[str, Any]) -> None:
    facts["device"]["kind"] = "cpu"
    facts["versions"]["driver"] = None


def torch_without_cuda(facts: dict[str, Any]) -> None:
    facts["device"]["kind"] = "cpu"
    facts["versions"]["cuda"] = None


def no_device(facts: dict[str, Any]) -> None:
    facts["device"]["kind"] = "cpu"


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "no driver": (no_driver, "no NVIDIA driver", "--gpus all"),
    "torch without CUDA": (torch_without_cuda, "torch 2.11 is built without CUDA", "pytorch.org"),
    "no device": (no_device, "torch sees no CUDA device", "CUDA_VISIBLE_DEVICES"),
    "no kernels": (lambda f: f.update(kernel_refusal="no NVRTC"), "no NVRTC", "pip install"),
    "few lanes": (lambda f: f["gpus"][0]["link"].update(width=8), "8 PCIe lanes of 16", "slot"),
    "pageable": (lambda f: f["copies"].update(pin_refusal="memlock"), "memlock", "ulimit -l unlimited"),
    "cgroup memory": (
        lambda f: f["host"].update(cgroup_limit_bytes=8 << 30),
        "8.00 GiB of the machine's 64.00 GiB",
        "--memory",
    ),
    "cgroup CPUs": (lambda f: f["host"].update(cpu_quota=2.5), "2.5 of 16 CPUs", "--cpus"),
    "small pages": (lambda f: f["host"].update(huge_pages="never"), "small pages", "transparent_hugepage"),
    "forced body": (lambda f: f.update(isa_forced="avx2", isa="avx2"), "OFFLOAD_FORCE_ISA=avx2", "unset"),
    "no AVX2": (lambda f: f.update(isa="scalar"), "no AVX2", "-cpu host"),
    "poison": (lambda f: f.update(poison=True), "filled with NaN", "unset OFFLOAD_POISON"),
    "no io_uring": (lambda f: f.update(uring_refusal="seccomp"), "seccomp", "kernel.io_uring_disabled=0"),
    "threads named": (lambda f: f["disks"][0].update(uring_refusal="not asked for"), "not asked for", "unset"),
    "no O_DIRECT": (lambda f: f["disks"][0].update(direct=False, direct_refusal="tmpfs"), "tmpfs", "ext4"),
}


def test_nothing_stands_in_the_way_of_a_good_machine() -> None:
    assert findings(GOOD) == []


@pytest.mark.parametrize("change", CHANGES)
def test_each_thing_in_the_way_is_found_with_its_remedy(change: str) -> None:
    facts = copy.deepcopy(GOOD)
    apply, problem, remedy = CHANGES[change]
    apply(facts)
    (finding,) = findings(facts)
    assert problem in finding.problem and remedy in finding.remedy


def test_aarch64_has_no_avx2_and_needs_none() -> None:
    facts = copy.deepcopy(GOOD)
    facts["versions"]["machine"], facts["isa"] = "aarch64", "scalar"
    assert findings(facts) == []


def test_a_machine_without_measurement_has_no_finding_of_it() -> None:
    assert findings({**GOOD, "copies": None, "gpus": [{"name": "H200", "link": None}]}) == []


def test_the_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_POISON", "1")
    facts = environment()
    json.dumps(facts)
    assert facts["copies"] is None and len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["offload"] == offload.__version__
    assert "OFFLOAD_POISON" in {finding["subject"] for finding in facts["findings"]}
    assert facts["uring_refusal"] == (_native.uring_refusal() or None)


def test_the_facts_of_the_device(device: torch.device) -> None:
    facts = environment(measure=True)
    json.dumps(facts)
    assert facts["device"]["name"] == str(device) and facts["device"]["kind"] == device.type
    assert facts["copies"]["to_host_gb_per_s"] > 0 and facts["copies"]["pin_refusal"] is None
    subjects = {finding["subject"] for finding in facts["findings"]}
    if device.type == "cpu":
        assert facts["memory"] is None and "accelerator" in subjects
        return
    assert facts["memory"]["device"] == str(device) and facts["memory"]["meaning"]
    assert "accelerator" not in subjects and "page-locked memory" not in subjects
    gpu = facts["gpus"][device.index or 0]
    assert gpu["name"] == torch.cuda.get_device_name(device) and gpu["memory_kind"] == facts["memory"]["kind"]
    assert gpu["total_bytes"] == torch.cuda.get_device_properties(device).total_memory
    assert gpu["compute_capability"] == ".".join(map(str, torch.cuda.get_device_capability(device)))


def test_a_measured_copy_moves_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    honest = _native.TransferQueue

    class Counting:
        def __init__(self, device: _native.Device) -> None:
            self._queue = honest(device)

        def __getattr__(self, name: str) -> Any:
            def submit(destination: int, source: int, nbytes: int) -> _native.Ticket:
                moved.append(nbytes)
                return getattr(self._queue, name)(destination, source, nbytes)  # type: ignore[no-any-return]

            return submit

    monkeypatch.setattr(_environment._native, "TransferQueue", Counting)
    copies = _environment._measured_copies(torch.device("cpu"))
    assert moved == [copies["bytes"]] * 2 * _environment._COPIES
    assert copies["to_host_gb_per_s"] > 0 and copies["to_device_gb_per_s"] > 0 and copies["pin_refusal"] is None


def test_why_the_kernel_gives_no_io_uring() -> None:
    calls = _native.FailingSystemCalls()
    calls.fail("uring_setup", 1, errno.EPERM)
    assert "seccomp" in _native.uring_refusal(calls)
    calls.fail("uring_setup", 1, errno.ENOSYS)
    assert "has no io_uring" in _native.uring_refusal(calls)


def test_the_link_of_a_card(tmp_path: Path) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    address = _environment._pci_address(properties)
    assert address == "0000:3b:00.0" and _environment._pci_address(SimpleNamespace()) is None
    assert _environment._link(address, tmp_path) is None and _environment._link(None, tmp_path) is None
    folder = tmp_path / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, value in {"current_link_width": 8, "max_link_width": 16, "max_link_speed": "32.0 GT/s PCIe"}.items():
        (folder / name).write_text(f"{value}\n")
    expected = {"width": 8, "max_width": 16, "max_speed": "32.0 GT/s PCIe"}
    assert _environment._link(address, tmp_path) == expected
    (folder / "current_link_width").write_text("0\n")  # a virtual machine that passes the card on
    assert _environment._link(address, tmp_path) is None


def test_the_version_of_the_driver(tmp_path: Path) -> None:
    assert _environment._driver_version(tmp_path) is None
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert _environment._driver_version(tmp_path) == "580.95.05"


def test_the_command_says_it_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_POISON", "1")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, "instruction set", "huge pages", "GB/s to the device", "io_uring"):
        assert word in text
    assert "- OFFLOAD_POISON:" in text and "  do: `unset OFFLOAD_POISON`" in text
    gpu = {"name": "H200", "total_bytes": 1 << 37, "compute_capability": "9.0", "memory_kind": "discrete", "link": None}
    link = {"width": 16, "max_width": 16, "max_speed": "32.0 GT/s PCIe"}
    monkeypatch.setattr(_environment, "_gpus", lambda: iter([gpu, gpu | {"link": link}]))
    monkeypatch.setattr(_environment, "findings", lambda facts: [])
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "gpu 0     H200" in text and "PCIe 16 lanes of 32.0 GT/s" in text.split("gpu 1")[1]
    assert text.endswith("Nothing stands in the way.\n")


def test_importing_the_package_probes_nothing() -> None:
    assert "offload._environment" in sys.modules and offload.environment is environment
