"""One flat config per stage."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from opd_trainer.config.base import Conflicts, StageConfig, TeacherConfig
from opd_trainer.config.values import Count, NotNegative, Positive, Share

OBJECTIVES = ("reverse_kl", "forward_kl", "jsd", "policy_gradient")


@dataclass
class DistillationConfig(TeacherConfig):
    """On-policy distillation: the student learns the teacher's distribution on its own samples."""

    teacher: str | dict[str, str] = "self"
    # EMA rate of the self-teacher, once per step: 0 keeps it frozen, 1 copies the student, and
    # values in between keep a moving average in float32.
    teacher_update_rate: Share = 0.0
    # reverse_kl, forward_kl, jsd, policy_gradient, or a function(student, teacher) of SparseLogits
    # that returns a loss per token, given as file.py:function or module:function.
    objective: str = "reverse_kl"
    stop_gradient: bool = True  # detach log p inside reverse_kl
    tail: Literal["drop", "bucket", "renormalize"] = "drop"
    beta: Share = 0.5  # the teacher's weight in the mixture of jsd
    # Token ids that the loss compares: the top-K of one model, or a combination of both top-Ks;
    # "sampled", the sampled token alone, is for a function.
    support: Literal["student", "teacher", "union", "intersection", "full", "sampled"] = "student"
    missing: Literal["error", "drop"] = "error"  # if a server leaves out ids of the support
    # Coefficient of a forward KL over the teacher's top-K that is added to reverse_kl.
    forward_kl_coef: NotNegative = 0.0
    # The forward KL is added only on tokens where the teacher's entropy (nats) is above this.
    forward_kl_min_entropy: float = 0.0
    # Coefficient of the cross-entropy on the rows' own completions.
    sft_coef: NotNegative = 0.0
    max_token_loss: Positive | None = None  # nats; above it a token has no gradient
    max_loss_tokens: Count | None = None  # only the first tokens of a completion have a loss
    # Weights tokens by p(student now) / p(rollout engine when sampled), at most by this: truncated
    # importance sampling, for completions that are reused and engines that differ from the student.
    max_importance_weight: Positive | None = None

    @property
    def takes_sampled_tokens(self) -> bool:
        """Whether the loss uses the sampled token alone."""
        return self.objective == "policy_gradient" or self.support == "sampled"

    @property
    def loss_support(self) -> Literal["student", "teacher", "union", "intersection", "full"]:
        """The loss's support: beside a forward KL, the student's top-K needs the teacher's too.

        For "sampled", each step passes the sampled tokens instead.
        """
        if self.support == "student" and self.forward_kl_coef > 0:
            return "union"
        return "student" if self.support == "sampled" else self.support

    @property
    def drops_mass(self) -> bool:
        """Whether the loss ignores the probability outside the support."""
        on_support = self.objective in OBJECTIVES and not self.takes_sampled_tokens
        return on_support and self.tail == "drop" and self.support != "full"

    def _conflicts(self) -> Conflicts:
        is_sampled, is_reverse = (self.objective == x for x in ("policy_gradient", "reverse_kl"))
        support_keys = (self.support, self.tail, self.stop_gradient, self.max_token_loss)
        rate, is_average = self.teacher_update_rate, 0 < self.teacher_update_rate < 1
        needs_all_ids = self.support in ("student", "union") and self.missing == "error"
        is_function = ":" in self.objective
        return [*super()._conflicts(),
            (self.objective not in OBJECTIVES and not is_function,
             f"objective: expected {', '.join(OBJECTIVES)}, file.py:function or module:function, "
             f"got {self.objective!r}"),
            (is_function and (self.tail, self.stop_gradient) != ("drop", True),
             "objective: a function has no tail or stop_gradient; leave these keys out"),
            (self.support == "sampled" and not is_function,
             "support: sampled is for a function; objective: policy_gradient needs no support"),
            (is_sampled and self.samples_differ,
             "objective: policy_gradient is unbiased only for samples from the student's own "
             "distribution; expected top_p: 1 and no sampling_temperature"),
            (is_sampled and support_keys != ("student", "drop", True, None),
             "objective: policy_gradient takes the sampled token alone: it has no support, tail, "
             "stop_gradient or max_token_loss; leave these keys out"),
            (is_sampled and self.steps_per_rollout > 1 and self.max_importance_weight is None,
             "objective: policy_gradient on reused completions needs max_importance_weight"),
            (self.forward_kl_coef > 0 and not is_reverse,
             "forward_kl_coef: it is added to objective: reverse_kl alone"),
            (self.forward_kl_coef > 0 and self.support == "intersection",
             "forward_kl_coef: it needs the teacher's whole top-K; expected support: student, "
             "teacher, union or full"),
            (not self.stop_gradient and not (is_reverse and self.drops_mass),
             "stop_gradient: only reverse_kl has one; false changes nothing here"),
            (self.tail == "renormalize" and self.k < 2,
             "k: expected at least 2 with tail: renormalize"),
            (rate > 0 and self.teacher != "self",
             "teacher_update_rate: expected 0 for a teacher that is another model"),
            (is_average and self.lora_r > 0,
             "teacher_update_rate: expected 0 (the base) or 1 (with the adapters) under lora_r"),
            (is_average and self.teacher_dtype not in (None, "float32"),
             "teacher_dtype: expected float32 for a moving average: 16 bits round its steps away"),
            (self.has_server and self.support == "full",
             "support: full needs the teacher's whole distribution; a server returns its top-K"),
            (self.has_server and self.forward_kl_coef > 0,
             "forward_kl_coef: it needs the teacher's entropy, which a server does not return"),
            (self.has_server and needs_all_ids and not self.takes_sampled_tokens,
             "support: a server returns its own top-K; expected teacher or intersection, or "
             "missing: drop"),
        ]  # fmt: skip


