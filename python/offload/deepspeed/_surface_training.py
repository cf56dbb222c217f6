"""The table of keys: the top level, number formats, optimizers and learning-rate schedules."""

from __future__ import annotations

from ._surface import OBJECT, REQUIRED, Section, accepted, honoured, inert, refused

__all__ = ["OPTIMIZERS", "REFUSED_OPTIMIZERS", "SCHEDULERS", "SECTIONS"]

_ALONE = "One process has nobody to exchange gradients or weights with."
_SECTION = "A section of its own."
_ONE_PROCESS = "One process trains the model, the whole of it: leave the key out."

_TOP = (
    honoured("train_batch_size", "int?", None, "Samples an optimizer step.", low=1, trainer="all three multiplied"),
    honoured(
        "train_micro_batch_size_per_gpu",
        "int?",
        None,
        "Samples a forward pass.",
        low=1,
        trainer="per_device_train_batch_size",
    ),
    honoured(
        "gradient_accumulation_steps",
        "int?",
        None,
        "Forward passes an optimizer step.",
        low=1,
        trainer="gradient_accumulation_steps",
    ),
    honoured("managed_gradient_accumulation", "bool", True, "`false`: each `step()` updates; the caller counts."),
    honoured("optimizer", OBJECT, None, _SECTION),
    honoured("scheduler", OBJECT, None, _SECTION),
    honoured("zero_optimization", "object|bool?", None, _SECTION),
    honoured("fp16", OBJECT, None, _SECTION),
    honoured("bf16", OBJECT, None, _SECTION),
    accepted("bfloat16", OBJECT, None, "Old spelling.", now="bf16"),
    honoured(
        "gradient_clipping",
        "float",
        1.0,
        "Gradients are clipped to this L2 norm over all of them; 0.0 clips nothing. DeepSpeed's default was 0.0 until "
        "June 2026.",
        low=0,
        trainer="max_grad_norm",
    ),
    accepted("prescale_gradients", "bool", False, "With one process the division and the multiplication cancel."),
    accepted("gradient_predivide_factor", "float", 1.0, "With one process the division and the multiplication cancel."),
    accepted("gradient_allreduce_op", ("mean", "sum"), "mean", "Of one process, the sum is the mean."),
    accepted("communication_data_type", ("fp16", "bf16", "fp32"), None, _ALONE),
    accepted("seq_parallel_communication_data_type", ("fp16", "bf16", "fp32"), "fp32", _ALONE),
    accepted("disable_allgather", "bool", False, _ALONE),
    accepted("sparse_gradients", "bool", False, _ALONE),
    accepted("allgather_size", "int", 500_000_000, f"{_ALONE} Goes with the old `zero_optimization: true`."),
    accepted("zero_allow_untested_optimizer", "bool", False, "Optimizers of any class pass."),
    accepted(
        "zero_force_ds_cpu_optimizer",
        "bool",
        True,
        "Optimizers of any class pass: Adam, AdamW, Lion and Adagrad get the host's own update, others run their code.",
    ),
    honoured("steps_per_print", "int?", None, "Optimizer steps between two lines of the log."),
    honoured("wall_clock_breakdown", "bool", False, "Logs the time of forward, backward and step."),
    honoured("dump_state", "bool", False, "Logs the settings when training starts."),
    honoured("memory_breakdown", "bool", False, "Logs the bytes by kind of tensor and place after every step."),
    honoured("dataloader_drop_last", "bool", False, "The loader made from `training_data` drops a short last batch."),
    accepted("log_level", "str?", None, "Set the level of the logger `offload` in Python's `logging`."),
    accepted("vocabulary_size", "int?", None, "DeepSpeed only prints advice with it."),
    accepted("disable_python_gc", "bool", False, "Python's collector is the script's own: call `gc.disable()` there."),
    accepted("graph_harvesting", "bool", False, "CUDA graphs are not recorded."),
    honoured("activation_checkpointing", OBJECT, None, _SECTION),
    honoured("torch_autocast", OBJECT, None, _SECTION),
    honoured("data_types", OBJECT, None, _SECTION),
    honoured("checkpoint", OBJECT, None, _SECTION),
    honoured("tensorboard", OBJECT, None, _SECTION),
    honoured("csv_monitor", OBJECT, None, _SECTION),
    honoured("flops_profiler", OBJECT, None, _SECTION),
    *inert(
        _SECTION,
        [
            (name, OBJECT, None)
            for name in (
                "amp", "aio", "wandb", "comet", "comms_logger", "timers", "compile", "autotuning", "hybrid_engine",
                "tensor_parallel", "expert_parallel", "nebula", "elasticity", "data_efficiency", "eigenvalue",
            )
        ],
    ),
    accepted("pipeline", OBJECT, None, "Read only for a pipeline module, and one process has one stage."),
    accepted("datastates_ckpt", OBJECT, None, "Checkpoints are written by offload.", aloud=True),
    accepted("weight_quantization", OBJECT, None, "Read for inference only."),
    accepted("use_data_before_expert_parallelism", "bool", False, _ALONE),
    refused("sequence_parallel_size", "int?", None, _ONE_PROCESS, harmless=(None, 0, 1)),
    refused("data_parallel_size", "int?", None, _ONE_PROCESS, harmless=(None, 0, 1)),
    refused("curriculum_learning", OBJECT, None, "Shorten the sequences in the data loader."),
    refused("progressive_layer_drop", OBJECT, None, "Drop layers in the model itself."),
    refused("quantize_training", OBJECT, None, "Quantize in the model itself, or leave the section out."),
    refused("compression_training", OBJECT, None, "Compress the model before or after training."),
    refused("sparse_attention", OBJECT, None, "Use an attention of the model's own, as FlexAttention."),
)  # fmt: skip

