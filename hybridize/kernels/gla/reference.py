"""The recurrence of `gla`, one token at a time: the text of the mathematics and the float64 oracle.

Letters: B batch, T tokens, H query heads, S state heads, N key dim, P value dim, E decays of a head (N or 1).
"""

import torch


def gla_reference(q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP=None, segments_BT=None):
    """Run the recurrence of `hybridize.kernels.gla.gla` token by token; same arguments and results.

    All is computed in the dtype of the inputs: float64 inputs give the oracle. Differentiable.

    Args, Returns, Raises: as `hybridize.kernels.gla.gla`, without its checks.
    Source: Yang et al., arXiv 2312.06635, eq. 3.
    """
    heads, states = q_BTHN.shape[2], k_BTSN.shape[2]
    if state_BSNP is None:
        state_BSNP = k_BTSN.new_zeros(k_BTSN.shape[0], states, k_BTSN.shape[3], v_BTSP.shape[3])
    keep_BT = torch.ones_like(log_decay_BTSE[:, :, 0, 0])
    if segments_BT is not None:
        keep_BT[:, 1:] = (segments_BT[:, 1:] == segments_BT[:, :-1]).to(keep_BT)
    y = []
    steps = zip(*(t.unbind(1) for t in (q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, keep_BT)), strict=True)
    for q_BHN, k_BSN, v_BSP, log_decay_BSE, keep_B in steps:
        decay_BSE = torch.exp(log_decay_BSE) * keep_B[:, None, None]
        state_BSNP = decay_BSE[..., None] * state_BSNP + k_BSN[..., None] * v_BSP[:, :, None, :]
        read_BHNP = state_BSNP.repeat_interleave(heads // states, dim=1)
        y.append((q_BHN[..., None] * read_BHNP).sum(-2))
    shape = (q_BTHN.shape[0], 0, heads, v_BTSP.shape[3])
    return (torch.stack(y, dim=1) if y else v_BTSP.new_zeros(shape)), state_BSNP
