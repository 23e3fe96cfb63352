"""The bound: its terms by hand, what they must do, and that it holds where everything is known."""

import dataclasses
import math

import pytest
import torch

from mergekit_lit.theory.bound import TOTAL, bound
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts
from mergekit_lit.theory.travel import step_l1, step_l2_squared

EXPERT = ExpertFacts(
    travel=0.2,
    travel_squared=0.004,
    plain_sgd=(0.02, 10),
    d2=0.5,
    batch=8,
    noise=3.0,
    zeta2=0.7,
    eps2=0.01,
    eps2_head=0.002,
    train_loss=1.5,
    lr=0.02,
)
MERGE = MergeFacts(
    smoothness=1.25,
    surrogate_at_base=2.0,
    surrogate_gradient2=0.9,
    merged_gradient2=0.3,
    sample_gradient2=4.0,
)


def test_terms_by_hand():
    other = dataclasses.replace(EXPERT, travel=0.1, d2=0.2, train_loss=0.5, eps2=0.03, zeta2=0.1)
    found = bound([EXPERT, other], MERGE, [0.25, 0.75])
    terms = {name: term.value for name, term in found.terms.items()}
    a_eff = 0.25 * 0.2 + 0.75 * 0.1
    w = [0.25 * 0.2 / a_eff, 0.75 * 0.1 / a_eff]
    assert terms["progress"] == pytest.approx(2.0 - a_eff / 4 * 0.9)
    d2 = w[0] * 0.5 + w[1] * 0.2
    assert terms["drift"] == pytest.approx(a_eff * 1.25**2 / 2 * d2)
    zeta = w[0] * 0.7 + w[1] * 0.1
    noise = 2 * 0.02**2 * 9 * 3.0 / 8
    apart = [16 / 3 * s**2 * (2 * z + 2 * zeta) for s, z in ((0.2, 0.7), (0.1, 0.1))]
    closed = a_eff * 1.25**2 / 2 * (noise + w[0] * apart[0] + w[1] * apart[1])
    assert terms["drift_closed_form"] == pytest.approx(closed)
    assert found.terms["drift_closed_form"].provenance == "closed form"
    assert terms["merged_noise"] == pytest.approx(1.25 * (0.25**2 + 0.75**2) * 0.004 * 3 / 8)
    assert terms["merged_gradient"] == 0.3
    mean = w[0] * 1.5 + w[1] * 0.5
    variance = w[0] * (1.5 - mean) ** 2 + w[1] * (0.5 - mean) ** 2
    chi2 = sum((0.5 - share) ** 2 / share for share in w)
    assert terms["divergence"] == pytest.approx(math.sqrt(chi2 * variance))
    delta2 = 0.5 * (0.25**2 * 0.01 + 0.002) + 0.5 * (0.75**2 * 0.03 + 0.002)
    assert terms["delta2"] == pytest.approx(delta2)
    by_loss = math.sqrt(2 * 1.25 * 1.0 * delta2) + 1.25 * delta2 / 2
    by_gradient = 2 * math.sqrt(delta2) + 1.25 * delta2 / 2
    assert terms["generalization_by_loss"] == pytest.approx(by_loss)
    assert terms["generalization_by_gradient"] == pytest.approx(by_gradient)
    assert terms["generalization"] == pytest.approx(min(by_loss, by_gradient))
    assert found.total == pytest.approx(sum(terms[name] for name in TOTAL))


def test_a_total_needs_each_of_its_terms_and_says_what_is_missing():
    for name in ("smoothness", "surrogate_at_base", "surrogate_gradient2"):
        found = bound([EXPERT] * 2, dataclasses.replace(MERGE, **{name: None}), [0.5, 0.5])
        assert found.total is None
    found = bound([dataclasses.replace(EXPERT, eps2=None)] * 2, MERGE, [0.5, 0.5])
    assert found.total is None
    assert found.terms["delta2"].note == "needs eps^2"
    assert found.terms["generalization"].provenance == "unknown"
    assert found.terms["drift"].value is not None


def test_cards_alone_give_the_closed_forms():
    cards = [ExpertFacts(travel=s, lr=0.01) for s in (1.0, 2.0)]
    found = bound(cards, MergeFacts(), [0.5, 0.5])
    assert found.weighing.chi2_w == pytest.approx(
        1 / 9 * 0.25 / (1 / 3) + 1 / 36 / (2 / 3) - 0, abs=1
    )
    known = [name for name, term in found.terms.items() if term.value is not None]
    assert known == []
    assert found.total is None


