"""Every name that Trainer, Accelerate, PEFT, TRL and Lightning take from deepspeed, and the test of what it means.

Read from transformers 5.23, accelerate 1.15, peft 0.21, trl 1.16 and lightning 2.6. ``same`` is the object of
zeropipe behind the name; it is empty where the name is one of an engine, an optimizer or a parameter.
"""

# ruff: noqa: E501 - a name is one row of a table
from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """``name``: as the clients write it. ``by``: who. ``use``: what they want of it. ``shown``: file::test."""

    name: str
    by: str
    use: str
    shown: str
    same: str = ""


_CLIENTS = "tests/dist/test_engine_clients.py"
_GATHER = "tests/dist/test_zero_gather.py"
_INIT = "tests/dist/test_zero_init.py"
_SAVED = "tests/dist/test_checkpoint_engine.py"
_REPORTS = "tests/dist/test_engine_reports.py"
_LIFE = "tests/dist/test_engine_life.py"
_MEANING = "tests/unit/compat/test_meaning.py"
_TABLE = "tests/unit/compat/test_table.py"
_SHIM = "tests/unit/compat/test_distribution.py"
_TOOLS = "tests/unit/checkpoint/test_tools.py"
_REGISTRY = "tests/unit/runtime/optimizers/test_registry.py"

