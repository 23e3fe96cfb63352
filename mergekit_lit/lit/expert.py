"""This file is the fine-tuning of one expert: what a Trainer moves, and how."""

from collections.abc import Hashable, MutableMapping
from typing import TypeAlias, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lit.core.params import Params
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.data.batches import Batch
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.distillation import Distillation, Teacher, check_teaching
from mergekit_lit.lit.finetuning import Finetuning, FinetuningName, NormStatistics
from mergekit_lit.lit.heads import Head, head_at, head_kind
from mergekit_lit.lit.lockstep import Together
from mergekit_lit.lit.lora import LowRank
from mergekit_lit.lit.optimization import Optimization, OptimizerName, ScheduleName
from mergekit_lit.lit.passes import inputs
from mergekit_lit.lit.randomness import seed_stream, slot_of
from mergekit_lit.lit.recalibration import task_statistics
from mergekit_lit.lit.sharpness import Ascent, check_trainer, statistics_kept
from mergekit_lit.lit.tangent import Tangent
from mergekit_lit.models.backbones import Backbone, build_backbone, load_base

Start: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]
"""BatchNorm statistics of a base on a task, and the head that was fitted under them."""


class ExpertModule(LightningModule):
    """Fine-tunes a base on one task; the head stands outside the merge.

    Before the first step the BatchNorm statistics are estimated on the task's training images and
    the head is fitted under them; training starts from there. The expert's file and evaluation
    estimate them on the same images in the same batches (`lit.recalibration.task_statistics`), so
    that the untouched base is evaluated under exactly what its head has seen.

    Whatever is drawn at random in a forward pass (dropout, augmentation) is keyed by (seed, step,
    slot), the slot counting micro-batches over accumulation and processes.

    Attributes:
        base: x0.
        backbone: the network that is tuned.
        head: the task's classifier, after `setup`.
        structure: what each backbone tensor is.
        optimization: optimizer and schedule.
        head_kind: `trained`, `frozen-probe`, `frozen-ncm` or `embeddings`.
        finetuning: what moves, and how.
        tangent: the tangent model of `linearised`, after `setup`; else None.
        adapter: the low-rank factors of `lora`, after `setup`; else None.
        starts: where other modules of this process found statistics and heads that this one may
            need too; None to share none.
        distillation: whose answers are learned; None without a teacher.
        together: computes losses along with those of other modules; None to compute them alone.
        seed: the seed of everything random.
    """

    head: Head
    _ascent: Ascent

    # Each argument is one flag of the command line, hence so many.
    def __init__(  # noqa: PLR0913
        self,
        base: str = "resnet",
        *,
        image_size: int | None = None,
        head: str = "frozen-ncm",
        optimizer: OptimizerName = "sgd",
        lr: float = 0.03,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: ScheduleName = "cosine",
        warmup_steps: int | None = None,
        label_smoothing: float = 0.0,
        norm_statistics: NormStatistics = "train",
        finetuning: FinetuningName = "full",
        sam_radius: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: float = 8.0,
        teacher: str | None = None,
        teacher_share: float = 0.9,
        temperature: float = 2.0,
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002 (the user's word for torch.compile)
        seed: int = 0,
    ) -> None:
        """Load the base; the head waits for the data.

        Args:
            base: `resnet` or `vit` (shipped), any timm or torchvision encoder, or a base file.
            image_size: height and width of the input, in pixels; None for the base's own.
            head: `trained`; or frozen: `frozen-probe`, `frozen-ncm` or `embeddings:FILE`.
            optimizer: `sgd`, `adam` or `adamw`.
            lr: peak learning rate, positive.
            momentum: momentum of `sgd`, in [0, 1).
            betas: decay rates of `adam` and `adamw`, each in [0, 1).
            weight_decay: coefficient, at least 0; coupled for `sgd` and `adam`, decoupled for
                `adamw`.
            schedule: `constant`, `cosine` or `linear`, after the warm-up. Only `constant` serves
                several step counts from one run.
            warmup_steps: steps of linear warm-up, less than the number of steps; None is 20, or
                half of the steps if that is fewer.
            label_smoothing: share of the label's mass spread over all classes, in [0, 1).
            norm_statistics: `train` uses batch statistics in BatchNorm; `frozen` those of the
                training images at the base, throughout.
            finetuning: `full`; `linearised`, the tangent model at the base, whose displacements add
                up with less interference, at two to three times the cost; or `lora`, low-rank
                factors of every matrix, whose product is added to the weights in the expert's file.
            sam_radius: r of sharpness-aware minimisation, at least 0: the gradient is taken at
                x + r g / ||g||, at twice the cost; 0 for none.
            lora_rank: rank of the factors of `lora`, at least 1.
            lora_alpha: positive; the product of the factors is scaled by lora_alpha / lora_rank.
            teacher: file of an expert of the same task and architecture whose answers are learned:
                for one that went too far to be merged. The bound's terms are then of another loss
                than was trained on.
            teacher_share: share of its answers in the loss, in (0, 1]; the labels have the rest.
            temperature: positive; the softer answers are compared, the larger it is.
            channels_last: whether convolutions run in channels-last memory: often faster, rounds
                differently.
            compile: whether torch.compile runs the backbone.
            seed: seed of the data order, the augmentation, dropout and a trained head.
        """
        super().__init__()
        self.save_hyperparameters()
        self.optimization = Optimization(
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            betas=(betas[0], betas[1]),
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
        )
        self.finetuning = Finetuning(
            kind=finetuning,
            norm_statistics=norm_statistics,
            label_smoothing=label_smoothing,
            sam_radius=sam_radius,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            compiles=compile,
        )
        self.head_kind, self.head_spec, self.seed = head_kind(head), head, seed
        self.memory = torch.channels_last if channels_last else torch.contiguous_format
        self.tangent: Tangent | None = None
        self.adapter: LowRank | None = None
        self.starts: MutableMapping[Hashable, Start] | None = None
        self.together: Together | None = None
        self.backbone, self.base = load_base(base, image_size=image_size)
        self.structure = self.base.structure
        self.finetuning.check_fits(self.structure)
        check_teaching(teacher_share, temperature)
        self.distillation: Distillation | None = None
        if teacher is not None:
            self.distillation = Distillation.of(
                teacher, self.base, share=teacher_share, temperature=temperature
            )
        self._teacher: Teacher | None = None

    @property
    def data(self) -> TaskDataModule:
        """The data module of the Trainer."""
        return TaskDataModule.of(self.trainer)

    def setup(self, stage: str) -> None:
        """Put the base back, estimate its BatchNorm statistics and fit the head under them."""
        if stage != "fit" and hasattr(self, "head"):
            return
        data = self.data.task_data.start
        start = self.plain_backbone(self.base.params, self.trainer.strategy.root_device)
        statistics, head = self._start(start, data)
        start.load_state_dict({**start.state_dict(), **statistics})
        self.head = Head(head, trained=self.head_kind == "trained")
        if self.distillation is not None:
            self.distillation.check_fits(data)
            teacher = self.plain_backbone(self.base.params, self.trainer.strategy.root_device)
            self._teacher = self.distillation.taught(teacher)
        self.backbone.load_state_dict(start.state_dict())
        self.backbone.to(memory_format=self.memory)
        self.tangent = self.finetuning.tangent(start, self.memory)
        self.adapter = self.finetuning.adapter(start, self.structure, seed=self.seed)
        if self.adapter is not None:
            self.backbone.requires_grad_(requires_grad=False)
        super().train()
        if self.finetuning.compiles:
            self.backbone.compile()

    def on_fit_start(self) -> None:
        """Refuse a Trainer that cannot take sharpness-aware steps, before anything is written."""
        if self.finetuning.sam_radius:
            check_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Freeze the BatchNorm statistics, if asked: Lightning warns if that is done before."""
        self._ascent = Ascent([p for p in self.parameters() if p.requires_grad])
        self.train()

    def on_after_backward(self) -> None:
        """Come back from the point at which a sharpness-aware gradient was taken."""
        self._ascent.down()

    def plain_backbone(self, params: Params, device: torch.device | None = None) -> Backbone:
        """Return a second backbone in eval mode that holds `params`, never compiled or wrapped."""
        plain = build_backbone(self.base.backbone, image_size=self.base.image_size)
        plain.load_state_dict(dict(params))
        return plain.to(device or self.device).eval()

    def train(self, mode: bool = True) -> "ExpertModule":  # noqa: FBT001 (torch's signature)
        """Set the mode; BatchNorm stays in eval mode where its statistics are frozen."""
        super().train(mode)
        if self.finetuning.norm_statistics == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) of uint8 images (B, H, W, 3)."""
        images = inputs(self.backbone, x).contiguous(memory_format=self.memory)
        if self.tangent is None and self.adapter is None:
            return cast("Tensor", self.head(self.backbone(images)))

        def model(params: Params) -> Tensor:
            features = functional_call(self.backbone, dict(params), (images,))
            return cast("Tensor", self.head(features))

        params = dict(self.backbone.named_parameters())
        return self.tangent(model, params) if self.tangent else model(self._adapted(params))

    def tuned(self) -> dict[str, Tensor]:
        """Return the backbone's tensors as tuned so far, low-rank steps added."""
        with torch.no_grad():
            return self._adapted(self.backbone.state_dict())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        x, y, _ = batch
        step, slot = self.trainer.global_step, slot_of(self.trainer, batch_idx)
        seed = derive_seed(self.seed, "forward", step, slot)
        x = self.data.augmented(x, step, slot, seed=self.seed)
        loss = self._loss(x, y, seed)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # set untyped
        logs = (step + 1) % every == 0
        if logs:
            self._report(loss, step)
        # In eval mode others ask for the gradient at x itself.
        if not (self.finetuning.sam_radius and self.training):
            return loss
        gradients = self._ascent.gradients(loss, self.trainer.strategy)
        norm = self._ascent.up(gradients, self.finetuning.sam_radius)
        if logs:
            self.log("sam/first_norm", norm.float())
        with statistics_kept(self):
            return self._loss(x, y, seed)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's)
        """Log cross-entropy and accuracy on the validation images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's)
        """Log cross-entropy and accuracy on the test images."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer over what is trained, and its schedule over K steps."""
        trained = (p for p in self.parameters() if p.requires_grad)
        return self.optimization.configured(trained, self.trainer.max_steps)

    def _start(self, backbone: Backbone, data: TaskData) -> Start:
        """Return the statistics of the base on the task and the head under them, found once."""
        device = next(backbone.parameters()).device.type
        seed = self.seed if self.head_kind == "trained" else 0
        key = (self.base.content, data.split_hash, self.head_spec, seed, device)
        starts = {} if self.starts is None else self.starts
        if key not in starts:
            statistics = task_statistics(backbone, data)
            backbone.load_state_dict({**backbone.state_dict(), **statistics})
            starts[key] = statistics, head_at(backbone, data, self.head_spec, seed=self.seed)
        return starts[key]

    def _adapted(self, params: Params) -> dict[str, Tensor]:
        """Return tensors of the backbone with low-rank steps, if any, added."""
        return {**params, **(self.adapter(params) if self.adapter is not None else {})}

    def _loss(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """Return the loss, all that the forward pass draws at random keyed by `seed`."""
        # What one pass computes for many knows no teacher.
        together = self.together if self._teacher is None else None
        if together is not None and (loss := together(self, x, y)) is not None:
            return loss
        seed_stream(seed, self.device)
        logits, smoothing = self(x).float(), self.finetuning.label_smoothing
        plain = cross_entropy(logits, y, label_smoothing=smoothing)
        return plain if self._teacher is None else self._teacher.loss(x, logits, plain)

    def _report(self, loss: Tensor, step: int) -> None:
        """Log the loss and the learning rate; refuse a loss that is no number."""
        value = loss.detach()
        self.optimization.check_finite(float(value), step=step, task=self.data.task)
        self.log("train/loss", value)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def _evaluate(self, batch: Batch, split: str) -> None:
        x, y, _ = batch
        logits = self(x).float()
        right = (logits.argmax(1) == y).float().mean()
        values = {f"{split}/loss": cross_entropy(logits, y), f"{split}/accuracy": right}
        self.log_dict(values, batch_size=len(y), sync_dist=True)
