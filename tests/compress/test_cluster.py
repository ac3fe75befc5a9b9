import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistil.compress import prune_magnitude
from fastdistil.compress.cluster import METHODS, ClusterOptions, k_means
from fastdistil.compress.encoded import code_of, densify, parameter_of
from fastdistil.compress.huffman import CHUNK
from fastdistil.compress.replacements import replacements
from fastdistil.errors import UserError
from fastdistil.evaluate.cost import count_parameters

(METHOD,) = METHODS
PATH = "bert.encoder.layer.1.output.dense"


def cluster(model: Any, **options: Any) -> Any:
    chosen = ClusterOptions(**options)
    return METHOD.finish(METHOD.apply(model, chosen, None), chosen)


def prune(model: Any, sparsity: float) -> Any:
    (method,) = prune_magnitude.METHODS
    options = prune_magnitude.PruneMagnitudeOptions(sparsity=sparsity, embeddings=True)
    return method.finish(method.apply(model, options, None), options)


def weights(model: Any) -> dict[str, Tensor]:
    kinds = (nn.Linear, nn.Embedding)
    with torch.no_grad():
        return {n: m.weight for n, m in model.base_model.named_modules() if isinstance(m, kinds)}


def train(model: Any, calibration: Any) -> Any:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for batch in calibration.batches:
        calibration.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_parameters_are_the_weights_and_not_the_codebooks(build: Any) -> None:
    whole = count_parameters(build())
    assert count_parameters(cluster(build(), bits=2)) == whole
    pruned = prune(build(), 0.5)
    left = count_parameters(pruned)
    assert left < whole
    assert count_parameters(cluster(pruned, bits=2)) == left


def test_k_means_finds_separate_groups() -> None:
    centers = np.array([-3.0, -1.0, 0.5, 4.0])
    groups = [center + np.array([-0.1, 0.0, 0.1, 0.2]) for center in centers]
    values = np.random.default_rng(0).permutation(np.concatenate(groups)).astype(np.float32)
    np.testing.assert_allclose(k_means(values, 4), centers + 0.05, rtol=1e-6)


def test_k_means_ends_where_each_centroid_is_the_mean_of_its_values() -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    centroids = k_means(values, 8)
    nearest = np.abs(values[:, None] - centroids).argmin(1)
    means = [values[nearest == k].mean(dtype=np.float64) for k in range(8)]
    np.testing.assert_allclose(centroids, means, rtol=1e-5)


def test_k_means_spares_a_centroid_for_an_outlier() -> None:
    values = np.append(np.random.default_rng(3).standard_normal(20_000), 350.0).astype(np.float32)
    centroids = k_means(values, 8)
    assert centroids[-1] == 350
    assert np.abs(values[:-1, None] - centroids).min(1).std() < 0.3


@pytest.mark.parametrize("values", [[2.0], [1.0, 1.0, 1.0], [3.0, 1.0, 3.0, 2.0]])
def test_k_means_of_few_values_gives_these(values: list[float]) -> None:
    assert k_means(np.array(values, np.float32), 4).tolist() == sorted(set(values))


def least_error(values: np.ndarray, k: int) -> float:
    """The least sum of squared distances of n values to k centroids, by dynamic programming over all n."""
    ordered = np.sort(values.astype(np.float64))
    total, square = (np.concatenate([[0.0], np.cumsum(x)]) for x in (ordered, ordered**2))
    edges = np.arange(len(ordered) + 1)
    size = edges - edges[:, None]
    error = np.where(
        size > 0, square - square[:, None] - (total - total[:, None]) ** 2 / size.clip(1), np.inf
    )
    best = np.where(edges == 0, 0, np.inf)
    for _ in range(k):
        best = (best[:, None] + error).min(0)
    return float(best[-1])


