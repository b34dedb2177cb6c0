"""The small MNIST classifier whose last hidden layer is the feature space of `fd_mnist_cnn`."""

import math

import torch
from torch import Tensor, nn

from evalp_fast.kernels.philox import Stream, normal


class MNISTClassifier(nn.Module):
    """Three convolutions, a layer of 64 features, a linear classifier: 69,000 parameters, 270 kB in float32.

    Input float32 `[N, 1, 32, 32]` in [0, 1] (28×28 digits padded by two pixels); `features` returns float32
    `[N, 64]`, non-negative; `forward` returns the logits of the ten digits, float32 `[N, 10]`.
    """

    feature_dim = 64
    image_shape = (1, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        # Without the normalisation a third of the features die in training: constant 0 for every digit.
        self.feature_layer = nn.Sequential(
            nn.Linear(48 * 4 * 4, self.feature_dim, bias=False), nn.BatchNorm1d(self.feature_dim), nn.ReLU()
        )
        self.classifier = nn.Linear(self.feature_dim, 10)

    def features(self, images: Tensor) -> Tensor:
        """The activations before the last linear layer, float32 `[N, 64]`."""
        return self.feature_layer(self.convolutions(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def initialise(model: nn.Module, seed: int) -> None:
    """He initialisation (He et al. 2015, eq. 10) of every weight matrix from `(seed, number of the layer)`.

    Unlike the defaults of torch it reads no global state, so the same seed gives the same weights in every
    version of torch. Biases become 0; normalisation layers keep their own defaults.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            weight = layer.weight
            noise = normal(seed, torch.tensor([number]), 0, Stream.INITIAL, weight.numel())
            weight.copy_(noise.reshape(weight.shape) * math.sqrt(2.0 / weight[0].numel()))
            if layer.bias is not None:
                layer.bias.zero_()


__all__ = ["MNISTClassifier", "initialise"]
