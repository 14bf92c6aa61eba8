"""Objectives by name: which teacher signal they need and how they turn it into a per-token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_bpdg.config.schema import FullVocabulary, ObjectiveConfig, SampledToken, SupervisedObjective, TeacherTopK
from megatron_bpdg.objectives.divergence import divergence
from megatron_bpdg.objectives.local_support import local_support_loss
from megatron_bpdg.objectives.sampled_token import sampled_token_loss
from megatron_bpdg.objectives.vocabulary import VocabOps


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher says about N sampled positions.

    Attributes:
        logprobs_n: log q of the sampled tokens, this rank's rows, float ``[n]``.
        support_NK: the teacher's top-K ids, int64 ``[N, K]``, replicated; None unless asked for.
        support_logprobs_nK: their log-probs, this rank's rows, float ``[n, K]``.
        full: the teacher's whole distribution in the student's layout, detached; None unless asked for.
    """

    logprobs_n: Tensor
    support_NK: Tensor | None = None
    support_logprobs_nK: Tensor | None = None
    full: VocabOps | None = None


@dataclass(frozen=True)
class TeacherNeeds:
    """How much of the teacher an objective reads; the sampled token's log-prob comes with everything else."""

    sampled: bool = True
    top_k: int = 0
    full: bool = False


class Objective(Protocol):
    """A per-token loss."""

    @property
    def needs(self) -> TeacherNeeds: ...

    @property
    def differentiates_logprob(self) -> bool:
        """Whether the gradient flows through `logprobs_n`."""
        ...

    def __call__(
        self,
        student: VocabOps,
        sampled_N: Tensor,
        logprobs_n: Tensor,
        old_logprobs_n: Tensor,
        teacher: TeacherSignal,
    ) -> Tensor:
        """Per-token loss ``[n]``.

        Args:
            student: bound to the student's logits of N positions.
            sampled_N: the sampled ids, replicated.
            logprobs_n: the student's log-probs of them, differentiable iff `differentiates_logprob`.
            old_logprobs_n: the behaviour policy's.
            teacher: what `needs` asked for.
        """
        ...


@dataclass(frozen=True)
class SampledTokenObjective:
    config: SampledToken
    needs: TeacherNeeds = TeacherNeeds()
    differentiates_logprob: bool = True

    def __call__(
        self,
        student: VocabOps,
        sampled_N: Tensor,
        logprobs_n: Tensor,
        old_logprobs_n: Tensor,
        teacher: TeacherSignal,
    ) -> Tensor:
        return sampled_token_loss(
            logprobs_n,
            old_logprobs_n,
            teacher.logprobs_n,
            advantage=self.config.advantage,
            advantage_clamp=self.config.advantage_clamp,
            clip=self.config.clip,
            dual_clip=self.config.dual_clip,
        )


@dataclass(frozen=True)
class LocalSupportObjective:
    config: TeacherTopK
    needs: TeacherNeeds
    differentiates_logprob: bool = False

    def __call__(
        self,
        student: VocabOps,
        sampled_N: Tensor,
        logprobs_n: Tensor,
        old_logprobs_n: Tensor,
        teacher: TeacherSignal,
    ) -> Tensor:
        assert teacher.support_NK is not None
        assert teacher.support_logprobs_nK is not None
        return local_support_loss(
            student,
            teacher.support_NK,
            teacher.support_logprobs_nK,
            divergence(self.config.divergence, self.config.jsd_beta),
            outside=self.config.outside,
            extra=(sampled_N, teacher.logprobs_n) if self.config.append_sampled else None,
        )


@dataclass(frozen=True)
class FullVocabularyObjective:
    config: FullVocabulary
    needs: TeacherNeeds = TeacherNeeds(full=True)
    differentiates_logprob: bool = False

    def __call__(
        self,
        student: VocabOps,
        sampled_N: Tensor,
        logprobs_n: Tensor,
        old_logprobs_n: Tensor,
        teacher: TeacherSignal,
    ) -> Tensor:
        assert teacher.full is not None
        measure = divergence(self.config.name, self.config.jsd_beta)
        return measure(student.log_softmax(), teacher.full.log_softmax().detach(), student.vocab_sum)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning on given responses; reads no teacher."""

    needs: TeacherNeeds = TeacherNeeds(sampled=False)
    differentiates_logprob: bool = True

    def __call__(
        self,
        student: VocabOps,
        sampled_N: Tensor,
        logprobs_n: Tensor,
        old_logprobs_n: Tensor,
        teacher: TeacherSignal,
    ) -> Tensor:
        return -logprobs_n


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config section names."""
    match config:
        case SampledToken():
            return SampledTokenObjective(config)
        case TeacherTopK():
            return LocalSupportObjective(config, needs=TeacherNeeds(top_k=config.top_k))
        case FullVocabulary():
            return FullVocabularyObjective(config)
        case SupervisedObjective():
            return NegativeLogLikelihood()
