"""One gated update: the loss of a micro-batch, and the exact normalisation of a whole optimizer step.

    drift -> gate -> per-token loss -> weighted sum        per micro-batch, on this rank's tokens
    sum of losses / sum of gate masses                     over micro-batches, shards and replicas

The denominator is a float (the gate mass), applied to the summed gradients after all micro-batches: see `update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bpdg.data.batch import MicroBatch
from megatron_bpdg.drift.diagnostics import drift_by_block, drift_statistics, drift_sums, num_sums
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.objectives.objective import Objective, TeacherSignal
from megatron_bpdg.objectives.vocabulary import VocabOps
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.sequence import sum_over
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

# Rows of the drift heat map; later blocks are added to the last row.
MAX_BLOCKS = 256
_TOTALS = (
    "mass",
    "loss",
    "tokens",
    "entropy",
    "teacher_gap",
    "nonfinite_student",
    "nonfinite_old",
    "nonfinite_teacher",
    "nonfinite_loss",
)


class NonFiniteError(RuntimeError):
    """A log-prob or the loss is NaN or infinite; the weights are still those of the last good step."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw, the same on every rank.

    Attributes:
        statistics: named metrics.
        block_drift: token-weighted mean block drift by block number within the response.
        block_tokens: valid tokens behind each entry.
    """

    statistics: dict[str, float]
    block_drift: list[float]
    block_tokens: list[int]


class Updater:
    """Gated updates of a student.

    Args:
        policy: the model.
        module: the same model, wrapped for data parallelism.
        optimizer: of the same model.
        objective: per-token loss.
        gate: with tau = 0 for a run without one.
        temperature: the sampling temperature.
    """

    def __init__(
        self,
        policy: MegatronPolicy,
        module: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        objective: Objective,
        gate: Gate,
        temperature: float,
    ) -> None:
        self.policy = policy
        self.module = module
        self.optimizer = optimizer
        self.objective = objective
        self.gate = gate
        self.temperature = temperature
        groups = policy.groups
        # Sequence parallelism spreads the tokens too: each rank keeps, and counts, its own shard of them.
        self.scattered = policy.layout.sequence_parallel
        self.reduce = sum_over([groups.tensor, groups.context] if self.scattered else [groups.context])
        self.owns_blocks = groups.leads
        self.owns_tokens = groups.is_last_stage and (self.scattered or groups.tensor.rank() == 0)

    def update(self, batches: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step over this replica's micro-batches; other replicas may bring more or fewer.

        Raises:
            NonFiniteError: on all ranks alike, before the weights are touched.
        """
        report = self.accumulate(batches)
        report.statistics["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        report.statistics["train/grad_norm"] = float(grad_norm)
        return report

    def accumulate(self, batches: Sequence[MicroBatch]) -> StepReport:
        """Leave the exact gradient of the whole step's loss in the model's main gradients."""
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals = self._no_totals()

        def loss(hidden_SBH: Tensor, batch: MicroBatch) -> Tensor:
            loss_sum, sums = self.loss(hidden_SBH, batch)
            if self.owns_tokens:
                totals.add_(sums)
            return loss_sum

        self.policy.forward_backward(batches, loss)
        finalize_model_grads([self.module])
        # Megatron-Core's optimizers step on NaN gradients without a word when there is no loss scale.
        bad_gradients = torch.zeros_like(totals[:1])
        for parameter in self.module.parameters():
            bad_gradients += (~parameter.main_grad.isfinite()).sum()
        # Every token is counted on exactly one rank of the world, so one sum makes the step's totals exact.
        totals = torch.cat([totals, bad_gradients])
        dist.all_reduce(totals)
        named = dict(zip(_TOTALS, totals[: len(_TOTALS)].tolist()))
        _check_finite(named, bad_gradients=int(totals[-1]))
        self.module.scale_gradients(1.0 / named["mass"])
        drift = totals[len(_TOTALS) : -1].cpu()
        statistics = {
            "loss/opd": named["loss"] / named["mass"],
            "actor/entropy": named["entropy"] / named["tokens"],
            "teacher/gap_mean": named["teacher_gap"] / named["tokens"],
            "train/tokens": named["tokens"],
            **drift_statistics(drift),
        }
        return StepReport(statistics, *drift_by_block(drift))

    @staticmethod
    def _no_totals() -> Tensor:
        return torch.zeros(len(_TOTALS) + num_sums(MAX_BLOCKS), dtype=torch.float64, device=default_device())

    def loss(self, hidden_SBH: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(weighted loss sum over this rank's tokens, detached sums for `totals`)."""
        # Not where this rank alone has none of its tokens: the sums over blocks are collective.
        if batch.num_counted == 0:
            return hidden_SBH.sum() * 0.0, self._no_totals()
        student = self.policy.vocab_ops(hidden_SBH, batch, self.temperature, scattered=self.scattered)
        with torch.set_grad_enabled(self.objective.differentiates_logprob):
            logprobs_n = student.logprob(batch.sampled_N)
        mask_n = student.rows(batch.mask_N)
        teacher = self._teacher(student, batch)
        old_logprobs_n = student.rows(batch.old_logprobs_N) if batch.old_logprobs_N is not None else logprobs_n.detach()

        gated = self.gate(
            logprobs_n,
            old_logprobs_n,
            mask_n,
            student.rows(batch.block_N),
            batch.num_blocks,
            student.rows(batch.sequence_N),
            batch.num_sequences,
            self.reduce,
        )
        loss_n = self.objective(student, batch.sampled_N, logprobs_n, old_logprobs_n, teacher)
        loss_sum = (gated.weight_N * torch.where(mask_n, loss_n, 0.0)).sum()

        with torch.no_grad():
            entropy_n = student.entropy()

            def total(values_n: Tensor) -> Tensor:
                return values_n[mask_n].double().sum()

            def nonfinite(values_n: Tensor) -> Tensor:
                return total(~values_n.isfinite())

            sums = torch.stack(
                [
                    gated.mass,
                    loss_sum.double(),
                    mask_n.sum().double(),
                    total(entropy_n),
                    total(teacher.logprobs_n - logprobs_n),
                    nonfinite(logprobs_n),
                    nonfinite(old_logprobs_n),
                    nonfinite(teacher.logprobs_n),
                    nonfinite(loss_n),
                ]
            )
            drift = drift_sums(gated, mask_n, batch.block_index_S, MAX_BLOCKS, self.owns_blocks)
        return loss_sum, torch.cat([sums, drift])

    def _teacher(self, student: VocabOps, batch: MicroBatch) -> TeacherSignal:
        if batch.teacher_logprobs_N is None:
            if self.objective.needs.sampled:
                raise ValueError("the responses carry no teacher log-probs: score them with the teacher first")
            return TeacherSignal(torch.zeros_like(student.rows(batch.mask_N), dtype=torch.float32))
        return TeacherSignal(
            logprobs_n=student.rows(batch.teacher_logprobs_N),
            support_NK=None if batch.teacher_support_NK is None else batch.teacher_support_NK.long(),
            support_logprobs_nK=None
            if batch.teacher_support_logprobs_NK is None
            else student.rows(batch.teacher_support_logprobs_NK),
            full=None
            if batch.teacher_full_NV is None
            else ParallelVocab(
                batch.teacher_full_NV,
                self.policy.shape.vocab_size,
                TokenLayout(self.policy.groups.tensor, self.scattered),
            ),
        )


def _check_finite(totals: dict[str, float], bad_gradients: int) -> None:
    if totals["tokens"] == 0:
        raise ValueError("an optimizer step without a single response token: every response was empty")
    who = {
        "nonfinite_student": "the student's log-probs",
        "nonfinite_old": "the behaviour policy's log-probs",
        "nonfinite_teacher": "the teacher's log-probs",
        "nonfinite_loss": "the loss",
    }
    broken = [f"{label} of {totals[key]:.0f} response tokens" for key, label in who.items() if totals[key]]
    if bad_gradients:
        broken.append(f"{bad_gradients} gradient entries")
    if broken:
        raise NonFiniteError(
            f"NaN or infinite: {', '.join(broken)} (of {totals['tokens']:.0f} tokens in this update). This update was "
            "not applied. Lower training.lr, use float32, or look at the checkpoint that was loaded"
        )
