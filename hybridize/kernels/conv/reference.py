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
