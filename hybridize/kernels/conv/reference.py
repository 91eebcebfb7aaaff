"""The causal convolution token by token: the text of the mathematics and the float64 oracle.

Letters: B batch, T tokens, C channels, K taps, K1 = K - 1 inputs kept.
"""

import torch


def causal_conv1d_reference(x_BTC, weight_CK, bias_C=None, state_BCK1=None, activation="silu", segments_BT=None):
    """Run `hybridize.kernels.conv.causal_conv1d` token by token; same arguments and results.

    Args, Returns, Raises: as `hybridize.kernels.conv.causal_conv1d`, without its checks.
    Source: the definition of a depthwise causal convolution.
    """
    (batch, _, channels), taps = x_BTC.shape, weight_CK.shape[1]
    window = x_BTC.new_zeros(batch, channels, taps - 1) if state_BCK1 is None else state_BCK1
    y = []
    for t, x_BC in enumerate(x_BTC.unbind(1)):
        if segments_BT is not None and t:
            window = window * (segments_BT[:, t] == segments_BT[:, t - 1])[:, None, None]
        window = torch.cat([window, x_BC[..., None]], dim=2)
        out_BC = (window * weight_CK).sum(-1)
        out_BC = out_BC if bias_C is None else out_BC + bias_C
        y.append(out_BC if activation is None else out_BC * torch.sigmoid(out_BC))
        window = window[..., 1:]
    return (torch.stack(y, dim=1) if y else x_BTC.clone()), window


def causal_conv1d_step_reference(x_BC, weight_CK, bias_C, state_BCK1, activation="silu", rows_B=None):
    """Run `hybridize.kernels.conv.causal_conv1d_step` row by row; same arguments and result, the state is overwritten.

    Args, Returns, Raises: as `hybridize.kernels.conv.causal_conv1d_step`, without its checks. A skipped row gives 0.
    Source: as above.
    """
    y = []
    for b, x_C in enumerate(x_BC):
        row = b if rows_B is None else int(rows_B[b])
        if row < 0:
            y.append(torch.zeros_like(x_C))
            continue
        window = torch.cat([state_BCK1[row], x_C[:, None]], dim=1)
        out_C = (window * weight_CK).sum(-1) + (0 if bias_C is None else bias_C)
        y.append(out_C if activation is None else out_C * torch.sigmoid(out_C))
        state_BCK1[row] = window[:, 1:]
    return torch.stack(y)
