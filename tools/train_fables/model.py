"""The model in PyTorch, quick on a CPU: Qwen3-MoE's architecture, weights named as on the hub."""

# pyright: reportMissingImports=false

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HEAD_SCALE = 0.05  # of the output table, from the embedding
_COPY_SCALE = 0.3  # of what a head brings back, by head


@dataclass(frozen=True)
class Geometry:
    """Sizes. Every inner dimension is a multiple of 32, the quantised formats' block."""

    vocab_size: int = 3072
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    expert_dim: int = 64
    max_context: int = 1024
    rope_theta: float = 10_000.0
    eps: float = 1e-6

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.expert_dim * self.top_k,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "torch_dtype": "float32",
        }


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with a norm over each head of q and k."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.q_proj = nn.Linear(g.hidden, g.heads * g.head_dim, bias=False)
        self.k_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=False)
        self.v_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=False)
        self.o_proj = nn.Linear(g.heads * g.head_dim, g.hidden, bias=False)
        self.q_norm = RmsNorm(g.head_dim, g.eps)
        self.k_norm = RmsNorm(g.head_dim, g.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        g = self.g
        q = self.q_norm(self.q_proj(x).view(b, t, g.heads, g.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, g.kv_heads, g.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, g.kv_heads, g.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = g.heads // g.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Experts(nn.Module):
    """Router and experts. Keeps its last routing for the balance loss and for statistics."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.gate = nn.Linear(g.hidden, g.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(g.experts, 2 * g.expert_dim, g.hidden))
        self.down = nn.Parameter(torch.empty(g.experts, g.hidden, g.expert_dim))
        self.chosen = torch.empty(0)
        self.balance = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        shape, g = x.shape, self.g
        x = x.reshape(-1, shape[-1])
        probabilities = self.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(g.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=g.experts)
        self.chosen = chosen.detach()
        # Switch Transformer's loss: 1 when balanced. The counts carry no gradient.
        self.balance = (counts / flat.numel() * probabilities.mean(0)).sum() * g.experts
        order = flat.argsort(stable=True)
        rows = order // g.top_k
        outs: list[Tensor] = []
        pieces = x.index_select(0, rows).split(counts.tolist())
        for piece, gate_up, down in zip(
            pieces, self.gate_up.unbind(0), self.down.unbind(0), strict=True
        ):
            gate, up = (piece @ gate_up.T).chunk(2, -1)
            outs.append((F.silu(gate) * up) @ down.T)
        y = torch.cat(outs) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, rows, y).view(shape)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(g.hidden, g.eps)
        self.self_attn = Attention(g)
        self.post_attention_layernorm = RmsNorm(g.hidden, g.eps)
        self.mlp = Experts(g)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Fables(nn.Module):
    """The decoder."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden)
        self.layers = nn.ModuleList(Layer(g) for _ in range(g.layers))
        self.norm = RmsNorm(g.hidden, g.eps)
        self.lm_head = nn.Linear(g.hidden, g.vocab_size, bias=False)
        _initialise(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] of ids [B, T]."""
        x = self.embed_tokens(ids)
        cos, sin = _angles(self.g, ids.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))

    def balance_loss(self) -> Tensor:
        """Return the mean balance loss of the last forward pass; 1 is perfect."""
        return torch.stack([layer.mlp.balance for layer in self.layers]).mean()

    def hub_weights(self) -> dict[str, Tensor]:
        """Return the tensors under the names of a hub checkpoint."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            prefix = name if name.startswith("lm_head") else f"model.{name}"
            if name.endswith("mlp.gate_up"):
                base = prefix.removesuffix("gate_up")
                for e in range(self.g.experts):
                    gate, up = tensor[e].chunk(2, 0)
                    found[f"{base}experts.{e}.gate_proj.weight"] = gate
                    found[f"{base}experts.{e}.up_proj.weight"] = up
            elif name.endswith("mlp.down"):
                base = prefix.removesuffix("down")
                for e in range(self.g.experts):
                    found[f"{base}experts.{e}.down_proj.weight"] = tensor[e]
            else:
                found[prefix] = tensor
        return {
            name: tensor.detach().float().contiguous().clone() for name, tensor in found.items()
        }


def geometry_dict(g: Geometry) -> dict[str, Any]:
    """Return the sizes, for a checkpoint."""
    return asdict(g)


def _initialise(model: Fables) -> None:
    """Begin as a machine that copies a little: heads bring back the tokens they look at.

    The residual stream begins as the token itself, large, and experts begin as nothing: with small
    embeddings a token's identity drowns in what the branches add. Values and outputs begin as each
    other's transposes, and the head as the embedding: then only where to look must be learned
    before a name can be said again, and gradients point there from the first step. (Measured:
    without both, two million tokens without a trace of copying.) Source of the idea: A. Trockman,
    J. Z. Kolter, "Mimetic initialization of self-attention layers", 2023.
    """
    g = model.g
    nn.init.normal_(model.embed_tokens.weight)
    model.lm_head.weight.data = _HEAD_SCALE * model.embed_tokens.weight.data
    for layer in model.layers:
        attention, experts = layer.self_attn, layer.mlp
        for p in (attention.q_proj.weight, attention.k_proj.weight, experts.gate.weight):
            nn.init.normal_(p, std=0.5 / math.sqrt(g.hidden))
        nn.init.orthogonal_(attention.v_proj.weight)
        values = attention.v_proj.weight.data.view(g.kv_heads, g.head_dim, g.hidden)
        back = values.repeat_interleave(g.heads // g.kv_heads, 0)
        attention.o_proj.weight.data = _COPY_SCALE * back.reshape(-1, g.hidden).T.contiguous()
        nn.init.normal_(experts.gate_up, std=0.5 / math.sqrt(g.hidden))
        nn.init.zeros_(experts.down)


def _angles(g: Geometry, length: int) -> tuple[Tensor, Tensor]:
    inverse = g.rope_theta ** (-torch.arange(0, g.head_dim, 2) / g.head_dim)
    angle = torch.arange(length)[:, None] * inverse[None]
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
