"""One sampled response with everything that is later said about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trajectory:
    """A response to one prompt, on the host. R = response tokens, K = support size.

    The sampler fills the first group; the teacher and the trainer fill the second, on the ranks that need it (all of
    its replica's last pipeline stage).

    Attributes:
        problem: index of the prompt.
        sample: which of the prompt's samples.
        prompt_ids: prompt tokens.
        response_ids: response tokens; the end-of-sequence token is part of the response when it was sampled.
        sampler_logprobs_R: the sampler's log-probs under the full distribution at the sampling temperature, float32.
        finished: whether the response ended by itself; False when it hit the length limit.
        version_R: trainer step whose weights sampled each token, int32; None for given responses.
        index: place in the step's batch; it decides which replica trains on the response.
        correct: the grader's verdict.
        mask_R: response tokens that the loss counts, bool; None: all of them. Others (a tool's output, say) keep their
            place in their block and are left out of its mean.
        block_R: block number of each response token, int64.
        old_logprobs_R: log pi_old, float32.
        weights_R, mass_R: what the prepared factors say of each token (`controllers.factor`), float32 and float64.
        teacher_logprobs_R: log q of the sampled tokens, float32.
        teacher_support_RK: the teacher's top-K ids, int32.
        teacher_support_logprobs_RK: their log-probs, float32.
        teacher_full_RV: the teacher's log-probs over this rank's part of the vocabulary, float32.
    """

    problem: int
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logprobs_R: Tensor
    finished: bool
    version_R: Tensor | None = None
    index: int = 0
    correct: bool | None = None
    mask_R: Tensor | None = None

    block_R: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    old_logprobs_R: Tensor | None = None
    weights_R: Tensor | None = None
    mass_R: Tensor | None = None
    teacher_logprobs_R: Tensor | None = None
    teacher_support_RK: Tensor | None = None
    teacher_support_logprobs_RK: Tensor | None = None
    teacher_full_RV: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """`mask_R`, all True where there is none."""
        return torch.ones(len(self.response_ids), dtype=torch.bool) if self.mask_R is None else self.mask_R

    @property
    def name(self) -> str:
        return f"problem {self.problem}, sample {self.sample}"

    def check(self, vocab_size: int) -> None:
        """Raise ValueError for what would corrupt a batch: ids out of range, lengths that differ, broken log-probs."""
        for values_R, words in (
            (self.sampler_logprobs_R, "{} log-probs"),
            (self.mask_R, "a mask of {}"),
            (self.version_R, "{} weight versions"),
        ):
            if values_R is not None and len(values_R) != len(self.response_ids):
                counted = words.format(len(values_R))
                raise ValueError(f"{self.name}: {len(self.response_ids)} response tokens but {counted}")
        if bad := [token for token in self.prompt_ids + self.response_ids if not 0 <= token < vocab_size]:
            raise ValueError(f"{self.name}: token id {bad[0]} is outside the vocabulary of {vocab_size}")
        broken = ~self.sampler_logprobs_R.isfinite()
        if bool(broken.any()):
            position = int(broken.nonzero()[0])
            raise ValueError(
                f"{self.name}: the sampler's log-prob of response token {position} is "
                f"{float(self.sampler_logprobs_R[position])}; a sampled token must have a finite "
                "log-prob: check the rollout engine's weights and dtype"
            )
