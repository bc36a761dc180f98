"""Records that travel between walks and epilogues: operands, chunks, row states, row gradients."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Everything that turns a hidden state into final logits.

    z = softcap(scale * (hidden @ weight.T + bias)) / temperature over the first `vocab_size` rows
    of `weight`, with softcap(x) = softcap * tanh(x / softcap). The epilogues apply the scalars:
    folding them into a 16-bit operand would round every logit.
    """

    weight: Tensor  # [V_padded, D]
    bias: Tensor | None  # [V_padded]
    softcap: float | None
    scale: float
    temperature: float
    vocab_size: int

    # The fields, in their order, as arguments of a custom operator.
    SCHEMA: ClassVar[str] = (
        "Tensor weight, Tensor? bias, float? softcap, float scale, float temperature, "
        "SymInt vocab_size"
    )

    def flat(self) -> tuple[Any, ...]:
        """The arguments that SCHEMA names."""
        scalars = (self.softcap, self.scale, self.temperature, self.vocab_size)
        return self.weight, self.bias, *scalars

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """The tensors at the front of `flat`; an autograd function saves them."""
        return self.weight, self.bias

    @property
    def scalars(self) -> tuple[float | None, float, float, int]:
        """The arguments behind the tensors in `flat`."""
        return self.softcap, self.scale, self.temperature, self.vocab_size

    @classmethod
    def unpack(cls, arguments: tuple[Any, ...]) -> tuple["Head", tuple[Any, ...]]:
        """Make a head of the arguments of SCHEMA; also return the arguments behind them."""
        return cls(*arguments[:_HEAD_ARGUMENTS]), arguments[_HEAD_ARGUMENTS:]

    def detach(self) -> "Head":
        """The same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, *self.scalars)

    @property
    def factors(self) -> tuple[bool, float, float]:
        """(capped, inner, outer): z = outer * tanh(inner * score) if capped, else outer * score.

        Every kernel takes softcap, scale and temperature in this form.
        """
        if self.softcap is None:
            return False, 1.0, self.scale / self.temperature
        return True, self.scale / self.softcap, self.softcap / self.temperature

    @property
    def is_plain(self) -> bool:
        """Whether a logit is its product times a scalar."""
        return self.bias is None and self.softcap is None

    def bias_of(self, first_id: int, columns: int) -> Tensor | None:
        """The bias of columns [first_id, first_id + columns), contiguous; None without a bias."""
        if self.bias is None:
            return None
        return self.bias.detach()[first_id : first_id + columns].contiguous()

    def logits(self, scores: Tensor) -> Tensor:
        """The final logits z of scores = hidden @ weight.T + bias; a new tensor, differentiable."""
        capped, inner, outer = self.factors
        return torch.tanh(scores * inner) * outer if capped else scores * outer

    @property
    def max_slope(self) -> float:
        """The largest |dz/dscore|."""
        return abs(self.scale / self.temperature)

    def derivative(self, scores: Tensor) -> Tensor | float:
        """dz/dscores. 1 - tanh^2 cancels where the cap saturates; 4 e / (1 + e)^2 does not."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        e = torch.exp(scores.abs() * (-2.0 * abs(self.scale) / self.softcap))
        return (4.0 * factor) * e / (1.0 + e).square()


_HEAD_ARGUMENTS = len(fields(Head))


def accumulator_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype of logits, tails and losses: float64 if any operand has it, else float32."""
    for operand in operands:
        if operand.dtype == torch.float64:
            return torch.float64
    return torch.float32


@dataclass(frozen=True)
class Operands:
    """Hidden states and the head that turns them into logits."""

    hidden: Tensor  # [N, D]
    head: Head

    @property
    def requires_grad(self) -> bool:
        """Whether a loss of these logits has a gradient."""
        bias = self.head.bias
        trained = self.hidden.requires_grad or self.head.weight.requires_grad
        trained = trained or (bias is not None and bias.requires_grad)
        return trained and torch.is_grad_enabled()

    def __getitem__(self, rows: Any) -> "Operands":
        """Select rows by an index of the first dimension."""
        return Operands(self.hidden[rows], self.head)


@dataclass(frozen=True)
class Chunk:
    """Raw products hidden @ weight.T of some rows at columns [first_id, first_id + v)."""

    raw: Tensor  # [n, v]
    head: Head
    first_id: int = 0

    def __getitem__(self, rows: slice) -> "Chunk":
        """A view of some rows."""
        return Chunk(self.raw[rows], self.head, self.first_id)

    def scores(self) -> Tensor:
        """The raw products plus the bias: what Head.logits takes."""
        bias = self.bias(self.raw.dtype)
        return self.raw if bias is None else self.raw + bias

    def head_operands(self, dtype: torch.dtype) -> tuple[Tensor | None, bool, float, float]:
        """What the C++ and CUDA kernels take of a head: the bias [v] in `dtype`, and factors."""
        bias = None if self.head.bias is None else self.bias(dtype)
        return bias, *self.head.factors

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias [v] of the chunk's columns in a dtype, contiguous; None without a bias."""
        bias = self.head.bias_of(self.first_id, self.raw.shape[1])
        return None if bias is None else bias.to(dtype)


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a loss with respect to rows of final logits z.

    dL/dz is dvalues at the ids of S and dtail * exp(z - tail) everywhere else.
    """

    ids: Tensor  # [n, K] int64, -1 in an empty slot, no id twice in a row
    dvalues: Tensor  # [n, K]
    tail: Tensor  # [n] logsumexp of the logits outside S
    dtail: Tensor  # [n]

    def rows(self, rows: slice) -> "RowGradient":
        """A view of some rows."""
        return RowGradient(self.ids[rows], self.dvalues[rows], self.tail[rows], self.dtail[rows])

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, dvalues, tail and dtail in contiguous memory, as compiled kernels take them."""
        return (
            self.ids.contiguous(),
            self.dvalues.contiguous(),
            self.tail.contiguous(),
            self.dtail.contiguous(),
        )


