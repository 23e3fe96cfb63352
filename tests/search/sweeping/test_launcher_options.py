"""What launchers refuse before anything is written, and what they make of their options."""

import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mergekit_lit.search.sweeping.launchers import ray
from mergekit_lit.search.sweeping.launchers.ray import ray_cluster
from mergekit_lit.search.sweeping.launchers.slurm import slurm_executor

LOCAL = {"cluster": "local"}


@pytest.fixture
def ray_stand_in(monkeypatch):
    """A Ray that is never reached: to connect to it fails the test."""

    def init(**_):
        pytest.fail("Ray would wait for minutes.")

    stand_in = ModuleType("ray")
    vars(stand_in).update(init=init, is_initialized=lambda: False)
    stand_in.exceptions = SimpleNamespace(RayError=OSError)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def closed_port():
    """A port at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.usefixtures("ray_stand_in")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_told_at_once(scheme, closed_port, monkeypatch):
    address = f"{scheme}127.0.0.1:{closed_port}"
    with pytest.raises(ValueError, match=f"cluster at '{address}' must be reachable"):
        ray_cluster({"address": address})
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match="must be reachable"):
        ray_cluster({})


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_addresses_that_name_no_place_are_rays_to_find(address):
    ray._check_reachable(address)


def test_a_cluster_that_answers_is_left_to_ray():
    with socket.create_server(("127.0.0.1", 0)) as head:
        ray._check_reachable(f"127.0.0.1:{head.getsockname()[1]}")


@pytest.mark.usefixtures("ray_stand_in")
def test_what_a_worker_needs_is_a_mapping():
    with pytest.raises(ValueError, match=r"`launcher_options.worker` must map .* but is 5"):
        ray_cluster({"worker": 5})


@pytest.mark.parametrize(("given", "times"), [({}, 10**6), ({"slurm_max_num_timeout": 7}, 7)])
def test_a_job_at_its_time_limit_is_queued_again_as_often_as_it_takes(given, times, tmp_path):
    executor = slurm_executor(tmp_path / "slurm", {**LOCAL, **given})
    assert executor._executor.max_num_timeout == times


@pytest.mark.parametrize(
    ("given", "message"),
    [({"partitio": "x"}, "'partitio' need"), ({"timeout_min": "long"}, "expected type")],
)
def test_a_refused_option_leaves_nothing(given, message, tmp_path):
    with pytest.raises(ValueError, match=rf"submitit cannot start jobs on 'local': .*{message}"):
        slurm_executor(tmp_path / "out" / "slurm", {**LOCAL, **given})
    assert not (tmp_path / "out").exists()
