"""The frame of a weight is its truncated SVD, and the same whatever LAPACK chose."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spinfast.errors import UserError
from spinfast.policy.adapters import frames


def weight(values, out, inp, seed=0):
    """A matrix of these singular values."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((n, len(values))))[0] for n in (out, inp))
    return torch.from_numpy(left * values @ right.T).float()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_it_is_the_truncated_svd(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A, B = frames.frame(W, 5)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    expected = (U[:, :5] * S[:5]) @ Vh[:5]
    assert (B.double() @ A.double() - expected).norm() <= 1e-6 * expected.norm()
    assert torch.allclose(A @ A.t(), torch.eye(5), atol=1e-6)
    assert torch.allclose(B.norm(dim=0), S[:5].float(), rtol=1e-6)


SPECTRA = st.lists(st.sampled_from([4.0, 2.0, 2.0, 1.0, 0.5]), min_size=2, max_size=8).map(
    lambda values: sorted(values, reverse=True)
)


@settings(max_examples=40, deadline=None)
@given(SPECTRA, st.integers(1, 8), st.booleans(), st.integers(0, 5))
def test_another_lapack_gives_the_same_frame(values, r, tall, seed):
    """Signs turned and equal values rotated, also across the border of the rank, as another LAPACK might."""
    W, r = weight(values, *((20, 12) if tall else (12, 20)), seed=seed), min(r, len(values))
    real, draw = torch.linalg.eigh, np.random.default_rng(seed + 1)

    def other(gram):
        found, vectors = real(gram)
        groups = torch.cumsum(torch.diff(found, prepend=found[:1]) > 1e-9 * found[-1], 0)
        for group in groups.unique():
            at = (groups == group).nonzero()[:, 0]
            turned = torch.from_numpy(np.linalg.qr(draw.standard_normal((len(at), len(at))))[0])
            vectors[:, at] = vectors[:, at] @ turned
        return found, vectors

    expected = frames.frame(W, r)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", other)
        found = frames.frame(W, r)
    for ours, theirs in zip(expected, found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * ours.norm()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tall", [False, True])
def test_a_weight_of_lower_rank_has_a_finite_frame(seed, tall):
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    W[3] = W[5]
    A, B = frames.frame(W.t() if tall else W, 8)
    assert A.isfinite().all()
    assert B.isfinite().all()
    assert torch.allclose(B @ A, W.t() if tall else W, atol=1e-5)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="NaN or inf"):
        frames.frame(torch.full((3, 3), torch.nan), 2)


def test_a_damaged_cache_is_made_again_and_none_that_can_be_written_is_no_obstacle(tmp_path, monkeypatch, caplog):
    save_file({"q.weight": weight([3.0, 1.0], 6, 8)}, tmp_path / "model.safetensors")
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))
    made = frames.of_model(tmp_path, "rev", ["q"], 2)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    for content in (b"", kept.read_bytes()[:-9]):
        kept.write_bytes(content)
        assert frames.of_model(tmp_path, "rev", ["q"], 2).base == made.base
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "file"))
    assert frames.of_model(tmp_path, "rev", ["q"], 2).base == made.base


def test_files_decide_and_the_cache_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))
    names = ["layers.0.q", "layers.1.q"]
    save_file({f"{n}.weight": weight([3.0, 1.0], 6, 8, i) for i, n in enumerate(names)}, tmp_path / "model.safetensors")
    made = frames.of_model(tmp_path, "rev", names, 2)
    monkeypatch.setattr(frames, "frame", None)  # nothing is computed again
    again = frames.of_model(tmp_path, "rev", names, 2)
    assert made.base == again.base
    assert all(torch.equal(a, b) for n in names for a, b in zip(made.by_module[n], again.by_module[n], strict=True))
    with pytest.raises(UserError, match=r"has no layers\.2\.q\.weight"):
        frames.of_model(tmp_path, "rev", ["layers.2.q"], 2)


def test_a_probe_tells_updates_apart():
    W = weight([5.0, 3.0, 1.0], 10, 14)
    by_module = {"a": frames.frame(W, 2), "b": frames.frame(W * 2, 2)}
    R = {"a": torch.tensor([[1.0, 0.5], [0.0, -1.0]]), "b": torch.tensor([[0.2, 0.0], [0.3, 1.0]])}
    told = frames.probe(by_module, R, 1.0)
    turned = {name: (-A, B) for name, (A, B) in by_module.items()}
    swapped = frames.probe(by_module, {"a": R["b"], "b": R["a"]}, 1.0)
    for other in (frames.probe(turned, R, 1.0), swapped, frames.probe(by_module, R, 2.0)):
        assert np.linalg.norm(np.subtract(told, other)) > 0.1 * np.linalg.norm(told)
    half = frames.probe(by_module, {name: small / 2 for name, small in R.items()}, 1.0)
    assert np.allclose(np.array(told) / 2, half)
