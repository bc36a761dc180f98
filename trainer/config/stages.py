"""The configs of the stages."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.config.base import Refusals, StageConfig, TeacherConfig
from trainer.config.values import Count, NotNegative, Positive, Share

OBJECTIVES = ("reverse_kl", "forward_kl", "jsd", "policy_gradient")


@dataclass
class DistillationConfig(TeacherConfig):
    """On-policy distillation: from the teacher's distribution on the student's own samples."""

    teacher: str | dict[str, str] = "self"
    # Of the way to the student's weights that a self-teacher goes after each step: 0 stays, 1 is
    # the student as it is, what lies between is an exponential moving average in float32.
    teacher_update_rate: Share = 0.0
    # reverse_kl, forward_kl, jsd, policy_gradient, or a function(student, teacher) of SparseLogits
    # that returns a loss per token, of file.py:function or module:function.
    objective: str = "reverse_kl"
    stop_gradient: bool = True
    tail: Literal["drop", "bucket", "renormalize"] = "drop"
    beta: Share = 0.5  # jsd's
    # Whose top-K; "sampled" is the sampled token alone, for a function.
    support: Literal["student", "teacher", "union", "intersection", "full", "sampled"] = "student"
    missing: Literal["error", "drop"] = "error"  # the support's ids that a server did not return
    forward_kl_coef: NotNegative = 0.0  # of forward KL, added to reverse_kl ...
    forward_kl_min_entropy: float = 0.0  # ... on tokens where the teacher's entropy (nats) exceeds
    sft_coef: NotNegative = 0.0  # of the cross-entropy on the rows' own completions
    max_token_loss: Positive | None = None  # nats; above it no gradient
    max_loss_tokens: Count | None = None  # of each completion, from its start
    # Tokens are weighted by p(now) / p(when sampled), at most this, for completions that are stale.
    max_importance_weight: Positive | None = None

    @property
    def uses_references(self) -> bool:
        """See StageConfig."""
        return self.sft_coef > 0

    @property
    def takes_sampled_tokens(self) -> bool:
        """Whether the loss is of the sampled token alone."""
        return self.objective == "policy_gradient" or self.support == "sampled"

    @property
    def drops_mass(self) -> bool:
        """Whether the loss is known not to see what is outside the support."""
        on_top = self.objective in OBJECTIVES and not self.takes_sampled_tokens
        return on_top and self.tail == "drop" and self.support != "full"

    def _refusals(self) -> Refusals:
        is_sampled, is_reverse = (self.objective == x for x in ("policy_gradient", "reverse_kl"))
        shaped = (self.support, self.tail, self.stop_gradient, self.max_token_loss)
        rate, averages = self.teacher_update_rate, 0 < self.teacher_update_rate < 1
        served, needs_all = bool(self.servers), self.support in ("student", "union")
        is_function = ":" in self.objective
        return [*super()._refusals(),
            (self.objective not in OBJECTIVES and not is_function,
             f"objective: expected {', '.join(OBJECTIVES)}, file.py:function or module:function, "
             f"got {self.objective!r}"),
            (is_function and (self.tail, self.stop_gradient) != ("drop", True),
             "objective: a function has no tail or stop_gradient; leave these keys out"),
            (self.support == "sampled" and not is_function,
             "support: sampled is for a function; of the others policy_gradient has it as it is"),
            (is_sampled and self.samples_differ,
             "objective: policy_gradient is unbiased only for samples from the model's own "
             "distribution; expected top_p: 1 and no sampling_temperature"),
            (is_sampled and shaped != ("student", "drop", True, None),
             "objective: policy_gradient takes the sampled token alone: it has no support, tail, "
             "stop_gradient or max_token_loss; leave these keys out"),
            (is_sampled and self.steps_per_rollout > 1 and self.max_importance_weight is None,
             "objective: policy_gradient on stale completions needs max_importance_weight"),
            (self.forward_kl_coef > 0 and not is_reverse,
             "forward_kl_coef: it is added to objective: reverse_kl alone"),
            (not self.stop_gradient and not (is_reverse and self.drops_mass),
             "stop_gradient: only reverse_kl has one; false changes nothing here"),
            (self.tail == "renormalize" and self.k < 2,
             "k: expected at least 2 with tail: renormalize"),
            (rate > 0 and self.teacher != "self",
             "teacher_update_rate: expected 0 for a teacher that is another model"),
            (averages and self.lora_r > 0,
             "teacher_update_rate: expected 0 (the base) or 1 (with the adapters) under lora_r"),
            (averages and self.teacher_dtype not in (None, "float32"),
             "teacher_dtype: expected float32 for an average of weights, whose small steps 16 bits "
             "round away"),
            (served and self.support == "full",
             "support: full needs the teacher's whole distribution; a server returns its top-K"),
            (served and self.forward_kl_coef > 0,
             "forward_kl_coef: it needs the teacher's entropy, which a server does not return"),
            (served and needs_all and self.missing == "error"
             and not self.takes_sampled_tokens,
             "support: a server returns its own top-K; expected teacher or intersection, or "
             "missing: drop"),
        ]  # fmt: skip


@dataclass
class SFTConfig(TeacherConfig):
    """Supervised fine-tuning on given completions, or on those that a teacher generates first."""

    generate_from: Literal["data", "teacher"] = "data"

    @property
    def uses_references(self) -> bool:
        """See StageConfig."""
        return self.generate_from == "data"

    def _refusals(self) -> Refusals:
        return [*super()._refusals(),
            (self.generate_from == "teacher" and self.teacher is None,
             "teacher: missing; it generates the completions"),
            (self.generate_from == "teacher" and bool(self.servers),
             "generate_from: expected a teacher that is loaded here, not a server"),
            (self.completions_per_prompt > 1 and self.generate_from == "data",
             "completions_per_prompt: expected 1 with completions from the data"),
            (self.steps_per_rollout > 1, "steps_per_rollout: expected 1; use num_train_epochs"),
        ]  # fmt: skip


@dataclass
class RLVRConfig(StageConfig):
    """Reinforcement learning from verifiable rewards: the scorer is the reward.

    The group-relative policy gradient of GRPO, arXiv 2402.03300.
    """

    completions_per_prompt: Count = 8  # the group
    scale_advantages: bool = True  # by the group's standard deviation
    clip_ratio: Positive = 0.2  # of p(now) / p(when sampled), where more of it has no gradient
    clip_ratio_high: Positive | None = None  # upwards; default clip_ratio
    kl_coef: NotNegative = 0.0  # of the KL to the initial weights, nats per token

    def _refusals(self) -> Refusals:
        return [*super()._refusals(),
            (self.scorer is None, "scorer: missing; it is the reward"),
            (self.completions_per_prompt < 2,
             "completions_per_prompt: expected at least 2, since a reward counts by its difference "
             "to the others of the prompt"),
            (self.samples_differ,
             "sampling_temperature: the policy gradient is of the distribution that is sampled; "
             "expected top_p: 1 and no sampling_temperature"),
        ]  # fmt: skip


@dataclass
class EvaluationConfig(TeacherConfig):
    """Measurements of a model on held-out prompts, with a teacher or without."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "eval_data")

    train_data: str = field(default="", kw_only=True)
    # The teacher continues student completions that are cut at random; needs a scorer.
    prefix_probe: bool = False

    def _refusals(self) -> Refusals:
        return [*super()._refusals(),
            (self.prefix_probe and not (self.scorer and self.teacher),
             "prefix_probe: it needs a teacher and a scorer"),
            (self.prefix_probe and bool(self.servers),
             "prefix_probe: expected a teacher that is loaded here, not a server"),
        ]  # fmt: skip
