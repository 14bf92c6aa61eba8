"""The fields of HF's config.json that `hf_config` knows: mapped, fixed, of no effect; and what each may hold."""

from __future__ import annotations

from typing import Any

REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
)
REQUIRED_MOE = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
MAPPED = {
    *REQUIRED,
    "model_type",
    "head_dim",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "dtype",
    "torch_dtype",
}
MAPPED_MOE = {*REQUIRED_MOE, "num_local_experts", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
# The only values for which HF's model is the one that Megatron-Core builds.
FIXED: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "Megatron-Core ties a bias of the output projection to biases everywhere"),
    "mlp_bias": (False, "Megatron-Core ties a bias of the MLP to biases everywhere"),
    "hidden_act": ("silu", "the gated MLP is built with silu"),
    "attention_dropout": (0.0, "models are built without dropout"),
    "pretraining_tp": (1, "slicing the matrices changes the arithmetic"),
    "partial_rotary_factor": (1.0, "rotary embeddings cover the whole head"),
    "chunk_size_feed_forward": (0, "the MLP is not chunked"),
    "is_encoder_decoder": (False, "only decoders are converted"),
    "add_cross_attention": (False, "only decoders are converted"),
    "cross_attention_hidden_size": (None, "only decoders are converted"),
    "is_causal": (True, "attention looks back only"),
    "pruned_heads": ({}, "all heads are built"),
    "tie_encoder_decoder": (False, "only decoders are converted"),
    "use_sliding_window": (False, "sliding-window attention is not supported"),
    "quantization_config": (None, "quantised checkpoints are not supported; use the bf16 or fp32 release"),
}
# Neither weights nor forward pass depend on these: bookkeeping, what transformers 4 kept for generation, and what only
# models of other kinds read.
WITHOUT_EFFECT = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "layer_types",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token_id",
    "sliding_window",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}
# What a field may hold, where it is not null.
COUNTS = {
    *(
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "moe_intermediate_size"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"),
}
NUMBERS = {
    *("rms_norm_eps", "rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    *("low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
}
SWITCHES = {"tie_word_embeddings", "norm_topk_prob", "truncate"}
# Two names for the same thing, of which a file may give both.
SYNONYMS = (("dtype", "torch_dtype"), ("num_experts", "num_local_experts"))
ROPE_SECTIONS = ("rope_parameters", "rope_scaling")
