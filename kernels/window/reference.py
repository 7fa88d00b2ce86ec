"""Softmax over a sliding window joined with linear attention over everything older, in three forms.

The attention of LoLCATs (arXiv 2410.10254). Shapes: B batch, T time, S KV heads, G query heads per
KV head, d head width, F features, w window. Keys and values come as `[B, S, w + T, d]`, those of
the window before the call first, so that query t sees the columns t < j <= t + w in its window and
everything up to column t has left it:

    a_tj = q_t . k_j + log gamma                                              t < j <= t + w
    n_t  = phi(q_t)^T (S_0 + sum_{j <= t} phi(k_j) [v_j, 1]^T)
    o_t  = softmax([a_t, log Z_t]) . [v_j, n_t[:d] / Z_t]                     Z_t = n_t[d] + eps

which is (sum e^a v + n_t[:d]) / (sum e^a + Z_t), computed on one scale. The authors' code
subtracts the window's largest logit from the window alone, so that the share of the linear part
moves with the size of the logits; `common_scale=False` does the same.
"""

import torch
from torch.nn import functional

__all__ = ["chunked_window", "parallel_window", "recurrent_window"]

Output = tuple[torch.Tensor, torch.Tensor]
HIDDEN = -1e30  # finite, so that a row which sees nothing stays a number
CHUNK = 64


def recurrent_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    log_gamma: torch.Tensor,
    state: torch.Tensor,
    *,
    eps: float = 1e-12,
    common_scale: bool = True,
) -> Output:
    """One token after another: the definition, and the decode step.

    Args:
        q: queries `[B, S, G, T, d]`, scaled by d^-1/2.
        k: keys `[B, S, w + T, d]`.
        v: values `[B, S, w + T, d]`.
        seen: whether a column is a token, `[B, w + T]`; others are in nobody's window.
        phi_q: features of the queries, `[B, S, G, T, F]`.
        phi_k: features of the first T keys, `[B, S, G, T, F]`; 0 where there is no token.
        log_gamma: log weight of the window, `[S, G]`, <= 0.
        state: `[B, S, G, F, d + 1]` of everything that left the window before the call.
        eps: added to the linear part's mass.
        common_scale: False subtracts the window's largest logit from the window alone.

    Returns:
        The output `[B, S, G, T, d]` and the state after the call.
    """
    time, window = q.shape[3], k.shape[2] - q.shape[3]
    values, outputs = functional.pad(v, (0, 1), value=1.0), []
    for t in range(time):
        now, columns = slice(t, t + 1), slice(t + 1, t + 1 + window)
        state = state + phi_k[..., now, :].mT @ values[:, :, None, now]
        scores = q[..., now, :] @ k[:, :, None, columns].mT
        logits = _logits(scores, seen[:, None, None, None, columns], log_gamma, common_scale)
        outputs.append(_joined(logits, v[:, :, None, columns], phi_q[..., now, :] @ state, eps))
    return torch.cat(outputs, dim=3), state


def parallel_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    log_gamma: torch.Tensor,
    state: torch.Tensor,
    *,
    eps: float = 1e-12,
    common_scale: bool = True,
) -> Output:
    """All pairs at once, quadratic in T; arguments of `recurrent_window`."""
    time = q.shape[3]
    band = _band(time, k.shape[2] - time, q.device)
    scores = q @ k[:, :, None].mT
    logits = _logits(scores, band & seen[:, None, None, None], log_gamma, common_scale)
    values = functional.pad(v[:, :, None, :time], (0, 1), value=1.0)
    older = (phi_q @ phi_k.mT).tril() @ values + phi_q @ state
    return _joined(logits, v[:, :, None], older, eps), state + phi_k.mT @ values


def chunked_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    log_gamma: torch.Tensor,
    state: torch.Tensor,
    *,
    eps: float = 1e-12,
    common_scale: bool = True,
    chunk: int = CHUNK,
) -> Output:
    """All chunks at once, each with its band of keys and its entering state: linear in T."""
    time, window = q.shape[3], k.shape[2] - q.shape[3]
    if time <= chunk:
        return parallel_window(
            q, k, v, seen, phi_q, phi_k, log_gamma, state, eps=eps, common_scale=common_scale
        )
    more = -time % chunk
    q, phi_q, phi_k = (
        functional.pad(x, (0, 0, 0, more)).reshape(*x.shape[:3], -1, chunk, x.shape[-1])
        for x in (q, phi_q, phi_k)
    )  # [B, S, G, N, C, .]
    bands = [
        functional.pad(x, (0, 0, 0, more)).unfold(2, chunk + window, chunk).mT[:, :, None]
        for x in (k, v)
    ]  # [B, S, 1, N, C + w, d]
    columns = functional.pad(seen, (0, more)).unfold(1, chunk + window, chunk)  # [B, N, C + w]
    visible = _band(chunk, window, q.device) & columns[:, None, None, :, None]
    logits = _logits(q @ bands[0].mT, visible, log_gamma[..., None], common_scale)
    values = functional.pad(bands[1][..., :chunk, :], (0, 1), value=1.0)
    added = phi_k.mT @ values
    states = torch.cat((state[:, :, :, None], added), dim=3).cumsum(dim=3)
    older = (phi_q @ phi_k.mT).tril() @ values + phi_q @ states[:, :, :, :-1]
    output = _joined(logits, bands[1], older, eps).flatten(3, 4)
    return output[:, :, :, :time], states[:, :, :, -1].clone()  # a view would keep them all alive


def _band(rows: int, window: int, device: torch.device) -> torch.Tensor:
    """The columns t < j <= t + w of each row t, `[rows, rows + w]`."""
    ones = torch.ones(rows, rows + window, dtype=torch.bool, device=device)
    return ones.triu(1) & ones.tril(window)


def _logits(
    scores: torch.Tensor, visible: torch.Tensor, log_gamma: torch.Tensor, common_scale: bool
) -> torch.Tensor:
    """Weighted logits of the window out of scaled scores, `HIDDEN` outside it."""
    shown = torch.where(visible, scores, HIDDEN)
    if not common_scale:
        shown = shown - shown.amax(dim=-1, keepdim=True)
    return shown + log_gamma[..., None, None]


def _joined(
    logits: torch.Tensor, values: torch.Tensor, older: torch.Tensor, eps: float
) -> torch.Tensor:
    """The log mass of the linear part as one more logit, its mean as one more value."""
    mass = older[..., -1:] + eps
    weights = torch.cat((logits, mass.log()), dim=-1).softmax(dim=-1)
    return weights[..., :-1] @ values + weights[..., -1:] * (older[..., :-1] / mass)
