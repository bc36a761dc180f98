"""Second derivatives and forward mode raise on every path, and are right through materialize()."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.testing import assert_close

from opd_kernels import LazyLogits, SparseLogits, VocabShard, distillation_loss, reverse_kl
from opd_kernels.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from tests.distill_cases import SUPPORTS, TOKENS, VOCAB, K, ids_of, pair, summed_loss
from tests.reference import operands

SECOND = (
    "^opd_kernels: the gradient of a loss has no autograd formula, so it cannot be differentiated "
    r"again; compute gradient penalties and Hessians from the logits of LazyLogits.materialize\(\)$"
)
REVERSE_MODE_ONLY = (
    "^opd_kernels: topk, gather, log_prob and distillation_loss have no derivative in forward mode "
    r"or under torch.func; use backward\(\) or torch.autograd.grad, or differentiate the logits of "
    r"LazyLogits.materialize\(\)$"
)
TEACHER = pair()[1]
IDS, TARGETS = ids_of(TOKENS, K), torch.arange(TOKENS)


def liger(student, loss, **arguments):
    heads = (student.hidden, student.weight, TEACHER.hidden, TEACHER.weight[: len(student.weight)])
    return loss(*heads, **arguments)


def summed(method, support):
    return lambda s: summed_loss(s, TEACHER, support, K, method=method).loss


# Functions of a student to a number. Every public path to a derivative is here.
PATHS = {
    "values of topk": lambda s: s.topk(K).values.sum(),
    "tail of topk": lambda s: s.topk(K).tail.square().sum(),
    "mass of topk": lambda s: s.topk(K).mass.sum(),
    "values of gather": lambda s: s.gather(IDS).values.sum(),
    "tail of gather": lambda s: s.gather(IDS).tail.sum(),
    "gather without tail": lambda s: s.gather(IDS, tail=False).values.sum(),
    "log_prob": lambda s: s.log_prob(TARGETS).sum(),
    "module": lambda s: liger(s, LigerFusedLinearJSD()),
    "labels and module": lambda s: liger(s, LigerFusedLinearJSDLoss(), true_labels=TARGETS),
    "filter": lambda s: loss_of(s, method="one_pass", gradient_filter=1e-3),
    "no reduction": lambda s: loss_of(s, reduction="none").sum(),
    "weights": lambda s: loss_of(s, token_weights=torch.arange(TOKENS)),
    "own objective, full": lambda s: loss_of(s, support="full", objective=squared_difference),
} | {
    f"{method}, {support}": summed(method, support)
    for method in ("one_pass", "recompute")
    for support in SUPPORTS
}  # fmt: skip


def squared_difference(student, teacher):
    return (student.values - teacher.values).square().sum(-1)


def loss_of(student, **options):
    return distillation_loss(student, TEACHER, k=K, **options).loss


@pytest.fixture
def student():
    torch.manual_seed(1)
    return pair()[0]


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.mark.parametrize("operand", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_a_gradient_penalty_raises(student, path, operand):
    """Added to the loss, as users do: the loss alone has a gradient, so a lost term is silent."""
    x = operands(student)[operand]
    (gradient,) = torch.autograd.grad(path(student), x, create_graph=True, allow_unused=True)
    if gradient is None:
        pytest.skip("this path has no bias")
    total = path(student) + gradient.square().sum()
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(total, x)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["values of topk", "tail of gather", "one_pass, student",
                                  "recompute, student", "one_pass, full"])  # fmt: skip
def test_a_gradient_penalty_on_a_split_head_raises(student, group, name):
    """The collectives have gradients of their own, which would hide the operators' error."""
    path = PATHS[name]
    split = replace(student, shard=VocabShard.from_weight(student.weight, group))
    assert_close(path(split), path(student))
    for x in operands(student):
        (gradient,) = torch.autograd.grad(path(split), x, create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(path(split) + gradient.square().sum(), x)


@pytest.mark.parametrize("by_backward", [True, False])
def test_a_penalty_on_one_operand_raises_for_another(student, path, by_backward):
    (gradient,) = torch.autograd.grad(path(student), student.hidden, create_graph=True)
    total = path(student) + gradient.sum()
    with pytest.raises(RuntimeError, match=SECOND):
        total.backward() if by_backward else torch.autograd.grad(total, student.weight)


def test_a_graph_of_the_gradient_that_nobody_differentiates_does_no_harm(student, path):
    x = operands(student)[:2]
    plain = torch.autograd.grad(path(student), x)
    assert_close(torch.autograd.grad(path(student), x, create_graph=True), plain)


@pytest.mark.parametrize("operand", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_forward_mode_raises(student, path, operand, needs_grad):
    x = getattr(student, operand)
    if torch.autograd.grad(path(student), x, allow_unused=True)[0] is None:
        pytest.skip("this path has no bias")
    if not needs_grad:
        student, x = student.detach(), x.detach()

    def of_operand(x):
        return path(replace(student, **{operand: x}))

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=REVERSE_MODE_ONLY):
            of_operand(dual)
    with pytest.raises(RuntimeError, match=REVERSE_MODE_ONLY):
        torch.func.jvp(of_operand, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_torch_func_is_refused(student, path, transform):
    def of_hidden(x):
        return path(replace(student.detach(), hidden=x))

    with pytest.raises(RuntimeError, match=REVERSE_MODE_ONLY):
        getattr(torch.func, transform)(of_hidden)(student.hidden.detach())


def test_vmap_of_an_operator_is_right(student):
    """PyTorch calls the operator once for each element of the batch."""
    batch = torch.randn(3, *student.hidden.shape, dtype=torch.float64)
    student = student.detach()

    def tail(x):
        return replace(student, hidden=x).topk(K).tail

    assert_close(torch.func.vmap(tail)(batch), torch.stack([tail(x) for x in batch]))


def test_a_tangent_of_something_else_does_no_harm(student, path):
    other = torch.ones(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(other, other)
        assert_close(path(student), path(student))
        assert forward_ad.unpack_dual(dual.sum()).tangent == 3


def test_the_remedy_has_all_derivatives(student):
    """A Hessian of the logits' loss in both ways, and that of a softmax in closed form."""

    def loss(hidden):
        return replace(student, hidden=hidden).materialize().logsumexp(-1).sum()

    student = LazyLogits(student.hidden[:2], student.weight, vocab_size=VOCAB)
    hidden = student.hidden.detach()
    p = student.detach().materialize().softmax(-1)
    w = student.weight.detach()[:VOCAB]
    mean = p @ w
    expected = torch.einsum("nv,vd,ve->nde", p, w, w) - mean[:, :, None] * mean[:, None]
    for hessian in (
        torch.autograd.functional.hessian(loss, hidden),
        torch.func.hessian(loss)(hidden),
        torch.func.jacrev(torch.func.jacrev(loss))(hidden),
    ):
        assert_close(hessian[0, :, 0], expected[0])
        assert_close(hessian[1, :, 1], expected[1])
        assert_close(hessian[0, :, 1], torch.zeros_like(expected[0]))


@pytest.mark.parametrize("name", ["token_weights", "denominator"])
@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_a_gradient_of_the_weights_is_refused(student, name, method):
    value = torch.ones(TOKENS if name == "token_weights" else (), requires_grad=True)
    run = partial(loss_of, student, method=method)
    message = (
        f"^{name}: expected a tensor without gradient, got one that requires it; pass {name}"
        r"\.detach\(\), or weigh the losses of reduction='none' yourself$"
    )
    with pytest.raises(ValueError, match=message):
        run(**{name: value})
    with torch.no_grad():
        expected = run(**{name: value})
    assert_close(run(**{name: value.detach()}).detach(), expected)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REVERSE_MODE_ONLY):
        run(**{name: forward_ad.make_dual(value.detach(), torch.ones_like(value))})


def test_weighing_the_losses_yourself_has_the_gradient_of_the_weights(student):
    weights = torch.rand(TOKENS, dtype=torch.float64, requires_grad=True)
    out = distillation_loss(student, TEACHER, k=K, reduction="none")
    (gradient,) = torch.autograd.grad((out.loss * weights).sum(), weights)
    assert_close(gradient, out.per_token)


@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_learned_factor_in_an_objective_has_a_gradient_or_is_refused(student, support, is_leaf):
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    used = factor if is_leaf else factor * 1.0

    def objective(s, t):
        return used * reverse_kl(s, t, tail="bucket")

    run = partial(summed_loss, student, TEACHER, support, K, objective=objective)
    message = (
        "^objective: expected a loss of student and teacher alone, got one that depends on another "
        r"tensor that needs a gradient, of shape \(\); detach it, or use method='recompute' with a "
        "support of K ids$"
    )
    with pytest.raises(ValueError, match=message):
        run(method="one_pass")
    out = run(method="recompute")
    if support == "full":
        with pytest.raises(ValueError, match=message):
            torch.autograd.grad(out.loss, student.hidden)
    else:
        (gradient,) = torch.autograd.grad(out.loss, factor)
        assert_close(gradient, out.per_token.sum() / 2)
    with torch.no_grad():
        assert_close(run(method="one_pass").loss, out.loss.detach())


def test_objectives_on_tensors_of_your_own_are_differentiable_twice(student):
    s, teacher = student.detach().topk(K), TEACHER
    t = teacher.gather(s.ids)

    def loss(values):
        own = SparseLogits(values, s.ids, s.tail, VOCAB, s.temperature)
        return reverse_kl(own, t, tail="bucket", stop_gradient=False).sum()

    hessian = torch.func.hessian(loss)(s.values)
    assert_close(hessian, torch.autograd.functional.hessian(loss, s.values))
    assert hessian.abs().max() > 0
