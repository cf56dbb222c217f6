"""What the native core knows of CUDA by heart, compared with cuda.h: entries, structs, numbers. Nothing runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = [*sorted((ROOT / "csrc/device").glob("cuda_*.cpp")), ROOT / "csrc/unified/unified_memory.cpp"]
DOUBLE = ROOT / "tests/driver_double"

# Every entry of the table has the parameters of the version that the table asks for.
ENTRIES = """
#include <cudaTypedefs.h>

#include <cstddef>
#include <type_traits>

#include "device/cuda_driver.h"

template <typename T>
concept Complete = requires { sizeof(T); };

template <typename Ours, typename Theirs>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    if constexpr (!std::is_pointer_v<Ours> || !std::is_pointer_v<Theirs>) return false;
    else return alike<std::remove_pointer_t<Ours>, std::remove_pointer_t<Theirs>>();
  } else if constexpr (Complete<Ours> && Complete<Theirs>) {
    return sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs) &&
           std::is_class_v<Ours> == std::is_class_v<Theirs> &&
           std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs> &&
           std::is_const_v<Ours> == std::is_const_v<Theirs>;
  } else {
    return Complete<Ours> == Complete<Theirs>;  // void, and what a handle points to
  }
}

template <typename Ours, typename Theirs>
struct Same : std::false_type {};
template <typename... Ours, typename... Theirs>
struct Same<offload::CudaResult (*)(Ours...), CUresult (*)(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) != sizeof...(Theirs)) return false;
    else return (alike<Ours, Theirs>() && ...);
  }();
};

#define CHECK_ENTRY(name, symbol, version, parameters) \
  static_assert(Same<decltype(offload::CudaDriver::name), PFN_cu##name##_v##version>::value, #symbol);
OFFLOAD_CUDA_ENTRIES(CHECK_ENTRY)
OFFLOAD_CUDA_LATER_ENTRIES(CHECK_ENTRY)
static_assert(!Same<decltype(offload::CudaDriver::MemcpyBatchAsync), PFN_cuMemcpyBatchAsync_v13000>::value);
static_assert(!Same<decltype(offload::CudaDriver::MemPrefetchAsync), PFN_cuMemPrefetchAsync_v12020>::value);

using Attributes = offload::CudaCopyAttributes;
static_assert(offsetof(Attributes, source_access_order) == offsetof(CUmemcpyAttributes, srcAccessOrder));
static_assert(offsetof(Attributes, source_hint) == offsetof(CUmemcpyAttributes, srcLocHint));
static_assert(offsetof(Attributes, destination_hint) == offsetof(CUmemcpyAttributes, dstLocHint));
static_assert(offsetof(Attributes, flags) == offsetof(CUmemcpyAttributes, flags));
static_assert(CU_MEM_ADVISE_UNSET_READ_MOSTLY == CU_MEM_ADVISE_SET_READ_MOSTLY + 1);
static_assert(CU_MEM_ADVISE_UNSET_PREFERRED_LOCATION == CU_MEM_ADVISE_SET_PREFERRED_LOCATION + 1);
static_assert(CU_MEM_ADVISE_UNSET_ACCESSED_BY == CU_MEM_ADVISE_SET_ACCESSED_BY + 1);
"""


def named_numbers(path: Path) -> dict[str, str]:
    """The numbers of cuda.h in a source, by their names there; every constant of it has one."""
    numbers: dict[str, str] = {}
    prefix = None
    for line in path.read_text().splitlines():
        section = re.match(r"// (CU_[A-Z_]+_)\*", line)
        prefix = section[1] if section else prefix if line.startswith("constexpr int") else None
        if constant := re.search(r"constexpr (?:int|unsigned|CudaResult|uint64_t) k(\w+) = (0x\w+|-?\d+);(.*)", line):
            comment = re.match(r"\s+// (CU(?:DA_ERROR)?_[A-Z0-9_]+)", constant[3])
            assert comment or prefix, f"{path.name}: {line} has no name of cuda.h"
            words = re.sub(r"(?<!^)(?=[A-Z])", "_", constant[1]).upper()
            numbers[comment[1] if comment else f"{prefix}{words}"] = constant[2]
        elif case := re.match(r"    case (\d+):  // ([A-Z_]+)$", line):
            numbers[f"CUDA_ERROR_{case[2]}"] = case[1]
    return numbers


def numbers_of_the_double() -> dict[str, str]:
    numbers = {}
    for line in (DOUBLE / "devices.cpp").read_text().splitlines():
        if case := re.match(r"    case (\d+): return .*// ([A-Z_]+)$", line):
            numbers[f"CU_DEVICE_ATTRIBUTE_{case[2]}"] = case[1]
        elif error := re.match(r'    \{(\d+), "(CUDA_ERROR_\w+)"', line):
            numbers[error[2]] = error[1]
    return numbers


def compiles(folder: Path, headers: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "check.cpp").write_text(source)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "-isystem", headers]
    return subprocess.run([*command, folder / "check.cpp"], capture_output=True, text=True, check=False)


def test_the_table_and_the_numbers_are_those_of_the_header(cuda_headers: Path, tmp_path: Path) -> None:
    numbers = [item for path in CORE for item in named_numbers(path).items()]
    doubled = numbers_of_the_double()
    assert len(numbers) > 45 and len(doubled) > 25
    checks = [f'static_assert(static_cast<long long>({name}) == {value}, "{value}");' for name, value in numbers]
    checks += [f'static_assert({name} == {value}, "{value}");' for name, value in doubled.items()]
    done = compiles(tmp_path, cuda_headers, ENTRIES + "\n".join(checks))
    assert done.returncode == 0, done.stderr
    wrong = compiles(tmp_path, cuda_headers, ENTRIES + "static_assert(CU_DEVICE_ATTRIBUTE_INTEGRATED == 19);")
    assert wrong.returncode != 0
