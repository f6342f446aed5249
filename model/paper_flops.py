"""What the paper says its architectures cost at inference; `model.flops` counts what our own modules do.

In multiplications, each with an addition, for v visual and t text tokens, s = v + t:

    LLaVA      P(v) + n (L(s) + 2 s^2 h)             one projector; visual tokens pass what text passes
    SAISA      n (P(v) + 2 v h k + L(t) + 2 t s h)   a projector a layer; visual tokens are keys and values alone
    P(x)     = x (d h + h^2)                         the MLP projector
    L(x)     = x (2 h^2 + 2 h k + 3 h m)             queries and output; keys and values; the gated FFN

n layers, h hidden width, m of the FFN, k of all keys (as of all values), d of the vision features. Attention is counted
for full rectangles; the vision encoder and the vocabulary are not in it. FLOPs are twice that.

Source: arXiv 2502.02458, section 4.4 and appendix A.2. Its text was not at hand; these are the forms that give every
number it prints, digit for digit (`tests/model/test_paper_flops.py`). It has a formula for cross-attention as well, of
which no number was at hand: what is below is from the shapes of two such models on Vicuna-7B.
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class PaperSizes:
    """What the formulas take.

    Attributes:
        n: layers.
        h: hidden width.
        m: width of the FFN.
        k: width of all heads of the keys, less than `h` where query heads share them.
        d: width of the vision features.
        k_text: the same as `k` for the keys and values of text in `saisa`, where the paper seems to put `h`.
    """

    n: int
    h: int
    m: int
    k: int
    d: int
    k_text: int

    @classmethod
    def of(cls, model: ModelConfig) -> "PaperSizes":
        """Returns those of a model, its encoder's width among them."""
        k = model.num_query_groups * model.head_dim
        return cls(model.num_layers, model.hidden_size, model.ffn_hidden_size, k, model.vision.hidden_size, k)

    def projector(self, rows: int) -> int:
        """Returns P(rows), in multiplications."""
        return rows * (self.d * self.h + self.h**2)

    def layer(self, rows: int, k: int) -> int:
        """Returns L(rows), in multiplications."""
        return rows * (2 * self.h**2 + 2 * self.h * k + 3 * self.h * self.m)


def llava_flops(sizes: PaperSizes, num_visual: int, num_text: int) -> int:
    """Returns the FLOPs of LLaVA for a prompt: P(v) + n (L(s) + 2 s^2 h)."""
    s = num_visual + num_text
    return 2 * (sizes.projector(num_visual) + sizes.n * (sizes.layer(s, sizes.k) + 2 * s**2 * sizes.h))


def saisa_flops(sizes: PaperSizes, num_visual: int, num_text: int) -> int:
    """Returns the FLOPs of SAISA for a prompt: n (P(v) + 2 v h k + L(t) + 2 t s h)."""
    visual = sizes.projector(num_visual) + 2 * num_visual * sizes.h * sizes.k
    text = sizes.layer(num_text, sizes.k_text) + 2 * num_text * (num_visual + num_text) * sizes.h
    return 2 * sizes.n * (visual + text)


def open_flamingo_flops(sizes: PaperSizes, num_visual: int, num_text: int) -> int:
    """Returns the FLOPs of OpenFlamingo's kind for a prompt.

    A text-only LLM, n (L(t) + 2 t^2 h); before every fourth layer a block with 8 heads of 64 (a = 512), keys and values
    of l = 64 latents of width d, and an FFN of 4 h: t (2 h a + 8 h^2) + 2 l d a + 2 t l a. The latents come from a
    resampler of 6 layers whose keys are features and latents: l (2 d a + 8 d^2) + 2 (v + l) d a + 2 l (v + l) a.
    """
    t, latents, inner = num_text, 64, 512
    h, d, num_keys = sizes.h, sizes.d, num_visual + 64
    text = sizes.n * (sizes.layer(t, sizes.k) + 2 * t**2 * h)
    block = t * (2 * h * inner + 8 * h**2) + 2 * latents * d * inner + 2 * t * latents * inner
    resampler = latents * (2 * d * inner + 8 * d**2) + 2 * num_keys * d * inner + 2 * latents * num_keys * inner
    return 2 * (text + sizes.n // 4 * block + 6 * resampler)


def llama_3_2_flops(sizes: PaperSizes, num_visual: int, num_text: int) -> int:
    """Returns the FLOPs of Llama-3.2-Vision's kind for a prompt.

    A text-only LLM, and before every fourth layer a block with the LLM's own heads and FFN, whose keys and values come
    from the features of width d: t (2 h^2 + 3 h m) + 2 v d k + 2 t v h. Rows, as there, attend to visual tokens alone.
    """
    t, v, h = num_text, num_visual, sizes.h
    text = sizes.n * (sizes.layer(t, sizes.k) + 2 * t**2 * h)
    block = t * (2 * h**2 + 3 * h * sizes.m) + 2 * v * sizes.d * sizes.k + 2 * t * v * h
    return 2 * (text + sizes.n // 4 * block)
