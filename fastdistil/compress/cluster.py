"""Weight clustering: a codebook for each matrix, and for each weight its index in it, Huffman-coded.

Han et al. 2016 (Deep Compression), sections 3 and 4. The codebook is trained in the recovery, the indices
stay: the gradient of a centroid is the sum of its weights' gradients (section 3.3). Zeros, such as those of
pruned weights, share a centroid that is not trained, so they stay zero.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdistil.compress import huffman
from fastdistil.compress.encoded import (
    EncodedWeight,
    code_of,
    kind_of,
    parameter_of,
    parametrize_weight,
    plain,
    weights_to_compress,
)
from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.replacements import drop, replace, replacement
from fastdistil.schema import Section

NAME = "cluster"
_ITERATIONS = 300  # of Lloyd's algorithm at most


class ClusterOptions(Section):
    bits: int = Field(default=4, ge=1, le=8, description="of an index before its coding: 2^bits centroids")
    embeddings: bool = Field(default=True, description="cluster the embeddings, too")
    bits_embeddings: int | None = Field(
        default=None, ge=1, le=8, description="of an index of the embeddings; null: as `bits`"
    )


class ClusteredWeight(EncodedWeight):
    """Indices into a codebook.

    The parameter is the codebook, (K,), or (K - 1,) after a fixed first centroid 0 with `zero`.

    Attributes:
        stream, lengths, chunks: the indices, row by row, as `huffman.Coded`.
    """

    kind = "clustered"
    stream: Tensor
    lengths: Tensor
    chunks: Tensor

    def __init__(self, shape: torch.Size, spec: dict[str, Any], device: torch.device) -> None:
        super().__init__(shape)
        self.zero: bool = spec["zero"]
        self.centroids: int = spec["centroids"]
        count = self.centroids + self.zero
        chunks = -(-shape.numel() // huffman.CHUNK)
        self.register_buffer("stream", torch.zeros(spec["bytes"], dtype=torch.uint8, device=device))
        self.register_buffer("lengths", torch.zeros(count, dtype=torch.uint8, device=device))
        self.register_buffer("chunks", torch.zeros(chunks, dtype=torch.int16, device=device))
        self._indices: Tensor | None = None  # (n,) uint8, decoded while training needs them

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(self.centroids)

    def decode(self, parameter: Tensor) -> Tensor:
        codebook = nn.functional.pad(parameter, (1, 0)) if self.zero else parameter
        indices = self._indices
        if indices is None:
            coded = huffman.Coded(*(b.cpu().numpy() for b in (self.stream, self.lengths, self.chunks)))
            found = huffman.decode(coded, self.shape.numel())
            indices = torch.from_numpy(found).to(parameter.device)
        self._indices = indices if torch.is_grad_enabled() else None
        return _Lookup.apply(codebook, indices).view(self.shape)

    def forget(self) -> None:
        super().forget()
        self._indices = None


class _Lookup(torch.autograd.Function):
    """codebook[indices], for few entries and many indices: its gradient is a histogram."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:  # (K,), (n,) uint8 -> (n,)
        ctx.save_for_backward(indices)
        ctx.size = len(codebook)
        return codebook.index_select(0, indices.int())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        # float64, so that the sum of millions of gradients has the digits of one.
        sums = torch.bincount(indices, weights=grad.double(), minlength=ctx.size)
        return sums.to(grad.dtype), None


