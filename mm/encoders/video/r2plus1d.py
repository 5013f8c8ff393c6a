"""R(2+1)D: convolutions over space and time, and no image tower."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm.encoders import Features
from mm.encoders.image import ImageEncoder
from mm.encoders.layers import linear
from mm.encoders.video.base import ClipConfig, VideoEncoder
from mm.encoders.weights import load_strictly, read_weights, weights_file

BLOCKS = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
WIDTH = 512
# of Kinetics, with which torchvision's weights were trained
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class R2Plus1D(VideoEncoder):
    """R(2+1)D (Tran et al. 2018, arXiv:1711.11248) as torchvision has it: the reference that is no CLIP.

    A linear layer brings its features to the width of the image tower's. The tokens are the averages over space, one
    for each step in time that its strides leave of 8 frames.
    """

    kind = "r2plus1d"
    options = ("depth",)
    reads_image = False
    has_weights = True
    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageEncoder, *, clip: ClipConfig | Mapping[str, Any], depth: int) -> None:
        from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

        super().__init__(image, clip=clip, depth=depth)
        self.network = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, BLOCKS[depth], R2Plus1dStem)
        self.network.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))  # over space alone
        self.network.fc = nn.Identity()
        self.project = linear(WIDTH, self.width)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image: ImageEncoder, clips: Tensor) -> Features:
        """As the others', but with tokens (B, ceil(T / 8), D); the image tower is not asked."""
        pixels = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
        steps = self.network(((pixels - self.mean) / self.std).transpose(1, 2))
        tokens: Tensor = self.project(steps.unflatten(1, (WIDTH, -1)).mT).float()
        return Features(tokens.mean(1), tokens, tokens.new_ones(tokens.shape[:2]).bool())

    def load_weights(self, weights: str) -> None:
        path = weights_file(weights)
        load_strictly(self.network, read_weights(path), path, ignore=("fc.",))
