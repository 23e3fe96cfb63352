"""This file is the two small encoders that the shipped initialisations are made for."""

from typing import cast

from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """A ResNet-10 for small images: 3x3 stride-2 stem, one basic block a stage, average pooling.

    Tensors are named as in timm's and torchvision's ResNets, so that the same rules read them.
    """

    num_features = 256

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU()
        self.layer1 = nn.Sequential(_block(32, 32, 1))
        self.layer2 = nn.Sequential(_block(32, 64, 2))
        self.layer3 = nn.Sequential(_block(64, 128, 2))
        self.layer4 = nn.Sequential(_block(128, 256, 2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features (B, 256) of images (B, 3, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def small_vit(image_size: int) -> nn.Module:
    """Return a ViT of width 128, depth 5, 4 heads and patch 8 that pools the mean of its tokens."""
    model = VisionTransformer(
        img_size=image_size,
        patch_size=8,
        embed_dim=128,
        depth=5,
        num_heads=4,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    )
    return cast("nn.Module", model)


def _block(width_in: int, width_out: int, stride: int) -> nn.Module:
    """Return a basic block, with a 1x1 projection on its shortcut where the shape changes."""
    shortcut = None
    if stride != 1 or width_in != width_out:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False),
            nn.BatchNorm2d(width_out),
        )
    return cast("nn.Module", BasicBlock(width_in, width_out, stride=stride, downsample=shortcut))