@pytest.mark.parametrize("k", [2, 7, 16])
def test_k_means_finds_nearly_the_least_error(k: int) -> None:
    values = np.random.default_rng(2).standard_t(3, 1500).astype(np.float32)  # with outliers
    error = np.abs(values[:, None].astype(np.float64) - k_means(values, k)).min(1)
    assert (error**2).sum() <= 1.01 * least_error(values, k)


@pytest.mark.parametrize("bits", [1, 5])
def test_each_matrix_has_so_many_values_and_the_nearest(
    build: Callable[..., Any], family: str, bits: int
) -> None:
    model = build(family)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    after = weights(cluster(model, bits=bits))
    for name, weight in after.items():
        centroids = weight.unique()
        assert len(centroids) <= 2**bits
        distance = (before[name].flatten()[:, None] - centroids).abs().min(1).values
        torch.testing.assert_close((before[name] - weight).abs().flatten(), distance, atol=1e-6, rtol=0)


def test_embeddings_may_have_bits_of_their_own_or_stay(build: Callable[..., Any]) -> None:
    model = cluster(build("bert"), bits=2, bits_embeddings=5)
    assert len(weights(model)["embeddings.word_embeddings"].unique()) == 32
    assert len(model.get_submodule(PATH).weight.unique()) == 4
    model = cluster(build("bert"), embeddings=False)
    assert len(weights(model)["embeddings.word_embeddings"].unique()) == 3200


def test_the_head_is_left_alone(tiny_bert: Any) -> None:
    before = tiny_bert.classifier.weight.detach().clone()
    assert torch.equal(cluster(tiny_bert).classifier.weight, before)


def test_reloads_bit_equal(
    build: Callable[..., Any], family: str, reload_equal: Callable[[Any], Any]
) -> None:
    reload_equal(cluster(build(family), bits=4))


@pytest.mark.parametrize("bits", [1, 8])
def test_the_fewest_and_the_most_bits_reload_bit_equal(
    tiny_bert: Any, bits: int, reload_equal: Callable[[Any], Any]
) -> None:
    reload_equal(cluster(tiny_bert, bits=bits, bits_embeddings=4))


