import pytest

from mergekit_lit.core.records import Record


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("quickstart_seeds")


def record(seed, *, base, merged, experts):
    kinds = {"base": ("base", base), "ties": ("merged", merged), "experts": ("experts", experts)}
    models = {}
    for name, (kind, accuracy) in kinds.items():
        row = {"accuracy": accuracy, "normalised_accuracy": accuracy / experts}
        models[name] = {"kind": kind, "scale": 0.5, "tasks": {"a": row}, "mean": row}
    return Record(
        stage="quickstart",
        name="x",
        config={},
        seeds={"seed": seed},
        metrics={"models": models},
        seconds=60.0,
    )


def test_table_holds_means_student_intervals_and_the_count_of_ordered_seeds(script):
    text = script.markdown(
        [
            record(0, base=0.3, merged=0.5, experts=0.8),
            record(1, base=0.4, merged=0.6, experts=0.8),
            record(2, base=0.5, merged=0.4, experts=0.8),
        ]
    )
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| base", "| ties", "| experts"]
    # stdev .1, so half an interval is 4.303 * .1 / sqrt(3) = .2484.
    assert "0.400 [0.152, 0.648]" in lines[2]
    assert "| 0.5, 0.5, 0.5 |" in lines[3]
    assert "Base < merge < experts in 2 of 3 seeds [0, 1, 2]." in text


def test_finished_runs_are_read_and_not_made_again(script, tmp_path):
    record(7, base=0.1, merged=0.2, experts=0.3).write(tmp_path / "record.json")
    assert script.run(tmp_path, backbone="resnet", seed=7, jobs=1).seeds == {"seed": 7}