def test_the_closed_form_is_vacuous_where_it_is_not_proved():
    far = dataclasses.replace(EXPERT, travel=10.0)
    term = bound([far] * 2, MERGE, [0.5, 0.5]).terms["drift_closed_form"]
    assert (term.value, term.provenance) == (None, "vacuous")
    assert "eta K L = 12.5" in term.note


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("d2", "drift"),
        ("zeta2", "drift_closed_form"),
        ("noise", "merged_noise"),
        ("noise", "drift_closed_form"),
        ("travel_squared", "merged_noise"),
        ("eps2", "generalization"),
        ("eps2_head", "generalization"),
        ("train_loss", "generalization_by_loss"),
    ],
)
def test_terms_grow_with_their_constants(name, larger):
    before = bound([EXPERT] * 3, MERGE, [1 / 3] * 3)
    more = dataclasses.replace(EXPERT, **{name: getattr(EXPERT, name) * 1.3})
    after = bound([more] * 3, MERGE, [1 / 3] * 3)
    assert after.terms[larger].value > before.terms[larger].value


@pytest.mark.parametrize("larger", ["drift", "merged_noise", "generalization"])
def test_terms_grow_with_the_smoothness(larger):
    rough = dataclasses.replace(MERGE, smoothness=1.4)
    before, after = (bound([EXPERT] * 2, m, [0.5, 0.5]) for m in (MERGE, rough))
    assert after.terms[larger].value > before.terms[larger].value


def test_terms_are_zero_where_they_must_be():
    still = dataclasses.replace(EXPERT, d2=0.0, noise=0.0, eps2=0.0, eps2_head=0.0)
    terms = bound([still] * 2, MERGE, [0.5, 0.5]).terms
    for name in ("drift", "merged_noise", "divergence", "delta2", "generalization"):
        assert terms[name].value == 0


def test_averaging_more_experts_lowers_noise_and_delta():
    few, many = (bound([EXPERT] * n, MERGE, [1 / n] * n) for n in (2, 8))
    assert many.terms["merged_noise"].value == pytest.approx(few.terms["merged_noise"].value / 4)
    backbone = dataclasses.replace(EXPERT, eps2_head=0.0)
    few, many = (bound([backbone] * n, MERGE, [1 / n] * n) for n in (2, 8))
    assert many.terms["delta2"].value == pytest.approx(few.terms["delta2"].value / 16)


def test_a_merge_that_is_not_linear_takes_its_own_stability():
    linear = dataclasses.replace(MERGE, linear=False)
    found = bound([EXPERT] * 2, linear, [0.5, 0.5])
    assert found.terms["delta2"].provenance == "unknown"
    measured = dataclasses.replace(linear, delta2_of_merge=0.04)
    assert bound([EXPERT] * 2, measured, [0.5, 0.5]).terms["delta2"].value == pytest.approx(0.042)


def test_gradients_along_the_path_replace_the_smoothness():
    facts = dataclasses.replace(MERGE, smoothness=None, gradient_drift=[0.2, 0.4])
    found = bound([EXPERT] * 2, facts, [0.5, 0.5])
    assert found.terms["drift"].value == pytest.approx(0.2 / 2 * 0.3)
    assert found.terms["drift"].note == "by gradients"


def test_broken_assumptions_are_said():
    steep = dataclasses.replace(MERGE, smoothness=150.0)
    found = bound([dataclasses.replace(EXPERT, adaptive=True)] * 2, steep, [0.5, 0.7])
    text = " ".join(found.violated)
    for part in ("sum to 1.2", "eta L = 3 exceeds 2", "exceeds 0.306", "exceeds 0.5", "adaptive"):
        assert part in text
    assert found.effective
    assert bound([EXPERT] * 2, MERGE, [0.5, 0.5]).violated == ()


@pytest.mark.parametrize(
    ("expert", "merge", "message"),
    [
        ({"eps2": -1.0}, {}, "`eps2` must be at least 0 and finite"),
        ({"train_loss": math.nan}, {}, "`train_loss` must be at least 0 and finite"),
        ({}, {"smoothness": math.inf}, "`smoothness` must be at least 0 and finite"),
    ],
)
def test_constants_out_of_range_are_refused(expert, merge, message):
    facts = dataclasses.replace(EXPERT, **expert)
    with pytest.raises(ValueError, match=message):
        bound([facts] * 2, dataclasses.replace(MERGE, **merge), [0.5, 0.5])