def k_means(values: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """At most k ascending centroids of `values` (n,), of nearly the least squared error.

    Lloyd's algorithm, which is exact and cheap in one dimension: clusters of sorted values are intervals, so
    a step is k searches and the differences of prefix sums. It ends when no value changes its cluster, or
    after 300 steps. Its start decides what it finds: of centroids spread evenly over the range (the linear
    start of Han et al., section 3.2) all but a few are lost to a single weight of 350 standard deviations, as
    trained encoders have them. So it starts from `_optimal_groups`.
    """
    ordered = np.sort(values).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    bounds = _optimal_groups(ordered, sums, k)
    for _ in range(_ITERATIONS):
        centroids = np.diff(sums[bounds]) / np.diff(bounds)
        inner = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        previous, bounds = bounds, np.unique(np.concatenate([[0], inner, [len(ordered)]]))
        if np.array_equal(bounds, previous):
            break
    return np.unique(centroids.astype(np.float32))


def _optimal_groups(ordered: NDArray[Any], sums: NDArray[Any], k: int) -> NDArray[Any]:
    """Bounds (k + 1,) of the k intervals of least squared error, among intervals of whole groups of values.

    By dynamic programming over the number of intervals (Wang and Song 2011, Ckmeans.1d.dp). The groups: 256
    of equal size, and the 32 values at each end one by one, for outliers.
    """
    n = len(ordered)
    ends = np.arange(min(32, n))
    edges = np.unique(np.concatenate([ends, np.linspace(0, n, 257).astype(np.int64), n - ends]))
    size = (edges - edges[:, None]).clip(1)  # from row to column
    total, square = sums[edges], np.concatenate([[0.0], np.cumsum(ordered**2)])[edges]
    error = square - square[:, None] - (total - total[:, None]) ** 2 / size
    error[np.tril_indices(len(edges))] = np.inf
    best = np.full(len(edges), np.inf)
    best[0] = 0.0
    before = []
    for _ in range(min(k, len(edges) - 1)):
        cost = best[:, None] + error
        before.append(cost.argmin(0))
        best = cost.min(0)
    found = [len(edges) - 1]
    for choice in reversed(before):
        found.append(int(choice[found[-1]]))
    return edges[found[::-1]]


def _cluster(model: Any, path: str, bits: int) -> None:
    module: Any = model.get_submodule(path)
    weight = module.weight.detach()
    values = weight.float().flatten().cpu().numpy()
    nonzero = values[values != 0]
    zero = len(nonzero) < len(values)
    centroids = k_means(nonzero, 2**bits - zero) if len(nonzero) else np.ones(1, np.float32)
    # Where the middle between two centroids is, the lower one is nearest.
    indices = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values).astype(np.uint8)
    if zero:
        indices = np.where(values == 0, 0, indices + 1).astype(np.uint8)
    coded = huffman.encode(indices, len(centroids) + zero)
    spec = {"kind": "clustered", "centroids": len(centroids), "zero": zero, "bytes": len(coded.stream)}
    module = _build(module, spec)
    code = code_of(module)
    with torch.no_grad():
        parameter_of(module).copy_(torch.from_numpy(centroids))
        for name in ("stream", "lengths", "chunks"):
            getattr(code, name).copy_(torch.from_numpy(getattr(coded, name)))
    replace(model, path, module, spec)


@replacement("clustered")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    weight: Any = module.weight
    return parametrize_weight(module, ClusteredWeight(weight.shape, spec, weight.device))


def cluster_weights(model: Any, options: ClusterOptions, calibration: Calibration | None) -> Any:
    """The model with a codebook and coded indices for each linear layer of the encoder, the pooler included,
    and each embedding table if wanted.

    A matrix (n weights, entropy H of its indices in bits) takes at most n (H + 1) / 8 bytes, 2 bytes for each
    512 weights, and its codebook. Zeros keep a value of their own, which training leaves at 0.

    Raises:
        UserError: a weight is clustered or quantised already, or its pruning is not finished; there is none,
            or `embeddings` of a language model, whose output matrix they are.
    """
    found = weights_to_compress(model, NAME, embeddings=options.embeddings, accept=("sparse",))
    for path, module in found:
        if kind_of(module) == "sparse":
            drop(model, path, "sparse", plain(module))
        embedding = isinstance(module, nn.Embedding)
        bits = (options.bits_embeddings if embedding else None) or options.bits
        _cluster(model, path, bits)
    return model


METHODS = (
    Method(
        name=NAME,
        kind="clustering",
        description="round each matrix to 2^bits values; stored Huffman-coded, no faster by itself",
        paper="Han et al. 2016, Deep Compression",
        options=ClusterOptions,
        main="bits",
        apply=cluster_weights,
    ),
)