@dataclass
class SFTConfig(TeacherConfig):
    """Supervised fine-tuning on completions of the data, or of a teacher that generates them."""

    generate_from: Literal["data", "teacher"] = "data"

    def _conflicts(self) -> Conflicts:
        return [*super()._conflicts(),
            (self.generate_from == "teacher" and self.teacher is None,
             "teacher: missing; it generates the completions"),
            (self.generate_from == "teacher" and self.has_server,
             "generate_from: expected a teacher that is loaded here, not a server"),
            (self.completions_per_prompt > 1 and self.generate_from == "data",
             "completions_per_prompt: expected 1 with completions from the data"),
            (self.steps_per_rollout > 1, "steps_per_rollout: expected 1; use num_train_epochs"),
        ]  # fmt: skip


@dataclass
class RLVRConfig(StageConfig):
    """Reinforcement learning from verifiable rewards: the scorer is the reward.

    The loss is the group-relative policy gradient of GRPO, arXiv 2402.03300.
    """

    completions_per_prompt: Count = 8  # the group
    scale_advantages: bool = True  # divide by the group's standard deviation
    clip_ratio: Positive = 0.2  # bounds p(student now) / p(engine when sampled) to 1 +- this
    clip_ratio_high: Positive | None = None  # upper bound; default clip_ratio
    kl_coef: NotNegative = 0.0  # of the KL to the initial weights, nats per token

    def _conflicts(self) -> Conflicts:
        return [*super()._conflicts(),
            (self.scorer is None, "scorer: missing; it is the reward"),
            (self.completions_per_prompt < 2,
             "completions_per_prompt: expected at least 2, since a reward counts by comparison"),
            (self.samples_differ,
             "sampling_temperature: the policy gradient needs samples from the student's own "
             "distribution; expected top_p: 1 and no sampling_temperature"),
        ]  # fmt: skip


@dataclass
class EvaluationConfig(TeacherConfig):
    """Measurements of a model on held-out prompts, with or without a teacher."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "eval_data")

    train_data: str = field(default="", kw_only=True)
    # Let the teacher continue student completions cut at random places; needs a scorer.
    prefix_probe: bool = False

    def _conflicts(self) -> Conflicts:
        return [*super()._conflicts(),
            (self.prefix_probe and not (self.scorer and self.teacher),
             "prefix_probe: it needs a teacher and a scorer"),
            (self.prefix_probe and self.has_server,
             "prefix_probe: expected a teacher that is loaded here, not a server"),
        ]  # fmt: skip
