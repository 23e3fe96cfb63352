"""This file is distillation: an expert learns another's answers, to reach them on a shorter way."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.params import content_hash, with_prefix
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.passes import inputs
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.heads import apply_head


def check_teaching(share: float, temperature: float) -> None:
    """Refuse a share of a teacher's answers, or a temperature, that cannot be.

    Raises:
        ValueError: out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`teacher_share` must lie in (0, 1], but is {share!r}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, but is {temperature!r}.")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Whose answers are learned, and how much they count.

        (1 - w) cross-entropy(z, y) + w T^2 KL(softmax(z_teacher / T) || softmax(z / T))

    with w the share and T the temperature.

    **Source**: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, sec. 2. Here both are tuned from one
    base, and the point is the way: a student that goes as far as a group's others do, beside a
    teacher that went further.

    Attributes:
        teacher: the expert.
        share: w, in (0, 1].
        temperature: T, positive.
    """

    teacher: Expert
    share: float
    temperature: float

    def __post_init__(self) -> None:
        """Refuse values out of range, one line each."""
        check_teaching(self.share, self.temperature)

    @classmethod
    def of(cls, path: str, base: Base, *, share: float, temperature: float) -> "Distillation":
        """Open a teacher.

        Args:
            path: an expert's file.
            base: of the student.
            share: w, in (0, 1].
            temperature: T, positive.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no expert, or of another architecture; or a value is out of range.
        """
        made = cls(teacher=load_expert(Path(path)), share=share, temperature=temperature)
        card = made.teacher.card
        theirs, ours = (card.backbone, card.image_size), (base.backbone, base.image_size)
        if theirs != ours:
            raise ValueError(
                f"`teacher` must be a {ours[0]!r} at {ours[1]} pixels, as the student is, "
                f"but {path!r} is of {theirs[0]!r} at {theirs[1]}."
            )
        return made

    @property
    def content(self) -> str:
        """Content hash of the teacher's backbone and head."""
        teacher = self.teacher
        return content_hash(
            with_prefix(teacher.backbone, "backbone.") | with_prefix(teacher.head, "head.")
        )

    def check_fits(self, data: TaskData) -> None:
        """Refuse a teacher of another task.

        Raises:
            ValueError: its task, or number of classes, is another.
        """
        card, classes = self.teacher.card, len(self.teacher.head["weight"])
        if (card.task, classes) != (data.name, len(data.classes)):
            raise ValueError(
                f"`teacher` must be an expert of {data.name!r}, which has {len(data.classes)} "
                f"classes, but is one of {card.task!r} with {classes}."
            )

    def taught(self, network: Backbone) -> "Teacher":
        """Return the teacher at work.

        Args:
            network: of its architecture, in eval mode and nobody else's.
        """
        network.load_state_dict(dict(self.teacher.backbone))
        device = next(network.parameters()).device
        head = {name: tensor.to(device) for name, tensor in self.teacher.head.items()}
        return Teacher(network.requires_grad_(requires_grad=False), head, self)


@dataclass(frozen=True)
class Teacher:
    """A teacher's network: no module, so that nothing trains or saves it with the student.

    Attributes:
        network: its backbone, in eval mode.
        head: its head.
        distillation: how much its answers count.
    """

    network: Backbone
    head: dict[str, Tensor]
    distillation: Distillation

    def loss(self, x: Tensor, logits: Tensor, plain: Tensor) -> Tensor:
        """Return the loss of a student's answers.

        Args:
            x: uint8 images, (B, H, W, 3).
            logits: z, the student's, (B, C).
            plain: its cross-entropy, a scalar.
        """
        share, temperature = self.distillation.share, self.distillation.temperature
        with torch.no_grad():
            wanted = apply_head(self.head, self.network(inputs(self.network, x))).float()
        apart = kl_div(
            log_softmax(logits / temperature, dim=1),
            log_softmax(wanted / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - share) * plain + share * temperature**2 * apart
