"""The embedded rollout engine: HF transformers' generate in this process, for small models and for trying things out.

Each rank keeps a full copy of the student and samples its share of the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.together import gather_shares, my_share
from megatron_bpdg.rollout.engine import Finished, Probe, Request, Response, RolloutStream
from megatron_bpdg.rollout.sampling import draw, uniforms


class EmbeddedEngine:
    """`RolloutEngine` on HF generate.

    Args:
        hf_config: directory with the student's config.json.
        end_ids: tokens that end a response, at least one.
        batch_size: sequences decoded at once.
        dtype: of the sampler's weights.
    """

    def __init__(self, hf_config: Path, *, end_ids: Sequence[int], batch_size: int, dtype: torch.dtype) -> None:
        config = AutoConfig.from_pretrained(hf_config, local_files_only=True)
        with torch.device(default_device()):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        # What a config.json says of sampling (a repetition penalty, say) would come before our own choice of tokens.
        self.model.generation_config = GenerationConfig()
        self.end_ids, self.batch_size = list(end_ids), batch_size
        self.version = -1
        self.retries = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, probe: Probe | None = None) -> None:
        """Copy streamed weights in. `probe` is for engines that are sent their weights over a wire.

        Raises:
            ValueError: listing every parameter that is missing or unknown.
        """
        # state_dict, unlike named_parameters, also has the name of a head that is tied to the embeddings.
        mine = self.model.state_dict()
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        missing, unknown = set(mine) - tied, []
        for name, tensor in weights:
            missing.discard(name)
            if name in mine:
                mine[name].copy_(tensor)
            else:
                unknown.append(name)
        if missing or unknown:
            raise ValueError(f"weight update: missing {sorted(missing)}, unknown {unknown}")
        self.version = version

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> RolloutStream:
        if self.version < 0:
            raise RuntimeError("EmbeddedEngine.stream before load_weights: the sampler has no weights yet")
        if any(request.started is not None for request in requests):
            raise ValueError("the embedded engine never cuts responses off and cannot go on with one")
        return _Batches(self, requests, sampling)

    def close(self) -> None:
        pass

    @torch.no_grad()
    def decode(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Responses of one batch on this rank."""
        if not requests:
            return []
        device = self.model.device
        width = max(len(request.prompt_ids) for request in requests)
        input_ids_BS = torch.full((len(requests), width), self.end_ids[0], dtype=torch.int64)
        mask_BS = torch.zeros_like(input_ids_BS)
        for row, request in enumerate(requests):
            input_ids_BS[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_BS[row, width - len(request.prompt_ids) :] = 1
        sampler = _Sampler([request.seed for request in requests], sampling, device)
        ids_BT = self.model.generate(
            input_ids_BS.to(device),
            attention_mask=mask_BS.to(device),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            logits_processor=LogitsProcessorList([sampler]),
        )[:, width:].cpu()
        logprobs_BT = torch.stack(sampler.logprobs, dim=1).cpu()
        return [self._cut(ids_T.tolist(), logprobs_T) for ids_T, logprobs_T in zip(ids_BT, logprobs_BT)]

    def _cut(self, ids: list[int], logprobs_T: Tensor) -> Response:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        length = len(ids) if end is None else end + 1
        version_R = torch.full((length,), self.version, dtype=torch.int32)
        return Response(ids[:length], logprobs_T[:length].clone(), end is not None, version_R)


@dataclass
class _Batches:
    """`RolloutStream`: the ranks decode a batch each, then tell each other."""

    engine: EmbeddedEngine
    requests: Sequence[Request]
    sampling: Sampling

    def __iter__(self) -> Iterator[Finished]:
        # Sorting by length keeps left padding short.
        order = sorted(range(len(self.requests)), key=lambda i: len(self.requests[i].prompt_ids))
        ranks, per_rank = dist.get_world_size(), self.engine.batch_size
        for start in range(0, len(order), per_rank * ranks):
            together = order[start : start + per_rank * ranks]
            mine = [together[i] for i in my_share(len(together))]
            decoded = self.engine.decode([self.requests[i] for i in mine], self.sampling)
            yield list(zip(together, gather_shares(dict(zip(my_share(len(together)), decoded)), len(together))))

    def interrupt(self) -> Finished:
        return []


class _Sampler(LogitsProcessor):
    """Draws each token itself and leaves generate's greedy choice only that token."""

    def __init__(self, seeds: list[int], sampling: Sampling, device: torch.device) -> None:
        self.uniform_BT = uniforms(seeds, sampling.max_new_tokens).to(device)
        self.sampling = sampling
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = len(self.logprobs)
        ids_B, logprobs_B = draw(scores, self.uniform_BT[:, step], self.sampling.temperature, self.sampling.top_p)
        self.logprobs.append(logprobs_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids_B[:, None], 0.0)
