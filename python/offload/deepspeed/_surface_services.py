"""The table of keys: what goes on around training: activation checkpointing, checkpoints, monitors, profilers."""

from __future__ import annotations

from ._surface import OBJECT, Key, Section, accepted, honoured, inert, refused

__all__ = ["SECTIONS"]

_OWN_CHECKPOINTS = "Checkpoints are written by offload: whole or not at all."
_MONITORS = "Write `csv_monitor` or `tensorboard`, or log from the training loop."
_SILENT = "One process does not communicate."


def _monitor(name: str) -> tuple[Key, ...]:
    return (
        honoured("enabled", "bool", False, f"Writes losses, rates and loss scales {name}."),
        honoured("output_path", "str", "", "The folder."),
        honoured("job_name", "str", "DeepSpeedJobName", "The folder inside it."),
    )


_ACTIVATIONS = (
    honoured(
        "cpu_checkpointing",
        "bool",
        False,
        "What checkpointed blocks save lives in host memory. Works from the JSON alone, where DeepSpeed also wants the "
        "model to call its own function.",
    ),
    accepted("partition_activations", "bool", False, "One process has nobody to share activations with."),
    accepted("contiguous_memory_optimization", "bool", False, "Host memory for activations lies in blocks already."),
    accepted("number_checkpoints", "int?", None, "Needed by `contiguous_memory_optimization` only."),
    accepted("synchronize_checkpoint_boundary", "bool", False, "Copies are ordered by events; the device never waits."),
    accepted("profile", "bool", False, "Write `wall_clock_breakdown`."),
    accepted(
        "partitioned_activations",
        "bool",
        False,
        "DeepSpeed ignores this spelling; it means `partition_activations`.",
        aloud=True,
    ),
)

_CHECKPOINT = (
    accepted("tag_validation", ("ignore", "warn", "fail"), "warn", "One process always agrees with itself on the tag."),
    honoured("writer", OBJECT, None, "A section of its own."),
    refused("load_universal", "bool", False, "Leave it out: checkpoints load under any placement as they are."),
    accepted("use_node_local_storage", "bool", False, "One process has one node."),
    accepted("parallel_write", OBJECT, None, "A section of its own."),
    accepted("checkpoint_serialization", "bool", True, _OWN_CHECKPOINTS),
)  # fmt: skip

_WRITER = (
    honoured("decoupled", "bool", False, "Saving goes on behind training, with the bits of the step that asked."),
    accepted("type", ("mock", "python", "fast"), "fast", _OWN_CHECKPOINTS),
    *inert(
        _OWN_CHECKPOINTS,
        [
            ("io_buffer_size", "int", 67_108_864),
            ("io_buffer_double", "bool", True),
            ("show_statistics", "bool", False),
            ("io_multiplier", "int", 1),
        ],
    ),
    accepted("data_parallel", ("replica", "socket", "machine"), None, "One process writes alone."),
)  # fmt: skip

_FLOPS = (
    honoured("enabled", "bool", False, "Counts the operations of one step and prints them by module."),
    honoured("profile_step", "int", 1, "The optimizer step to profile.", low=0),
    honoured("module_depth", "int", -1, "Depth of modules to print; -1 means all."),
    accepted("top_modules", "int", 1, "Every module is printed.", low=0),
    honoured("detailed", "bool", True, "Prints the tree of modules."),
    honoured("output_file", "str?", None, "The file to write to; null means the log."),
    honoured("recompute_fwd_factor", "float", 0.0, "This share of forward is added, in a figure of its own.", low=0),
)

SECTIONS = (
    Section("activation_checkpointing", "", _ACTIVATIONS),
    Section("checkpoint", "", _CHECKPOINT),
    Section("checkpoint.writer", "", _WRITER),
    Section(
        "checkpoint.parallel_write",
        "",
        (accepted("pipeline_stage", "bool", False, "One process has one pipeline stage."),),
    ),
    Section("csv_monitor", "", _monitor("to CSV files"), strict=True),
    Section("tensorboard", "Needs the package `tensorboard`.", _monitor("for TensorBoard"), strict=True),
    Section("flops_profiler", "", _FLOPS),
    Section(
        "wandb",
        "",
        (
            accepted("enabled", "bool", False, _MONITORS, aloud=True),
            *inert(_MONITORS, [("group", "str?", None), ("team", "str?", None), ("project", "str", "deepspeed")]),
        ),
        strict=True,
    ),
    Section(
        "comet",
        "",
        (
            accepted("enabled", "bool", False, _MONITORS, aloud=True),
            *inert(
                _MONITORS,
                [
                    ("samples_log_interval", "int", 100),
                    ("project", "str?", None),
                    ("workspace", "str?", None),
                    ("api_key", "str?", None),
                    ("experiment_name", "str?", None),
                    ("experiment_key", "str?", None),
                    ("online", "bool?", None),
                    ("mode", "str?", None),
                ],
            ),
        ),
        strict=True,
    ),
    Section(
        "comms_logger",
        "",
        inert(
            _SILENT,
            [
                ("enabled", "bool", False),
                ("prof_all", "bool", True),
                ("prof_ops", "list", []),
                ("verbose", "bool", False),
                ("debug", "bool", False),
            ],
        ),
        strict=True,
    ),
    Section("timers", "", (accepted("throughput", OBJECT, None, "A section of its own."),)),
    Section(
        "timers.throughput",
        "",
        inert(
            "Samples a second are logged with `wall_clock_breakdown`.",
            [("enabled", "bool", True), ("synchronized", "bool", True)],
        ),
        strict=True,
    ),
    Section(
        "aio",
        "How files on NVMe are read and written, where a `device` is `nvme`: by io_uring, else by threads. "
        "Without this section 16 transfers of 1 MiB are under way at once, by threads 8.",
        (
            honoured(
                "block_size",
                "int",
                1_048_576,
                "Bytes of one transfer, up to 1 GiB and rounded up to a multiple of 4096; each has a checksum.",
                low=1,
                high=1 << 30,
            ),
            honoured(
                "queue_depth",
                "int",
                8,
                "Transfers under way at once, each path, times `intra_op_parallelism`; at most 4096.",
                low=1,
            ),
            honoured("intra_op_parallelism", "int", 1, "See `queue_depth`: each thread of DeepSpeed has one.", low=1),
            accepted("single_submit", "bool", False, "Transfers are handed over as many at once as there are."),
            accepted("overlap_events", "bool", True, "New transfers begin as soon as one has ended."),
            accepted("use_gds", "bool", False, "The update runs on the host: states go no further than its memory."),
            accepted("thread_count", "int", None, "DeepSpeed reads `intra_op_parallelism` instead.", aloud=True),
        ),
    ),
    Section(
        "nebula",
        "Checkpoints on Azure.",
        (
            accepted("enabled", "bool", False, _OWN_CHECKPOINTS, aloud=True),
            *inert(
                _OWN_CHECKPOINTS,
                [
                    ("persistent_storage_path", "str?", None),
                    ("persistent_time_interval", "int", 100),
                    ("num_of_version_in_retention", "int", 2),
                    ("enable_nebula_load", "bool", True),
                    ("nebula_load_path", "str?", None),
                ],
            ),
        ),
    ),
)
