"""How a matrix lies in a layer's weight."""

from torch import nn

CLOSE = dict(rtol=1e-10, atol=1e-10)


def as_weight(layer, matrix, shape):
    if isinstance(layer, (nn.Embedding, nn.ConvTranspose1d)):
        matrix = matrix.T
    return matrix.reshape(shape)
