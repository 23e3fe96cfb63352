"""This file is how much of the images the constants of the bound are measured on."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is looked at.

    Attributes:
        micro_batches: K, micro-batches of each task, at least 2; 3 or more for intervals.
        batch: b, images in one, at least 1.
        hessian_images: images of each task that the Hessian is taken over.
        lanczos_steps: largest number of products with it.
        images: largest number of images of each task that a loss is taken over.
        seed: of every choice of images.
    """

    micro_batches: int = 8
    batch: int = 16
    hessian_images: int = 64
    lanczos_steps: int = 20
    images: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        least = {
            "micro_batches": 2,
            "batch": 1,
            "hessian_images": 1,
            "lanczos_steps": 1,
            "images": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"`{name}` must be at least {lowest}, but is {getattr(self, name)!r}."
                )

    def within(self, images: int) -> "Effort":
        """Return the effort with micro-batches that so many images of each task suffice for.

        What is estimated is of single images, whatever their number in a batch.
        """
        return replace(self, batch=max(1, min(self.batch, images // self.micro_batches)))
