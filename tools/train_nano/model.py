"""nano for training: the published Gemma 4 graph in plain PyTorch, with the published tensor names.

transformers remains the reference; `check_model.py` compares every output of this file with it. Three things are
here that a training run needs and the reference lacks: sliding attention in blocks of one window, a static cache
for batched generation, and the drafter at all positions at once.

Shapes: B batch, T tokens, H hidden, D head, S cache, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x), times a weight if it has one; in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., size] → [..., size]."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


def rope(positions: Tensor, config: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of one layer kind. Shapes: [T] → two of [T, D]."""
    parameters = config["rope_parameters"][kind]
    head = head_dim(config, kind)
    rotated = int(parameters.get("partial_rotary_factor", 1.0) * head // 2)
    exponents = torch.arange(0, 2 * rotated, 2, device=positions.device).float() / head
    frequencies = F.pad(parameters["rope_theta"] ** -exponents, (0, head // 2 - rotated))
    angles = positions.float()[:, None] * torch.cat([frequencies, frequencies])
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE. Shapes: x [B, heads, T, D], cos and sin [T, D] or broadcastable."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)


def head_dim(config: dict[str, Any], kind: str) -> int:
    """Return the head size of a layer kind."""
    return int(config["global_head_dim"] if kind == "full_attention" else config["head_dim"])


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int, seen: int) -> Tensor:
    """Sliding causal attention in blocks of `window`; each query sees its last `seen` keys, itself included.

    Shapes: q [B, heads, T, D], k and v [B, 1, T, D] → [B, heads, T, D]; window < seen allowed up to window + 1.
    """
    batch, heads, length, size = q.shape
    blocks = -(-length // window)
    pad = blocks * window - length
    q = F.pad(q, (0, 0, 0, pad)).view(batch, heads, blocks, window, size).transpose(1, 2).flatten(0, 1)

    def with_previous(x: Tensor) -> Tensor:
        padded = F.pad(x[:, 0], (0, 0, window, pad))
        pairs = torch.cat([padded[:, : blocks * window], padded[:, window:]], -1)
        pairs = pairs.view(batch, blocks, window, 2, size).transpose(2, 3)
        return pairs.reshape(batch * blocks, 1, 2 * window, size).expand(-1, heads, -1, -1)

    rows = torch.arange(window, device=q.device)[:, None] + window
    columns = torch.arange(2 * window, device=q.device)[None]
    inside = (columns <= rows) & (columns > rows - seen)
    first = inside & (columns >= window)
    mask = torch.stack([first] + [inside] * (blocks - 1)).repeat(batch, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(q, with_previous(k), with_previous(v), attn_mask=mask, scale=1.0)
    return out.view(batch, blocks, heads, window, size).transpose(1, 2).flatten(2, 3)[:, :, :length]


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str, window: int, seen: int) -> Tensor:
    """Causal attention over as many keys as queries, whole or sliding. Shapes as in `windowed`."""
    if kind == "full_attention":
        k, v = k.expand_as(q), v.expand_as(q)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return windowed(q, k, v, window, seen)


class Attention(nn.Module):
    """Query projection and output projection; keys and values only where the layer owns them."""

    def __init__(self, config: dict[str, Any], kind: str, owns_kv: bool) -> None:
        super().__init__()
        self.size = head_dim(config, kind)
        hidden, eps, wide = config["hidden_size"], config["rms_norm_eps"], config["num_attention_heads"] * self.size
        self.q_proj = nn.Linear(hidden, wide, bias=False)
        self.q_norm = RMSNorm(self.size, eps)
        self.o_proj = nn.Linear(wide, hidden, bias=False)
        self.eps = eps
        if owns_kv:
            self.k_proj = nn.Linear(hidden, self.size, bias=False)
            self.v_proj = nn.Linear(hidden, self.size, bias=False)
            self.k_norm = RMSNorm(self.size, eps)

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shapes: [B, T, H] → [B, heads, T, D]."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.size))).transpose(1, 2)
        return rotate(q, cos, sin)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> KeyValue:
        """Shapes: [B, T, H] → two of [B, 1, T, D]."""
        k = rotate(self.k_norm(self.k_proj(x))[:, None], cos, sin)
        v = self.v_proj(x)
        v = F.rms_norm(v.float(), v.shape[-1:], None, self.eps).type_as(v)
        return k, v[:, None]

    def output(self, attended: Tensor) -> Tensor:
        """Shapes: [B, heads, T, D] → [B, T, H]."""
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Gated GELU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [B, T, H] → [B, T, H]."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        down: Tensor = self.down_proj(gate * self.up_proj(x))
        return down


class Layer(nn.Module):
    """One decoder layer: attention, MLP and, in the target, the per-layer input."""

    layer_scalar: Tensor

    def __init__(self, config: dict[str, Any], index: int) -> None:
        super().__init__()
        hidden, eps, ple = config["hidden_size"], config["rms_norm_eps"], config["hidden_size_per_layer_input"]
        owners = config["num_hidden_layers"] - config["num_kv_shared_layers"]
        self.kind: str = config["layer_types"][index]
        self.owns_kv = index < owners
        wide = 2 if config["use_double_wide_mlp"] and not self.owns_kv else 1
        self.self_attn = Attention(config, self.kind, self.owns_kv)
        self.mlp = MLP(hidden, config["intermediate_size"] * wide)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.ple = ple
        if ple:
            self.per_layer_input_gate = nn.Linear(hidden, ple, bias=False)
            self.per_layer_projection = nn.Linear(ple, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)

    def forward(
        self, x: Tensor, per_layer: Tensor | None, cos_sin: KeyValue, shared: KeyValue | None, window: int, seen: int
    ) -> tuple[Tensor, KeyValue]:
        """Return the layer over a whole sequence, with its own keys and values or, if it has none, the `shared` ones.

        Shapes: x [B, T, H] → [B, T, H], the keys and values used, two of [B, 1, T, D].
        """
        normed = self.input_layernorm(x)
        pair = self.self_attn.key_value(normed, *cos_sin) if shared is None else shared
        q = self.self_attn.query(normed, *cos_sin)
        return self.after_attention(x, attend(q, *pair, self.kind, window, seen), per_layer), pair

    def after_attention(self, x: Tensor, attended: Tensor, per_layer: Tensor | None) -> Tensor:
        """The rest of the layer. Shapes: x [B, T, H], attended [B, heads, T, D], per_layer [B, T, ple] → [B, T, H]."""
        x = x + self.post_attention_layernorm(self.self_attn.output(attended))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if per_layer is not None:
            gated = F.gelu(self.per_layer_input_gate(x), approximate="tanh") * per_layer
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar.to(x.dtype)


class LanguageModel(nn.Module):
    """The target's `model.language_model`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, eps, ple = config["hidden_size"], config["rms_norm_eps"], config["hidden_size_per_layer_input"]
        count = config["num_hidden_layers"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(count))
        self.norm = RMSNorm(hidden, eps)
        self.embed_tokens_per_layer = nn.Embedding(config["vocab_size_per_layer_input"], count * ple)
        self.per_layer_model_projection = nn.Linear(hidden, count * ple, bias=False)
        self.per_layer_projection_norm = RMSNorm(ple, eps)

    def embed(self, ids: Tensor) -> Tensor:
        """Scaled token embeddings: what the drafter is fed as well. Shapes: [B, T] → [B, T, H]."""
        out: Tensor = self.embed_tokens(ids) * self.config["hidden_size"] ** 0.5
        return out

    def inputs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and per-layer inputs. Shapes: [B, T] → [B, T, H], [B, T, layers, ple]."""
        ple = self.config["hidden_size_per_layer_input"]
        x = self.embed(ids)
        projected = self.per_layer_model_projection(x) * self.config["hidden_size"] ** -0.5
        projected = self.per_layer_projection_norm(projected.unflatten(-1, (-1, ple)))
        looked_up = self.embed_tokens_per_layer(ids).unflatten(-1, (-1, ple)) * ple**0.5
        return x, (projected + looked_up) * 2.0**-0.5

    def ropes(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Both kinds' cosine and sine at `positions` [T]."""
        return {kind: rope(positions, self.config, kind) for kind in ("sliding_attention", "full_attention")}

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, KeyValue]]:
        """The whole sequence at once. Shapes: [B, T] → post-norm hidden [B, T, H], the shared keys and values."""
        x, per_layer = self.inputs(ids)
        ropes = self.ropes(torch.arange(ids.shape[1], device=ids.device))
        shared: dict[str, KeyValue] = {}
        window = self.config["sliding_window"]
        per_layers = per_layer.unbind(2)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            keys_and_values = None if layer.owns_kv else shared[layer.kind]
            x, shared[layer.kind] = layer(x, per_layers[index], ropes[layer.kind], keys_and_values, window, window)
        return self.norm(x), shared

    def step(self, ids: Tensor, position: Tensor, caches: list[KeyValue]) -> Tensor:
        """One token of each sequence, over a static cache that it writes at `position` (a tensor of one element).

        Shapes: ids [B, 1], caches one ([B, 1, S, D], [B, 1, S, D]) per owning layer → post-norm hidden [B, 1, H].
        """
        x, per_layer = self.inputs(ids)
        ropes = self.ropes(position)
        slots = torch.arange(caches[0][0].shape[2], device=ids.device)
        past = slots <= position
        masks = {"full_attention": past, "sliding_attention": past & (slots > position - self.config["sliding_window"])}
        shared: dict[str, KeyValue] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            normed = layer.input_layernorm(x)
            if layer.owns_kv:
                fresh = layer.self_attn.key_value(normed, *ropes[layer.kind])
                for cache, new in zip(caches[index], fresh, strict=True):
                    cache.index_copy_(2, position, new.to(cache.dtype))
                shared[layer.kind] = caches[index]
            q = layer.self_attn.query(normed, *ropes[layer.kind])
            k, v = shared[layer.kind]
            scores = (q[:, :, 0] @ k[:, 0].transpose(1, 2)).float()  # one query per head: [B, heads, S]
            weights = scores.masked_fill(~masks[layer.kind], -math.inf).softmax(-1).to(v.dtype)
            attended = (weights @ v[:, 0]).unsqueeze(2)
            x = layer.after_attention(x, attended, per_layer[:, :, index])
        out: Tensor = self.norm(x)
        return out

    def new_caches(self, batch: int, length: int, dtype: torch.dtype) -> list[KeyValue]:
        """Zeroed caches for `step`."""
        device = self.embed_tokens.weight.device
        owners = [layer for layer in self.layers if isinstance(layer, Layer) and layer.owns_kv]
        shapes = [(batch, 1, length, layer.self_attn.size) for layer in owners]
        make = functools.partial(torch.zeros, dtype=dtype, device=device)
        return [(make(shape), make(shape)) for shape in shapes]

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits. Shapes: [..., H] → [..., V]."""
        cap = self.config["final_logit_softcapping"]
        out: Tensor = torch.tanh(F.linear(hidden, self.embed_tokens.weight).float() / cap) * cap
        return out


def compile_layers(model: nn.Module) -> None:
    """Compile layer by layer, not the whole graph: layers of one kind share a kernel set, so it takes seconds."""
    torch._dynamo.config.recompile_limit = 32
    for module in model.modules():
        if isinstance(module, Layer):
            module.compile(dynamic=False)


class Trunk(nn.Module):
    """The drafter's `model`: four layers that own no keys and values."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class ClusterIndex(nn.Module):
    """The drafter's `masked_embedding`: cluster centroids and the tokens of each cluster, in order."""

    token_ordering: Tensor

    def __init__(self, hidden: int, clusters: int, vocab: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(hidden, clusters, bias=False)
        self.register_buffer("token_ordering", torch.arange(vocab))


class Drafter(nn.Module):
    """The MTP drafter, evaluated at every position of a sequence as if each began a round."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config: dict[str, Any] = config["text_config"]
        self.top_k: int = config["centroid_intermediate_top_k"]
        hidden, backbone = self.config["hidden_size"], config["backbone_hidden_size"]
        self.model = Trunk(self.config)
        self.pre_projection = nn.Linear(2 * backbone, hidden, bias=False)
        self.post_projection = nn.Linear(hidden, backbone, bias=False)
        self.masked_embedding = ClusterIndex(hidden, config["num_centroids"], self.config["vocab_size"])

    def forward(self, embedded: Tensor, hidden: Tensor, shared: dict[str, KeyValue]) -> tuple[Tensor, Tensor]:
        """One draft step of the rounds that begin after each t: keys 0..t are there, the position is t + 1.

        Shapes: embedded and hidden [B, T, backbone] → the head's input [B, T, H], the next step's hidden
        [B, T, backbone].
        """
        x = self.pre_projection(torch.cat([embedded, hidden], dim=-1))
        positions = torch.arange(1, x.shape[1] + 1, device=x.device)
        window = self.config["sliding_window"]
        ropes = {kind: rope(positions, self.config, kind) for kind in set(self.config["layer_types"])}
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            x, _ = layer(x, None, ropes[layer.kind], shared[layer.kind], window, window + 1)
        x = self.model.norm(x)
        return x, self.post_projection(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the dense tied head. Shapes: [..., H] → [..., V]."""
        out: Tensor = F.linear(x, self.model.embed_tokens.weight).float()
        return out

    def clusters_of_tokens(self) -> Tensor:
        """Each token's cluster. Shapes: → [V]."""
        ordering = self.masked_embedding.token_ordering
        size = ordering.numel() // self.masked_embedding.centroids.out_features
        clusters = torch.empty_like(ordering)
        clusters[ordering] = torch.arange(ordering.numel(), device=ordering.device) // size
        return clusters

    def clustered_logits(self, x: Tensor) -> Tensor:
        """The head as exported: only tokens of the best clusters, all others at -inf. Shapes: [..., H] → [..., V]."""
        scores = self.masked_embedding.centroids(x).float()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.top_k, -1).indices, True)
        return self.logits(x).masked_fill(~chosen[..., self.clusters_of_tokens()], -math.inf)
