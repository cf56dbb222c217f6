"""The native core. Addresses, lengths in bytes and format codes cross as integers; results are Tickets.

Every call that can block releases the GIL. Errors are the classes of `offload.InvalidArgument` and so on.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

version: str

# --- base -------------------------------------------------------------------------------------------------

@final
class Ticket:
    """The promise that asynchronous work ended. `Ticket()` is done; of `Ticket.pending()` Python says when."""

    def __init__(self) -> None: ...
    @staticmethod
    def pending() -> Ticket: ...
    @property
    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool:
        """Blocks until the work ended (False: the timeout passed first); raises the error of failed work."""
    def complete(self) -> None: ...
    def end_with(self, other: Ticket) -> None:
        """A pending ticket ends when `other` does, and as that does."""
    def fail(self, message: str) -> None: ...

@final
class ManualClock:
    def __init__(self) -> None: ...
    def now_ns(self) -> int: ...
    def advance(self, delta_ns: int) -> None: ...
    def deadlines_ns(self) -> list[int]:
        """What sleepers wait for, the earliest first."""

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
    @property
    def copies_together(self) -> Literal["in one call", "by a kernel", "one by one"]:
        """How the driver is given small copies of one submission."""

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

    takes_batches: False, as where the driver is older than CUDA 12.8, measures what is done there.

    Raises `DeviceError` with the driver's own words and the remedy when there is no driver, it is too old, or the
    device is not there. Holds the primary context, as torch does.
    """

    def __init__(self, index: int = 0, *, driver_path: str = "", takes_batches: bool = True) -> None: ...
    def facts(self) -> dict[str, Any]:
        """name, uuid, index, memory_kind ("discrete", "hmm", "ats", "integrated"), compute_capability (major, minor),
        multiprocessor_count, copy_engine_count, total_bytes, free_bytes, driver_version, can_pin,
        pageable_copy_count (copies so far whose host memory is not registered)."""
    def load_copy_kernel(self, cubin: bytes) -> None:
        """Small copies of one submission go by kernels/copies.cu where the driver takes no batches.

        Raises `DeviceError` when the driver refuses it, `StateError` when there is one.
        """
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

    def submit_all_to_host(
        self, copies: list[tuple[int, int, int, Ticket, HostBuffer]], compute_stream: int = 0, trace_name: int = 0
    ) -> None:
        """Copies (destination, source, nbytes, ticket, buffer) that share no byte, in one submission; the list is empty
        afterwards.

        Each ticket becomes that of all, and no block is reused before that ended. A signal handler runs before all of
        this or after it. Refused copies change nothing. trace_name: whose they are in traces, see set_trace_label().
        """

    def submit_batch(self, lane: Lane, copies: Sequence[tuple[int, int, int]], compute_stream: int = 0) -> Ticket:
        """Copies (destination, source, nbytes) that share no byte, in any order among themselves, with one ticket."""

    def wait_on_stream(self, compute_stream: int, ticket: Ticket) -> None: ...
    def end(self) -> None:
        """What was submitted ends or fails, for good; later submissions raise `StateError`."""

    def stats(self) -> dict[str, int]:
        """to_host_bytes, to_device_bytes, to_host_count, to_device_count."""

# --- memory -----------------------------------------------------------------------------------------------

Tag = Literal["weights", "master", "moments", "gradients", "activations", "staging", "window", "backups"]

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
    def trace_sample(self) -> None:
        """Records the bytes in use by tag, as each change of them is while a trace is on."""
    def stats(self) -> dict[str, Any]:
        """The fields of HostPoolStats; `tag_bytes` and `tag_peak_bytes` are dicts by tag."""

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
    def hold_transfers(self) -> None:
        """From now on each pread and pwrite waits until it is let go, all of them until release_transfers()."""
    def release_transfers(self) -> None: ...
    def held_transfers(self) -> list[tuple[bool, int, int]]:
        """Of each that waits: whether it is a write, its offset in the file, and its bytes."""
    def let_go(self, is_write: bool, offset: int) -> None: ...
    def pretend_clones(self) -> None:
        """From now on a clone is a copy of the bytes, on any file system."""
    def pretend_file_system(self, type: int) -> None:
        """What fstatfs says from now on."""
    def call_count(self, call: str) -> int: ...

def uring_refusal(calls: FailingSystemCalls | None = None) -> str:
    """Why the kernel gives no io_uring; empty where it does."""

