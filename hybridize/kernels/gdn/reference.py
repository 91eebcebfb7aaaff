"""The recurrence of `gdn`, one token at a time: the text of the mathematics and the float64 oracle.

Letters: B batch, T tokens, H output heads, Q heads of q, G heads of k, X value heads, N key dim, P value dim.
"""

import torch


def gdn_reference(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP=None, segments_BT=None):
    """Run the recurrence of `hybridize.kernels.gdn.gdn` token by token; same arguments and results.

    All is computed in the dtype of the inputs: float64 inputs give the oracle. Differentiable.

    Args, Returns, Raises: as `hybridize.kernels.gdn.gdn`, without its checks.
    Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464, eq. 10; a decay for each channel: arXiv 2510.26692, eq. 1.
    """
    heads, tokens = beta_BTH.shape[2], beta_BTH.shape[1]
    q, k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (q_BTQN, k_BTGN, v_BTXP))
    decay = torch.exp(g if g.dim() == 4 else g[..., None])
    if state_BHNP is None:
        state_BHNP = v.new_zeros(v.shape[0], heads, k.shape[3], v.shape[3])
    keep_BT = torch.ones_like(beta_BTH[:, :, 0])
    if segments_BT is not None:
        keep_BT[:, 1:] = (segments_BT[:, 1:] == segments_BT[:, :-1]).to(keep_BT)
    y = []
    steps = zip(*(t.unbind(1) for t in (q, k, v, decay, beta_BTH, keep_BT)), strict=True)
    for q_BHN, k_BHN, v_BHP, decay_BHN, beta_BH, keep_B in steps:
        state_BHNP = state_BHNP * (decay_BHN * keep_B[:, None, None])[..., None]
        wrong_BHP = v_BHP - (k_BHN[..., None] * state_BHNP).sum(-2)
        state_BHNP = state_BHNP + (beta_BH[..., None] * k_BHN)[..., None] * wrong_BHP[:, :, None, :]
        y.append((q_BHN[..., None] * state_BHNP).sum(-2))
    return (torch.stack(y, dim=1) if tokens else v.clone()), state_BHNP


def gdn_step_reference(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B=None):
    """One token of `gdn_reference` for each entry of the batch that has a state, entry by entry; as `gdn_step`."""
    y_BHP = v_BXP.new_zeros(*beta_BH.shape, v_BXP.shape[2])
    for entry in range(len(beta_BH)):
        row = entry if rows_B is None else int(rows_B[entry])
        if row >= 0:
            q, k, v, decay, beta = (t[entry, None, None] for t in (q_BQN, k_BGN, v_BXP, g, beta_BH))
            y, state = gdn_reference(q, k, v, decay, beta, state_BHNP[row, None])
            y_BHP[entry], state_BHNP[row] = y[0, 0], state[0]
    return y_BHP
