"""Several tensors of one place in several models -> one: pure functions, fp32 in and out, any one shape.

Names, defaults and corner cases are mergekit's (0.1.5), so that its recipes mean the same here; each function says its
formula and its source. b is the base, T_i the models, D_i = T_i - b; the base is none of the T_i but where `METHODS`
says that it counts among them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from spinfast.errors import UserError

Keep = Callable[[Tensor, float], Tensor]
PART = 1 << 20  # elements of a sum in fp64
REQUIRED = None  # of a parameter without a default


def linear(tensors: Sequence[Tensor], weight: Sequence[float], normalize: bool = True) -> Tensor:
    """sum w_i T_i / sum w_i, without the division unless `normalize` (model soups, arXiv 2203.05482)."""
    total = sum(weight)
    if normalize and abs(total) < 1e-8:
        raise UserError("the weights add up to 0, by which linear divides; set normalize: false")
    merged = torch.zeros_like(tensors[0])
    for tensor, w in zip(tensors, weight, strict=True):
        merged.add_(tensor, alpha=w)
    return merged.div_(total) if normalize else merged


def slerp(base: Tensor, tensors: Sequence[Tensor], t: float) -> Tensor:
    """[sin((1-t) th) b + sin(t th) T] / sin th, th the angle of b and T as vectors (Shoemake 1985); t = 0 is the base.

    (1-t) b + t T where they are parallel: abs(cos th) > 0.9995, or a norm below 1e-8.
    """
    (other,) = tensors
    norms = [max(_inner(x, x), 0.0) ** 0.5 for x in (base, other)]
    cos = _inner(base, other) / math.prod(norm if norm > 1e-8 else 1.0 for norm in norms)
    cos = min(max(cos, -1.0), 1.0)
    if abs(cos) > 0.9995:
        return torch.lerp(base, other, t)
    angle = math.acos(cos)
    return (base * (math.sin((1 - t) * angle) / math.sin(angle))).add_(
        other, alpha=math.sin(t * angle) / math.sin(angle)
    )


def nuslerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Slerp of two models, or of their D_i, which are added to the base, with t = w_2 / (w_1 + w_2) (mergekit).

    Each tensor is one vector, or with `nuslerp_flatten: false` its rows are, its columns with `nuslerp_row_wise` too.
    """
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    pair = [tensor if base is None else tensor - base for tensor in tensors]
    across = nuslerp_row_wise and not nuslerp_flatten
    if nuslerp_flatten:
        pair = [x.reshape(-1) for x in pair]
    elif across:
        pair = [x.transpose(0, -1) for x in pair]
    a, b = pair
    cos = 1.0
    for x in pair:
        cos = cos * (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-7))
    cos = cos.sum(-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cos.square() <= 1e-16
    angle = torch.acos(torch.where(parallel, 0, cos))
    of_a = torch.where(parallel, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    of_b = torch.where(parallel, t, torch.sin(t * angle) / torch.sin(angle))
    merged = of_a * a + of_b * b
    merged = (merged.transpose(0, -1) if across else merged).reshape(tensors[0].shape)
    return merged if base is None else base + merged


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weight: Sequence[float], normalize: bool = False, lambda_: float = 1.0
) -> Tensor:
    """b + lambda sum w_i D_i, the sum divided by sum w_i if `normalize` (arXiv 2212.04089)."""
    return _added(base, _weighted(_updates(base, tensors), weight), weight, normalize, lambda_)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    rescale: bool | str = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Trim each D_i to its largest, then add up those whose sign is that of the weighted sum (arXiv 2306.01708).

    P_i = w_i D_i of the max(1, int(d_i n)) largest of n; s = sign(sum P_i), 0 counts as +; kept where sign(P_i) = s;
    b + lambda sum kept P_i / sum of the kept ones' w_i, without the division unless `normalize`.
    """
    updates = [_sparse(D, d, _largest, rescale) for D, d in zip(_updates(base, tensors), density, strict=True)]
    return _elected(base, _weighted(updates, weight), weight, normalize, lambda_)


def dare_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    density: Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    rescale: bool | str = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop each element of D_i with probability 1 - d_i, rescale what is left, then task arithmetic (arXiv 2311.03099).

    `rescale`: true is mergekit's, by which the L1 norm stays what it was; density is the paper's, times 1 / d_i.
    """
    updates = _dropped(base, tensors, density, generator, rescale)
    return _added(base, _weighted(updates, weight), weight, normalize, lambda_)


def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    density: Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    rescale: bool | str = True,
    lambda_: float = 1.0,
) -> Tensor:
    """As `dare_linear`, with the election of signs of `ties` (arXiv 2311.03099)."""
    updates = _dropped(base, tensors, density, generator, rescale)
    return _elected(base, _weighted(updates, weight), weight, normalize, lambda_)