@final
class BlockFile:
    """Bytes on disk, in private files that go with it: see csrc/storage/block_file.h.

    Offsets are multiples of block_bytes, addresses of DISK_ALIGNMENT, and memory reaches to the next multiple of
    DISK_ALIGNMENT behind the last byte. The caller keeps it until the ticket ended.
    """

    def __init__(
        self,
        directories: Sequence[str | bytes],
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
    def clone(self) -> BlockFile:
        """A file of the bytes that this one has when the writes submitted so far have ended, to be read: a reflink."""
    def submit_read(self, offset: int, destination: int, nbytes: int) -> Ticket: ...
    def submit_write(self, offset: int, source: int, nbytes: int) -> Ticket: ...
    def submit_read_after(self, after: Sequence[Ticket], offset: int, destination: int, nbytes: int) -> Ticket:
        """As submit_read(), begun when all of `after` have ended, well or badly; every error is the ticket's."""
    def submit_write_after(self, after: Ticket, offset: int, source: int, nbytes: int) -> Ticket:
        """As submit_write(), begun when `after` has ended well; its error is the ticket's, and nothing is written."""
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
MASTER_BFLOAT16: int
MOMENTS_FLOAT32: int
MOMENTS_BFLOAT16: int
MOMENTS_INT8: int
MOMENT_BLOCK: int
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
        step: int = 0,
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
        step: int = 0,
    ) -> None: ...

class AdagradScalars:
    """The scalars of one step; doubles are rounded to fp32. See [Note: the Adagrad sequence]."""

    def __init__(self, *, l2: float, step_size: float, eps: float, maximize: bool = False, step: int = 0) -> None: ...

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
    moment_format: int = 0,
    exp_avg_scales: int = 0,
    exp_avg_sq_scales: int = 0,
    rounding_seed: int = 0,
    first_element: int = 0,
) -> None:
    """One step of the optimizer whose scalars are given, over host memory; a state that it has not may be 0.

    `threads`: 0 = the shared pool, n = a pool of n made for the call (tests). Scales are of MOMENTS_INT8, one fp32 for
    every MOMENT_BLOCK elements; `first_element` is the index of the first in its parameter.
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
class StateLayout:
    """How the states of one parameter lie on disk: in chunks of elements, the arrays of a chunk side by side.

    master, exp_avg, exp_avg_sq: bytes of an element of each, 0 for one that is not on disk.
    """

    def __init__(
        self,
        *,
        master: int,
        exp_avg: int,
        exp_avg_sq: int,
        element_count: int,
        chunk_elements: int,
        block_bytes: int,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def chunks(self) -> list[tuple[int, int, int, int, tuple[int, int, int]]]:
        """Of each: first element, elements, offset from the layout's beginning, bytes, offsets of its arrays in it."""

@final
class StateWindow:
    """Frames of host memory that states on disk pass through while they are updated."""

    def __init__(self, file: BlockFile, pool: HostPool, *, frame_bytes: int, frame_count: int) -> None: ...

@final
class StepPipeline:
    def __init__(
        self,
        transfers: TransferQueue,
        *,
        chunk_elements: int = ...,
        window: StateWindow | None = None,
        run_ahead: bool = False,
    ) -> None: ...
    @property
    def run_ahead_refusal(self) -> str:
        """Why no stream waits for an update, as `run_ahead` asks for; empty: streams do, or nobody asked."""
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
        moment_format: int = 0,
        exp_avg_scales: int = 0,
        exp_avg_sq_scales: int = 0,
        rounding_seed: int = 0,
        layout: StateLayout | None = None,
        disk_offset: int = 0,
        trace_name: int = 0,
    ) -> int:
        """Addresses are 0 for what is not there, or is on disk: those that `layout` has, from `disk_offset` on."""
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
            | tuple[
                int,
                int,
                int,
                Sequence[Ticket],
                AdamWScalars | LionScalars | AdagradScalars,
                Sequence[tuple[int, int, float]],
                int,
            ]
        ],
        compute_stream: int = 0,
        backwards: bool = False,
    ) -> list[Ticket]:
        """Jobs are (slot, gradient address, gradient format, tickets, scalars, factors[, weight address]).

        A job runs when every one of its tickets is done. A factor is (kind, address, value); the fp32 at a
        non-zero address is read then. A non-zero weight address is where the slot's weight on the host is this time.
        `backwards` runs through the chunks of each state on disk from the last one on.
        """
    def backup_bytes(self, slot: int) -> int:
        """What `speculate` needs for this slot."""
    def speculate(
        self,
        job: tuple[int, int, int, Sequence[Ticket], AdamWScalars | LionScalars | AdagradScalars, Sequence[Any]],
        backup: int,
    ) -> Ticket:
        """Updates states in memory ahead of the job that is expected, and keeps in `backup` what they were.

        The next job of the slot takes it up if it is the same, with factors that are 1; else it is undone first. The
        ticket ends, well, when gradient and backup are no longer used. Once the next job submitted need not wait for
        anything that lands, what has not begun is dropped.
        """
    def discard(self, slots: Sequence[int]) -> Ticket:
        """These slots' states are those of their last jobs once the ticket is done."""
    def states_written(self, slot: int) -> None:
        """Somebody else wrote the slot's states on disk: what the window has of them is read anew."""
    def wait(self, tickets: Sequence[Ticket]) -> None: ...
    @staticmethod
    def weight(ticket: Ticket) -> Ticket:
        """Ends when the job's weight is updated and uploaded, before its states are on disk; another ticket is
        returned as it is.
        """
    def stats(self) -> dict[str, int]:
        """job_count, update_ns, blocked_ns, exposed_ns (blocked while an update ran); of updates ahead kept_count,
        discarded_count; of states on disk disk_read_bytes, disk_kept_bytes (in the window still), disk_written_bytes,
        disk_wait_ns.
        """
    def hold(self) -> None:
        """The sequencer starts no further job until release(), but for those that streams may wait for: for tests."""
    def release(self) -> None: ...

