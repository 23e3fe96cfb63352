"""Experts from files: what is accepted, and one line for each thing that is not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_base, save_expert
from mergekit_lit.core.experts import Base, Expert, Experts
from mergekit_lit.core.params import content_hash
from mergekit_lit.merging import in_memory, load_experts, merge


@dataclass
class Folder:
    """Two experts, `a` and `b`, of one base, as files that a test can spoil."""

    base: Base
    paths: list[Path]
    experts: list[Expert]

    def rewrite(self, t: int, **changes: object) -> None:
        self.experts[t] = replace(self.experts[t], **changes)
        save_expert(self.paths[t], self.experts[t])

    def tensors(self, **changes: torch.Tensor) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        self.rewrite(1, backbone={**self.experts[1].backbone, **named})

    def card(self, **changes: object) -> None:
        self.rewrite(1, card=replace(self.experts[1].card, **changes))

    def load(self, **options: bool) -> Experts:
        return load_experts(self.paths, base=self.base, **options)


@pytest.fixture
def folder(tmp_path, make_experts) -> Folder:
    made = make_experts(2, dtype=torch.float32)
    base = Base(
        name="tiny",
        backbone="tiny",
        image_size=8,
        params=made.base,
        structure=made.structure,
        content=content_hash(made.base),
    )
    folder = Folder(base, [], [])
    for task, tuned in zip("ab", made.tuned, strict=True):
        card = Card(
            task=task, base="tiny", base_hash=base.content, backbone="tiny", image_size=8, travel=1
        )
        head = {"weight": torch.ones(3, 7), "bias": torch.zeros(3)}
        folder.experts.append(Expert(tuned, head, made.structure, card))
        folder.paths.append(tmp_path / f"{task}.safetensors")
        save_expert(folder.paths[-1], folder.experts[-1])
    return folder


def test_experts_are_what_was_saved(folder):
    experts = folder.load()
    assert (experts.names, experts.base_name, experts.backbone) == (["a", "b"], "tiny", "tiny")
    assert (experts.base_hash, experts.image_size) == (folder.base.content, 8)
    for tuned, expert in zip(experts.tuned, folder.experts, strict=True):
        assert all(torch.equal(tuned[name], expert.backbone[name]) for name in tuned)
    assert experts.heads[1]["weight"].shape == (3, 7)
    assert experts.cards[0].travel == 1


def test_reading_from_disk_and_from_memory_merge_alike(folder):
    lazy = folder.load()
    whole = in_memory(lazy)
    for path in folder.paths:
        path.unlink()
    assert all(isinstance(tuned, dict) for tuned in whole.tuned)
    merged = merge(whole, "task_arithmetic")
    assert all(
        torch.equal(t, merged.shared[n]) for n, t in merge(lazy, "task_arithmetic").shared.items()
    )


def test_half_precision_experts_are_accepted(folder):
    expert = folder.experts[1]
    half = {n: t.half() if t.is_floating_point() else t for n, t in expert.backbone.items()}
    folder.rewrite(1, backbone=half)
    merged = merge(folder.load(), "average")
    assert merged.shared["stem.weight"].dtype == torch.float32


def test_unknown_card_is_taken_when_allowed(folder):
    folder.rewrite(1, card=Card())
    experts = folder.load(allow_different_base=True)
    assert experts.names == ["a", "b"]
    with pytest.raises(ValueError, match="the card of 'b' has none"):
        merge(experts, "travel_normalised")


def test_other_base_is_taken_when_allowed(folder):
    folder.card(base_hash="f" * 64)
    assert len(folder.load(allow_different_base=True)) == 2


def written_by_others(folder: Folder, prefix: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone = {f"{prefix}{name}": t for name, t in folder.experts[1].backbone.items()}
    head = {f"head.{name}": tensor for name, tensor in folder.experts[1].head.items()}
    return {**backbone, **head, **more}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("prefix", ["", "model.encoder."])
def test_files_that_others_wrote_merge_like_ours(folder, tmp_path, suffix, prefix):
    ours = merge(folder.load(), "average")
    tensors = written_by_others(folder, prefix)
    path = tmp_path / f"theirs{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    folder.paths[1] = path
    with pytest.raises(ValueError, match="but its card names no base"):
        folder.load()
    experts = folder.load(allow_different_base=True)
    assert list(experts.names) == ["a", "theirs"]
    theirs = merge(experts, "average")
    assert all(torch.equal(theirs.shared[name], tensor) for name, tensor in ours.shared.items())
    assert torch.equal(experts.heads[1]["weight"], folder.experts[1].head["weight"])


@pytest.mark.parametrize(
    "more",
    [
        {"norm2.weight": torch.ones(3)},
        {"head.scale": torch.ones(3)},
        {"head.bias": torch.ones(4)},
        {"head.weight": torch.ones(3, 7, 1)},
        {"other.weight": torch.ones(3, 7)},
    ],
)
def test_tensors_that_are_no_classifier_are_refused(folder, more):
    save_file(written_by_others(folder, "") | more, folder.paths[1])
    with pytest.raises(ValueError, match="may hold one linear classifier"):
        folder.load(allow_different_base=True)


def test_a_foreign_file_without_classifier_has_no_head(folder):
    save_file(dict(folder.experts[1].backbone), folder.paths[1])
    assert folder.load(allow_different_base=True).heads[1] == {}


def flip(folder: Folder) -> None:
    data = bytearray(folder.paths[1].read_bytes())
    data[-5] ^= 4
    folder.paths[1].write_bytes(data)


def truncate(folder: Folder) -> None:
    folder.paths[1].write_bytes(folder.paths[1].read_bytes()[:-40])


def bad_weight(value: float) -> torch.Tensor:
    return torch.zeros(7, 5).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(value))


def without(folder: Folder, name: str) -> None:
    kept = {n: t for n, t in folder.experts[1].backbone.items() if n != name}
    folder.rewrite(1, backbone=kept)


SPOILT: dict[str, tuple[Callable[[Folder], object], type[Exception], str]] = {
    "missing": (
        lambda f: f.paths[1].unlink(),
        FileNotFoundError,
        r"No file '.*b\.safetensors'\.",
    ),
    "none": (lambda f: f.paths.clear(), ValueError, "at least one expert file, but got none"),
    "truncated": (truncate, ValueError, r"b\.safetensors.*is damaged or of another format"),
    "bit flipped": (flip, ValueError, "does not match its checksum"),
    "pickle": (
        lambda f: torch.save({"w": torch.ones(2)}, f.paths[1]),
        ValueError,
        r"b\.safetensors' must be a safetensors file, but is a pickle",
    ),
    "foreign": (
        lambda f: save_file({"w": torch.ones(2)}, f.paths[1]),
        ValueError,
        r"b\.safetensors' must hold the base's \d+ tensors, but lacks \d+, first 'block.bias'",
    ),
    "base instead": (
        lambda f: save_base(f.paths[1], f.base),
        ValueError,
        "must be an expert file of mergekit-lit, but is of kind 'base'",
    ),
    "one task twice": (
        lambda f: f.card(task="a"),
        ValueError,
        r"must be of different tasks, but '.*a\.safetensors' and '.*b\.safetensors' are both",
    ),
    "name missing": (
        lambda f: without(f, "token"),
        ValueError,
        r"b\.safetensors' and the base differ in 1 parameter names, first 'token'",
    ),
    "name too many": (
        lambda f: f.tensors(extra=torch.ones(1)),
        ValueError,
        "and the base differ in 1 parameter names, first 'extra'",
    ),
    "shape": (
        lambda f: f.tensors(block__weight=torch.ones(5, 7)),
        ValueError,
        r"shapes of 1 parameters, first 'block.weight': \(5, 7\) and \(7, 5\)",
    ),
    "integers": (
        lambda f: f.tensors(block__bias=torch.ones(7, dtype=torch.int64)),
        ValueError,
        "'block.bias' is of torch.int64 and there of torch.float32",
    ),
    "nan": (
        lambda f: f.tensors(block__weight=bad_weight(float("nan"))),
        ValueError,
        "must hold finite numbers, but 'block.weight' has 1 NaN or infinite of 35",
    ),
    "infinite": (
        lambda f: f.tensors(block__weight=bad_weight(float("inf"))),
        ValueError,
        "must hold finite numbers, but 'block.weight' has 1 NaN or infinite of 35",
    ),
    "nan in the statistics": (
        lambda f: f.tensors(norm__running_var=torch.full((4,), float("nan"))),
        ValueError,
        "'norm.running_var' has 4 NaN or infinite of 4",
    ),
    "nan in the head": (
        lambda f: f.rewrite(1, head={"weight": torch.full((3, 7), float("nan"))}),
        ValueError,
        r"The head of '.*b\.safetensors' must hold finite numbers",
    ),
    "nan in the base": (
        lambda f: f.base.params["token"].fill_(float("nan")),
        ValueError,
        "The base 'tiny' must hold finite numbers",
    ),
    "another base": (
        lambda f: f.card(base="other", base_hash="f" * 64),
        ValueError,
        r"must be tuned from the base 'tiny' \(.{12}\), but it was tuned from 'other' "
        r"\(ffffffffffff\)\. Align .* `--method git_rebasin --allow_different_base true`, or merge",
    ),
    "another architecture": (
        lambda f: (f.tensors(extra=torch.ones(1)), f.card(base="other", base_hash="f" * 64)),
        ValueError,
        r"of the architecture of the base 'tiny', but it was tuned from 'other' .* which has other",
    ),
    "no base on the card": (
        lambda f: f.card(base=None, base_hash=None),
        ValueError,
        "but its card names no base. Align .* or merge them .* `--allow_different_base true`",
    ),
    "another image size": (
        lambda f: f.card(image_size=16),
        ValueError,
        "at the base's image size of 8, but was tuned at 16",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_merged_is_refused_in_one_line(folder, case):
    spoil, error, message = SPOILT[case]
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        folder.load()
    assert "\n" not in str(caught.value)
