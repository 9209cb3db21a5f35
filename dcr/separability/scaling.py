"""Classical multidimensional scaling: prompts as points in the plane."""

import torch
from jaxtyping import Float
from torch import Tensor


def classical_mds(
    points: Float[Tensor, "prompts width"], dimensions: int = 2
) -> Float[Tensor, "prompts {dimensions}"]:
    """Coordinates whose distances come nearest to the points' own (Torgerson 1952), in float64.

    The leading eigenvectors of the double-centred squared Euclidean distances, −½·J·D²·J, times the
    roots of their eigenvalues. For points this matrix is exactly the Gram matrix of the centred
    ones, which is formed directly: squaring and centring distances would lose half the digits. An
    eigenvector's sign is free: the coordinate largest in magnitude is made positive. Dimensions
    beyond the rank are 0.
    """
    found = torch.zeros(len(points), dimensions, dtype=torch.float64)
    if not len(points):
        return found
    centred = points.double() - points.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # ascending
    kept = min(dimensions, len(points))
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    found[:, :kept] = vectors * largest.sign() * values.clamp(min=0).sqrt()
    return found
