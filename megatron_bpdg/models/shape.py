"""Sizes of a model in HF's terms, and which layouts divide them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.models.families import FAMILIES, moe_layers
from megatron_bpdg.models.rope import RopeScaling, rope_scaling


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        num_experts: per layer.
        num_experts_per_tok: chosen for each token, by the softmax of the router's logits.
        moe_intermediate_size: width of one expert.
        norm_topk_prob: whether the weights of the chosen ones sum to 1.
        dense_layers: 0-based layers that have an MLP all the same.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} exceeds num_experts = {self.num_experts}"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok = 1 with norm_topk_prob is not supported: the weight of the one expert would "
                "always be 1, and the router without a gradient"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Experts | None:
        """Of a normalised config; None where no layer has experts."""
        layers = moe_layers(config)
        if not any(layers):
            return None
        missing = [name for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size") if not config[name]]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        return cls(
            config["num_experts"],
            config["num_experts_per_tok"],
            config["moe_intermediate_size"],
            config["norm_topk_prob"],
            tuple(i for i, has_experts in enumerate(layers) if not has_experts),
        )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model of Qwen3's build, in HF's terms: Qwen3 and Qwen3-MoE, and Qwen2 and Llama by the two flags.

    `head_dim` is a field of its own: hidden_size / num_attention_heads is wrong for 0.6B, 4B and 32B.

    Attributes:
        rope_scaling: of the rotary embedding; None: as trained.
        experts: None for a dense model.
        qk_norm: RMSNorm on each query and key head.
        qkv_bias: biases on q, k and v.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    head_dim: int = 128
    vocab_size: int = 151_936
    max_position_embeddings: int = 40_960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    experts: Experts | None = None
    qk_norm: bool = True
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embeddings turn pairs of dimensions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must divide num_attention_heads = "
                f"{self.num_attention_heads}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelShape:
        """Of a config as `read_hf_config` gives it.

        Raises:
            ValueError: naming the field that is missing, or whose value cannot be built.
        """
        derived = ("rope_scaling", "experts", "qk_norm", "qkv_bias")
        plain = [name for name in cls.__dataclass_fields__ if name not in derived]
        if missing := [n for n in plain if config.get(n) is None and n != "max_position_embeddings"]:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        family = FAMILIES[config["model_type"]]
        return cls(
            **{name: config[name] for name in plain if config.get(name) is not None},
            rope_scaling=rope_scaling(config.get("rope_scaling")),
            experts=Experts.from_hf(config),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
        )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of the tensor-parallel size.

    Qwen3's 151,936 rows need no padding at any power of two up to 128. Padded rows never enter a softmax.
    """
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Raise ValueError naming every size that the layout does not divide, and what else does not go together."""
    tp, pp = layout.tensor_parallel, layout.pipeline_parallel
    divisible = {
        "num_attention_heads": (shape.num_attention_heads, tp, "tensor_parallel"),
        "num_key_value_heads": (shape.num_key_value_heads, tp, "tensor_parallel"),
        "intermediate_size": (shape.intermediate_size, tp, "tensor_parallel"),
        "num_hidden_layers": (shape.num_hidden_layers, pp, "pipeline_parallel"),
    }
    if shape.experts is not None:
        if not shape.experts.dense_layers:
            del divisible["intermediate_size"]
        divisible |= {
            "num_experts": (shape.experts.num_experts, layout.expert_parallel, "expert_parallel"),
            "moe_intermediate_size": (
                shape.experts.moe_intermediate_size,
                layout.expert_tensor_parallel,
                "expert_tensor_parallel",
            ),
        }
    problems = [
        f"layout.{knob}: {size} does not divide {name} = {value}"
        for name, (value, size, knob) in divisible.items()
        if value % size
    ]
    if problems:
        raise ValueError("; ".join(problems) + "; choose a divisor")
    if shape.experts is not None and tp > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"layout.tensor_parallel: {tp} with experts needs layout.sequence_parallel: true (each tensor-parallel "
            "rank routes its own tokens)"
        )
