"""One round of a small problem as one CUDA graph: choose a position, its G, K steps, a draw.

Where a problem is small, launching its kernels takes longer than running them. Between two passes of the
models nothing of a round needs the host: which position is chosen, whether its token flipped and how
many steps it took are numbers on the device, and no shape depends on them. So all launches of a
round can be recorded once and replayed.

This serves callers that drive one problem at a time with models and draws of their own. The package's
decode loop does not use it: it answers the requests of many problems and proposals in joint launches of
changing shapes, asks the models for scores and gradients in the middle of a round, and draws from CPU
generators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_fast.config import DTOConfig
from nabla_fast.errors import InputError, RowError
from nabla_fast.ops import (
    AdamState,
    GumbelNoise,
    backend_status,
    cosine_schedule,
    draw_tokens,
    dto_descent,
    dto_descent_latents,
    lm_logits,
    onehot_grad,
    onehot_grad_norm,
    token_stats,
)
from nabla_fast.ops.checks import (
    expect,
    expect_matrix,
    expect_one_device,
    expect_tables,
    expect_vocabulary,
)
from nabla_fast.ops.registry import precedes
from nabla_fast.ops.rows import gathered, report


class Outcome(NamedTuple):
    """What a round came to. The next call of the same :class:`Round` overwrites all of it.

    Where no position was found, ``position`` is some position, nothing was moved, and ``token`` is a
    draw that means nothing.
    """

    found: Tensor  # [1] bool, whether a position meets all thresholds
    position: Tensor  # [1] int64, the first that does
    hard: Tensor  # [1] int64, its hard token now
    flipped: Tensor  # [1] bool, whether the last step moved the hard token: G holds no more
    token: Tensor  # [1] int64, drawn from the logits as they are now
    logits: Tensor  # [1, V], these, without noise
    parameter: Tensor  # [1, V] the same, or [1, H] the hidden state that gives them
    state: AdamState  # [1, V or H]; state.step [1] says how many steps were taken

    def copy(self) -> Outcome:
        """The same in memory of its own."""
        *plain, state = self
        return Outcome(
            *(tensor.clone() for tensor in plain), AdamState(*(tensor.clone() for tensor in state))
        )


class Round:
    """Rounds over trajectories of up to L positions: :meth:`begin` one, and :meth:`go_on` after a flip.

    On a CUDA device the first call records graphs, and every call copies its inputs to where these
    read them and replays one. Elsewhere, and where the Triton kernels do not take the dtypes or are not
    chosen, the same ops run one by one.

    Args:
        config: ``parameter`` is any; ``relaxation`` "straight_through" or "gumbel"; ``update``
            "first". Its thresholds choose the position, ``resample_sampling`` draws.
        head: W [V, H], not copied.
        tables: E [V, H_t] and others that G reads, not copied.
        token_maps: as of ``onehot_grad``, for tables of another vocabulary.
        positions: L.
        dtype: of hidden states, the head's if None. Cotangents have their tables'.
        draws: rows of exponentials that :meth:`begin` is given: 1 for whichever position is chosen, or
            L, one a position. With ``torch.empty(V).exponential_(generator=g)`` on the CPU for a
            generator seeded as the decode loop seeds that position's, the token is that loop's.
    Raises:
        InputError: a shape, dtype or device does not fit, or the config needs what a round has not.
    """

    def __init__(
        self,
        config: DTOConfig,
        head: Tensor,
        tables: Sequence[Tensor],
        *,
        positions: int,
        token_maps: Sequence[Tensor | None] = (),
        dtype: torch.dtype | None = None,
        draws: int = 1,
    ):
        _check(config, head, tables, token_maps, positions, draws)
        self.config, self.positions = config, positions
        self._head, self._tables = head.detach(), [table.detach() for table in tables]
        self._token_maps = list(token_maps)
        device, dtype = head.device, dtype or head.dtype
        expect(dtype.is_floating_point, f"round: dtype must be a floating-point type, got {dtype}")
        (vocabulary, width), wide = head.shape, torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        # What a round reads.
        self._rollout, self._hard = (zeros(positions, width, dtype=dtype) for _ in range(2))
        self._cotangents = [zeros(positions, table.shape[1], dtype=table.dtype) for table in tables]
        self._span = zeros(2)  # the positions that may be chosen
        self._limit = zeros(1)  # the step at which the descent stops
        self._exponentials = torch.ones(draws, vocabulary, dtype=wide, device=device)
        self._noise = GumbelNoise(zeros(positions), zeros(positions))
        self._schedule = cosine_schedule(
            config.iters, config.lr, min_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps
        ).to(device)
        # Of the position chosen: what G needs, and what the round leaves.
        self._chosen_hard = zeros(1, width, dtype=dtype)
        self._chosen_cotangents = [zeros(1, table.shape[1], dtype=table.dtype) for table in tables]
        of_parameter = zeros(1, vocabulary if config.parameter == "logits" else width, dtype=wide)
        self.outcome = Outcome(
            found=zeros(1, dtype=torch.bool),
            position=zeros(1),
            hard=zeros(1),
            flipped=zeros(1, dtype=torch.bool),
            token=zeros(1),
            logits=zeros(1, vocabulary, dtype=wide),
            parameter=of_parameter,
            state=AdamState.zeros(of_parameter),
        )
        self._replays: dict[str, _Replay] = {}

    @torch.no_grad()
    def begin(
        self,
        rollout: Tensor,
        hard: Tensor,
        cotangents: Sequence[Tensor],
        exponentials: Tensor,
        *,
        start: int = 0,
        until: int | None = None,
        noise: GumbelNoise | None = None,
    ) -> Outcome:
        """Choose the first position from ``start`` on that meets all thresholds, and move it.

        Args:
            rollout: [n, H], 1 ≤ n ≤ L: final hidden states over the sampled tokens.
            hard: [n, H]: the same over the hard tokens, of which G is. Where these are not the sampled
                ones, G of a position is not what it would be behind sampled tokens, as the decode loop
                has it: begin again there, with the positions from it on.
            cotangents: ∂ℒ/∂e_t [n, H_t], one a table.
            exponentials: [1, V] or [L, V] (the first n of them matter), by ``draws``; as of
                ``draw_tokens``.
            until: steps to take, at most ``config.iters``; None: these.
            noise: of the n positions, where the relaxation is "gumbel".
        Raises:
            InputError: a shape, dtype or device does not fit.
            RowError: a row has a NaN or +inf logit, or no finite one; on a device at the next
                ``nabla_fast.ops.synchronize``, which is called here every few dozen rounds. A row's
                number is that of its position, or 0 for the one that was chosen. The rounds after it are
                none the worse.
        """
        n = len(rollout)
        expect(1 <= n <= self.positions, f"round: {n} positions, but it was made for 1 to {self.positions}")
        expect(isinstance(start, int) and 0 <= start <= n, f"round: start must be in 0..{n}, got {start}")
        given = [("rollout", self._rollout, rollout), ("hard", self._hard, hard)]
        expect(
            len(cotangents) == len(self._tables),
            f"round: one cotangent a table is needed, got {len(cotangents)} for {len(self._tables)}",
        )
        for t, (buffer, cotangent) in enumerate(zip(self._cotangents, cotangents, strict=True)):
            given.append((f"cotangents[{t}]", buffer, cotangent))
        gumbel = self.config.relaxation == "gumbel"
        expect(
            gumbel == (noise is not None),
            "round: noise belongs to the relaxation 'gumbel', and it to noise",
        )
        for name, buffer, key in zip(("seed", "position"), self._noise, noise or (), strict=False):
            given.append((f"noise.{name}", buffer, key))
        for name, buffer, tensor in given:
            _expect_like(name, tensor, (n, *buffer.shape[1:]), buffer)
        _expect_like("exponentials", exponentials, self._exponentials.shape, self._exponentials)
        limit = self._steps(until)

        for _, buffer, tensor in given:
            buffer[:n].copy_(tensor)
            # What is left of longer ones might not be finite; the logits of 0 are, and name no row.
            buffer[n:].zero_()
        self._exponentials.copy_(exponentials)
        self._span[0].fill_(start)
        self._span[1].fill_(n)
        self._limit.fill_(limit)
        return self._run("begin")

    @torch.no_grad()
    def go_on(
        self,
        hard: Tensor,
        cotangents: Sequence[Tensor],
        *,
        until: int | None = None,
        since: Outcome | None = None,
    ) -> Outcome:
        """Take the steps that are left with a new G, and draw anew with the exponentials of before.

        Args:
            hard: [1, H]: the hidden state that predicts the position over the new hard tokens.
            cotangents: [1, H_t], one a table, at that position.
            until: as of :meth:`begin`.
            since: a copy of the outcome to go on from; None: the last one. Its position's noise and
                exponentials are those given to the last :meth:`begin`.
        Raises:
            InputError, RowError: as of :meth:`begin`.
        """
        expect(bool(self._replays), "round: there is none to go on with, begin one")
        expect(
            len(cotangents) == len(self._tables),
            f"round: one cotangent a table is needed, got {len(cotangents)} for {len(self._tables)}",
        )
        given = [("hard", self._chosen_hard, hard)]
        for t, (buffer, cotangent) in enumerate(zip(self._chosen_cotangents, cotangents, strict=True)):
            given.append((f"cotangents[{t}]", buffer, cotangent))
        for name, buffer, tensor in given:
            _expect_like(name, tensor, buffer.shape, buffer)
        limit = self._steps(until)

        for _, buffer, tensor in given:
            buffer.copy_(tensor)
        self._limit.fill_(limit)
        if since is not None:
            for ours, theirs in zip(_flat(self.outcome), _flat(since), strict=True):
                _expect_like("since", theirs, ours.shape, ours)
            for ours, theirs in zip(_flat(self.outcome), _flat(since), strict=True):
                ours.copy_(theirs)
        return self._run("go_on")

    def _steps(self, until: int | None) -> int:
        iters = self.config.iters
        expect(
            until is None or (isinstance(until, int) and 0 <= until <= iters),
            f"round: until must be in 0..{iters}, got {until}",
        )
        return iters if until is None else until

    # -- what is replayed --------------------------------------------------------------------------

    def _run(self, name: str) -> Outcome:
        if not self._replays:
            parts = {"begin": self._begin, "go_on": self._move}
            record = _Graph.record if self._records() else _Eager
            self._replays = {part: record(function, self._head.device) for part, function in parts.items()}
        self._replays[name].replay()
        return self.outcome

    def _records(self) -> bool:
        """Whether a graph can hold the round: plain PyTorch's descents wait for the device."""
        return (
            self._head.is_cuda
            and backend_status()["triton"] is None
            and precedes("triton", "torch")
            and all(tensor.dtype != torch.float64 for tensor in (self._rollout, self._head, *self._tables))
        )

    def _begin(self) -> None:
        outcome, config = self.outcome, self.config
        places = torch.arange(self.positions, device=self._head.device)
        meets = (places >= self._span[0]) & (places < self._span[1])
        stats = token_stats(self._rollout, self._head)
        if config.confidence_threshold is not None:
            meets &= stats.confidence <= config.confidence_threshold
        if config.entropy_threshold is not None:
            meets &= stats.entropy >= config.entropy_threshold
        if config.grad_threshold is not None:
            norms = onehot_grad_norm(
                self._cotangents,
                self._tables,
                self._hard,
                self._head,
                nll_coeff=config.nll_coeff,
                token_maps=self._token_maps,
            )
            meets &= norms >= config.grad_threshold
        first = torch.where(meets, places, self.positions).amin(dim=0, keepdim=True)
        outcome.found.copy_(first < self.positions)
        outcome.position.copy_(first.clamp(max=self.positions - 1))

        self._chosen_hard.copy_(self._hard.index_select(0, outcome.position))
        for chosen, of_all in zip(self._chosen_cotangents, self._cotangents, strict=True):
            chosen.copy_(of_all.index_select(0, outcome.position))
        hidden = self._rollout.index_select(0, outcome.position)
        latents = config.parameter == "latents"
        outcome.parameter.copy_(hidden if latents else lm_logits(hidden, self._head))
        for tensor in outcome.state:
            tensor.zero_()
        self._move()

    def _move(self) -> None:
        outcome, config = self.outcome, self.config
        grad = onehot_grad(
            self._chosen_cotangents,
            self._tables,
            self._chosen_hard,
            self._head,
            nll_coeff=config.nll_coeff,
            token_maps=self._token_maps,
        )
        options = {"until": torch.where(outcome.found, self._limit, 0), "tau": config.tau, "noise": None}
        if config.relaxation == "gumbel":
            options["noise"] = GumbelNoise(*(key.index_select(0, outcome.position) for key in self._noise))
        moved = outcome.parameter, grad, outcome.state, self._schedule
        if config.parameter == "latents":
            descent = dto_descent_latents(moved[0], self._head, *moved[1:], **options)
            outcome.logits.copy_(lm_logits(outcome.parameter, self._head))
        else:
            descent = dto_descent(*moved, **options)
            outcome.logits.copy_(outcome.parameter)
        outcome.hard.copy_(descent.token)
        outcome.flipped.copy_(descent.flipped)
        exponentials = self._exponentials
        if len(exponentials) > 1:
            exponentials = exponentials.index_select(0, outcome.position)
        sampling = config.resample_sampling
        token = draw_tokens(
            outcome.logits,
            exponentials,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        outcome.token.copy_(token)


class _Eager:
    """A part of a round that runs op by op."""

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.replay = function


class _Graph:
    """A part of a round as a graph, with the row statuses that its replay leaves."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, statuses: list[tuple[str, Tensor]], device: torch.device
    ):
        self._graph, self._statuses, self._device = graph, statuses, device

    @classmethod
    def record(cls, function: Callable[[], None], device: torch.device) -> _Graph:
        """Run a part once, which compiles what is compiled at a first call, and then record it."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), gathered():
                function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with gathered() as statuses, torch.cuda.graph(graph):
                function()
        return cls(graph, statuses, device)

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()
            # The next replay writes over them.
            statuses = [(op, status.clone()) for op, status in self._statuses]
        failure = None
        for op, status in statuses:
            try:
                report(op, status)
            except RowError as error:  # of an older round: those of this one are kept all the same
                failure = failure or error
        if failure:
            raise failure


_Replay = _Eager | _Graph


def _flat(outcome: Outcome) -> list[Tensor]:
    *plain, state = outcome
    return [*plain, *state]


def _expect_like(name: str, tensor: Tensor, shape: Sequence[int], buffer: Tensor) -> None:
    expect(
        tuple(tensor.shape) == tuple(shape)
        and tensor.dtype == buffer.dtype
        and tensor.device == buffer.device,
        f"round: {name} must be {buffer.dtype} {list(shape)} on {buffer.device}, "
        f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}",
    )


def _check(
    config: DTOConfig,
    head: Tensor,
    tables: Sequence[Tensor],
    token_maps: Sequence[Tensor | None],
    positions: int,
    draws: int,
) -> None:
    if config.relaxation == "soft":
        raise InputError(
            "round: the relaxation 'soft' has a new G at every step, which only the models give"
        )
    expect(config.update == "first", "round: update='all' moves more than one position")
    expect_matrix("round", "head", head)
    expect_vocabulary("round", head.shape[0])
    expect_tables("round", tables, head.shape[0], token_maps)
    expect_one_device("round", head, *tables, *token_maps)
    expect(
        isinstance(positions, int) and positions >= 1,
        f"round: positions must be at least 1, got {positions}",
    )
    expect(draws in (1, positions), f"round: draws must be 1 or positions={positions}, got {draws}")
