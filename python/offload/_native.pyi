"""The native core. Addresses, lengths in bytes and format codes cross as integers; results are Tickets.

Every call that can block releases the GIL. Errors are the classes of `offload.InvalidArgument` and so on.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

version: str

# --- base -------------------------------------------------------------------------------------------------

@final
class Ticket:
    """The promise that asynchronous work ended. `Ticket()` is done; `Ticket.pending()` is for tests."""

    def __init__(self) -> None: ...
    @staticmethod
    def pending() -> Ticket: ...
    @property
    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool:
        """Blocks until the work ended (False: the timeout passed first); raises the error of failed work."""
    def complete(self) -> None: ...
    def fail(self, message: str) -> None: ...

@final
class ManualClock:
    def __init__(self) -> None: ...
    def now_ns(self) -> int: ...
    def advance(self, delta_ns: int) -> None: ...

def default_thread_count() -> int: ...
def shared_thread_count() -> int: ...
def end_shared_threads() -> None:
    """Joins the threads of the shared WorkerPool; the next loop starts new ones."""

def parallel_sum_for_test(count: int) -> int:
    """Sums range(count) on the shared WorkerPool: shows that the pool works (after a fork, say)."""

# --- device and transfer ----------------------------------------------------------------------------------

Lane = Literal["to_host", "to_device"]

class Device:
    @property
    def kind(self) -> str: ...

@final
class HostDevice(Device):
    """The compute device "cpu": streams are threads. A rate of 0 bytes/s means unlimited."""

    def __init__(
        self,
        *,
        clock: ManualClock | None = None,
        to_host_bytes_per_s: float = 0,
        to_device_bytes_per_s: float = 0,
    ) -> None: ...
    def hold(self, lane: Lane) -> None:
        """Copies of the lane queue up but do not run until release()."""
    def release(self, lane: Lane) -> None: ...
    def limit(self, lane: Lane, bytes_per_s: float) -> None:
        """The rate of copies of the lane that start from now on; 0 means unlimited."""
    def fail_copy(self, lane: Lane, nth: int) -> None:
        """The nth copy of the lane from now on (1 = the next) fails with DeviceError; 0 disarms."""
    def fail_pin(self, nth: int) -> None: ...
    def pending_count(self, lane: Lane) -> int:
        """Copies submitted and not yet ended."""
    @property
    def pinned_bytes(self) -> int: ...

@final
class CudaDevice(Device):
    """A CUDA device by its ordinal, through the driver API; `driver_path` loads another driver (see csrc/device).

    Raises `DeviceError` with the driver's own words and the remedy when there is no driver, it is too old, or the
    device is not there. Holds the primary context, as torch does.
    """

    def __init__(self, index: int = 0, *, driver_path: str = "") -> None: ...
    def facts(self) -> dict[str, Any]:
        """name, uuid, index, memory_kind ("discrete", "hmm", "ats", "integrated"), compute_capability (major, minor),
        multiprocessor_count, copy_engine_count, total_bytes, free_bytes, driver_version, can_pin,
        pageable_copy_count (copies so far whose host memory is not registered)."""
    @property
    def pinned_bytes(self) -> int: ...

@final
class TransferQueue:
    def __init__(self, device: Device) -> None: ...
    def submit_to_host(
        self,
        destination: int,
        source: int,
        nbytes: int,
        compute_stream: int = 0,
        after: Ticket | None = None,
        ticket: Ticket | None = None,
        buffer: HostBuffer | None = None,
    ) -> Ticket:
        """`ticket`, where given, becomes the copy's; the block of `buffer` is not reused before that ended.

        A signal handler runs before all of this or after it. A refused copy changes neither.
        """

    def submit_to_device(
        self,
        destination: int,
        source: int,
        nbytes: int,
        compute_stream: int = 0,
        after: Ticket | None = None,
        ticket: Ticket | None = None,
        buffer: HostBuffer | None = None,
    ) -> Ticket:
        """As submit_to_host()."""

    def wait_on_stream(self, compute_stream: int, ticket: Ticket) -> None: ...
    def stats(self) -> dict[str, int]:
        """to_host_bytes, to_device_bytes, to_host_count, to_device_count."""

# --- memory -----------------------------------------------------------------------------------------------

Tag = Literal["weights", "master", "moments", "gradients", "activations", "staging"]

@final
class HostBuffer:
    """One block of the pool; supports the (writable) buffer protocol, so `torch.frombuffer` is zero-copy.

    The block returns to the pool when the buffer and every tensor over it are gone.
    """

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tag(self) -> str: ...
    def release_after(self, ticket: Ticket) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class HostPool:
    def __init__(
        self,
        device: Device | None = None,
        *,
        budget_bytes: int | None = None,
        slab_bytes: int = ...,
        pin: bool = False,
        huge_pages: bool = True,
        numa_node: int = -1,
        poison: bool = False,
    ) -> None: ...
    def reserve(self, nbytes: int) -> None: ...
    def acquire(self, nbytes: int, tag: Tag, alignment: int = 1) -> HostBuffer:
        """A block at an address that is a multiple of 256, and of `alignment` (a power of two)."""
    def trim(self) -> int: ...
    def stats(self) -> dict[str, Any]:
        """The fields of HostPoolStats; `tag_bytes` is a dict by tag."""

def pool_layout(sizes_bytes: Sequence[int], *, reserve_first: bool = True) -> dict[str, Any]:
    """The stats of a pool that holds blocks of these sizes; no memory is touched, so they may exceed the machine."""

# --- storage ----------------------------------------------------------------------------------------------

DISK_ALIGNMENT: int
DiskBackend = Literal["auto", "io_uring", "threads"]

@final
class FailingSystemCalls:
    """The kernel's calls, but for those that a test makes fail; the names are those of csrc/storage/system_calls.h."""

    def __init__(self) -> None: ...
    def fail(self, call: str, nth: int, code: int, count: int = 1) -> None:
        """The nth call of that name from now on (1 = the next) and the count - 1 after it give the errno `code`."""
    def shorten(self, call: str, nth: int, nbytes: int) -> None:
        """The nth pread, pwrite, uring_read or uring_write from now on says that it moved `nbytes` only."""
    def pretend_file_system(self, type: int) -> None:
        """What fstatfs says from now on."""
    def call_count(self, call: str) -> int: ...