_SHARPER = "Master weights stay exact to fp32: two bytes a parameter more, and no accuracy lost."

_FP16 = (
    honoured("enabled", "bool", False, "The model is cast to fp16, with a loss scale.", trainer="fp16"),
    honoured("auto_cast", "bool", False, "Floating-point inputs of forward are cast to fp16."),
    honoured("loss_scale", "float", 0.0, "A fixed loss scale; 0 adapts it.", low=0),
    honoured("initial_scale_power", "int", 16, "The first loss scale is 2 to this power."),
    honoured("loss_scale_window", "int", 1000, "Good steps in a row after which the scale doubles."),
    honoured("hysteresis", "int", 2, "So many overflows before the scale is halved."),
    honoured("consecutive_hysteresis", "bool", False, "A good step gives the hysteresis back."),
    honoured("min_loss_scale", "int", 1, "The scale is not halved below it."),
    accepted("fp16_master_weights_and_grads", "bool", False, _SHARPER, aloud=True),
    refused("opt_level", "str", None, "Leave it out: it belongs to Apex. DeepSpeed refuses it here too."),
)
_BF16 = (
    honoured("enabled", "bool", False, "The model is cast to bf16.", trainer="bf16"),
    honoured("check_grad_overflow", "bool", True, "A step with inf or NaN in its gradients is skipped."),
    accepted("immediate_grad_update", "bool", False, "Gradients always leave the device as soon as they are final."),
    accepted("bf16_master_weights_and_grads", "bool", False, _SHARPER, aloud=True),
    accepted("bf16_optimizer_states", "bool", False, "Optimizer states stay fp32.", aloud=True),
    refused("check_overflow", "bool", None, "Write `check_grad_overflow`. DeepSpeed refuses this spelling too."),
)
_AUTOCAST_DTYPES = (
    "fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16", "fp32", "float32", "float",
    "torch.float32",
)  # fmt: skip

_DTYPES = ("fp32", "fp16", "bf16")

