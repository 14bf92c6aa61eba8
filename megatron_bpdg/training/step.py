"""One gated update: the loss of a micro-batch, and the exact normalisation of a whole optimizer step.

    drift -> gate and other factors -> per-token loss -> weighted sum    per micro-batch, on this rank's tokens
    sum of losses / sum of masses                                        over micro-batches, shards and replicas

The denominator is a float (the mass of the factors' product), applied to the summed gradients after all micro-batches:
see `update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bpdg.controllers.factor import Live, Prepared, prepare, product
from megatron_bpdg.data.batch import MicroBatch
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.diagnostics import drift_by_block, drift_shapes, drift_statistics, drift_sums
from megatron_bpdg.drift.gate import Gate
from megatron_bpdg.drift.signals import Factor, Segments, Signals, TeacherSignal
from megatron_bpdg.drift.sums import NamedSums
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.objectives.objective import Objective
from megatron_bpdg.objectives.vocabulary import VocabOps
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.sequence import sum_over
from megatron_bpdg.parallel.vocab import ParallelVocab, TokenLayout

# Rows of the drift heat map; later blocks are added to the last row.
MAX_BLOCKS = 256
# Sum of an update -> of whose numbers it counts those that are not finite.
_BROKEN = {
    "nonfinite_student": "the student's log-probs",
    "nonfinite_old": "the behaviour policy's log-probs",
    "nonfinite_teacher": "the teacher's log-probs",
    "nonfinite_loss": "the loss",
    "nonfinite_weight": "the factors' weights or masses",
}


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
        gate: with tau = 0 for a run without one, as it measures the drift.
        temperature: the sampling temperature.
        live, prepared: other factors of the tokens' weights.
    """

    def __init__(
        self,
        policy: MegatronPolicy,
        module: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        objective: Objective,
        gate: Gate,
        temperature: float,
        live: Sequence[Live] = (),
        prepared: Sequence[Prepared] = (),
    ) -> None:
        self.policy = policy
        self.module = module
        self.optimizer = optimizer
        self.objective = objective
        self.gate = gate
        self.temperature = temperature
        self.live = live
        self.prepared = prepared
        mesh = policy.mesh
        # Sequence parallelism spreads the tokens too: each rank keeps, and counts, its own shard of them.
        self.scattered = policy.layout.sequence_parallel
        self.reduce = sum_over([mesh.tensor, mesh.context] if self.scattered else [mesh.context])
        self.owns_blocks = mesh.is_leader
        self.owns_tokens = mesh.is_last_stage and (self.scattered or mesh.tensor.rank() == 0)

    def prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """Fill in what the prepared factors say of this replica's responses of a rollout batch, before its updates.

        Done where the teacher's and the old log-probs are: on the ranks of the last pipeline stage. Collective over
        the replicas.
        """
        mesh = self.policy.mesh
        if not self.prepared or not mesh.is_last_stage:
            return
        over_replicas = sum_over([parallel_state.get_data_parallel_group()])
        mine = [t for t in trajectories if mesh.owns(t.index)]
        factors = prepare(self.prepared, mine, lambda sums: over_replicas(sums.to(default_device())).to(sums.device))
        for trajectory, factor in zip(mine, factors):
            trajectory.weights_R, trajectory.mass_R = factor.weight_n, factor.mass_n

    def update(self, batches: Sequence[MicroBatch]) -> StepReport:
        """One optimizer step over this replica's micro-batches; other replicas may bring more or fewer.

        Where the factors leave no token any mass there is nothing to average: no replica makes the step, and
        `weight/empty_updates` counts it.

        Raises:
            NonFiniteError: on all ranks alike, before the weights are touched.
        """
        report = self.accumulate(batches)
        report.statistics["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
        if "weight/empty_updates" in report.statistics:
            report.statistics["train/grad_norm"] = 0.0
            return report
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
                totals.add(sums)
            return loss_sum

        self.policy.forward_backward(batches, loss)
        finalize_model_grads([self.module])
        # Megatron-Core's optimizers step on NaN gradients without a word when there is no loss scale.
        totals["nonfinite_gradient"] = bad_gradients = torch.zeros_like(totals["mass"])
        for parameter in self.module.parameters():
            bad_gradients += (~parameter.main_grad.isfinite()).sum()
        # Every token is counted on exactly one rank of the world, so one sum makes the step's totals exact.
        assert dist.group.WORLD is not None
        totals = totals.over(sum_over([dist.group.WORLD]))
        _check_finite(totals)
        mass, tokens = float(totals["mass"]), float(totals["tokens"])
        self.module.scale_gradients(1.0 / mass if mass else 0.0)
        statistics = {
            "loss/opd": float(totals["loss"]) / mass if mass else 0.0,
            "actor/entropy": float(totals["entropy"]) / tokens,
            "teacher/gap_mean": float(totals["teacher_gap"]) / tokens,
            "train/tokens": tokens,
            **drift_statistics(totals),
        }
        if not mass:
            statistics["weight/empty_updates"] = 1.0
        return StepReport(statistics, *drift_by_block(totals))

    @staticmethod
    def _no_totals() -> NamedSums:
        names = ("mass", "loss", "entropy", "teacher_gap", *_BROKEN)
        return NamedSums.zeros({**dict.fromkeys(names, 0), **drift_shapes(MAX_BLOCKS)}, default_device())

    def loss(self, hidden_SBH: Tensor, batch: MicroBatch) -> tuple[Tensor, NamedSums]:
        """(weighted loss sum over this rank's tokens, detached sums for the step's totals)."""
        # Not where this rank alone has none of its tokens: the sums over blocks are collective.
        if batch.num_counted == 0:
            return hidden_SBH.sum() * 0.0, self._no_totals()
        student = self.policy.vocab_ops(hidden_SBH, batch, self.temperature, scattered=self.scattered)
        signals = self._signals(student, batch)
        mask_n, teacher = signals.mask_n, signals.teacher
        assert teacher is not None
        gated = self.gate(signals)
        loss_n = self.objective(student, signals)
        others = [factor(signals) for factor in self.live]
        if batch.weights_N is not None and batch.mass_N is not None:
            others.append(Factor(student.rows(batch.weights_N), student.rows(batch.mass_N)))
        elif self.prepared:
            raise ValueError("the responses carry no prepared weights: call Updater.prepare on the rollout batch first")
        other = product(others, mask_n)
        whole = product([gated, other], mask_n)
        loss_sum = (whole.weight_n * torch.where(mask_n, loss_n, 0.0)).sum()

        with torch.no_grad():
            entropy_n = student.entropy()

            def total(values_n: Tensor) -> Tensor:
                return values_n[mask_n].double().sum()

            def nonfinite(values_n: Tensor) -> Tensor:
                return total(~values_n.isfinite())

            sums = NamedSums(
                mass=whole.mass,
                loss=loss_sum.double(),
                entropy=total(entropy_n),
                teacher_gap=total(teacher.logprobs_n - signals.logprobs_n),
                nonfinite_student=nonfinite(signals.logprobs_n),
                nonfinite_old=nonfinite(signals.old_logprobs_n),
                nonfinite_teacher=nonfinite(teacher.logprobs_n),
                nonfinite_loss=nonfinite(loss_n),
                nonfinite_weight=nonfinite(other.weight_n + other.mass_n),
                **drift_sums(gated, mask_n, batch.block_index_G, MAX_BLOCKS, self.owns_blocks),
            )
        return loss_sum, sums

    def _signals(self, student: VocabOps, batch: MicroBatch) -> Signals:
        with torch.set_grad_enabled(self.objective.differentiates_logprob):
            logprobs_n = student.logprob(batch.sampled_N)
        return Signals(
            logprobs_n=logprobs_n,
            old_logprobs_n=logprobs_n.detach() if batch.old_logprobs_N is None else student.rows(batch.old_logprobs_N),
            mask_n=student.rows(batch.mask_N),
            blocks=Segments(student.rows(batch.block_N), batch.num_blocks),
            sequences=Segments(student.rows(batch.sequence_N), batch.num_sequences),
            reduce=self.reduce,
            sampled_N=batch.sampled_N,
            teacher=self._teacher(student, batch),
        )

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
            full_logprobs_NV=None
            if batch.teacher_full_NV is None
            else ParallelVocab(
                batch.teacher_full_NV,
                self.policy.shape.vocab_size,
                TokenLayout(self.policy.mesh.tensor, self.scattered),
            )
            .log_softmax()
            .detach(),
        )


def _check_finite(totals: NamedSums) -> None:
    if not totals["tokens"]:
        raise ValueError("an optimizer step without a single response token: every response was empty")
    broken = [f"{whose} of {totals[key]:.0f} response tokens" for key, whose in _BROKEN.items() if totals[key]]
    if totals["nonfinite_gradient"]:
        broken.append(f"{totals['nonfinite_gradient']:.0f} gradient entries")
    if broken:
        raise NonFiniteError(
            f"NaN or infinite: {', '.join(broken)} (of {totals['tokens']:.0f} tokens in this update). This update was "
            "not applied. Lower training.lr, use float32, or look at the checkpoint that was loaded"
        )