@final
class BlockFile:
    """Bytes on disk, in private files that go with it: see csrc/storage/block_file.h.

    Offsets are multiples of block_bytes, addresses of DISK_ALIGNMENT, and memory reaches to the next multiple of
    DISK_ALIGNMENT behind the last byte. The caller keeps it until the ticket ended.
    """

    def __init__(
        self,
        directories: Sequence[str],
        *,
        block_bytes: int = ...,
        queue_depth: int = ...,
        thread_count: int = ...,
        backend: DiskBackend = "auto",
        direct: bool = True,
        calls: FailingSystemCalls | None = None,
    ) -> None: ...
    def allocate(self, nbytes: int) -> int:
        """The offset of so many bytes, whose space is reserved on the disks; given back with the file."""
    def submit_read(self, offset: int, destination: int, nbytes: int) -> Ticket: ...
    def submit_write(self, offset: int, source: int, nbytes: int) -> Ticket: ...
    @property
    def block_bytes(self) -> int: ...
    def facts(self) -> list[dict[str, Any]]:
        """By path: the fields of DiskPathFacts and LaneStats; a refusal is "" where nothing was refused."""

# --- optimizer --------------------------------------------------------------------------------------------

FLOAT32: int
BFLOAT16: int
FLOAT16: int
MASTER_FLOAT32: int
MASTER_SPLIT: int
FACTOR_MULTIPLY: int
FACTOR_DIVIDE: int
FACTOR_MULTIPLY_RECIPROCAL: int
FACTOR_MULTIPLY_WIDE: int

def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def flush_denormals_enabled() -> bool: ...

@final
class AdamWScalars:
    """The scalars of one step; doubles are rounded to fp32. See [Note: the AdamW sequence]."""

    def __init__(
        self,
        *,
        weight_scale: float,
        l2: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        step_size: float,
        eps: float,
        maximize: bool = False,
    ) -> None: ...

class LionScalars:
    """The scalars of one step; doubles are rounded to fp32. See [Note: the Lion sequence]."""

    def __init__(
        self,
        *,
        weight_scale: float,
        beta1: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        step_size: float,
        maximize: bool = False,
    ) -> None: ...

class AdagradScalars:
    """The scalars of one step; doubles are rounded to fp32. See [Note: the Adagrad sequence]."""

    def __init__(self, *, l2: float, step_size: float, eps: float, maximize: bool = False) -> None: ...

def update_states(
    *,
    gradient: int,
    gradient_format: int,
    master: int,
    master_format: int,
    weight: int,
    weight_format: int,
    exp_avg: int,
    exp_avg_sq: int,
    count: int,
    scalars: AdamWScalars | LionScalars | AdagradScalars,
    factors: Sequence[tuple[int, float]] = (),
    isa: str | None = None,
    threads: int = 0,
) -> None:
    """One step of the optimizer whose scalars are given, over host memory; a state that it has not may be 0.

    `threads`: 0 = the shared pool, n = a pool of n made for the call (tests).
    """

def split_master(master: int, weight: int, remainder: int, count: int) -> None: ...
def join_master(weight: int, remainder: int, master: int, count: int) -> None: ...

ACCESS_READ: int
ACCESS_UPDATE: int
ACCESS_WRITE: int

def streaming_pass(
    arrays: Sequence[tuple[int, int, int]],
    count: int,
    *,
    non_temporal: bool = False,
    prefetch: bool = False,
    threads: int = 0,
) -> None:
    """Streams `count` elements of each array (address, bytes an element, access): the ceiling for update_states.

    Arrays that are read or updated keep their bytes; written ones are filled with zeros.
    """

# --- pipeline ---------------------------------------------------------------------------------------------

@final
class StepPipeline:
    def __init__(self, transfers: TransferQueue, *, chunk_elements: int = ...) -> None: ...
    def add_slot(
        self,
        *,
        name: str,
        master: int,
        master_format: int,
        weight: int,
        weight_format: int,
        exp_avg: int,
        exp_avg_sq: int,
        count: int,
        upload_source: int,
        device_weight: int,
        weight_bytes: int,
    ) -> int: ...
    def submit(
        self,
        jobs: Sequence[
            tuple[
                int,
                int,
                int,
                Sequence[Ticket],
                AdamWScalars | LionScalars | AdagradScalars,
                Sequence[tuple[int, int, float]],
            ]
        ],
        compute_stream: int = 0,
    ) -> list[Ticket]:
        """Jobs are (slot, gradient address, gradient format, tickets, scalars, factors).

        A job runs when every one of its tickets is done. A factor is (kind, address, value); the fp32 at a
        non-zero address is read then.
        """
    def wait(self, tickets: Sequence[Ticket]) -> None: ...
    def stats(self) -> dict[str, int]:
        """job_count, update_ns, blocked_ns."""
    def hold(self) -> None:
        """The sequencer starts no further job until release(): for tests."""
    def release(self) -> None: ...
