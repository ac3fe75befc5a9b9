"""Word embeddings as a narrow table and a projection (ALBERT, Lan et al. 2020, section 3.1)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdistil.compress.method import Calibration, Method
from fastdistil.compress.replacements import replace, replacement
from fastdistil.errors import UserError
from fastdistil.schema import Section


class FactorizedEmbedding(nn.Module):
    """`projection(table(ids))`: V × r and r × D numbers in place of V × D, with the face of an
    `nn.Embedding`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.table = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.projection = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """(V, D), the product, formed at each call."""
        return self.table.weight @ self.projection.weight.mT

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.projection(self.table(ids))
        return states


@replacement("factorized_embedding")
def _build(module: nn.Module, spec: dict[str, Any]) -> nn.Module:
    embedding: Any = module
    return _empty(embedding, spec["rank"])


def _empty(embedding: Any, rank: int) -> FactorizedEmbedding:
    rows, width = embedding.weight.shape
    weight = embedding.weight
    return FactorizedEmbedding(rows, width, rank, embedding.padding_idx, weight.device, weight.dtype)


class FactorizeEmbeddingsOptions(Section):
    rank: int = Field(default=128, ge=1, description="width of the table; ALBERT's is 128")


def factorize_embeddings(
    model: Any, options: FactorizeEmbeddingsOptions, calibration: Calibration | None
) -> Any:
    """The model with its word embeddings (V, D) as a table (V, rank) and a projection (rank, D).

    The factors are those of `factorize_embedding`; a word counts as often as it is in the examples, and once
    more.

    Raises:
        UserError: a rank that is larger than the matrix, or that does not make it smaller; word embeddings
            that are missing, factorised or coded already, or tied to a decoder.
    """
    path, embedding = _word_embeddings(model)
    rows, width = embedding.weight.shape
    rank = options.rank
    if rank > min(rows, width):
        raise UserError(
            f"factorize-embeddings: rank {rank} is larger than the {rows} × {width} matrix {path}"
        )
    if rank * (rows + width) >= rows * width:
        largest = (rows * width - 1) // (rows + width)
        raise UserError(
            f"factorize-embeddings: rank {rank} does not make the {rows} × {width} matrix {path} smaller, "
            f"ranks up to {largest} do"
        )
    counts = torch.ones(rows, dtype=torch.float64, device=embedding.weight.device)
    for batch in [] if calibration is None else calibration.batches:
        counts += torch.bincount(batch.input_ids[batch.attention_mask.bool()], minlength=rows)
    factors = factorize_embedding(embedding, rank, counts)
    replace(model, path, factors, {"kind": "factorized_embedding", "rank": rank})
    return model


def factorize_embedding(embedding: nn.Embedding, rank: int, counts: Tensor) -> FactorizedEmbedding:
    """The factors A (V, r) and P (r, D) that minimise Σ_v counts_v ‖e_v − a_v P‖² over the rows e_v.

    P's rows are the first r eigenvectors of Σ_v counts_v e_v e_vᵀ and a_v = e_v Pᵀ: the SVD of a matrix with
    rows weighted by √counts_v. The minimum is the sum of the other eigenvalues.
    """
    weight = embedding.weight.detach().double()
    directions = torch.linalg.eigh(weight.mT @ (counts[:, None] * weight))[1].flip(1)[:, :rank]
    factors = _empty(embedding, rank)
    with torch.no_grad():
        factors.table.weight.copy_(weight @ directions)
        factors.projection.weight.copy_(directions)
    return factors.train(embedding.training)


def _word_embeddings(model: Any) -> tuple[str, nn.Embedding]:
    """The path and the module; `UserError` where they cannot be replaced."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    name = type(model).__name__
    if isinstance(embedding, FactorizedEmbedding):
        raise UserError("factorize-embeddings: the word embeddings are factorised already")
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"factorize-embeddings: {name} has no word embeddings of floats that can be replaced")
    if parametrize.is_parametrized(embedding):
        raise UserError(
            "factorize-embeddings: the word embeddings are pruned or clustered already; put "
            "factorize-embeddings before that step"
        )
    decoder = model.get_output_embeddings()
    if decoder is not None and getattr(decoder, "weight", None) is embedding.weight:
        raise UserError(
            f"factorize-embeddings: the decoder of {name} is tied to the word embeddings; give a model with "
            "the head of a task"
        )
    return next(path for path, module in model.named_modules() if module is embedding), embedding


METHODS = (
    Method(
        name="factorize-embeddings",
        kind="low rank",
        description="replace the word embeddings by a narrow table and a projection, as in ALBERT",
        paper="Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
        options=FactorizeEmbeddingsOptions,
        main="rank",
        apply=factorize_embeddings,
    ),
)
