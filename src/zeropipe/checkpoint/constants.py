"""The keys and file names of DeepSpeed's checkpoint formats, under the names that its users import.

They are the vocabulary of the files; nothing here is logic.
"""

from __future__ import annotations

from typing import Final

# Inside an optimizer file.
OPTIMIZER_STATE_DICT: Final = "optimizer_state_dict"
FP32_GROUPS: Final = "fp32_groups"
FP32_FLAT_GROUPS: Final = "fp32_flat_groups"
BASE_OPTIMIZER_STATE: Final = "base_optimizer_state"
BASE_OPTIMIZER_STATE_STEP: Final = "base_optimizer_state_step"
SINGLE_PARTITION_OF_FP32_GROUPS: Final = "single_partition_of_fp32_groups"
PARAM_GROUPS: Final = "param_groups"
GROUP_PADDINGS: Final = "group_paddings"
PARAM_ALIGNMENT_PADDINGS: Final = "param_alignment_paddings"
PARTITION_COUNT: Final = "partition_count"
ZERO_STAGE: Final = "zero_stage"
CLIP_GRAD: Final = "clip_grad"
FP32_WEIGHT_KEY: Final = "fp32"
LOSS_SCALER: Final = "loss_scaler"

# Inside a model file.
PARAM: Final = "param"
PARAM_SHAPES: Final = "param_shapes"
BUFFER_NAMES: Final = "buffer_names"
FROZEN_PARAM_SHAPES: Final = "frozen_param_shapes"
FROZEN_PARAM_FRAGMENTS: Final = "frozen_param_fragments"

# File names.
MODEL_FILE_PREFIX: Final = "mp_rank_"
ZERO_FILE_PREFIX: Final = "zero_pp_rank_"
OPTIM_FILE_SUFFIX: Final = "_optim_states.pt"
MODEL_FILE_SUFFIX: Final = "_model_states.pt"
LAYER_FILE_PREFIX: Final = "layer_"
BF16_ZERO_FILE_PREFIX: Final = "bf16_zero_pp_rank_"
FP16_ZERO_FILE_PREFIX: Final = "fp16_zero_pp_rank_"

# Degrees and versions.
CHECKPOINT_PARALLEL_DIMS: Final = "checkpoint_parallel_dimensions"
CHECKPOINT_PP_DEGREE: Final = "pp_degree"
CHECKPOINT_TP_DEGREE: Final = "tp_degree"
DS_VERSION: Final = "ds_version"

# The universal format and the patterns of ``universal_checkpoint_info``.
UNIVERSAL_CHECKPOINT_INFO: Final = "universal_checkpoint_info"
UNIVERSAL_CHECKPOINT_VERSION_KEY: Final = "universal_checkpoint_version"
UNIVERSAL_CHECKPOINT_VERSION_VALUE: Final = 0.4
AFFINE_MAP: Final = "affine_map"
AFFINE_MAP_VERSION: Final = "version"
AFFINE_MAP_PARAMS: Final = "params"
VOCAB_TENSOR: Final = "vocab_tensor"
PADDED_VOCAB_SIZE: Final = "padded_vocab_size"
ORIGINAL_VOCAB_SIZE: Final = "original_vocab_size"
PARAM_SLICE_MAPPINGS: Final = "param_slice_mappings"
CAT_DIM: Final = "cat_dim"
PARAM_N_SUB_PARAMS: Final = "param_n_sub_params"
SUB_PARAM_SHAPE: Final = "sub_param_shape"
VOCABULARY_PARAMETER_PATTERNS: Final = "vocabulary_parameter_patterns"
PIPELINE_REPLICATED_PARAMETER_PATTERNS: Final = "pipeline_replicated_parameter_patterns"
PARAMETER_TO_AVERAGE_PATTERNS: Final = "parameter_to_average_patterns"
PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: Final = "parameter_with_row_parallelism_patterns"
TP_REPLICATED_PARAMETER_PATTERNS: Final = "tp_replicated_parameter_patterns"
PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: Final = "parameter_with_2_sub_params_cat_dim_0"
PARAMETER_WITH_SUB_PARAMS: Final = "parameter_with_sub_params"
SUB_PARAM_SHARD_WIDTHS: Final = "sub_param_shard_widths"
SUB_PARAMS_SHAPE: Final = "sub_params_shape"

# Written by DeepSpeed for automatic tensor and expert parallelism; kept so that such files are recognised.
DS_AUTOTP_UC_META: Final = "ds_autotp_universal_checkpoint_meta"
AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS: Final = "autotp_unsupported_parameter_patterns"
AUTOEP_LAYERS_KEY: Final = "ds_autoep_layers"
AUTOEP_LAYERS_KEY_LEGACY: Final = "autoep_layers"
AUTOEP_EXPERT_KEY_PREFIX: Final = "expert_key_prefix"
AUTOEP_NUM_EXPERTS: Final = "num_experts"
AUTOEP_NUM_LOCAL_EXPERTS: Final = "num_local_experts"
AUTOEP_EP_SIZE: Final = "ep_size"
AUTOEP_EXPERT_PLACEMENT: Final = "expert_placement"
AUTOEP_AFFINE_MAPS: Final = "affine_maps"
DS_AUTOEP_UC_META: Final = "ds_autoep_uc_meta"
AUTOEP_PARAM_LOGICAL_SHAPE: Final = "logical_shape"
AUTOEP_PARAM_EP_RANK: Final = "ep_rank"
AUTOEP_PARAM_LOCAL_EXPERTS: Final = "local_experts"
AUTOEP_ZERO12_REQUIRED_FIELDS: Final = ("expert_key_prefix", "num_experts", "num_local_experts", "ep_size")
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY: Final = "checkpoint_format"
AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT: Final = "zero3_partitioned"
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY: Final = "checkpoint_format_version"
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION: Final = 1
AUTOEP_PLACEMENT_VERSION_KEY: Final = "version"
AUTOEP_PLACEMENT_VERSION: Final = 1
AUTOEP_PLACEMENT_NUM_EXPERTS: Final = "num_experts"
AUTOEP_PLACEMENT_EP_SIZE: Final = "ep_size"
AUTOEP_PLACEMENT_RANKS: Final = "ranks"
AUTOEP_PLACEMENT_RANK: Final = "rank"
AUTOEP_PLACEMENT_EXPERTS: Final = "experts"
EP_IS_EXPERT_PARAM: Final = "is_expert_param"
EP_NUM_EXPERTS: Final = "ep_num_experts"
EXPERT_PARAMETER_PATTERNS: Final = "expert_parameter_patterns"
FOLDING_METADATA_KEY: Final = "folding"
FOLDING_METADATA_VERSION: Final = 1
FOLDING_TP_SIZE: Final = "tp_size"
FOLDING_TP_RANK: Final = "tp_rank"
FOLDING_EP_SIZE: Final = "ep_size"
FOLDING_EP_RANK: Final = "ep_rank"
FOLDING_ETP_SIZE: Final = "etp_size"
FOLDING_ETP_RANK: Final = "etp_rank"
FOLDING_ZERO_PARTITION_GROUP: Final = "zero_partition_group"
FOLDING_ZERO_PARTITION_RANK: Final = "zero_partition_rank"
FOLDING_ZERO_PARTITION_COUNT: Final = "zero_partition_count"
FOLDING_DISPATCH_STRATEGY: Final = "dispatch_strategy"
FOLDING_SHARED_EXPERT_PLACEMENT: Final = "shared_expert_placement"
FOLDING_FAMILY: Final = "family"
FOLDING_PARAM_FAMILIES: Final = "param_families"
