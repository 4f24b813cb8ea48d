"""Dual-stream layers: words and picture stay two sequences that read each other (LXMERT, ViLBERT).

ViLT went the other way, one sequence and one stream (arXiv:2102.03334, 2.2); these layers are there to compare it with.
Shapes: B pairs, L text tokens, S image tokens, D width. Masks are boolean, True means "may be looked at", and every row
must have one such token.
"""

from __future__ import annotations

from torch import Tensor, nn

from minivlp.layers import MLP, Attention, Block


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Who may be looked at, (B, S), in the shape that attention wants: (B, 1, 1, S), every head and asker alike."""
    return None if mask is None else mask[:, None, None, :]


class CrossAttention(nn.Module):
    """One modality asks, the other answers: x (B, T, D), context (B, S, D') -> LN(x + answer), post-norm as in BERT."""

    def __init__(
        self, width: int, heads: int, *, context_width: int | None = None, dropout: float = 0.0, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, context_width=context_width, dropout=dropout)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor], *, mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """-> (B, T, D) and, on request, the weights (B, heads, T, S). `mask` (B, S) is about the context, which may
        also be given as `attn.keys_values`."""
        answer, weights = self.attn(x, context, mask=key_mask(mask), need_weights=need_weights)
        return self.norm(x + answer), weights


class LXMERTLayer(nn.Module):
    """Cross-attention both ways, then self-attention and MLP in each stream (LXMERT, arXiv:1908.07490, 2.2).

    The two directions share one cross-attention with its LayerNorm, as in the official code (`visual_attention`); the
    paper speaks of two. Simplified: no dropout on the attention weights, and one more inside the MLP.
    """

    def __init__(self, width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0, eps: float = 1e-12) -> None:
        super().__init__()
        self.cross = CrossAttention(width, heads, dropout=dropout, eps=eps)
        self.text_block = Block(width, heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, norm="post")
        self.image_block = Block(width, heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, norm="post")

    def forward(
        self, text: Tensor, image: Tensor, *, text_mask: Tensor | None = None, image_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """text (B, L, D), image (B, S, D), masks (B, L) and (B, S) -> the new text and image.

        On request also the weights by name, who looks at whom: "text_to_image" (B, heads, L, S), "image_to_text"
        (B, heads, S, L), "text_to_text" (B, heads, L, L) and "image_to_image" (B, heads, S, S).
        """
        t, t_i = self.cross(text, image, mask=image_mask, need_weights=need_weights)
        i, i_t = self.cross(image, text, mask=text_mask, need_weights=need_weights)  # the old text, not t
        t, t_t = self.text_block(t, mask=key_mask(text_mask), need_weights=need_weights)
        i, i_i = self.image_block(i, mask=key_mask(image_mask), need_weights=need_weights)
        named = {"text_to_image": t_i, "image_to_text": i_t, "text_to_text": t_t, "image_to_image": i_i}
        return t, i, named if need_weights else {}


class CoAttentionLayer(nn.Module):
    """Co-attention (ViLBERT, arXiv:1908.02265, 2.2): each stream reads the other with weights and width of its own.

    Simplified from the official `BertConnectionLayer`: there both directions attend in one width of their own
    (`bi_hidden_size`, 1024 with 8 heads) and the MLPs differ (text 4 D, image 1 D); here a direction attends in its
    asker's width. The self-attention layers of each stream, which stand between such layers, are not part of it.
    """

    def __init__(
        self, text_width: int, image_width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__()
        self.text_cross = CrossAttention(text_width, heads, context_width=image_width, dropout=dropout, eps=eps)
        self.image_cross = CrossAttention(image_width, heads, context_width=text_width, dropout=dropout, eps=eps)
        self.text_mlp, self.image_mlp = (MLP(w, ratio=mlp_ratio, dropout=dropout) for w in (text_width, image_width))
        self.text_norm, self.image_norm = (nn.LayerNorm(w, eps=eps) for w in (text_width, image_width))

    def forward(
        self, text: Tensor, image: Tensor, *, text_mask: Tensor | None = None, image_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """text (B, L, D), image (B, S, D'), masks (B, L) and (B, S) -> the new text and image.

        On request also the weights by name: "text_to_image" (B, heads, L, S) and "image_to_text" (B, heads, S, L).
        """
        t, t_i = self.text_cross(text, image, mask=image_mask, need_weights=need_weights)
        i, i_t = self.image_cross(image, text, mask=text_mask, need_weights=need_weights)
        t, i = self.text_norm(t + self.text_mlp(t)), self.image_norm(i + self.image_mlp(i))
        return t, i, {"text_to_image": t_i, "image_to_text": i_t} if need_weights else {}
