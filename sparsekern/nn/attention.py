"""The attention of PyTorch with its projections as layers that are called, so that they can be sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.errors import InputError
from sparsekern.nn.selectors import Selector, select
from sparsekern.nn.surgery import swap_
from sparsekern.nn.weight import WeightInfo
from sparsekern.topology.arguments import check_kind


class SplitAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with four layers: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    PyTorch's keeps the first three projections in one parameter and reads the weight of the fourth, which a sparse
    layer does not have. This one has the same arguments and results, takes the same checkpoints, and works in PyTorch's
    transformer layers. ``attn_mask`` counts also where ``is_causal`` describes it.

    Args:
        attention: the one to split; its parameters are copied.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    in_proj_bias = None
    _qkv_same_embed_dim = False  # tells nn.TransformerEncoderLayer to call this module

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        state = _split(attention.state_dict(), "", attention.embed_dim)
        out: Any = attention.out_proj.weight
        has_bias = attention.in_proj_bias is not None
        for name, ins in (("q", self.embed_dim), ("k", self.kdim), ("v", self.vdim), ("out", self.embed_dim)):
            linear = nn.Linear(ins, self.embed_dim, bias=has_bias, device="meta", dtype=out.dtype)
            self.add_module(f"{name}_proj", linear.to_empty(device=out.device))
        for name in ("bias_k", "bias_v"):
            given = getattr(attention, name)
            self.register_parameter(name, None if given is None else nn.Parameter(torch.empty_like(given)))
        self.load_state_dict(state)
        before = dict(attention.named_parameters())
        for name, parameter in self.named_parameters():
            module, _, kind = name.rpartition(".")
            sources = (name, f"{module}_{kind}", f"in_proj_{kind}")
            parameter.requires_grad_(next(before[s] for s in sources if s in before).requires_grad)

    @property
    def in_proj_weight(self) -> WeightInfo:
        """Return the shape and dtype of what PyTorch's attention has under this name; computing with it raises."""
        return WeightInfo((3 * self.embed_dim, self.embed_dim), next(self.out_proj.parameters()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of :meth:`torch.nn.MultiheadAttention.forward`.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``, which it describes.
        """
        if is_causal and attn_mask is None:
            raise InputError("is_causal=True says what attn_mask is; pass that too", parameter="attn_mask")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        extra = 0  # keys that no mask covers
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
            extra += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            extra += 1
        mask = self._mask(q, k.shape[1], key_padding_mask, attn_mask, extra)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-1, -2)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(
        self, q: Tensor, keys: int, padding: Tensor | None, attention: Tensor | None, extra: int
    ) -> Tensor | None:
        """Return both masks as one to add, ``(N or 1, heads or 1, L or 1, keys)``, or None."""
        masks = []
        if attention is not None:
            three = attention.unflatten(0, (len(q), self.num_heads)) if attention.dim() == 3 else attention[None, None]
            masks.append(three)
        if padding is not None:
            masks.append(padding[:, None, None])
        total: Tensor | None = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
            total = mask.to(q.dtype) if total is None else total + mask
        return total if total is None or not extra else F.pad(total, (0, extra))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict |= (split := _split(state_dict, prefix, self.embed_dim))
        for name in _WHOLE if split else ():
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


_WHOLE = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _split(state: dict[str, Any], prefix: str, width: int) -> dict[str, Any]:
    """Return what the state of PyTorch's attention holds, under the names of :class:`SplitAttention`."""
    found: dict[str, Any] = {}
    for at, name in enumerate("qkv"):
        part = slice(at * width, (at + 1) * width)
        if (whole := state.get(f"{prefix}in_proj_weight")) is not None:
            found[f"{prefix}{name}_proj.weight"] = whole[part]
        if (own := state.get(f"{prefix}{name}_proj_weight")) is not None:
            found[f"{prefix}{name}_proj.weight"] = own
        if (bias := state.get(f"{prefix}in_proj_bias")) is not None:
            found[f"{prefix}{name}_proj.bias"] = bias[part]
    kept = {} if prefix else {k: v for k, v in state.items() if k not in _WHOLE}
    return kept | found


def split_attention_(model: nn.Module, targets: Selector = nn.MultiheadAttention) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` of a model by a :class:`SplitAttention` that computes the same, in place.

    ``sparsify_`` can then make its projections sparse::

        sk.nn.split_attention_(model)
        sk.sparsify_(model, 0.9, 16)

    Args:
        model: changed in place; build the optimizer afterwards.
        targets: which of them.

    Returns:
        The model.

    Raises:
        TypeError: not a :class:`torch.nn.Module`.
        ValueError: the model has none, is one itself, or the targets match others than those.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    if isinstance(model, nn.MultiheadAttention):
        raise InputError("model is itself an nn.MultiheadAttention and cannot be replaced in place; use SplitAttention")
    found = select(model, targets, "targets")
    twins: dict[int, SplitAttention] = {}
    for name, module in found.items():
        if type(module) is not nn.MultiheadAttention:
            raise InputError(
                f"targets matches {name!r}, a {type(module).__name__}; it must match nn.MultiheadAttention"
            )
        twins[id(module)] = SplitAttention(module)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in twins:
            swap_(model, name, twins[id(module)])
    return model
