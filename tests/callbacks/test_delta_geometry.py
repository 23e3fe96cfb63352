"""DeltaGeometry against NumPy, and its ways into the log."""

import json
import logging
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergekit_lit.callbacks import DeltaGeometry, MergeCallback
from mergekit_lit.core.merging import MergeObserver
from mergekit_lit.merging import merge
from mergekit_lit.theory import geometry as module


def observed(experts, geometry=None):
    geometry = geometry or DeltaGeometry()
    merge(experts, "average", observers=[geometry])
    return geometry.to_json()


def flat_deltas(experts, group=None):
    names = [n for n in experts.merged_names() if group in (None, experts.structure[n].group)]
    base = np.concatenate([experts.base[n].numpy().ravel() for n in names])
    tuned = [np.concatenate([t[n].numpy().ravel() for n in names]) for t in experts.tuned]
    return np.stack(tuned) - base


def check(found, deltas):
    norms = np.linalg.norm(deltas, axis=1)
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-12)
    np.testing.assert_allclose(
        found["cosine"], deltas @ deltas.T / np.outer(norms, norms), rtol=1e-10, atol=1e-12
    )
    for s, left in enumerate(deltas):
        for t, right in enumerate(deltas):
            both = (left != 0) & (right != 0)
            opposite = (np.sign(left) != np.sign(right)) & both
            assert found["sign_conflict"][s][t] == pytest.approx(opposite.sum() / both.sum())
    lost = 1 - np.abs(deltas.sum(axis=0)).sum() / np.abs(deltas).sum()
    assert found["cancellation"] == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_equals_numpy_globally_and_by_group(tiny_experts, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    sparse = tiny_experts.tuned[0] | {"block.weight": tiny_experts.base["block.weight"]}
    experts = replace(tiny_experts, tuned=[sparse, *tiny_experts.tuned[1:]])
    found = observed(experts)
    assert found["experts"] == list(experts.names)
    check(found["global"], flat_deltas(experts))
    assert set(found["groups"]) == {"stem", "block"}
    for group in found["groups"]:
        check(found["groups"][group], flat_deltas(experts, group))


def test_equal_and_opposite_experts(tiny_experts):
    base = tiny_experts.base
    names = tiny_experts.merged_names()
    up = {**base, **{name: base[name] + 0.5 for name in names}}
    down = {**base, **{name: base[name] - 0.5 for name in names}}
    found = observed(replace(tiny_experts, tuned=[up, up, down]))["global"]
    np.testing.assert_allclose(found["cosine"], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-12)
    assert found["sign_conflict"] == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert found["cancellation"] == pytest.approx(2 / 3)


def test_an_expert_that_did_not_move_has_no_direction(tiny_experts):
    found = observed(replace(tiny_experts, tuned=[tiny_experts.base, *tiny_experts.tuned[1:]]))
    assert found["global"]["norms"][0] == 0
    assert found["global"]["cosine"][0] == [None, None, None]
    assert found["global"]["sign_conflict"][0] == [None, None, None]
    json.dumps(found, allow_nan=False)
    still = observed(replace(tiny_experts, tuned=[tiny_experts.base] * 3))
    assert still["global"]["cancellation"] is None


def test_a_second_merge_starts_anew(tiny_experts):
    geometry = DeltaGeometry()
    first = observed(tiny_experts, geometry)
    assert observed(tiny_experts, geometry) == first


def test_small_deltas_of_half_precision_experts_keep_their_norm(make_experts):
    experts = make_experts(dtype=torch.float16, size=1e-3)
    wide = replace(
        experts,
        base={n: t.double() for n, t in experts.base.items()},
        tuned=[{n: t.double() for n, t in tuned.items()} for tuned in experts.tuned],
    )
    norms = observed(experts)["global"]["norms"]
    np.testing.assert_allclose(norms, np.linalg.norm(flat_deltas(wide), axis=1), rtol=1e-6)


def test_logs_to_the_trainers_loggers_and_to_the_log(tiny_experts, caplog):
    logged = []
    trainer = SimpleNamespace(loggers=[SimpleNamespace(log_metrics=logged.append)])
    geometry = DeltaGeometry()
    geometry.setup(trainer, SimpleNamespace(), "test")
    with caplog.at_level(logging.INFO):
        found = observed(tiny_experts, geometry)["global"]
    assert len(logged) == 1
    assert logged[0]["delta/norm/task1"] == found["norms"][1]
    assert set(logged[0]) == {
        *(f"delta/norm/task{t}" for t in range(3)),
        "delta/cosine",
        "delta/sign_conflict",
        "delta/cancellation",
    }
    pairs = [found["cosine"][s][t] for s in range(3) for t in range(s + 1, 3)]
    assert logged[0]["delta/cosine"] == pytest.approx(np.mean(pairs))
    assert "delta/cosine" in caplog.text


def test_is_an_observer_and_can_be_sent_to_another_process(tiny_experts):
    assert isinstance(MergeCallback(), MergeObserver)
    geometry = DeltaGeometry()
    found = observed(tiny_experts, geometry)
    assert pickle.loads(pickle.dumps(geometry)).to_json() == found


def test_a_callback_that_overrides_nothing_changes_nothing(tiny_experts):
    plain = merge(tiny_experts, "average")
    seen = merge(tiny_experts, "average", observers=[MergeCallback()])
    assert all(torch.equal(tensor, seen.shared[name]) for name, tensor in plain.shared.items())
