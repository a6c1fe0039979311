"""The mathematics of Tucker experts, on plain tensors.

Legend, used throughout the package (shape suffixes and einsum letters):

    B  samples of a batch          S  positions (tokens, patches) of a sample
    D  input features of a layer   O  output features of a layer (O = D in the multiplicative form)
    R  rank of an expert           K  groups of experts
    T  experts in a group          P  rank shared by the experts of a group
    N  routed units (B samples, or 1 for a whole batch)
    F  length of a routing feature L  adapted layers
    H  width of the diagonal blocks of a core (H = R: a full core)
    A  width of the diagonal blocks of the slice on the input's own axes

Source: TuckA, arXiv 2511.06859, section 3; `mean_std`, the shared slice and the additive form go beyond the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CORE_GAIN = 4.0
"""How many times larger than its parameters a "bounded" core near zero acts, unless said: its speed under an optimiser
that moves every entry by its learning rate (Adam), beside that of factors (`tensors.FACTOR_ENTRY`) and of a head."""


def safe_norm(
    x: Tensor,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
) -> Tensor:
    """Euclidean (for a matrix: Frobenius) norm, with 1 in place of 0.

    Dividing by it leaves a zero tensor at zero and gives it a finite gradient.
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def safe_product(
    *norms: Tensor,  # () or (L,) each
) -> Tensor:
    """The product of norms to divide by, with 1 in place of 0 (see `safe_norm`)."""
    product = norms[0]
    for norm in norms[1:]:
        product = product * norm
    return torch.where(product > 0, product, 1.0)


def scale_core(
    core: Tensor,  # (..., P, R, H) or (..., R, H)
    dim: tuple[int, ...],
    normalize: bool | str,
    gain: float = CORE_GAIN,
) -> Tensor:
    """A core as it acts, given the modes of one group's part of it: divided by its norm, bounded, or as it is."""
    if not normalize:
        return core
    if normalize is True:
        return core / safe_norm(core, dim=dim, keepdim=True)
    core = gain * core
    return core * (1 + core.square().sum(dim, keepdim=True) / core.shape[-2]).rsqrt()


def unscale_core(
    core: Tensor,  # (..., P, R, H) or (..., R, H), of norm below √R
    dim: tuple[int, ...],
    gain: float = CORE_GAIN,
    least_room: float = 0.0,
) -> Tensor:
    """The "bounded" core that acts as this one; one of smaller norm where 1 − ‖𝒢‖²/R is below `least_room`."""
    room = 1 - core.square().sum(dim, keepdim=True) / core.shape[-2]
    return core * (room.clamp_min(least_room).rsqrt() / gain)


def block_diagonal(
    core: Tensor,  # (..., R, H), blocks of H rows one under the other
) -> Tensor:  # (..., R, R)
    """The core that diagonal blocks stand for: zero beside them, so that 𝒯 is a sum of R/H Tucker tensors of rank H.

    Source: block term decomposition, De Lathauwer 2008, SIAM J. Matrix Anal. Appl. 30(3), 1033–1066.
    """
    rank, width = core.shape[-2:]
    if rank == width:
        return core
    blocks = core.unflatten(-2, (-1, width))  # (..., R/H, H, H)
    same_block = torch.eye(rank // width, dtype=core.dtype, device=core.device)
    return torch.einsum("...bqr,bc->...bqcr", blocks, same_block).flatten(-2).flatten(-3, -2)


def diagonal_blocks(
    core: Tensor,  # (..., R, R)
    width: int,
) -> Tensor:  # (..., R, H)
    """The diagonal blocks of a core, one under the other, and nothing of what lies beside them."""
    if width == core.shape[-1]:
        return core
    blocks = core.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))  # (..., R/H, H, R/H, H)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).flatten(-3, -2)


