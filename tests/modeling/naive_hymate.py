"""HyMaTE written down a second time, for one patient, one triplet after the other, in float64: the truth of the tests.

It shares no code with the package: no batch, no padding, no packing, no layout, no attention or scan operator.
"""

import math

import torch

from tests.modeling.naive_ehrmamba import _mix, _rms_norm


def naive_hymate(weights, config, stay):
    """A dict of "embeddings" (list), "hidden" [n, d], "alpha" (list) and "pooled" [p], all float64.

    `weights`: state dict of a HyMaTEModel; `stay`: variable_ids, times, values and static_values as flat lists.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    binned = config.embedding_mode == "binned"
    embeddings = naive_bins(w, config, stay) if binned else naive_triplets(w, config, stay)
    x = embeddings
    for layer in range(config.num_mamba_layers):
        part = _part(w, f"mamba_layers.{0 if config.share_layer_weights else layer}.")
        mixed = _mix(part, [_rms_norm(token, part["norm.weight"], config.layer_norm_epsilon) for token in x], config)
        x = [token + out for token, out in zip(x, mixed, strict=True)]
    for layer in range(config.num_attention_layers):
        part = _part(w, f"attention_layers.{0 if config.share_layer_weights else layer}.")
        x = _attend(part, config, x)
    x = [_rms_norm(token, w["norm_f.weight"], config.layer_norm_epsilon) for token in x]
    alpha, pooled = naive_fusion(_part(w, "fusion_attention."), x)
    if config.num_static:
        pooled = torch.cat([pooled, naive_static(_part(w, "static_embedding."), stay["static_values"])])
    if config.variable_summaries:
        numbers = [number for variable in naive_summaries(config, stay) for number in variable]
        pooled = torch.cat([pooled, naive_static(_part(w, "summary_embedding."), numbers)])
    return {"embeddings": embeddings, "hidden": torch.stack(x), "alpha": alpha, "pooled": pooled}


def naive_number(w, numbers):
    """W2 tanh(W1 x + b1), number by number."""
    size, units = w["w2"].shape
    inner = []
    for unit in range(units):
        total = w["b1"][unit]
        for i, number in enumerate(numbers):
            total = total + w["w1"][unit, i] * number
        inner.append(torch.tanh(total))
    return torch.stack([sum(w["w2"][row, unit] * inner[unit] for unit in range(units)) for row in range(size)])


def naive_triplets(w, config, stay):
    out = []
    for i, (variable, time, value) in enumerate(zip(stay["variable_ids"], stay["times"], stay["values"], strict=True)):
        parts = [naive_number(_part(w, "embeddings.value_embeddings."), [value])]
        if config.embedding_mode != "value":
            parts.append(w["embeddings.variable_embeddings.weight"][variable])
            parts.append(naive_number(_part(w, "embeddings.time_embeddings."), [time]))
        earlier = [j for j in range(i) if stay["variable_ids"][j] == variable]
        change = (value - stay["values"][earlier[-1]], 0.0) if earlier else (0.0, 1.0)
        gap = (time - stay["times"][earlier[-1]], 0.0) if earlier else (0.0, 1.0)
        if config.value_change_embedding:
            parts.append(naive_number(_part(w, "embeddings.change_embeddings."), change))
        if config.time_gap_embedding:
            parts.append(naive_number(_part(w, "embeddings.gap_embeddings."), gap))
        if config.embedding_mode == "concat":
            out.append(w["embeddings.projection.weight"] @ torch.cat(parts) + w["embeddings.projection.bias"])
        else:
            out.append(sum(parts))
    return out


def naive_bins(w, config, stay):
    bins, variables = config.num_bins, config.num_variables
    measured = [[[] for _ in range(variables)] for _ in range(bins)]
    last = 0
    for variable, time, value in zip(stay["variable_ids"], stay["times"], stay["values"], strict=True):
        step = min(max(int((time + 1) / 2 * bins), 0), bins - 1)
        measured[step][variable].append(value)
        last = max(last, step)
    out = []
    for step in range(last + 1):
        means, masks, gaps = [], [], []
        for variable in range(variables):
            seen = [earlier for earlier in range(step + 1) if measured[earlier][variable]]
            newest = measured[seen[-1]][variable] if seen else [0.0]
            means.append(sum(newest) / len(newest))
            masks.append(1.0 if measured[step][variable] else 0.0)
            gaps.append((step - seen[-1]) / bins if seen else 1.0)
        grid = torch.tensor([*means, *masks, *gaps], dtype=torch.float64)
        out.append(w["embeddings.projection.weight"] @ grid + w["embeddings.projection.bias"])
    return out


def _attend(w, config, x):
    heads, d = config.num_attention_heads, config.hidden_size
    size = d // heads
    normed = [_rms_norm(token, w["attention_norm.weight"], config.layer_norm_epsilon) for token in x]
    projected = [w["attention.qkv_proj.weight"] @ token + w["attention.qkv_proj.bias"] for token in normed]
    out = []
    for i, token in enumerate(x):
        mixed = []
        for head in range(heads):
            span = slice(head * size, (head + 1) * size)
            query = projected[i][:d][span]
            scores = [query @ other[d : 2 * d][span] / math.sqrt(size) for other in projected]
            shares = [torch.exp(score) for score in scores]
            total = sum(shares)
            mixed.append(
                sum(share / total * other[2 * d :][span] for share, other in zip(shares, projected, strict=True))
            )
        token = token + w["attention.out_proj.weight"] @ torch.cat(mixed) + w["attention.out_proj.bias"]
        wide = _rms_norm(token, w["feed_forward_norm.weight"], config.layer_norm_epsilon)
        wide = w["up_proj.weight"] @ wide + w["up_proj.bias"]
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        out.append(token + w["down_proj.weight"] @ wide + w["down_proj.bias"])
    return out


def naive_fusion(w, x):
    """(alpha, pooled)."""
    scores = []
    for token in x:
        scores.append(w["u"] @ torch.tanh(w["projection.weight"] @ token + w["projection.bias"]))
    shares = [torch.exp(score) for score in scores]
    alpha = [share / sum(shares) for share in shares]
    return alpha, sum(weight * token for weight, token in zip(alpha, x, strict=True))


def naive_static(w, static):
    s = torch.tensor(static, dtype=torch.float64)
    inner = torch.tanh(w["dense_in.weight"] @ s + w["dense_in.bias"])
    return w["dense_out.weight"] @ inner + w["dense_out.bias"]


def naive_summaries(config, stay):
    """For each variable: measured, log(1 + count), mean, deviation, lowest, highest, first, last, time of the first, of
    the last, slope, mean of the last quarter; zeros where it was never measured."""
    out = []
    for variable in range(config.num_variables):
        values, times = [], []
        for which, time, value in zip(stay["variable_ids"], stay["times"], stay["values"], strict=True):
            if which == variable:
                values.append(value)
                times.append(time)
        if not values:
            out.append([0.0] * 12)
            continue
        count = len(values)
        mean, mean_time = sum(values) / count, sum(times) / count
        variance = covariance = time_variance = 0.0
        for time, value in zip(times, values, strict=True):
            variance += (value - mean) ** 2 / count
            covariance += (value - mean) * (time - mean_time) / count
            time_variance += (time - mean_time) ** 2 / count
        late = [value for time, value in zip(times, values, strict=True) if time >= 0.5]
        row = [1.0, math.log(1 + count), mean, math.sqrt(variance), min(values), max(values)]
        row += [values[0], values[-1], times[0], times[-1]]
        row += [covariance / (time_variance + 0.01), sum(late) / len(late) if late else values[-1]]
        out.append(row)
    return out


def naive_logits(weights, config, stay):
    """[labels], of the state dict of a classifier that reads the pooled vector."""
    pooled = naive_hymate(_part(weights, "model."), config, stay)["pooled"]
    logits = weights["classifier.weight"].double() @ pooled + weights["classifier.bias"].double()
    if not config.additive_summaries:
        return logits
    numbers = [number for variable in naive_summaries(config, stay) for number in variable]
    if config.num_static:
        numbers += stay["static_values"]
    pieces = [min(max(x, -3.0), 3.0) for x in numbers]
    for knot in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0):
        pieces += [min(max(x - knot, 0.0), 1.0) for x in numbers]
    return logits + weights["additive_head.weight"].double() @ torch.tensor(pieces, dtype=torch.float64)


def naive_last_values(config, stay):
    last = [0.0] * config.num_variables
    for variable, value in zip(stay["variable_ids"], stay["values"], strict=True):
        last[variable] = value
    return last


def naive_forecast(weights, config, stay):
    """[H][V], of the state dict of a model with a forecasting head."""
    pooled = naive_hymate(_part(weights, "model."), config, stay)["pooled"]
    head = {name: tensor.double() for name, tensor in _part(weights, "forecast_head.").items()}
    out = []
    for horizon in range(config.num_horizons):
        row = []
        for variable in range(config.num_variables):
            output = horizon * config.num_variables + variable
            number = head["weight"][output] @ pooled + head["bias"][output]
            if config.forecast_from_last_value:
                number = number + head["persistence"][output] * naive_last_values(config, stay)[variable]
            row.append(number)
        out.append(row)
    return out


def naive_forecast_loss(predictions, labels, mask):
    """Sum c (y^ - y)^2 / sum c over nested lists of equal shape; 0 without a target."""
    total, count = 0.0, 0
    for row, wanted, known in zip(predictions, labels, mask, strict=True):
        for y_hat, y, c in zip(row, wanted, known, strict=True):
            if c:
                total, count = total + (y_hat - y) ** 2, count + 1
    return total / count if count else 0.0


def _part(w, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