def test_the_file_is_within_a_bit_a_weight_of_the_entropy(
    build: Callable[..., Any], save: Callable[..., Path]
) -> None:
    model = cluster(build("bert", vocab_size=4000), bits=4)
    stored = load_file(save(model) / "model.safetensors")
    for name, weight in weights(model).items():
        n = weight.numel()
        shares = weight.unique(return_counts=True)[1] / n
        entropy = float(-(shares * shares.log2()).sum())
        overhead = 4 * len(shares) + len(shares) + 2 * -(-n // CHUNK) + 4
        size = sum(t.nbytes for key, t in stored.items() if f".{name}.parametrizations" in key)
        assert n * entropy / 8 <= size <= n * (entropy + 1) / 8 + overhead


def test_the_gradient_of_a_centroid_is_the_sum_of_its_weights_gradients(tiny_bert: Any) -> None:
    linear = cluster(tiny_bert, bits=3).get_submodule(PATH)
    weight = linear.weight.detach()
    x, upstream = torch.randn(5, 48), torch.randn(5, 32)
    linear(x).backward(upstream)
    centroids = parameter_of(linear)
    expected = [(upstream.T @ x)[weight == centroid].sum() for centroid in centroids]
    torch.testing.assert_close(centroids.grad, torch.stack(expected))


def test_training_moves_the_centroids_and_no_weight_to_another(
    tiny_bert: Any, calibration: Any, reload_equal: Callable[[Any], Any]
) -> None:
    model = cluster(tiny_bert, bits=3)
    before = model.get_submodule(PATH).weight.detach().clone()
    stream = code_of(model.get_submodule(PATH)).stream.clone()
    train(model, calibration)
    after = model.get_submodule(PATH).weight
    for value in before.unique():
        assert len(after[before == value].unique()) == 1
    assert not torch.equal(after, before)
    assert torch.equal(code_of(model.get_submodule(PATH)).stream, stream)
    reload_equal(model)


def test_pruned_weights_stay_zero_when_clustered_and_trained(
    tiny_bert: Any, calibration: Any, reload_equal: Callable[[Any], Any]
) -> None:
    model = prune(tiny_bert, 0.7)
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    train(cluster(model, bits=3), calibration)
    for name, weight in weights(model).items():
        assert torch.equal(weight == 0, zeros[name])
        assert len(weight.unique()) <= 8
    assert {spec["kind"] for _, spec in replacements(model)} == {"clustered"}
    reload_equal(model)


def test_zeros_make_the_file_smaller(build: Callable[..., Any], save: Callable[..., Path]) -> None:
    files = [
        save(cluster(model), name) / "model.safetensors"
        for name, model in (("dense", build("bert")), ("pruned", prune(build("bert"), 0.8)))
    ]
    dense, pruned = (
        sum(t.nbytes for key, t in load_file(file).items() if key.endswith("stream")) for file in files
    )
    # 80 % of the indices take 1 bit in place of about 3.8, the others one or two bits more.
    assert pruned < 0.55 * dense


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_matrix_can_be_clustered(
    tiny_bert: Any, value: float, reload_equal: Callable[[Any], Any]
) -> None:
    nn.init.constant_(tiny_bert.get_submodule(PATH).weight, value)
    cluster(tiny_bert)
    assert (tiny_bert.get_submodule(PATH).weight == value).all()
    reload_equal(tiny_bert)


def test_densify_gives_plain_weights_of_the_same_values(tiny_bert: Any, run: Callable[[Any], Tensor]) -> None:
    model = cluster(tiny_bert)
    expected = run(model)
    densify(model)
    assert replacements(model) == []
    assert type(model.get_submodule(PATH)) is nn.Linear
    assert torch.equal(run(model), expected)


def test_densify_leaves_the_model_alone_that_was_copied(tiny_bert: Any, run: Callable[[Any], Tensor]) -> None:
    model = cluster(tiny_bert)
    expected, listed = run(model), replacements(model)
    copied = densify(copy.deepcopy(model))
    assert torch.equal(run(copied), expected)
    assert torch.equal(run(model.train().eval()), expected)
    assert replacements(model) == listed
    assert code_of(model.get_submodule(PATH)).kind == "clustered"


def test_works_in_bfloat16(tiny_bert: Any, reload_equal: Callable[[Any], Any]) -> None:
    model = cluster(tiny_bert)
    float32 = model.get_submodule(PATH).weight.detach()
    model.to(torch.bfloat16)
    assert torch.equal(model.get_submodule(PATH).weight, float32.bfloat16())
    reload_equal(model)


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 9}, {"bits_embeddings": 9}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        ClusterOptions(**options)


def test_clustering_twice_is_refused(tiny_bert: Any) -> None:
    cluster(tiny_bert)
    with pytest.raises(UserError, match="is clustered already"):
        cluster(tiny_bert)


def test_pruning_what_is_clustered_is_refused(tiny_bert: Any) -> None:
    cluster(tiny_bert)
    with pytest.raises(UserError, match=r"prune-magnitude: .* is clustered already"):
        prune(tiny_bert, 0.5)


def test_a_mask_that_is_not_finished_is_refused(tiny_bert: Any) -> None:
    (method,) = prune_magnitude.METHODS
    method.apply(tiny_bert, prune_magnitude.PruneMagnitudeOptions(), None)
    with pytest.raises(UserError, match="is pruned already"):
        cluster(tiny_bert)


@pytest.mark.parametrize("kind", ["int8_linear", "fake_int8", "int8_embedding"])
def test_a_quantised_model_is_refused(tiny_bert: Any, kind: str) -> None:
    tiny_bert.config.fastdistil = {"replacements": [[PATH, {"kind": kind}]]}
    with pytest.raises(UserError, match="is quantised already; put cluster before that step"):
        cluster(tiny_bert)