@dataclass(frozen=True)
class RowState:
    """Running statistics of the logits of each row; epilogues update the tensors in place.

    The tail is the online logsumexp (Milakov and Gimelshein, arXiv 1805.02867) of the logits
    outside S: `sum` = sum exp(z - max). A candidate that leaves the running top-K joins the tail.
    `moment` = sum exp(z - max) * (z - max) is kept only for the entropy.
    """

    values: Tensor  # [N, K] logits on S, -inf in an empty slot
    ids: Tensor  # [N, K] int64, -1 in an empty slot
    selects: bool  # True: ids are the running top-K; False: ids are given and only gathered
    max: Tensor  # [N]
    sum: Tensor  # [N]
    moment: Tensor | None  # [N]

    @classmethod
    def for_topk(cls, tokens: int, k: int, entropy: bool, like: Tensor) -> "RowState":
        """The state before the first chunk when the k largest logits are to be selected."""
        ids = like.new_full((tokens, k), -1, dtype=torch.int64)
        return cls._empty(ids, True, entropy, like)

    @classmethod
    def for_ids(cls, ids: Tensor, entropy: bool, like: Tensor) -> "RowState":
        """The state before the first chunk when the logits at canonical ids [N, K] are wanted."""
        return cls._empty(ids, False, entropy, like)

    @classmethod
    def _empty(cls, ids: Tensor, selects: bool, entropy: bool, like: Tensor) -> "RowState":
        tokens = ids.shape[0]
        return cls(
            values=like.new_full(ids.shape, -torch.inf),
            ids=ids,
            selects=selects,
            max=like.new_full((tokens,), -torch.inf),
            sum=like.new_zeros(tokens),
            moment=like.new_zeros(tokens) if entropy else None,
        )

    def rows(self, rows: slice) -> "RowState":
        """A view of some rows; updating it updates this state."""
        return RowState(
            self.values[rows],
            self.ids[rows],
            self.selects,
            self.max[rows],
            self.sum[rows],
            None if self.moment is None else self.moment[rows],
        )

    def close(self) -> None:
        """Spread NaN over every row that has one; call this once, after the last chunk.

        A backend may have met the NaN in the tail only, and a loss that reads S alone would miss
        it. If nothing was selected, the first slot gets an id, so that gradients are NaN too.
        """
        is_nan = self.sum.isnan()
        self.values.masked_fill_(is_nan[:, None], torch.nan)
        if self.selects:
            first = self.ids[:, 0]
            first.copy_(torch.where(is_nan, first.clamp_min(0), first))

    def tail(self) -> Tensor:
        """logsumexp of the logits outside S, [N]; -inf where S is everything."""
        # Added in float64 and rounded once: the rounding at the tail's size is most of its error.
        return (self.max.double() + self.sum.double().log()).to(self.max.dtype)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, [N]: log Z - E[z], relative to the row's largest logit."""
        if self.moment is None:
            raise RuntimeError("this state was made without entropy=True")
        peak = torch.maximum(self.max, self.values.amax(-1))
        on_support = self.values - peak[:, None]
        weights = on_support.exp()
        gap = (self.max - peak).clamp_min(torch.finfo(peak.dtype).min)
        decay = gap.exp()
        total = weights.sum(-1) + decay * self.sum
        moment = (weights * on_support.masked_fill(weights == 0, 0.0)).sum(-1)
        moment = moment + decay * (self.moment + self.sum * gap.masked_fill(decay == 0, 0.0))
        return total.log() - moment / total