PACKAGE = (
    Name("DeepSpeedEngine", "accelerate at every unwrap_model, lightning", "isinstance, a module", f"{_CLIENTS}::test_the_engine_is_a_module_that_delegates", "zeropipe.runtime.engine:DeepSpeedEngine"),
    Name("runtime.engine.DeepSpeedEngine", "lightning", "the same class", f"{_TABLE}::test_a_name_is_the_same_object", "zeropipe:DeepSpeedEngine"),
    Name("__version__", "transformers, lightning", "a string that satisfies >=0.19.6", f"{_SHIM}::test_the_version_is_the_interfaces_and_ours", "zeropipe.compat.table:VERSION"),
    Name("initialize", "all", "an engine; config_params, generators, device_rank=None", f"{_CLIENTS}::test_optimizer_object_callable_config_and_generator_are_the_same", "zeropipe.entry:initialize"),
    Name("init_distributed", "lightning", "positional backend, timeout may be None, again does nothing", f"{_MEANING}::test_starting_twice_and_with_none_is_fine", "zeropipe.comm.group:init_distributed"),
    Name("comm.init_distributed", "accelerate", "dist_backend may be None", f"{_MEANING}::test_starting_twice_and_with_none_is_fine", "zeropipe.comm.group:init_distributed"),
    Name("comm.is_initialized", "accelerate", "whether there is a world", f"{_MEANING}::test_starting_twice_and_with_none_is_fine", "torch.distributed:is_initialized"),
    Name("comm.get_rank", "transformers, trl", "the global rank, before an engine", f"{_MEANING}::test_starting_twice_and_with_none_is_fine", "torch.distributed:get_rank"),
    Name("utils.logger", "transformers", "setLevel", f"{_MEANING}::test_there_is_one_logger", "zeropipe.utils.logging:logger"),
    Name("utils.logging.logger", "lightning", "setLevel", f"{_MEANING}::test_there_is_one_logger", "zeropipe.utils.logging:logger"),
    Name("accelerator.get_accelerator", "transformers", "current_device_name()", f"{_MEANING}::test_the_accelerator_names_a_device_that_torch_takes", "zeropipe.accelerator:get_accelerator"),
    Name("zero.Init", "transformers, lightning", "construction in shards; auto values; enabled=False", f"{_INIT}::test_16_bits_from_a_config_with_auto_values", "zeropipe.runtime.zero.gather.init:Init"),
    Name("zero.GatheredParameters", "all", "one, many, generators, None, plain ones; modifier_rank", f"{_GATHER}::test_any_form_of_parameters", "zeropipe.runtime.zero.gather.whole:GatheredParameters"),
    Name("zero.register_external_parameter", "transformers", "a parameter of another module", f"{_GATHER}::test_external_parameters", "zeropipe.runtime.zero.marks:register_external_parameter"),
    Name("runtime.zero.partition_parameters.zero_wrapper_for_fp_tensor_constructor", "transformers", "exchanged, and looked up at each entry", f"{_INIT}::test_the_constructor_wrapper_is_looked_up_at_entry", "zeropipe.runtime.zero.partition_parameters:zero_wrapper_for_fp_tensor_constructor"),
    Name("runtime.zero.partition_parameters._orig_torch_arange", "transformers", "compared with the constructor that is wrapped", f"{_INIT}::test_the_constructor_wrapper_is_looked_up_at_entry", "zeropipe.runtime.zero.partition_parameters:_orig_torch_arange"),
    Name("runtime.zero.partition_parameters.get_accelerator", "transformers", "device_name(index)", f"{_MEANING}::test_the_accelerator_names_a_device_that_torch_takes", "zeropipe.accelerator:get_accelerator"),
    Name("runtime.zero.partition_parameters.ZeroParamStatus", "trl", "AVAILABLE, compared with ds_status", f"{_GATHER}::test_a_parameter_that_is_away", "zeropipe.runtime.zero.param:ZeroParamStatus"),
    Name("utils.set_z3_leaf_modules", "accelerate", "classes that are gathered whole", "tests/dist/test_zero3_features.py::test_a_leaf_module_is_one_unit", "zeropipe.runtime.zero.marks:set_z3_leaf_modules"),
    Name("utils.safe_get_full_grad", "peft", "the reduced gradient, or None", "tests/dist/test_access.py::test_whole_values_are_the_same_at_every_stage_and_rank", "zeropipe.runtime.zero.hold.access:safe_get_full_grad"),
    Name("runtime.base_optimizer.DeepSpeedOptimizer", "lightning", "isinstance, or optimizer states are not loaded", f"{_CLIENTS}::test_optimizer_step_alone_is_a_whole_update_also_through_fabrics_wrapper", "zeropipe.runtime.base_optimizer:DeepSpeedOptimizer"),
    Name("ops.adam.DeepSpeedCPUAdam", "accelerate", "built on another optimizer's groups, which stay the same dicts", f"{_REGISTRY}::test_groups_are_used_in_place", "zeropipe.runtime.optimizers.fused:DeepSpeedCPUAdam"),
    Name("ops.adagrad.DeepSpeedCPUAdagrad", "accelerate", "the same", f"{_REGISTRY}::test_groups_are_used_in_place", "zeropipe.runtime.optimizers.fused:DeepSpeedCPUAdagrad"),
    Name("ops.lion.DeepSpeedCPULion", "accelerate", "the same", f"{_REGISTRY}::test_groups_are_used_in_place", "zeropipe.runtime.optimizers.fused:DeepSpeedCPULion"),
    Name("runtime.lr_schedules.VALID_LR_SCHEDULES", "accelerate", "a list of class names", "tests/unit/test_lr_schedules.py::test_the_names", "zeropipe.runtime.lr_schedules.config:VALID_LR_SCHEDULES"),
    Name("runtime.lr_schedules.WarmupLR", "transformers", "an AssertionError 'need to call step' before the first step", "tests/unit/test_lr_schedules.py::test_no_last_lr_before_the_first_step", "zeropipe.runtime.lr_schedules.kinds:WarmupLR"),
    Name("checkpoint.utils.clone_tensors_for_torch_save", "accelerate at every save", "a nested copy on the CPU", "tests/unit/compat/test_meaning.py::test_a_clone_for_saving_owns_its_elements_and_keeps_its_containers", "zeropipe.checkpoint.utils:clone_tensors_for_torch_save"),
    Name("utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint", "lightning", "the whole model in fp32", f"{_TOOLS}::test_the_fp32_state_dict_is_the_whole_model", "zeropipe.utils.zero_to_fp32:get_fp32_state_dict_from_zero_checkpoint"),
    Name("utils.zero_to_fp32.get_model_state_file", "lightning", "the first model file", f"{_TOOLS}::test_file_helpers_that_clients_call", "zeropipe.utils.zero_to_fp32:get_model_state_file"),
    Name("utils.zero_to_fp32.get_optim_files", "lightning", "files whose optimizer_state_dict names the stage", f"{_TOOLS}::test_file_helpers_that_clients_call", "zeropipe.utils.zero_to_fp32:get_optim_files"),
    Name("checkpointing.configure", "lightning, always", "takes what its default configuration has", f"{_MEANING}::test_activation_checkpointing_takes_lightnings_call", "zeropipe.checkpointing:configure"),
    Name("launcher.runner.DEEPSPEED_ENVIRONMENT_NAME", "accelerate launch", "the name of a file", "tests/unit/compat/test_runner.py::test_the_environment_file_is_read", "zeropipe.compat.runner:DEEPSPEED_ENVIRONMENT_NAME"),
    Name("runtime.utils.move_to_device", "accelerate's test script", "a nested move", f"{_MEANING}::test_move_to_device_goes_through_containers", "zeropipe.runtime.utils:move_to_device"),
    Name("runtime.fp16.loss_scaler.LossScaler", "files that DeepSpeed wrote", "unpickles", f"{_MEANING}::test_what_deepspeeds_files_name_can_be_loaded", "zeropipe.runtime.fp16.loss_scaler:LossScaler"),
    Name("runtime.zero.config.ZeroStageEnum", "files that DeepSpeed wrote", "unpickles, an int", f"{_MEANING}::test_what_deepspeeds_files_name_can_be_loaded", "zeropipe.runtime.zero.config:ZeroStageEnum"),
    Name("utils.tensor_fragment.fragment_address", "files that DeepSpeed wrote", "unpickles", f"{_MEANING}::test_what_deepspeeds_files_name_can_be_loaded", "zeropipe.checkpoint.save.files:FragmentAddress"),
    Name("runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF", "accelerate, with sequence parallelism", "attention on whole sequences", "tests/clients/test_sequences.py::test_the_trainer", "zeropipe.runtime.sequence_parallel.hugging_face:UlyssesSPAttentionHF"),
    Name("runtime.sequence_parallel.ulysses_sp.UlyssesSPDataLoaderAdapter", "accelerate, transformers, with sequence parallelism", "each rank's tokens", "tests/dist/test_sequence_parallel.py::test_ranks_take_turns_in_each_others_batches", "zeropipe.runtime.sequence_parallel.data:UlyssesSPDataLoaderAdapter"),
    Name("utils.groups._get_sequence_parallel_rank", "accelerate, with sequence parallelism", "0 where there is none", f"{_MEANING}::test_groups_without_model_parallelism", "zeropipe.runtime.sequence_parallel.place:get_sequence_parallel_rank"),
    Name("utils.groups._get_sequence_parallel_group", "accelerate, with sequence parallelism", "an error where there is none", f"{_MEANING}::test_groups_without_model_parallelism", "zeropipe.runtime.sequence_parallel.place:get_sequence_parallel_group"),
    Name("utils.groups._get_sequence_parallel_world_size", "accelerate, with sequence parallelism", "1 where there is none", f"{_MEANING}::test_groups_without_model_parallelism", "zeropipe.runtime.sequence_parallel.place:get_sequence_parallel_world_size"),
)  # fmt: skip

