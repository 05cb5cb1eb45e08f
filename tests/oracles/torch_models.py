"""The whole models by their definitions, in torch: one row and one step after the other, float64, autograd."""

import math

import torch
from torch import nn


class LRU(nn.Module):
    """h_t = Lambda h_{t-1} + exp(gamma_log) B x_t, y_t = Re(C h_t) + D x_t."""

    def __init__(self, d_model, d_state):
        super().__init__()
        for name in ("nu_log", "theta_log", "gamma_log"):
            setattr(self, name, nn.Parameter(torch.zeros(d_state)))
        for part in ("re", "im"):
            setattr(self, f"B_{part}", nn.Parameter(torch.zeros(d_state, d_model)))
            setattr(self, f"C_{part}", nn.Parameter(torch.zeros(d_model, d_state)))
        self.D = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        """(T, H) -> (T, H)."""
        Lambda = torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))
        B = torch.exp(self.gamma_log)[:, None] * torch.complex(self.B_re, self.B_im)
        C = torch.complex(self.C_re, self.C_im)
        h, ys = torch.zeros_like(Lambda), []
        for x_t in x:
            h = Lambda * h + B @ x_t.to(B.dtype)
            ys.append((C @ h).real + self.D * x_t)
        return torch.stack(ys) if ys else x


class ClassifierBlock(nn.Module):
    def __init__(self, d_model, d_state, outputs=None):
        super().__init__()
        self.lrnn, self.norm = LRU(d_model, d_state), nn.LayerNorm(d_model)
        if outputs is not None:
            self.output_proj = nn.Linear(d_model, outputs)

    def forward(self, x):
        return self.norm(x + self.lrnn(x))


class Classifier(nn.Module):
    """Of LRU blocks; every row is cut to its length first, so that there is no padding at all."""

    def __init__(self, input_dim, outputs, d_model, d_state, n_layers, vocab_size=None, padding_idx=0):
        super().__init__()
        if vocab_size is None:
            self.input_proj = nn.Linear(input_dim, d_model)
        else:
            self.embedding = nn.Module()
            self.embedding.token_embedding = nn.Embedding(vocab_size, input_dim, padding_idx=padding_idx)
            self.embed_proj = nn.Linear(input_dim, d_model)
        self.blocks = nn.ModuleList(ClassifierBlock(d_model, d_state) for _ in range(n_layers - 1))
        self.final_block = ClassifierBlock(d_model, d_state, outputs)

    def forward(self, x, lengths, pooling, windows, reference):
        """`windows`: (kind, factor) of the pooling after each block, the last included."""
        rows = [self._row(row[:n], x.shape[1], pooling, windows, reference) for row, n in zip(x, lengths, strict=True)]
        return torch.stack(rows)

    def _row(self, x, L, pooling, windows, reference):
        h = self.input_proj(x) if hasattr(self, "input_proj") else self.embed_proj(self.embedding.token_embedding(x))
        for block, (kind, factor) in zip([*self.blocks, self.final_block], windows, strict=True):
            h = block(h)
            if kind != "none":
                h, L = pool(h, L, kind, factor, reference)
        summary = {"last": lambda: h[-1], "mean": lambda: h.mean(0), "max": lambda: h.max(0)[0]}[pooling]()
        return self.final_block.output_proj(summary)


def pool(h, L, kind, factor, reference):
    """Windows of one row (n, H) that was padded to L: (pooled, length of the padded row after pooling)."""
    if kind == "stride":
        return h[::factor], math.ceil(L / factor)
    total = L // factor if reference == "lrnnx" else math.ceil(L / factor)
    parts = [h[i : i + factor] for i in range(0, len(h), factor)][:total]
    if kind == "max":
        return torch.stack([part.max(0)[0] for part in parts]), total
    return torch.stack([part.sum(0) / (factor if reference == "lrnnx" else len(part)) for part in parts]), total


class Unet(nn.Module):
    """The U-Net of LRU layers, channels first; `delays`: steps by which each up-sampling is delayed, deepest first."""

    def __init__(self, in_channels, out_channels, channels, factors, delays):
        super().__init__()
        outer = [in_channels, *channels[:-1]]
        self.factors, self.delays = factors, delays
        self.down_ssms = nn.ModuleList(
            nn.ModuleList([_ssm(a), _named("conv", nn.Conv1d(a, b, k, k))])
            for a, b, k in zip(outer, channels, factors, strict=True)
        )
        self.hid_ssms = nn.ModuleList([_ssm(channels[-1]), _ssm(channels[-1])])
        self.up_ssms = nn.ModuleList(
            nn.ModuleList([_named("deconv", nn.ConvTranspose1d(b, a, k, k)), _ssm(a)])
            for a, b, k in reversed(list(zip(outer, channels, factors, strict=True)))
        )
        self.last_ssms = nn.ModuleList([_ssm(in_channels), _ssm(in_channels, norm=False)])
        if in_channels != out_channels:
            self.final_proj = nn.Conv1d(in_channels, out_channels, 1, bias=False)

    def forward(self, x):
        """(B, C, T) -> (B, O, T)."""
        T, whole = x.shape[2], math.prod(self.factors)
        h, skips = nn.functional.pad(x, (0, -T % whole)), []
        for ssm, down in self.down_ssms:
            skips.append(h)
            h = down.conv(_run(ssm, h))
        for ssm in self.hid_ssms:
            h = _run(ssm, h)
        for (up, ssm), delay in zip(self.up_ssms, self.delays, strict=True):
            late = nn.functional.pad(up.deconv(h), (delay, 0))
            h = _run(ssm, late[:, :, : late.shape[2] - delay] + skips.pop())
        h = _run(self.last_ssms[1], _run(self.last_ssms[0], h), silu=False)
        return (self.final_proj(h) if hasattr(self, "final_proj") else h)[:, :, :T]


def _named(name, module):
    parent = nn.Module()
    setattr(parent, name, module)
    return parent


def _ssm(width, norm=True):
    parts = [_named("lru_layer", LRU(width, width))]
    if norm and width > 1:
        parts.append(_named("norm", nn.LayerNorm(width)))
    return nn.ModuleList(parts)


def _run(ssm, x, silu=True):
    y = torch.stack([ssm[0].lru_layer(row) for row in x.transpose(1, 2)])
    if len(ssm) > 1:
        y = ssm[1].norm(y)
    y = y.transpose(1, 2)
    return nn.functional.silu(y) if silu else y


def load(module, layer):
    """The torch module with the parameters of our layer, in float64; the names must be the same."""
    module.double().load_state_dict({name: torch.tensor(value.__array__()).double() for name, value in layer.items()})
    return module


def gradients(module, loss):
    """{name: gradient} of the loss, as NumPy arrays."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    return {name: value.numpy() for name, value in zip(names, found, strict=True)}
