"""Many merges in one pass: the same bytes as one by one, from fewer looks at the experts."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import merge, merge_many

GRIDS = {
    "task_arithmetic": [{"scale": s} for s in (0.0, 0.1, 0.5, 1.0)],
    "weighted_average": [{"weights": [1, 2, 3]}, {}, {"weights": [0, 0, 1]}],
    "ties": [{"density": d, "scale": s} for d in (0.2, 0.6) for s in (0.5, 1.0)]
    + [{"density": {"block": 0.1, "*": 0.6}}, {"density": 0.2, "trim": "tensor"}, {"density": 1.0}],
    "dare": [{"drop": 0.2}, {"drop": 0.8}, {"rescale": "l1"}, {"drop": 0.2, "scale": 0.1}],
    "pcb": [{"density": d} for d in (0.1, 0.4, 0.02, 1.0)] + [{"density": 0.4, "scale": 0.5}],
    "tsv_m": [{"scale": {"block": 0.5, "*": 1.0}}, {"scale": 0.5}],
    "lines": [{"beta": 0.1}, {"beta": 0.9}],
    "emr": [{}, {}],
    "git_rebasin": [{}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", GRIDS)
def test_many_are_the_same_bytes_as_one_by_one(make_experts, method, dtype):
    experts = make_experts(3, dtype=dtype)
    options = {"veneers": [("equal_norms", {}), ("lines", {})], "batch_norm": "average", "seed": 2}
    many = list(merge_many(experts, method, GRIDS[method], **options))
    for config, merged in zip(GRIDS[method], many, strict=True):
        own = merge(experts, method, config=config, **options)
        assert merged.facts == own.facts
        assert merged.scales == own.scales
        assert list(merged.shared) == list(own.shared)
        assert all(torch.equal(merged.shared[name], t) for name, t in own.shared.items())


class Counting(Mapping[str, torch.Tensor]):
    """Tensors that count how often each is asked for."""

    def __init__(self, params: Mapping[str, torch.Tensor]) -> None:
        self._params = params
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def reads(make_experts, method, configs) -> int:
    experts = make_experts(3, dtype=torch.float32)
    counting = [Counting(tuned) for tuned in experts.tuned]
    for _ in merge_many(replace(experts, tuned=counting), method, configs):
        pass
    return counting[0].reads["block.weight"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "tsv_m", "metagpt"])
def test_a_grid_of_scales_reads_what_one_merge_reads(make_experts, method):
    grid = [{"scale": 0.1 * i} for i in range(10)]
    assert reads(make_experts, method, grid) == reads(make_experts, method, [{}])


@pytest.mark.parametrize("method", ["ties", "pcb"])
def test_a_grid_of_densities_reads_what_one_merge_reads(make_experts, method):
    grid = [{"density": 0.1 * i, "scale": 0.5 * i} for i in range(1, 10)]
    assert reads(make_experts, method, grid) == reads(make_experts, method, [{}])


def test_preparing_passes_are_shared_where_their_parameters_agree(make_experts):
    configs = [{"combine": "sum"}, {"combine": "mean"}]
    assert reads(make_experts, "ties", configs) == reads(make_experts, "ties", [{}])


def test_nothing_is_read_before_the_first_result_is_asked_for(tiny_experts, headers_of):
    unread = headers_of(tiny_experts)
    merge_many(unread, "ties", [{"density": 0.2}])
    with pytest.raises(KeyError, match="Did you mean 'density'"):
        merge_many(unread, "ties", [{"density": 0.2}, {"densty": 0.2}])


def test_no_configuration_gives_no_merge(tiny_experts):
    assert list(merge_many(tiny_experts, "ties", [])) == []


def test_every_method_with_a_scale_says_that_it_is_one():
    scaled = [m for m in MERGE_METHODS if "scale" in m.facts.get("search", {})]
    assert len(scaled) >= 18
    assert [m.name for m in scaled if not m.facts.get("homogeneous")] == []