def mix_experts(
    core: Tensor,  # (L, N, P, R, H), of the group that each unit chose
    expert_factor: Tensor,  # (L, T, P)
    gates: Tensor,  # (N, T)
) -> Tensor:  # (L, N, R, H)
    """Mix all experts of the chosen group before they touch the data: M = Σ_j g_j Σ_p C[j,p] 𝒢[i₀,p]."""
    weights_LNP = torch.einsum("nt,ltp->lnp", gates, expert_factor)
    return torch.einsum("lnp,lnpqr->lnqr", weights_LNP, core)


def add_update(
    onto: Tensor,  # (..., O)
    projected: Tensor,  # (..., R), rows of one unit contiguous
    mix: Tensor,  # (N, R, R)
    output_factor: Tensor,  # (O, R)
) -> Tensor:  # (..., O)
    """The update of projected inputs, every unit with its own M: onto + ((x U) M) Vᵀ, one fused product and sum."""
    mixed_NSR = torch.bmm(by_unit(projected, mix.shape[0]), mix).to(onto.dtype)
    flat = torch.addmm(onto.reshape(-1, onto.shape[-1]), mixed_NSR.flatten(0, 1), output_factor.mT)
    return flat.reshape(onto.shape)


def on_axes(
    x: Tensor,  # (..., D)
    blocks: Tensor,  # (A, A, D/A)
) -> Tensor:  # (..., D)
    """X E, with E the slice on the axes of x: entry (q − k mod A)·D/A + d goes to q·D/A + d by the factor [k,q,d].

    Axes that meet lie D/A apart, and a block is held by its circulant diagonals k, so that every product is of vectors
    that lie together.
    """
    x_AD = x.unflatten(-1, (blocks.shape[0], -1))
    terms = (x_AD.roll(shift, -2) * diagonal for shift, diagonal in enumerate(blocks))
    return sum(terms, torch.zeros_like(x_AD)).reshape(x.shape)


def bound_axes(
    blocks: Tensor,  # (A, A, D/A)
    bound: float,
) -> Tensor:  # (A, A, D/A)
    """E / √(1 + ‖E‖² / (D bound²)): near zero as it is; the root mean square norm of its rows stays below the bound."""
    features = blocks.shape[1] * blocks.shape[2]
    filled = torch.linalg.vector_norm(blocks) / (features**0.5 * float(bound))
    return blocks * (1 + filled.square()).rsqrt()


def axes_by_source(
    blocks: Tensor,  # (A, A, D/A)
) -> Tensor:  # (A, A, D/A)
    """I + E by where entries come from and where they go: x (I + E) is one product, and one sum over the first."""
    width = torch.arange(len(blocks), device=blocks.device)
    from_to = (width - width.unsqueeze(1)) % len(blocks)
    same = torch.eye(len(blocks), dtype=blocks.dtype, device=blocks.device)
    return blocks[from_to, width] + same.unsqueeze(-1)


def axes_matrix(
    blocks: Tensor,  # (A, A, D/A)
) -> Tensor:  # (D, D)
    """The matrix E of the slice on the axes."""
    features = blocks.shape[1] * blocks.shape[2]
    return on_axes(torch.eye(features, dtype=blocks.dtype, device=blocks.device), blocks)


def by_unit(
    x: Tensor,  # (..., R), rows of one unit contiguous
    units: int,
) -> Tensor:  # (N, S, R)
    """View rows as those of N routed units; there may be none."""
    rows = x.numel() // x.shape[-1] // units if units else 0
    return x.reshape(units, rows, x.shape[-1])


