"""Relevance written down a second time, token by token in float64, differentiated by finite differences: the truth.

It shares no code with the package. What the rules hold constant is recorded in a first pass and played back in all
others, so that the perturbed network is the rewritten one; gradients are central differences of it.
"""

import math

import torch


class Constants:
    """Records what is constant in the first pass and gives it back, in the same order, in every later one."""

    def __init__(self):
        self.values, self.recording, self.place = [], True, 0

    def __call__(self, value):
        if self.recording:
            self.values.append(value)
            return value
        self.place += 1
        return self.values[self.place - 1]

    def play(self):
        self.recording, self.place = False, 0


def naive_relevance(network, tokens, of=None, step=1e-5):
    """(log-odds, relevance of these tokens, or of all) of network(const, tokens) -> float; tokens float64 [l, d]."""
    const = Constants()
    log_odds = network(const, tokens)
    of = list(range(len(tokens))) if of is None else of
    relevance = torch.zeros(len(of), dtype=torch.float64)
    for place, i in enumerate(of):
        for j in range(tokens.shape[1]):
            sides = []
            for sign in (1, -1):
                moved = tokens.clone()
                moved[i, j] += sign * step
                const.play()
                sides.append(network(const, moved))
            relevance[place] += tokens[i, j] * (sides[0] - sides[1]) / (2 * step)
    return float(log_odds), relevance


def silu(const, x):
    return x * const(1 / (1 + torch.exp(-x)))


def gelu(const, x):
    return x * const(0.5 * (1 + torch.erf(x / math.sqrt(2))))