# --- trace ------------------------------------------------------------------------------------------------

# By the numbers of records; of tags, by the kind of a sample. See csrc/base/trace_ring.h.
TRACE_LANES: tuple[str, ...]
TRACE_TAGS: tuple[str, ...]
TRACE_RECORD_BYTES: int

def trace_start() -> None:
    """From now on the core records what it does, in the whole process; what was recorded before is forgotten."""

def trace_stop() -> None: ...
def trace_is_on() -> bool: ...
def trace_read() -> bytes:
    """The records that came since the last call, as they lie in memory. One thread at a time."""

def trace_lost_count() -> int:
    """Records since trace_start() that found no room."""

def trace_label() -> tuple[int, int]:
    """Name and kind of what this thread submits and waits for."""

def set_trace_label(name: int, kind: int = 0) -> None: ...

# --- unified memory ---------------------------------------------------------------------------------------

Side = Literal["host", "device"]

def unified_memory_facts(index: int, *, driver_path: str = "") -> dict[str, Any]:
    """The fields of CudaMemoryFacts, without a context on the device."""

@final
class UnifiedBlock:
    """One allocation; freed with its last owner, which may be a tensor made of `dlpack`. Ranges lie inside it."""

    @staticmethod
    def find(address: int, nbytes: int) -> UnifiedBlock | None:
        """The live block that holds the whole range."""
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def kind(self) -> str: ...
    def dlpack(self, side: Side) -> Any:
        """A DLPack capsule of the block's bytes (uint8), on the CPU or the CUDA device."""
    def advise(
        self,
        address: int,
        nbytes: int,
        *,
        preferred_location: Side | None,
        accessed_by_host: bool,
        accessed_by_device: bool,
        read_mostly: bool,
    ) -> None: ...
    def placement(self, address: int, nbytes: int) -> dict[str, Any]:
        """The names of `advise`, and last_prefetch."""
    def prefetch(self, address: int, nbytes: int, side: Side, stream: int) -> None: ...
    def discard(self, address: int, nbytes: int, stream: int) -> bool: ...

@final
class UnifiedMemory:
    """The unified memory of a CUDA device; see csrc/unified/unified_memory.h."""

    def __init__(self, index: int = 0, *, driver_path: str = "") -> None: ...
    @property
    def live_managed_bytes(self) -> int: ...
    def allocate(
        self,
        nbytes: int,
        kind: str,
        *,
        preferred_location: Side | None = None,
        accessed_by_host: bool = False,
        accessed_by_device: bool = False,
        read_mostly: bool = False,
        host_bytes: int,
    ) -> UnifiedBlock: ...

# The addresses of offload_unified_alloc and offload_unified_free, which torch finds by these names.
TORCH_ALLOC_ADDRESS: int
TORCH_FREE_ADDRESS: int

def open_torch_allocator(index: int, *, driver_path: str = "", host_bytes: int) -> None:
    """From now on those functions serve the device."""

def torch_allocator_refusal(index: int) -> str:
    """Why the last null was returned; "" when none was since the device was opened."""
