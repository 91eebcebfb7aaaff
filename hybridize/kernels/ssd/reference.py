"""The recurrence of `ssd`, one token at a time: the text of the mathematics and the float64 oracle.

Letters: B batch, T tokens, H output heads, X value heads, G heads of B, M heads of C, P value dim,
N state dim.
"""

import torch


def ssd_reference(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H=None, state_BHPN=None, segments_BT=None):
    """Run the recurrence of `hybridize.kernels.ssd.ssd` token by token; same arguments and results.

    All is computed in the dtype of the inputs: float64 inputs give the oracle. Differentiable.

    Args, Returns, Raises: as `hybridize.kernels.ssd.ssd`, without its checks.
    Source: Dao, Gu, arXiv 2405.21060, eq. 2 with a scalar A_t, discretised as in its section 7.
    """
    heads, tokens = dt_BTH.shape[2], dt_BTH.shape[1]
    x_BTHP, B_BTHN, C_BTHN = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (x_BTXP, B_BTGN, C_BTMN))
    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(x_BTHP.shape[0], heads, x_BTHP.shape[3], B_BTHN.shape[3])
    keep_BT = torch.ones_like(dt_BTH[:, :, 0])
    if segments_BT is not None:
        keep_BT[:, 1:] = (segments_BT[:, 1:] == segments_BT[:, :-1]).to(keep_BT)
    y = []
    steps = zip(*(t.unbind(1) for t in (x_BTHP, dt_BTH, B_BTHN, C_BTHN, keep_BT)), strict=True)
    for x_BHP, dt_BH, B_BHN, C_BHN, keep_B in steps:
        decay_BH = torch.exp(dt_BH * A_H) * keep_B[:, None]
        update_BHPN = (dt_BH[..., None] * x_BHP)[..., None] * B_BHN[:, :, None, :]
        state_BHPN = decay_BH[..., None, None] * state_BHPN + update_BHPN
        y.append((state_BHPN @ C_BHN[..., None]).squeeze(-1))
    y_BTHP = torch.stack(y, dim=1) if tokens else x_BTHP.clone()
    return (y_BTHP if D_H is None else y_BTHP + D_H[:, None] * x_BTHP), state_BHPN


def ssd_step_reference(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B=None):
    """Run `hybridize.kernels.ssd.ssd_step`, row by row of the batch and head by head; same arguments and results."""
    (batch, heads), y_BHP = dt_BH.shape, torch.zeros(*dt_BH.shape, x_BXP.shape[-1], dtype=x_BXP.dtype)
    for b in range(batch):
        row = b if rows_B is None else int(rows_B[b])
        for h in range(heads) if row >= 0 else ():
            x_P, B_N, C_N = (t[b, h // (heads // t.shape[1])] for t in (x_BXP, B_BGN, C_BMN))
            decay = torch.exp(dt_BH[b, h] * A_H[h])
            state_BHPN[row, h] = decay * state_BHPN[row, h] + dt_BH[b, h] * torch.outer(x_P, B_N)
            y_BHP[b, h] = state_BHPN[row, h] @ C_N + (0 if D_H is None else D_H[h] * x_P)
    return y_BHP
