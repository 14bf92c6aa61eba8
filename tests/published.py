"""Sizes of the published Qwen3 models, from the config.json of each release."""

from __future__ import annotations

from megatron_bpdg.models.shape import Experts, ModelShape

SIZES = {
    "0.6B": ModelShape(28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "1.7B": ModelShape(28, 2048, 6144, 16, 8, tie_word_embeddings=True),
    "4B": ModelShape(36, 2560, 9728, 32, 8, tie_word_embeddings=True),
    "8B": ModelShape(36, 4096, 12_288, 32, 8, tie_word_embeddings=False),
    "14B": ModelShape(40, 5120, 17_408, 40, 8, tie_word_embeddings=False),
    "32B": ModelShape(64, 5120, 25_600, 64, 8, tie_word_embeddings=False),
    "30B-A3B": ModelShape(48, 2048, 6144, 32, 4, tie_word_embeddings=False, experts=Experts(128, 8, 768)),
    "235B-A22B": ModelShape(94, 4096, 12_288, 64, 4, tie_word_embeddings=False, experts=Experts(128, 8, 1536)),
}