class Quadratics:
    """T tasks, f_i(x; z) = (x - z)^T A_i (x - z) / 2 on n samples z; many runs at once."""

    def __init__(self, seed, *, tasks=3, n=20, dim=4, runs=400, apart=1.0):
        draw = torch.Generator().manual_seed(seed)
        self.draw, self.runs, self.n, self.tasks = draw, runs, n, tasks
        roots = torch.randn(tasks, dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
        self.a = roots @ roots.transpose(1, 2)
        self.centres = apart * torch.randn(tasks, dim, generator=draw, dtype=torch.float64)
        self.smooth = float(torch.linalg.eigvalsh(self.a).max())

    def samples(self):
        """Fresh training samples of all tasks, (runs, tasks, n, dim)."""
        shape = (self.runs, self.tasks, self.n, self.centres.shape[1])
        noise = torch.randn(shape, generator=self.draw, dtype=torch.float64)
        return self.centres[:, None] + noise

    def loss(self, x, z):
        """F_S of each task, (runs, tasks), x (runs, dim)."""
        apart = x[:, None, None] - z
        return 0.5 * torch.einsum("rtnd,tde,rtne->rtn", apart, self.a, apart).mean(2)

    def population(self, x):
        """F of each task: samples are normal about the centres."""
        apart = x[:, None] - self.centres
        trace = self.a.diagonal(dim1=1, dim2=2).sum(1)
        return 0.5 * (torch.einsum("rtd,tde,rte->rt", apart, self.a, apart) + trace)

    def gradients(self, x, z):
        return torch.einsum("tde,rtne->rtnd", self.a, x[:, :, None] - z)

    def train(self, z, picks, lr, momentum):
        """SGD from 0; `picks` (steps, runs, tasks, batch). Returns x_K, and the sum of a d^2."""
        runs, tasks, _, dim = z.shape
        x = torch.zeros(runs, tasks, dim, dtype=torch.float64)
        v = torch.zeros_like(x)
        squares = []
        for at in picks:
            taken = torch.gather(z, 2, at[..., None].expand(-1, -1, -1, dim))
            squares.append(x.square().sum(2))
            v = momentum * v + torch.einsum("tde,rtbe->rtbd", self.a, x[:, :, None] - taken).mean(2)
            x = x - lr * v
        return x, torch.stack(squares)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_it_holds_on_quadratics(seed, momentum):
    """Optimization: E F~_S(x_avg); generalization: E[F - F_S](x_avg), eps measured by refits."""
    problem = Quadratics(seed, apart=1.0 + seed)
    steps, batch, tasks, n = 8, 4, problem.tasks, problem.n
    travel_per_lr = step_l1(steps, momentum=momentum)
    lr = 0.3 / (travel_per_lr * problem.smooth)
    z = problem.samples()
    shape = (steps, problem.runs, tasks, batch)
    picks = torch.randint(n, shape, generator=problem.draw)
    x, squares = problem.train(z, picks, lr, momentum)
    coefficients = [1 / tasks] * tasks
    merged = x.mean(1)
    steps_l2 = step_l2_squared(steps, momentum=momentum)
    a = torch.tensor(
        [(1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps)], dtype=torch.float64
    )
    d2 = torch.einsum("k,krt->rt", a, squares).mean(0) / a.sum()
    at_base = torch.zeros(problem.runs, problem.centres.shape[1], dtype=torch.float64)
    per_sample = problem.gradients(at_base[:, None].expand(-1, tasks, -1), z)
    of_tasks = per_sample.mean(2)
    # The noise of a quadratic with one matrix a task is the same at every point.
    noise = (per_sample - of_tasks[:, :, None]).square().sum(3).mean(2).mean(0)
    mean = of_tasks.mean(1, keepdim=True)
    zeta2 = (of_tasks - mean).square().sum(2).mean(0)
    eps2 = torch.zeros(tasks, dtype=torch.float64)
    for j in range(n):
        twin = z.clone()
        twin[:, :, j] = problem.samples()[:, :, 0]
        eps2 += (problem.train(twin, picks, lr, momentum)[0] - x).square().sum(2).mean(0) / n
    own = problem.gradients(merged[:, None].expand(-1, tasks, -1), z).square().sum(3)
    train_loss = problem.loss(merged, z)
    experts = [
        ExpertFacts(
            travel=lr * travel_per_lr,
            travel_squared=lr**2 * steps_l2,
            plain_sgd=None if momentum else (lr, steps),
            d2=float(d2[i]),
            batch=batch,
            noise=float(noise[i]),
            zeta2=float(zeta2[i]),
            eps2=float(eps2[i]),
            train_loss=float(train_loss[:, i].mean()),
            lr=lr,
        )
        for i in range(tasks)
    ]
    facts = MergeFacts(
        smoothness=problem.smooth,
        surrogate_at_base=float(problem.loss(at_base, z).mean()),
        surrogate_gradient2=float(mean.square().sum(2).mean()),
        sample_gradient2=float(own.mean()),
    )
    found = bound(experts, facts, coefficients)
    terms = {name: term.value for name, term in found.terms.items()}
    reached = float(train_loss.mean())
    for drift in ("drift", "drift_closed_form"):
        assert reached <= terms["progress"] + terms[drift] + terms["merged_noise"]
    # The gap at the base has mean 0: taking it away takes most of the chance away.
    of_base = problem.population(at_base) - problem.loss(at_base, z)
    gap = float((problem.population(merged) - train_loss - of_base).mean())
    assert 0 < gap <= terms["generalization_by_gradient"]
    assert gap <= terms["generalization_by_loss"]
    assert terms["drift"] <= terms["drift_closed_form"]
    assert float(problem.population(merged).mean()) <= found.total
