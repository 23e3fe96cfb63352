"""This file is the expert's card: the deterministic facts of its training that theory needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one expert. None means unknown: foreign checkpoints have many.

    Only facts that the same run reproduces to the last bit stand here; times, versions and commits
    go to the record beside the file. Symbols are those of the theory: eta learning rate, a the
    optimizer's effective step vector, x0 the base, x_k the backbone after k steps.

    Attributes:
        task: name of the task.
        suite: name of the suite that the task came from.
        classes: number of classes.
        split_hash: hash of the training samples handed out, order included.
        n: number of training samples.
        base: name of the shared initialisation.
        base_hash: content hash of the base's backbone.
        backbone: architecture, by the name that builds it again.
        image_size: height and width of the input, in pixels.
        optimizer: `sgd`, `adam` or `adamw`.
        lr: peak learning rate eta.
        momentum: momentum rho of SGD; None for other optimizers.
        betas: Adam's decay rates.
        weight_decay: coefficient; coupled for sgd and adam, decoupled for adamw.
        schedule: `constant`, `cosine` or `linear`, after the warm-up.
        warmup_steps: steps of linear warm-up.
        schedule_steps: horizon of the schedule in steps; None where the schedule has none.
        steps: K, optimizer steps taken.
        batch: b, samples in one optimizer step over all ranks and accumulated micro-batches.
        label_smoothing: share of the label's mass spread over all classes.
        clip_norm: largest gradient norm, or None.
        precision: Lightning's name of the precision.
        norm_statistics: `train` if BatchNorm used batch statistics, `frozen` if the base's.
        finetuning: what moved: the weights (`full`), those of the tangent model (`linearised`), or
            low-rank factors (`lora`).
        sam_radius: radius of sharpness-aware minimisation; 0 without.
        lora_rank: rank of the factors; None without.
        lora_alpha: their scale times the rank; None without.
        teacher: content hash of the expert whose answers were learned, with its head; or None.
        teacher_share: share of its answers in the loss; None without.
        temperature: at which they were compared; None without.
        head: how the head was made: `trained`, `frozen-probe`, `frozen-ncm` or `embeddings`.
        seed: seed of the data order, the augmentation and the head's initialisation.
        replaced: m, samples replaced in a neighbouring data set; 0 for the plain run.
        neighbour_seed: which neighbour; None for the plain run.
        twin_of: content hash of the file of the expert beside which `StabilityTwins` carried this
            one; None for a run of its own.
        travel: eta ||a||_1 as travelled; None for adaptive optimizers.
        travel_squared: sum_k (eta_k a_k)^2; None for adaptive optimizers.
        path_length: sum_k ||x_{k+1} - x_k||.
        displacement: ||x_K - x0||.
        mean_squared_displacement: d^2 = (1/||a||_1) sum_k a_k ||x_k - x0||^2.
        gradient_noise: tr Sigma per sample, averaged along the path.
        noise_estimates: number of estimates that `gradient_noise` and `eps_path` rest on.
        eps_path: path estimate of the stability, sqrt(eps_path^2).
        gradient_norm: mean L2 norm of the gradient before clipping.
        base_val_loss: cross-entropy of the base on the validation split under this head; None for
            a trained head.
        base_val_accuracy: share right of the base on the validation split under this head.
        train_loss: cross-entropy on the training split at the end.
        train_accuracy: share right on the training split at the end.
        val_loss: cross-entropy on the validation split at the end.
        val_accuracy: share right on the validation split at the end.
    """

    task: str | None = None
    suite: str | None = None
    classes: int | None = None
    split_hash: str | None = None
    n: int | None = None
    base: str | None = None
    base_hash: str | None = None
    backbone: str | None = None
    image_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    schedule_steps: int | None = None
    steps: int | None = None
    batch: int | None = None
    label_smoothing: float | None = None
    clip_norm: float | None = None
    precision: str | None = None
    norm_statistics: str | None = None
    finetuning: str | None = None
    sam_radius: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    teacher: str | None = None
    teacher_share: float | None = None
    temperature: float | None = None
    head: str | None = None
    seed: int | None = None
    replaced: int | None = None
    neighbour_seed: int | None = None
    twin_of: str | None = None
    travel: float | None = None
    travel_squared: float | None = None
    path_length: float | None = None
    displacement: float | None = None
    mean_squared_displacement: float | None = None
    gradient_noise: float | None = None
    noise_estimates: int | None = None
    eps_path: float | None = None
    gradient_norm: float | None = None
    base_val_loss: float | None = None
    base_val_accuracy: float | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, nulls included."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Card":
        """Return the card that `to_json` wrote; keys of newer versions are left out."""
        known = {field.name: value[field.name] for field in fields(cls) if field.name in value}
        if known.get("betas") is not None:
            known["betas"] = tuple(known["betas"])
        return cls(**known)