def gelu_tanh(const, x):
    return x * const(0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def rms_norm(const, x, weight, eps):
    return x * const(1 / torch.sqrt((x**2).mean() + eps)) * weight


def layer_norm(const, x, weight, bias, eps):
    x = x - x.mean()
    return x * const(1 / torch.sqrt((x**2).mean() + eps)) * weight + bias


def mamba_block(const, w, xs, eps, state):
    """x + mixer(norm x) of a list of vectors; w: the block's weights in float64, `state` n."""
    out_of_norm = [rms_norm(const, x, w["norm.weight"], eps) for x in xs]
    channels = w["mixer.D"].shape[0]
    rank = w["mixer.dt_proj.weight"].shape[1]
    a = -torch.exp(w["mixer.A_log"])
    h = torch.zeros(channels, state, dtype=torch.float64)
    inner, out = [], []
    for x, normed in zip(xs, out_of_norm, strict=True):
        projected = w["mixer.in_proj.weight"] @ normed
        inner.append(projected[:channels])
        u = w["mixer.conv1d.bias"].clone()
        taps = w["mixer.conv1d.weight"].shape[-1]
        for tap in range(taps):
            past = len(inner) - taps + tap
            if past >= 0:
                u = u + w["mixer.conv1d.weight"][:, 0, tap] * inner[past]
        u = silu(const, u)
        low, b, c = (w["mixer.x_proj.weight"] @ u).split([rank, state, state])
        step = const(torch.log1p(torch.exp(w["mixer.dt_proj.weight"] @ low + w["mixer.dt_proj.bias"])))
        b, c = const(b), const(c)
        h = torch.exp(step[:, None] * a) * h + (step * u)[:, None] * b[None, :]
        y = h @ c + w["mixer.D"] * u
        z = silu(const, projected[channels:])
        gated = 0.5 * (z * y) + const(0.5 * (z * y))
        out.append(x + w["mixer.out_proj.weight"] @ gated)
    return out


def head(const, w, x):
    hidden = silu(const, w["classifier.dense.weight"] @ x + w["classifier.dense.bias"])
    logits = w["classifier.out_proj.weight"] @ hidden + w["classifier.out_proj.bias"]
    return logits[1] - logits[0]


def ehrmamba(weights, config):
    """Network of EhrMamba's classifier on embedded tokens."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def network(const, tokens):
        xs = list(tokens)
        for k in range(config.num_hidden_layers):
            xs = mamba_block(const, _part(w, f"model.layers.{k}."), xs, config.layer_norm_epsilon, config.state_size)
        return head(const, w, rms_norm(const, xs[-1], w["model.norm_f.weight"], config.layer_norm_epsilon))

    return network


def transformer(weights, config, may_read):
    """Network of CEHR-BERT's or BigBird's classifier, which reads the first token.

    may_read(layer, head, i, j): whether token i reads token j.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    act = {"gelu": gelu, "gelu_new": gelu_tanh}[config.hidden_act]

    def network(const, tokens):
        xs = list(tokens)
        for k in range(config.num_hidden_layers):
            p = _part(w, f"model.layers.{k}.")
            mixed = _attend(
                const,
                [_linear(p, "attention.self.query", x) for x in xs],
                [_linear(p, "attention.self.key", x) for x in xs],
                [_linear(p, "attention.self.value", x) for x in xs],
                config.num_attention_heads,
                lambda h, i, j, k=k: may_read(k, h, i, j),
            )
            after = []
            for x, m in zip(xs, mixed, strict=True):
                x = x + _linear(p, "attention.output.dense", m)
                x = _layer_norm(const, p, "attention.output.LayerNorm", x, config)
                wide = act(const, _linear(p, "intermediate.dense", x))
                after.append(_layer_norm(const, p, "output.LayerNorm", x + _linear(p, "output.dense", wide), config))
            xs = after
        return head(const, w, xs[0])

    return network


def hymate(weights, config, beside):
    """Network of HyMaTE's classifier on embedded triplets; `beside`: what stands beside the fused ones in r, or []."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    eps = config.layer_norm_epsilon

    def network(const, tokens):
        xs = list(tokens)
        for k in range(config.num_mamba_layers):
            xs = mamba_block(const, _part(w, f"model.mamba_layers.{k}."), xs, eps, config.state_size)
        for k in range(config.num_attention_layers):
            p = _part(w, f"model.attention_layers.{k}.")
            normed = [rms_norm(const, x, p["attention_norm.weight"], eps) for x in xs]
            qkv = [_linear(p, "attention.qkv_proj", x).chunk(3) for x in normed]
            mixed = _attend(const, *zip(*qkv, strict=True), config.num_attention_heads, lambda h, i, j: True)
            xs = [x + _linear(p, "attention.out_proj", m) for x, m in zip(xs, mixed, strict=True)]
            wide = [
                gelu(const, _linear(p, "up_proj", rms_norm(const, x, p["feed_forward_norm.weight"], eps))) for x in xs
            ]
            xs = [x + _linear(p, "down_proj", y) for x, y in zip(xs, wide, strict=True)]
        xs = [rms_norm(const, x, w["model.norm_f.weight"], eps) for x in xs]
        scores = [
            torch.tanh(_linear(w, "model.fusion_attention.projection", x)) @ w["model.fusion_attention.u"] for x in xs
        ]
        alpha = const(torch.softmax(torch.stack(scores), 0))
        fused = sum(a * x for a, x in zip(alpha, xs, strict=True))
        logits = _linear(w, "classifier", torch.cat([fused, *beside]))
        return logits[1] - logits[0]

    return network


def _attend(const, queries, keys, values, heads, may_read):
    width = len(queries[0]) // heads
    out = [[] for _ in queries]
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i, query in enumerate(queries):
            seen = [j for j in range(len(keys)) if may_read(h, i, j)]
            scores = torch.stack([query[part] @ keys[j][part] / math.sqrt(width) for j in seen])
            weights = const(torch.softmax(scores, 0))
            out[i].append(sum(a * values[j][part] for a, j in zip(weights, seen, strict=True)))
    return [torch.cat(parts) for parts in out]


def _linear(w, name, x):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def _layer_norm(const, w, name, x, config):
    return layer_norm(const, x, w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)


def _part(w, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
