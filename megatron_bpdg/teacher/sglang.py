"""A teacher behind SGLang servers.

Scoring begins as soon as a group of responses is there, while others are still being sampled: `prefetch` sends the
requests, `score` waits for them. What comes back per response token is K ids and K + 1 log-probs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.config.servers import Servers
from megatron_bpdg.config.teacher import Teacher
from megatron_bpdg.data.batch import up_to
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.mesh import Mesh
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.together import everyone, on_first, wait_together
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import MalformedAnswer, Server, ServerError, ask
from megatron_bpdg.serving.http.pool import ServerPool, ServingError
from megatron_bpdg.serving.sglang.answers import Scored, ask_scores
from megatron_bpdg.serving.sglang.facts import check_tokenizer

# Tokens of the text by which a teacher's servers are told apart, and how far right answers to it may be apart.
_FINGERPRINT_TOKENS = 32
_FINGERPRINT_TOLERANCE = 0.2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SGLangTeacher:
    """Scores responses through servers; one rank of each replica's last stage asks, its tensor-parallel group is told.

    Args:
        cfg: servers, request size, width of the payload.
        needs: what the objective reads; not the whole distribution.
        temperature: the sampling temperature. Servers score at temperature 1 only: at another one the log-probs are
            divided by it, which leaves out each position's normaliser. `build` refuses objectives that need it.
        vocab_size: rows of the teacher's vocabulary.
        mesh: where this rank stands.
        api_key: bearer token, or None.

    Raises:
        ServingError: a server cannot be asked, or the servers do not serve the same weights.
    """

    def __init__(
        self,
        cfg: Teacher,
        needs: TeacherNeeds,
        temperature: float,
        *,
        vocab_size: int,
        mesh: Mesh,
        api_key: str | None = None,
    ) -> None:
        assert cfg.servers is not None
        self.cfg, self.needs, self.temperature = cfg, needs, temperature
        self.vocab_size, self.mesh = vocab_size, mesh
        self.dtype = _DTYPES[cfg.payload_dtype]
        self.pool = ServerPool(cfg.servers, "teacher", api_key, self._is_the_same)
        # By identity; holding the trajectory keeps its identity its own.
        self._asked: dict[int, tuple[Trajectory, Future[list[Scored]], int]] = {}
        self._version: str | None = None
        generator = torch.Generator().manual_seed(0)
        self._text = torch.randint(vocab_size, (_FINGERPRINT_TOKENS + 1,), generator=generator).tolist()
        self._fingerprint_T = torch.zeros(0)
        self._background = Background("bpdg-teacher")
        try:
            self._on_leaders(lambda: self._background.run(self._compare_servers()))
        except ServingError:
            self.close()
            raise

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError, on every rank, where a server's tokenizer is not this one. Collective."""

        async def compare() -> None:
            for answer in (await self.pool.each(partial(check_tokenizer, tokenizer=tokenizer))).values():
                if isinstance(answer, ServerError):
                    raise answer

        try:
            self._on_leaders(lambda: self._background.run(compare()))
        except (ValueError, ServingError) as error:
            raise ValueError(f"teacher.servers: {error}") from error

    def prefetch(self, trajectories: Sequence[Trajectory]) -> None:
        """Ask for what this replica will need of these."""
        if not self.mesh.is_leader:
            return
        mine = [t for t in trajectories if self.mesh.owns(t.index)]
        lengths = [len(t.prompt_ids) + len(t.response_ids) for t in mine]
        for batch in up_to(mine, lengths, self.cfg.tokens_per_request):
            answers = self._background.submit(self._score(batch))
            for position, trajectory in enumerate(batch):
                self._asked[id(trajectory)] = trajectory, answers, position

    def score(self, micro_batches: Sequence[Sequence[Trajectory]]) -> None:
        """Fill in the teacher fields of every trajectory, on all ranks of the last stage.

        Raises:
            ServingError: the same on every rank, when the servers are past helping or their weights changed.
        """
        trajectories = [trajectory for batch in micro_batches for trajectory in batch]
        self.prefetch([t for t in trajectories if id(t) not in self._asked])
        wait_together([self._asked[id(t)][1] for t in trajectories] if self.mesh.is_leader else [])

        def store() -> None:
            for trajectory in trajectories:
                _, answers, position = self._asked.pop(id(trajectory))
                self._store(trajectory, answers.result()[position])

        self._on_leaders(store)
        if self.mesh.is_last_stage and self.mesh.stage.size() > 1:
            self._hand_round(trajectories)

    def close(self) -> None:
        self._background.run(self.pool.close())
        self._background.close()

    def _on_leaders(self, work: Callable[[], None]) -> None:
        """Have every leader do a part of the work; what the first one fails at is raised on all ranks. Collective."""
        problem: Exception | None = None
        if self.mesh.is_leader:
            try:
                work()
            except ServerError as error:
                problem = ServingError(str(error))
            except (ServingError, ValueError) as error:
                problem = error
        for found in everyone(problem):
            if found is not None:
                raise found

    def _store(self, trajectory: Trajectory, scored: Scored) -> None:
        trajectory.teacher_logprobs_R = (scored.logprobs_R / self.temperature).to(self.dtype)
        trajectory.teacher_support_RK = scored.support_RK
        if scored.support_logprobs_RK is not None:
            trajectory.teacher_support_logprobs_RK = (scored.support_logprobs_RK / self.temperature).to(self.dtype)

    def _hand_round(self, trajectories: Sequence[Trajectory]) -> None:
        """Broadcast the leader's payload to the other ranks of the stage, response by response."""
        device = default_device()
        source = dist.get_process_group_ranks(self.mesh.stage)[0]
        for t in trajectories:
            R, K = len(t.response_ids), self.needs.top_k
            fields: list[tuple[str, tuple[int, ...], torch.dtype]] = [("teacher_logprobs_R", (R,), self.dtype)]
            if K:
                fields.append(("teacher_support_RK", (R, K), torch.int32))
                fields.append(("teacher_support_logprobs_RK", (R, K), self.dtype))
            for name, shape, dtype in fields:
                held: Tensor | None = getattr(t, name)
                tensor = (torch.empty(shape, dtype=dtype) if held is None else held).to(device)
                dist.broadcast(tensor, src=source, group=self.mesh.stage)
                setattr(t, name, tensor.cpu())

    async def _score(self, batch: Sequence[Trajectory]) -> list[Scored]:
        return await self.pool.call(lambda server: self._ask(server, batch), f"scores of {batch[0].name} and others")

    async def _ask(self, server: Server, batch: Sequence[Trajectory]) -> list[Scored]:
        texts = [(t.prompt_ids, t.response_ids) for t in batch]
        scored = await ask_scores(server, texts, top_k=self.needs.top_k, vocab_size=self.vocab_size)
        if changed := {s.version for s in scored} - {self._version}:
            raise ServingError(
                f"teacher: {server.url} now serves weights {sorted(changed)}, at the start of the run they were "
                f"{self._version!r}: a teacher's weights must not change (is it used as a rollout server?)"
            )
        return scored

    # --- which weights are served ----------------------------------------------------------------------------------

    async def _compare_servers(self) -> None:
        """Take the fingerprint of the teacher; raise ServingError unless all servers have the same."""
        found = await self.pool.each(self._fingerprint)
        if problems := [f"  {url}: {answer}" for url, answer in found.items() if isinstance(answer, ServerError)]:
            raise ServingError("teacher: not every server can be asked:\n" + "\n".join(problems))
        first, *others = [(url, answer) for url, answer in found.items() if isinstance(answer, Scored)]
        self._fingerprint_T, self._version = first[1].logprobs_R, first[1].version
        for url, answer in others:
            if answer.version != self._version or self._distance(answer) > _FINGERPRINT_TOLERANCE:
                raise ServingError(
                    f"teacher: {first[0]} and {url} do not serve the same weights: versions {self._version!r} and "
                    f"{answer.version!r}, log-probs {self._distance(answer):.3g} nats apart on average"
                )

    async def _is_the_same(self, server: Server) -> bool:
        """Whether a server that came back serves the same teacher."""
        scored = await self._fingerprint(server)
        if scored.version != self._version or self._distance(scored) > _FINGERPRINT_TOLERANCE:
            raise MalformedAnswer(f"{server.url} came back with other weights ({scored.version!r})")
        return True

    async def _fingerprint(self, server: Server) -> Scored:
        texts = [(self._text[:1], self._text[1:])]
        return (await ask_scores(server, texts, top_k=0, vocab_size=self.vocab_size))[0]

    def _distance(self, scored: Scored) -> float:
        return float((scored.logprobs_R - self._fingerprint_T).abs().mean())


def served_model(servers: Servers, api_key: str | None) -> Path:
    """Model path that the first server names. Collective over the world.

    Raises:
        ServingError: it cannot be asked.
    """
    try:
        return Path(on_first(lambda: asyncio.run(ask(servers.urls[0], api_key, Server.model_info)))["model_path"])
    except ServerError as error:
        raise ServingError(f"teacher: {error}; start it with `bpdg serve teacher CHECKPOINT`") from error