_WARMUP = (
    honoured(
        "warmup_num_steps",
        "int",
        1000,
        "Steps of warm-up; 0 starts at the full rate, where DeepSpeed raises.",
        low=0,
        trainer="get_warmup_steps()",
    ),
    honoured("warmup_type", "str", "log", "The shape of the warm-up: log or linear."),
    honoured("last_batch_iteration", "int", -1, "The step to go on from; -1 starts anew.", low=-1),
)
_TOTAL = honoured("total_num_steps", "int", REQUIRED, "Steps of the whole schedule.", low=1, trainer="max_steps")
_MAX_GRAD_NORM = refused("max_grad_norm", "float", None, "Write `gradient_clipping` at the top level.")
_ADAM = (
    honoured("lr", "float", 1e-3, "Learning rate.", low=0, trainer="learning_rate"),
    honoured("betas", "list", [0.9, 0.999], "Decays of the two moments.", trainer="adam_beta1, adam_beta2"),
    honoured("eps", "float", 1e-8, "Added to the denominator.", low=0, trainer="adam_epsilon"),
    honoured("weight_decay", "float", 0.0, "Decoupled, unless `adam_w_mode` is false.", low=0, trainer="weight_decay"),
    honoured("torch_adam", "bool", False, "Use torch's class; then its own keys are legal too."),
    honoured("adam_w_mode", "bool", True, "`false` makes Adam add the decay to the gradient; AdamW never does."),
    honoured("amsgrad", "bool", False, "Torch's class is used; DeepSpeed's host Adam ignores the key."),
    refused("bias_correction", "bool", True, "Leave it out: Adam always corrects its bias here.", harmless=(True,)),
    accepted("fp32_optimizer_states", "bool", True, "Optimizer states stay fp32.", aloud=True),
)
# `params` of each type that DeepSpeed has classes of its own for; "Adam" serves AdamW too.
OPTIMIZERS = (
    Section("optimizer.Adam", "Of Adam and AdamW.", (*_ADAM, _MAX_GRAD_NORM), arguments=True),
    Section(
        "optimizer.Lion",
        "",
        (
            honoured("lr", "float", 1e-3, "Learning rate.", low=0, trainer="learning_rate"),
            honoured("betas", "list", [0.9, 0.999], "Decays of momentum and update.", trainer="adam_beta1, adam_beta2"),
            honoured("weight_decay", "float", 0.0, "Decoupled.", low=0, trainer="weight_decay"),
            _MAX_GRAD_NORM,
        ),
        arguments=True,
    ),
    Section(
        "optimizer.Adagrad",
        "",
        (
            honoured("lr", "float", 1e-2, "Learning rate.", low=0, trainer="learning_rate"),
            honoured("eps", "float", 1e-10, "Added to the denominator.", low=0, trainer="adam_epsilon"),
            honoured("weight_decay", "float", 0.0, "Added to the gradient.", low=0, trainer="weight_decay"),
            accepted("amsgrad", "bool", False, "Adagrad has no such variant; DeepSpeed ignores the key too."),
            _MAX_GRAD_NORM,
        ),
        arguments=True,
    ),
)  # fmt: skip
_LAMB = "LAMB has no update on the host: write `AdamW`."
_MUON = "Muon has no update on the host: write `AdamW`."
REFUSED_SECTIONS = (
    Section(
        "optimizer.Lamb",
        _LAMB,
        tuple(
            refused(name, "any", default, _LAMB)
            for name, default in (
                ("lr", 1e-3), ("bias_correction", True), ("betas", [0.9, 0.999]), ("eps", 1e-8),
                ("eps_inside_sqrt", False), ("weight_decay", 0.0), ("max_grad_norm", 0.0), ("max_coeff", 10.0),
                ("min_coeff", 0.01), ("amsgrad", False),
            )
        ),
    ),
    Section(
        "optimizer.Muon",
        _MUON,
        tuple(
            refused(name, "any", default, _MUON)
            for name, default in (
                ("lr", 1e-3), ("momentum", 0.95), ("weight_decay", 0.0), ("muon_lr", None), ("adam_lr", None),
                ("betas", None), ("eps", None), ("ns_method", "gram"),
            )
        ),
    ),
)  # fmt: skip
# Of `optimizer.type`, in lower case; none has a counterpart in torch.optim.
REFUSED_OPTIMIZERS = {
    "lamb": _LAMB,
    "muon": _MUON,
    "onebitadam": "The 1-bit family compresses what ranks exchange, and there is one process: write `Adam`.",
    "zerooneadam": "The 1-bit family compresses what ranks exchange, and there is one process: write `Adam`.",
    "onebitlamb": "The 1-bit family compresses what ranks exchange, and there is one process: write `AdamW`.",
    "muadam": "It needs the package mup: scale the learning rates of parameter groups, and write `Adam`.",
    "muadamw": "It needs the package mup: scale the learning rates of parameter groups, and write `AdamW`.",
    "musgd": "It needs the package mup: scale the learning rates of parameter groups, and write `SGD`.",
    "lbfgs": "Its step evaluates the model itself: write `AdamW`.",
    "sparseadam": "It takes sparse gradients only: write `AdamW`, and `sparse=False` in embeddings.",
}