def breadcrumbs(
    base: Tensor,
    tensors: Sequence[Tensor],
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool | str = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Of each D_i of n elements the int(gamma_i n) largest are dropped, and the smallest, so that int(d_i n) are left;
    then task arithmetic (arXiv 2312.06795). Fewer of the largest are dropped where too few would be left."""
    updates = [
        _sparse(D, d, partial(_middle, gamma=g), rescale)
        for D, d, g in zip(_updates(base, tensors), density, gamma, strict=True)
    ]
    return _added(base, _weighted(updates, weight), weight, normalize, lambda_)


def model_stock(base: Tensor, tensors: Sequence[Tensor], filter_wise: bool = False) -> Tensor:
    """t mean(T_i) + (1-t) b, t = N c / (1 + (N-1) c), c the mean cosine of pairs of D_i (arXiv 2403.19522).

    As one vector, or row by row with `filter_wise`. The base where the denominator is 0 (below 1e-6).
    """
    rows = [x if filter_wise and x.ndim > 1 else x.reshape(1, -1) for x in tensors]
    b = base.reshape_as(rows[0])
    cosines = []
    for one, two in combinations(_updates(b, rows), 2):
        norms = (one.norm(dim=-1) * two.norm(dim=-1)).clamp(min=1e-6)
        cosines.append(((one * two).sum(-1) / norms).clamp(-1, 1))
    c, count = (sum(cosines) / len(cosines)).unsqueeze(-1), len(rows)
    below = 1 + (count - 1) * c
    t = torch.where(below.abs() < 1e-6, 0, count * c / below)
    return torch.lerp(b, sum(rows) / count, t).reshape(base.shape)


def karcher(tensors: Sequence[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Riemannian mean of T_i / |T_i| on the sphere, times the mean of |T_i| (Karcher 1977; arXiv 2603.04972).

    From the normalised mean m: v = mean of (th_i / sin th_i) (u_i - cos th_i m), cos th_i = u_i . m, then
    m <- cos |v| m + sin |v| v / |v|, until |v| < tol or `max_iter` times. A norm up to tol has no direction.
    """
    if len(tensors) == 1:
        return tensors[0]
    norms = [math.sqrt(_inner(x, x)) for x in tensors]
    units = [x / norm for x, norm in zip(tensors, norms, strict=True) if norm > tol]
    if not units:
        return torch.zeros_like(tensors[0])
    mean = sum(units) / len(units)
    length = math.sqrt(_inner(mean, mean))
    mean = units[0].clone() if length < tol else mean / length
    for _ in range(max_iter):
        v = torch.zeros_like(mean)
        for u in units:
            cos = min(max(_inner(u, mean), -1.0), 1.0)
            angle = math.acos(cos)
            if angle >= tol:
                v.add_(u - cos * mean, alpha=angle / math.sin(angle) / len(units))
        length = math.sqrt(_inner(v, v))
        if length < tol:
            break
        mean = math.cos(length) * mean + (math.sin(length) / length) * v
        mean /= math.sqrt(_inner(mean, mean))
    return mean * (sum(norms) / len(norms))


def passthrough(tensors: Sequence[Tensor], scale: Sequence[float]) -> Tensor:
    """T, times `scale`: for stacking layers of several models."""
    return tensors[0] if scale[0] == 1 else tensors[0] * scale[0]


# What they share -----------------------------------------------------------------------------------------------


def seed_of(seed: int, name: str) -> int:
    """Of a weight's random choice, whatever came before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")


def _inner(a: Tensor, b: Tensor) -> float:
    """a . b as vectors, in fp64, a part at a time."""
    parts = zip(a.reshape(-1).split(PART), b.reshape(-1).split(PART), strict=True)
    return float(sum(x.double() @ y.double() for x, y in parts))


def _updates(base: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor - base for tensor in tensors]


def _weighted(updates: Sequence[Tensor], weight: Sequence[float]) -> list[Tensor]:
    return [update.mul_(w) for update, w in zip(updates, weight, strict=True)]


def _added(base: Tensor, parts: Sequence[Tensor], weight: Sequence[float], normalize: bool, lambda_: float) -> Tensor:
    total = sum(weight)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    return base.add(sum(parts), alpha=lambda_ / divisor)


def _elected(base: Tensor, parts: Sequence[Tensor], weight: Sequence[float], normalize: bool, lambda_: float) -> Tensor:
    """The parts whose sign is that of their sum, added to the base."""
    positive = sum(parts) >= 0
    merged, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for part, w in zip(parts, weight, strict=True):
        kept = torch.where(positive, part > 0, part < 0)
        merged.add_(part * kept)
        divisor.add_(kept, alpha=w)
    if normalize:
        merged /= torch.where(divisor == 0, 1, divisor)
    return base.add(merged, alpha=lambda_)


def _sparse(update: Tensor, density: float, keep: Keep, rescale: bool | str) -> Tensor:
    """The elements that `keep` chooses; `rescale` true: of the same L1 norm, density: divided by it."""
    if density >= 1:
        return update
    kept = update * keep(update, density)
    if rescale == "density":
        return kept / density if density else kept
    before, after = update.abs().sum(), kept.abs().sum()
    return kept * (before / after) if rescale and min(before, after) >= 1e-7 else kept


def _dropped(
    base: Tensor, tensors: Sequence[Tensor], density: Sequence[float], generator: torch.Generator, rescale: bool | str
) -> list[Tensor]:
    def drawn(update: Tensor, d: float) -> Tensor:
        return torch.bernoulli(torch.full_like(update, d), generator=generator)

    return [_sparse(D, d, drawn, rescale) for D, d in zip(_updates(base, tensors), density, strict=True)]


def _largest(update: Tensor, density: float) -> Tensor:
    return _ranked(update, max(1, int(density * update.numel())) if density > 0 else 0, 0)


def _middle(update: Tensor, density: float, gamma: float) -> Tensor:
    count, left = update.numel(), int(density * update.numel())
    return _ranked(update, left, min(int(gamma * count), count - left))


def _ranked(update: Tensor, count: int, after: int) -> Tensor:
    """1 for the `count` largest by magnitude after the `after` largest, else 0."""
    best = update.abs().reshape(-1).topk(count + after).indices[after:]
    return torch.zeros(update.numel(), device=update.device).index_fill_(0, best, 1).reshape(update.shape)


# The table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a recipe may say of a method. `base`: "apart", "maybe" apart, or "among" the models; `count`: of those.

    `each` and `shared`: its parameters with their defaults, of every model that is not apart, and of all together.
    """

    merge: Callable[..., Tensor]
    base: str = "apart"
    count: tuple[int, float] = (1, math.inf)
    each: Mapping[str, float | None] = field(default_factory=dict)
    shared: Mapping[str, float | bool | int | None] = field(default_factory=dict)
    random: bool = False

    def __call__(self, base: Tensor | None, tensors: Sequence[Tensor], parameters: Mapping, seed: int = 0) -> Tensor:
        """`parameters` as `each` and `shared` name them, a list of those of each."""
        given = {"lambda_" if name == "lambda" else name: value for name, value in parameters.items()}
        if self.random:
            given["generator"] = torch.Generator(tensors[0].device).manual_seed(seed)
        return self.merge(tensors, **given) if self.base == "among" else self.merge(base, tensors, **given)


def _family(merge: Callable[..., Tensor], each: dict, random: bool = False, **shared) -> Method:
    return Method(merge, each={"weight": REQUIRED} | each, shared=shared | {"lambda": 1.0}, random=random)


METHODS: dict[str, Method] = {
    "linear": Method(linear, "among", each={"weight": REQUIRED}, shared={"normalize": True}),
    "slerp": Method(slerp, count=(1, 1), shared={"t": REQUIRED}),
    "nuslerp": Method(
        nuslerp,
        "maybe",
        (2, 2),
        each={"weight": REQUIRED},
        shared={"nuslerp_flatten": True, "nuslerp_row_wise": False},
    ),
    "task_arithmetic": _family(task_arithmetic, {}, normalize=False),
    "ties": _family(ties, {"density": 1.0}, normalize=True, rescale=False),
    "dare_linear": _family(dare_linear, {"density": 1.0}, random=True, normalize=False, rescale=True),
    "dare_ties": _family(dare_ties, {"density": 1.0}, random=True, normalize=False, rescale=True),
    "breadcrumbs": _family(breadcrumbs, {"density": 1.0, "gamma": 0.01}, normalize=False, rescale=False),
    "model_stock": Method(model_stock, count=(2, math.inf), shared={"filter_wise": False}),
    "karcher": Method(karcher, "among", shared={"max_iter": 10, "tol": 1e-5}),
    "passthrough": Method(passthrough, "among", (1, 1), each={"scale": 1.0}),
}