def pool(
    x: Tensor,  # (N, S, D)
    keep: Tensor | None,  # (N, S), 1 for a token that counts; None: all count
    how: str,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:  # (N, D) for "mean", (N, 2 D) for "mean_std"
    """Pool the tokens of every unit; a unit with no token that counts pools to (nearly) zero.

    `reduce` adds up totals over processes where one unit is spread over several.
    """
    if keep is None:
        keep = x.new_ones(x.shape[:2])
    else:
        keep = keep.to(x.dtype)
        # Padded positions may hold anything, even inf or nan, which a product with zero would keep.
        x = torch.where(keep.unsqueeze(-1) > 0, x, torch.zeros_like(x))
    counts_N1 = reduce(keep.sum(1, keepdim=True)).clamp_min(1)
    mean_ND = reduce(torch.einsum("ns,nsd->nd", keep, x)) / counts_N1
    if how == "mean":
        return mean_ND
    squares_ND = reduce(torch.einsum("ns,nsd->nd", keep, (x - mean_ND.unsqueeze(1)).square()))
    # The square root has no finite slope at 0: below a variance of 1e-12 the slope is 0 instead.
    return torch.cat([mean_ND, (squares_ND / counts_N1).clamp_min(1e-12).sqrt()], dim=-1)


def paper_affinity(
    feature: Tensor,  # (N, F)
    centroids: Tensor,  # (K T, F)
    groups: int,
) -> Tensor:  # (N, K, T)
    """Scores of the paper: sigmoid of each group's T logits divided by their L2 norm.

    With T = 1 a logit divided by its own norm is its sign: scores then carry no gradient to the centroids.
    """
    logits_NKT = torch.einsum("nf,cf->nc", feature, centroids).unflatten(-1, (groups, -1))
    return torch.sigmoid(logits_NKT / safe_norm(logits_NKT, dim=-1, keepdim=True))


def cosine_affinity(
    feature: Tensor,  # (N, F), centred
    centroids: Tensor,  # (K T, F)
    groups: int,
    temperature: float,
    log_share: Tensor | None = None,  # (K, T)
) -> Tensor:  # (N, K, T)
    """Softmax over all experts of the cosine to their centroids, over τ: Σ over K·T is 1 for every unit."""
    feature = feature / safe_norm(feature, dim=-1, keepdim=True)
    products_NC = torch.einsum("nf,cf->nc", feature, centroids)
    # With thousands of experts every pass over the centroids counts, so their norms divide the products.
    logits_NC = products_NC / (safe_norm(centroids, dim=-1) * temperature)
    return shared_softmax(logits_NC, log_share).unflatten(-1, (groups, -1))


def distance_affinity(
    feature: Tensor,  # (N, F), centred
    centroids: Tensor,  # (K T, F), centred
    groups: int,
    temperature: float,
    spread: Tensor,  # () mean squared distance of features to their own centroids
    log_share: Tensor | None = None,  # (K, T)
) -> Tensor:  # (N, K, T)
    """Softmax over all experts of −‖f − c‖² / (τ s²): the posterior of a Gaussian mixture of equal weights."""
    products_NC = torch.einsum("nf,cf->nc", feature, centroids)
    # ‖f‖² is the same for all experts, and leaving it out keeps the logits small.
    logits_NC = (2 * products_NC - centroids.square().sum(-1)) / (temperature * spread)
    return shared_softmax(logits_NC, log_share).unflatten(-1, (groups, -1))


def shared_softmax(
    logits: Tensor,  # (N, K T)
    log_share: Tensor | None,  # (K, T)
) -> Tensor:  # (N, K T)
    """Softmax in which an expert counts for its share w: exp ℓ_c / Σ w exp ℓ.

    An expert that was split in n has n copies of share 1/n, and each scores what it scored; so do all others.
    """
    if log_share is None:
        return logits.softmax(-1)
    return (logits - (logits + log_share.flatten()).logsumexp(-1, keepdim=True)).exp()


def choose_group(scores: Tensor) -> Tensor:
    """The group that holds the largest score: (N, K, T) to (N,)."""
    return scores.amax(-1).argmax(-1)


def group_gates(
    scores: Tensor,  # (N, K, T)
    group: Tensor,  # (N,)
) -> Tensor:  # (N, T)
    """The T scores of each unit's group, as they are."""
    index = group.view(-1, 1, 1).expand(-1, 1, scores.shape[-1])
    return scores.gather(1, index).squeeze(1)
