"""Objectives: which teacher signal they need and how they turn it into a per-token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megatron_bpdg.drift.signals import Signals
from megatron_bpdg.objectives.divergence import divergence
from megatron_bpdg.objectives.local_support import local_support_loss
from megatron_bpdg.objectives.sampled_token import sampled_token_loss
from megatron_bpdg.objectives.vocabulary import VocabOps


@dataclass(frozen=True)
class TeacherNeeds:
    """How much of the teacher an objective reads; the sampled token's log-prob comes with everything else.

    Attributes:
        sampled: anything at all.
        top_k: ids of the teacher's support.
        full: the whole distribution.
        normalised: whether a constant added to all of a position's log-probs would change the loss.
    """

    sampled: bool = True
    top_k: int = 0
    full: bool = False
    normalised: bool = True


class Objective(Protocol):
    """A per-token loss."""

    @property
    def needs(self) -> TeacherNeeds: ...

    @property
    def differentiates_logprob(self) -> bool:
        """Whether the gradient flows through `Signals.logprobs_n`; `student` is differentiable in any case."""

    def __call__(self, student: VocabOps, signals: Signals) -> Tensor:
        """Per-token loss ``[n]``.

        Args:
            student: bound to the student's logits of N positions.
            signals: of the same positions, with the sampled ids and what `needs` asked of the teacher.
        """


@dataclass(frozen=True)
class SampledTokenObjective:
    """`sampled_token_loss` with its knobs."""

    advantage: Literal["behaviour", "online"] = "behaviour"
    advantage_clamp: float | None = None
    clip: float = 0.2
    dual_clip: float | None = 3.0
    needs: TeacherNeeds = TeacherNeeds()
    differentiates_logprob: bool = True

    def __call__(self, student: VocabOps, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        return sampled_token_loss(
            signals.logprobs_n,
            signals.old_logprobs_n,
            signals.teacher.logprobs_n,
            advantage=self.advantage,
            advantage_clamp=self.advantage_clamp,
            clip=self.clip,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class LocalSupportObjective:
    """`local_support_loss` on the teacher's top K."""

    top_k: int = 32
    divergence: str = "reverse_kl"
    jsd_beta: float = 0.5
    outside: Literal["renormalise", "tail_bucket"] = "renormalise"
    append_sampled: bool = False
    differentiates_logprob: bool = False

    @property
    def needs(self) -> TeacherNeeds:
        return TeacherNeeds(top_k=self.top_k, normalised=self.outside != "renormalise")

    def __call__(self, student: VocabOps, signals: Signals) -> Tensor:
        teacher = signals.teacher
        assert teacher is not None
        assert teacher.support_NK is not None
        assert teacher.support_logprobs_nK is not None
        extra = None
        if self.append_sampled:
            assert signals.sampled_N is not None
            extra = signals.sampled_N, teacher.logprobs_n
        return local_support_loss(
            student,
            teacher.support_NK,
            teacher.support_logprobs_nK,
            divergence(self.divergence, self.jsd_beta),
            outside=self.outside,
            extra=extra,
        )


@dataclass(frozen=True)
class FullVocabularyObjective:
    """A divergence over the whole vocabulary."""

    divergence: str
    jsd_beta: float = 0.5
    needs: TeacherNeeds = TeacherNeeds(full=True)
    differentiates_logprob: bool = False

    def __call__(self, student: VocabOps, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        assert signals.teacher.full_logprobs_NV is not None
        measure = divergence(self.divergence, self.jsd_beta)
        return measure(student.log_softmax(), signals.teacher.full_logprobs_NV, student.vocab_sum)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning on given responses; reads no teacher."""

    needs: TeacherNeeds = TeacherNeeds(sampled=False)
    differentiates_logprob: bool = True

    def __call__(self, student: VocabOps, signals: Signals) -> Tensor:
        return -signals.logprobs_n