# `params` of each schedule that DeepSpeed has a class of its own for.
SCHEDULERS = (
    Section(
        "scheduler.WarmupLR",
        "",
        (
            honoured("warmup_min_lr", "float|numbers", 0.0, "The rate to start from.", low=0, trainer="0"),
            honoured(
                "warmup_max_lr",
                "float|numbers?",
                None,
                "The rate to reach; null takes the optimizer's.",
                low=0,
                trainer="learning_rate",
            ),
            *_WARMUP,
        ),
        arguments=True,
    ),
    Section(
        "scheduler.WarmupDecayLR",
        "",
        (
            _TOTAL,
            honoured("warmup_min_lr", "float|numbers", 0.0, "The rate to start from.", low=0, trainer="0"),
            honoured("warmup_max_lr", "float|numbers", 1e-3, "The rate to reach.", low=0, trainer="learning_rate"),
            *_WARMUP,
        ),
        arguments=True,
    ),
    Section(
        "scheduler.WarmupCosineLR",
        "",
        (
            _TOTAL,
            honoured("warmup_min_ratio", "float", 0.0, "The share of the rate to start from.", low=0),
            honoured("cos_min_ratio", "float", 1e-4, "The share of the rate to end at.", low=0),
            *_WARMUP,
        ),
        arguments=True,
    ),
    Section(
        "scheduler.OneCycle",
        "",
        (
            honoured("cycle_min_lr", "float|numbers", REQUIRED, "The rate at both ends of the cycle.", low=0),
            honoured("cycle_max_lr", "float|numbers", REQUIRED, "The rate at its top.", low=0),
            honoured("decay_lr_rate", "float", 0.0, "How fast the rate decays after the cycle.", low=0),
            honoured("cycle_first_step_size", "int", 2000, "Steps up.", low=1),
            honoured("cycle_second_step_size", "int?", None, "Steps down; null takes the same number.", low=0),
            honoured("cycle_first_stair_count", "int", 0, "Stairs on the way up; 0 is a slope.", low=0),
            honoured("cycle_second_stair_count", "int?", None, "Stairs on the way down.", low=0),
            honoured("decay_step_size", "int", 0, "Steps between two decays; 0 decays nothing.", low=0),
            honoured("cycle_momentum", "bool", True, "The momentum cycles too, against the rate."),
            honoured("cycle_min_mom", "float|numbers", 0.8, "The momentum at the top of the cycle.", low=0, below=1),
            honoured("cycle_max_mom", "float|numbers", 0.9, "The momentum at both ends.", low=0, below=1),
            honoured("decay_mom_rate", "float", 0.0, "How fast the momentum decays after the cycle."),
            honoured("last_batch_iteration", "int", -1, "The step to go on from; -1 starts anew.", low=-1),
        ),
        arguments=True,
    ),
    Section(
        "scheduler.LRRangeTest",
        "",
        (
            honoured("lr_range_test_min_lr", "float|numbers", 1e-3, "The rate to start from.", low=0),
            honoured("lr_range_test_step_size", "int", 2000, "Steps of one stretch.", low=1),
            honoured("lr_range_test_step_rate", "float", 1.0, "Growth of the rate in a stretch."),
            honoured("lr_range_test_staircase", "bool", False, "Grow in stairs."),
            honoured("last_batch_iteration", "int", -1, "The step to go on from; -1 starts anew.", low=-1),
        ),
        arguments=True,
    ),
)

SECTIONS = (
    Section("", "What DeepSpeed does not know here, it ignores without a word; offload warns.", _TOP),
    Section(
        "optimizer",
        "Adam, AdamW, Lion and Adagrad are updated by offload's own host kernels; any other class of `torch.optim` "
        "runs over host tensors by its own code. The 1-bit, Muon, LAMB and muP families are refused.",
        (
            honoured("type", "str?", None, "Its name; DeepSpeed's own in any case, torch's as torch spells them."),
            honoured("params", OBJECT, None, "Arguments of its constructor, below."),
            accepted("legacy_fusion", "bool", False, "It chooses between two fp16 wrappers of DeepSpeed's."),
        ),
    ),
    Section(
        "scheduler",
        "Steps with each optimizer step. Any class of `torch.optim.lr_scheduler` may be named too.",
        (
            honoured("type", "str?", None, "Name of the schedule."),
            honoured("params", OBJECT, None, "Arguments of its constructor, below."),
        ),
    ),
    Section("fp16", "Not together with `bf16`.", _FP16, strict=True),
    Section("bf16", "Not together with `fp16`. `bfloat16` is the old spelling.", _BF16, strict=True),
    Section(
        "amp",
        "NVIDIA Apex.",
        (
            refused("enabled", "bool", False, "Write `bf16` or `torch_autocast`.", trainer="the backend apex"),
            accepted("opt_level", "str?", None, "Read by Apex only.", trainer="fp16_opt_level"),
        ),
        open=True,
    ),
    Section(
        "torch_autocast",
        "Forward runs under `torch.autocast`; the model keeps its dtype, unless `fp16` or `bf16` cast it too.",
        (
            honoured("enabled", "bool", False, "Switches it on."),
            honoured("dtype", _AUTOCAST_DTYPES, None, "The dtype to compute in; null means bf16."),
            accepted("lower_precision_safe_modules", "list?", None, "Torch chooses by operation.", aloud=True),
        ),
    ),
    Section(
        "data_types",
        "",
        (
            honoured(
                "grad_accum_dtype",
                _DTYPES,
                None,
                "What gradients of micro-batches add up in: the dtype of the weights, which null means, or `fp32`, "
                "at two bytes more an element of 16-bit weights.",
            ),
            accepted("param_dtype", _DTYPES, None, "Must agree with `fp16` and `bf16`, which decide."),
            honoured(
                "buffer_dtype",
                _DTYPES,
                None,
                "What buffers are cast to; null leaves them, except that running statistics follow their weights.",
            ),
            honoured(
                "keep_in_fp32_modules",
                "list|str",
                "auto",
                "Patterns of names of buffers that stay in fp32, or are cast to it; `*` stands for any characters. "
                "`auto`: those that a transformers model names.",
            ),
        ),
    ),
    *OPTIMIZERS,
    *REFUSED_SECTIONS,
    *SCHEDULERS,
)  # fmt: skip
