"""EhrMamba written down a second time, for one patient, one token after the other, in float64: the truth of the tests.

It shares no code with the package: no batch, no padding, no packing, no cache, no convolution or scan operator.
"""

import math

import torch


def naive_hidden_states(weights, config, tokens):
    """Hidden states after the final norm, float64 [l, d].

    `weights`: state dict of an EhrMambaModel; `tokens`: dict of channels, each a flat list.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = naive_embeddings(w, tokens)
    for layer in range(config.num_hidden_layers):
        part = {
            name.removeprefix(f"layers.{layer}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"layers.{layer}.")
        }
        mixed = _mix(part, [_rms_norm(token, part["norm.weight"], config.layer_norm_epsilon) for token in x], config)
        x = [token + out for token, out in zip(x, mixed, strict=True)]
    return torch.stack([_rms_norm(token, w["norm_f.weight"], config.layer_norm_epsilon) for token in x])


def _rms_norm(x, weight, eps):
    return x / torch.sqrt((x**2).mean() + eps) * weight


def naive_embeddings(w, tokens):
    """The embedding layer, token by token: a list of vectors; `w` in float64."""
    out = []
    for i in range(len(tokens["input_ids"])):
        difference = tokens["times"][i] - tokens["times"][i - 1] if i > 0 else 0.0
        parts = [w["embeddings.word_embeddings.weight"][tokens["input_ids"][i]]]
        for name, value in (("time", difference), ("age", tokens["ages"][i])):
            phase = value * w[f"embeddings.{name}_embeddings.w"][0] + w[f"embeddings.{name}_embeddings.phi"][0]
            parts.append(torch.sin(phase))
        e = torch.tanh(w["embeddings.projection.weight"] @ torch.cat(parts) + w["embeddings.projection.bias"])
        e = e + w["embeddings.token_type_embeddings.weight"][tokens["token_type_ids"][i]]
        e = e + w["embeddings.visit_order_embeddings.weight"][tokens["visit_orders"][i]]
        e = e + w["embeddings.visit_segment_embeddings.weight"][tokens["visit_segments"][i]]
        e = (e - e.mean()) / torch.sqrt(e.var(unbiased=False) + 1e-12)
        out.append(e * w["embeddings.layer_norm.weight"] + w["embeddings.layer_norm.bias"])
    return out


def _mix(w, xs, config):
    channels, n, rank = config.expand * config.hidden_size, config.state_size, math.ceil(config.hidden_size / 16)
    a = -torch.exp(w["mixer.A_log"])
    h = torch.zeros(channels, n, dtype=torch.float64)
    before_conv, out = [], []
    for x in xs:
        projected = w["mixer.in_proj.weight"] @ x
        inner, gate = projected[:channels], projected[channels:]
        before_conv.append(inner)
        u = w["mixer.conv1d.bias"].clone()
        for tap in range(config.conv_kernel):
            past = len(before_conv) - config.conv_kernel + tap
            if past >= 0:
                u = u + w["mixer.conv1d.weight"][:, 0, tap] * before_conv[past]
        u = u * torch.sigmoid(u)
        step, b, c = (w["mixer.x_proj.weight"] @ u).split([rank, n, n])
        step = torch.log1p(torch.exp(w["mixer.dt_proj.weight"] @ step + w["mixer.dt_proj.bias"]))
        h = torch.exp(step[:, None] * a) * h + (step * u)[:, None] * b[None, :]
        y = h @ c + w["mixer.D"] * u
        out.append(w["mixer.out_proj.weight"] @ (y * gate * torch.sigmoid(gate)))
    return out