# Asked of engines, optimizers and parameters.
MEMBERS = (
    Name("engine(...), .module, .parameters, .train, .eval, other names", "all", "the module's", f"{_CLIENTS}::test_the_engine_is_a_module_that_delegates"),
    Name("engine.config", "transformers", "the raw dict", f"{_CLIENTS}::test_the_engine_is_a_module_that_delegates"),
    Name("engine.device, .global_steps", "accelerate", "facts", f"{_CLIENTS}::test_the_engine_is_a_module_that_delegates"),
    Name("engine.lr_scheduler", "lightning", "may be set to None", f"{_CLIENTS}::test_the_clients_param_groups_and_schedule_stay_the_same_objects"),
    Name("engine.backward(scale_wrt_gas=), .step, .set_gradient_accumulation_boundary(is_boundary=)", "accelerate", "the client counts", f"{_CLIENTS}::test_the_client_sets_the_boundary"),
    Name("engine.get_global_grad_norm", "accelerate", "after the step", f"{_LIFE}::test_the_norm_and_clipping_are_torchs"),
    Name("engine.no_sync", "accelerate", "accumulates locally", f"{_LIFE}::test_no_sync_gives_the_same_bits_at_every_stage"),
    Name("engine.zero_grad", "transformers", "without arguments", f"{_CLIENTS}::test_the_client_sets_the_boundary"),
    Name("engine.save_checkpoint, .load_checkpoint", "all", "folders, client_state, None where there is nothing", f"{_SAVED}::test_nothing_there_is_none_none_and_one_line_on_rank_0"),
    Name("engine.save_checkpoint(exclude_frozen_parameters=)", "transformers", "found by inspect.signature", f"{_SAVED}::test_frozen_parameters_can_be_left_out"),
    Name("engine.zero_gather_16bit_weights_on_model_save, ._zero3_consolidated_16bit_state_dict", "accelerate, transformers", "on rank 0 alone", f"{_REPORTS}::test_save_16bit_model_at_stage_3_gathers_if_it_may"),
    Name("engine.destroy", "accelerate", "again, and initialize again", f"{_LIFE}::test_twenty_engines_on_one_module_do_not_grow"),
    Name("engine.compile", "accelerate", "in place", f"{_LIFE}::test_a_compiled_module_trains_alike"),
    Name("optimizer.param_groups, .optimizer, .overflow, .defaults, .state_dict", "accelerate, lightning", "the client's own dicts", f"{_CLIENTS}::test_the_engine_is_a_module_that_delegates"),
    Name("type(optimizer) as a base class, optimizer.step alone", "lightning", "a whole update", f"{_CLIENTS}::test_optimizer_step_alone_is_a_whole_update_also_through_fabrics_wrapper"),
    Name("optimizer.parameter_offload, module.ds_external_parameters, param.ds_active_sub_modules", "trl", "hooks off while it generates", "tests/dist/test_zero3_clients.py::test_generation_without_hooks_leaves_training_as_it_was"),
    Name("param.ds_numel, .ds_shape, .ds_status, .partition_numel, shape [0] while away", "peft, trl, transformers, lightning", "facts", f"{_GATHER}::test_a_parameter_that_is_away"),
)  # fmt: skip

# Asked for too, by features that zeropipe does not have: stand-ins, which say so when they are used. And one name that
# clients ask for only where deepspeed is not installed.
OTHERS = (
    "tp_model_init",
    "utils.is_initialized",
)
