"""The bound holds where everything is known: many runs of SGD on quadratics."""

import pytest
import torch

from mergekit_lit.theory.bound import bound
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.facts import ALL, ExpertFacts, MergeFacts
from mergekit_lit.theory.travel import step_l1, step_l2_squared


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

    def train(self, z, picks, lr, momentum, part=slice(None)):
        """SGD from 0; `picks` (steps, runs, tasks, batch). Returns x_K, and ||x_k - x_0||^2."""
        runs, tasks, _, dim = z.shape
        x = torch.zeros(runs, tasks, dim, dtype=torch.float64)
        v = torch.zeros_like(x)
        squares = []
        for at in picks:
            taken = torch.gather(z, 2, at[..., None].expand(-1, -1, -1, dim))
            squares.append(x[:, :, part].square().sum(2))
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
            base_loss=float(problem.loss(at_base, z)[:, i].mean()),
            train_loss=float(train_loss[:, i].mean()),
            slope=float((of_tasks[:, i] * merged).sum(1).mean()),
            lr=lr,
        )
        for i in range(tasks)
    ]
    facts = MergeFacts(
        smoothness=problem.smooth,
        gram={ALL: torch.einsum("rid,rjd->ij", of_tasks, of_tasks).div(problem.runs).tolist()},
        sample_gradient2=float(own.mean()),
        step2={ALL: float(merged.square().sum(1).mean())},
    )
    found = bound(experts, facts, coefficients)
    terms = {name: term.value for name, term in found.terms.items()}
    reached = float(train_loss.mean())
    for drift in ("drift", "drift_closed_form"):
        # Of equal travels: what the step shows is tighter than what the path lets one expect.
        assert terms["descent"] <= terms["progress"] + terms[drift] + terms["merged_noise"]
    assert reached <= terms["descent"]
    # The gap at the base has mean 0: taking it away takes most of the chance away.
    of_base = problem.population(at_base) - problem.loss(at_base, z)
    gap = float((problem.population(merged) - train_loss - of_base).mean())
    assert 0 < gap <= terms["generalization_by_gradient"]
    assert gap <= terms["generalization_by_loss"]
    assert terms["drift"] <= terms["drift_closed_form"]
    assert float(problem.population(merged).mean()) <= found.total_by_step <= found.total


@pytest.mark.parametrize("seed", range(6))
def test_it_holds_on_quadratics_whose_coefficients_differ_by_block(seed):
    """Optimization alone: E F~_S(x_avg) by what each block is measured to have moved."""
    problem = Quadratics(seed, apart=1.0 + seed)
    halves = {"low": slice(0, 2), "high": slice(2, 4)}
    problem.a[:, 0:2, 2:4] = problem.a[:, 2:4, 0:2] = 0.0
    steps, batch, tasks = 8, 4, problem.tasks
    smooth = float(torch.linalg.eigvalsh(problem.a).max())
    draw = torch.rand(2, tasks, generator=problem.draw, dtype=torch.float64)
    rows = dict(zip(halves, draw / draw.sum(1, keepdim=True), strict=True))
    lr = 0.3 / (steps * smooth)
    z = problem.samples()
    picks = torch.randint(problem.n, (steps, problem.runs, tasks, batch), generator=problem.draw)
    x, squares = problem.train(z, picks, lr, 0.0)
    d2 = squares.mean((0, 1))
    low = problem.train(z, picks, lr, 0.0, part=halves["low"])[1].mean((0, 1)) / d2
    parts = {"low": low, "high": 1 - low}
    merged = torch.cat(
        [torch.einsum("t,rtd->rd", rows[name], x[:, :, half]) for name, half in halves.items()], 1
    )
    start = torch.zeros(problem.runs, 4, dtype=torch.float64)
    each = problem.gradients(start[:, None].expand(-1, tasks, -1), z)
    gradients = each.mean(2)
    noise = (each - gradients[:, :, None]).square().sum(3).mean((0, 2))
    losses = [problem.loss(at, z).mean(0) for at in (start, merged)]
    experts = [
        ExpertFacts(
            travel=lr * steps,
            travel_squared=lr**2 * steps,
            d2=float(d2[i]),
            batch=batch,
            noise=float(noise[i]),
            base_loss=float(losses[0][i]),
        )
        for i in range(tasks)
    ]
    gram = {
        name: torch.einsum("rid,rjd->ij", gradients[:, :, half], gradients[:, :, half]).tolist()
        for name, half in halves.items()
    }
    gram = {name: [[e / problem.runs for e in row] for row in rows] for name, rows in gram.items()}
    blocks = [Block(n, tuple(rows[n].tolist()), tuple(parts[n].tolist())) for n in halves]
    found = bound(experts, MergeFacts(smoothness=smooth, gram=gram), blocks)
    w = torch.tensor(found.weighing.w, dtype=torch.float64)
    terms = [found.terms[n].value for n in ("progress", "drift", "mismatch", "merged_noise")]
    assert found.terms["mismatch"].value > 0
    assert float(w @ losses[1]) <= sum(terms)
