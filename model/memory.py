"""What a training step of SAISA holds on a GPU, from the sizes alone: weights, gradients, optimizer, activations.

The formulas follow a step with Transformer Engine's kernels and a flash kernel; a step on a fake GPU, traced
allocation by allocation, agrees to 5% (`tests/benchmarks/test_fake_gpu.py`). What torch's allocator reserves beyond
what is asked of it is not in them.

Symbols: T text rows, I visual rows, S = T + I, E keys of all segments, R rows with a target; D hidden, N query heads,
G key/value heads, H head dim, F FFN, C vision width, V vocabulary.
"""

from dataclasses import dataclass

from model.config import ComputeConfig, ModelConfig, Phase, VisionConfig
from model.flops import parameter_counts
from model.parallel import ParallelConfig, padded_vocab_size

ELEMENT_BYTES = 2  # of weights and activations: bf16; under FP8 what a product reads has 1
STATISTICS_BYTES = 4  # of norms and of the softmax: fp32 in every precision
GRADIENT_BYTES = 4  # unless they are summed in bf16
MOMENT_BYTES = {"fp32": 4, "bf16": 2}
MAIN_WEIGHT_BYTES = 4
WORKSPACE_BYTES = 32 * 2**20  # of cuBLAS
HOST_COPY_BYTES_PER_SECOND = 5e9  # of one GPU to memory that its host locks anew; assumed, with room
DISK_BYTES_PER_SECOND = 1e9  # of the file system that all processes write to; assumed


@dataclass(frozen=True)
class PackSize:
    """Rows of a pack, padding included.

    Attributes:
        num_text: text rows.
        num_visual: visual rows.
        num_targets: text rows with a target.
        num_gathered_keys: keys of all segments, those that several segments need counted for each.
    """

    num_text: int
    num_visual: int
    num_targets: int
    num_gathered_keys: int


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of activations that one pack holds on one device.

    Attributes:
        shared: what all layers share: vision features, rotary angles, the projector if it is shared.
        layer: what each layer keeps from its forward to its backward pass.
        working: the most that a layer has besides in its backward pass, what is computed again included.
        head: the most that the final norm, the vocabulary and the loss have.
    """

    shared: int
    layer: int
    working: int
    head: int

    def peak(self, num_layers: int, has_head: bool = True, num_packs: int = 1) -> int:
        """Returns the most that is held at once by a stage with `num_layers` layers and `num_packs` packs under way."""
        return num_packs * (self.shared + num_layers * self.layer) + max(self.working, self.head if has_head else 0)


def activation_bytes(
    model: ModelConfig, phase: Phase, compute: ComputeConfig, pack: PackSize, parallel: ParallelConfig | None = None
) -> ActivationBytes:
    """Returns the activation memory of a pack on a device that has 1 / tp of every layer.

    Between the layers rows are divided by `parallel.num_row_parts`, within them heads, FFN and vocabulary by tp. In
    stage 1 nothing is kept that only the gradient of a frozen weight needs. Under FP8 a linear layer keeps its input in
    8 bits, and what an operation before it keeps as well (features, attention's output) is held twice.

    Source: what autograd saves of every operation of `model.saisa`, and what is alive beside it at the worst moment; of
    flash attention queries, keys, values, output and the log-sum-exp of each row (arXiv 2307.08691, section 3.1).
    """
    parallel = parallel or ParallelConfig()
    tp, parts, e, is_trained = parallel.tp, parallel.num_row_parts, ELEMENT_BYTES, phase == "finetune"
    is_shared = model.shares_projector(phase)
    d, f = model.hidden_size * e, model.ffn_hidden_size * e // tp
    queries = model.num_attention_heads * model.head_dim * e // tp
    keys = model.num_query_groups * model.head_dim * e // tp
    t, i, own_t, own_i = pack.num_text, pack.num_visual, pack.num_text // parts, pack.num_visual // parts
    text_rows, vocabulary = own_t * d, padded_vocab_size(model) * e // tp

    in_8_bits = layers_in_8_bits(model, compute)
    kept = 1 - in_8_bits / ELEMENT_BYTES  # of a linear layer's input; with edge layers in bf16 the mean of all layers
    c = model.vision.hidden_size
    is_mlp, num_features = model.projector == "mlp", i
    inner = i * d // tp * (1 + kept) if is_mlp else 0  # before GELU, and after it the second layer's input
    features = in_8_bits * i * c // (1 if is_mlp else tp)  # those in 16 bits are shared by all layers
    if model.projector == "resampler":  # normed features, keys, values; what comes out, with the latents, normed
        num_features = i // model.num_tokens_per_image * model.vision.num_tokens
        inner = 3 * (num_features + i) * c * e
    projector = features + inner + own_i * d
    linear_inputs = kept * (2 * text_rows + own_i * d) if is_trained else 0  # of queries; of keys and values
    statistics = (2 * own_t + own_i + t * model.num_attention_heads // tp) * STATISTICS_BYTES
    flash = 2 * t * queries + 2 * pack.num_gathered_keys * keys
    if is_trained:
        flash += (1 - kept) * t * queries  # the output layer's input
    attend = (0 if is_shared else projector) + linear_inputs + flash + statistics
    ffn = text_rows + 2 * t * f + (kept * (text_rows + t * f) if is_trained else 0)  # residual, up and gate; inputs

    # Beside what attention keeps: keys and values as they come, again in order under sequence parallelism, turned keys,
    # visual rows behind their norm, and what comes out.
    attending = (3 + 2 * (parts > 1)) * (t + i) * keys + own_i * d + text_rows
    # In the backward pass of the FFN: the gradients of its second layer's input and weight, then of the first's output
    # without the second's input, which is not needed by then.
    weight = 0 if compute.gradient_accumulation_fusion else model.hidden_size * f
    ffn_backward = max(t * f + weight, (3 - kept) * t * f) if is_trained else 3 * t * f
    shared_gradient = own_i * d if is_shared else 0  # of the visual rows, from the layers behind
    layer, working = {
        "none": (text_rows + attend + ffn, max(ffn_backward, attending - ffn)),
        "selective": (text_rows + ffn, max(ffn_backward, attend + attending - ffn + text_rows)),
        "full": (text_rows, attend + ffn + ffn_backward + shared_gradient),
    }[compute.recompute]
    head_rows = pack.num_targets * d
    return ActivationBytes(
        shared=int(num_features * c * e + (t + i) * model.head_dim * 4 + (projector if is_shared else 0)),
        layer=int(layer),
        working=int(working) + text_rows,  # the gradient that comes from behind
        head=text_rows
        + head_rows
        + max(
            2 * pack.num_targets * vocabulary,  # logits, and the copy that the loss keeps
            pack.num_targets * vocabulary + head_rows + (model.hidden_size * vocabulary if is_trained else 0),
        ),
    )


def layers_in_8_bits(model: ModelConfig, compute: ComputeConfig) -> float:
    """Returns the fraction of the layers that multiply in 8 bits."""
    return max(1 - 2 * compute.bf16_edge_layers / model.num_layers, 0) if compute.precision == "fp8" else 0


def largest_pack(model: ModelConfig, max_text_tokens: int, max_images: int) -> PackSize:
    """Returns the pack that holds the most within its budgets, of samples with one image each behind their text."""
    num_visual = max_images * model.num_tokens_per_image
    return PackSize(max_text_tokens, num_visual, max_text_tokens, num_visual + 2 * max_text_tokens)


def encoder_bytes(vision: VisionConfig) -> int:
    """Returns the bytes of the weights of an encoder's layers, whose FFN is as wide as CLIP's."""
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.usual_ffn_hidden_size
    return layer * vision.num_layers * ELEMENT_BYTES


def peak_bytes(
    model: ModelConfig,
    phase: Phase,
    compute: ComputeConfig,
    pack: PackSize,
    moments: str,
    num_replicas: int,
    reduce_in_bf16: bool = False,
) -> int:
    """Returns the most that a step holds on one device that has the whole model, with its encoder."""
    activations = activation_bytes(model, phase, compute, pack).peak(model.num_layers)
    resident = resident_bytes(model, phase, compute, moments, num_replicas, reduce_in_bf16)
    return resident + encoder_bytes(model.vision) + activations


def resident_bytes(
    model: ModelConfig,
    phase: Phase,
    compute: ComputeConfig,
    moments: str,
    num_replicas: int,
    reduce_in_bf16: bool = False,
) -> int:
    """Returns the bytes held between steps on one device that has the whole model, without the vision encoder.

    Weights; gradients of what is trained, in fp32 unless `reduce_in_bf16`; a share of its fp32 weights and two moments.
    Where weight gradients are added within the products, Transformer Engine keeps a tensor of each weight's shape to
    give autograd instead. Under FP8 it keeps each weight in 8 bits besides, by row and by column; with `fp8_weights`
    instead.
    Source: ZeRO (arXiv 1910.02054), section 3.1, with what megatron-core's distributed optimizer divides.
    """
    counts = parameter_counts(model, phase)
    divided = MAIN_WEIGHT_BYTES + 2 * MOMENT_BYTES[moments]
    gradient = ELEMENT_BYTES if reduce_in_bf16 else GRADIENT_BYTES
    trained = counts.num_trained * (gradient + divided / num_replicas)
    has_copies = compute.precision == "fp8" and not compute.fp8_weights
    copies = 2 * layers_in_8_bits(model, compute) * (counts.layers + counts.projectors) if has_copies else 0
    stand_ins = 0
    if compute.gradient_accumulation_fusion and phase == "finetune":
        d, f, c = model.hidden_size, model.ffn_hidden_size, model.vision.hidden_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        shapes = {(2 * f, d), (d, f), (queries, d), (2 * keys, d), (d, queries), (d, c)}
        shapes |= {(d, d)} if model.projector == "mlp" else set()
        stand_ins = sum(rows * columns for rows, columns in shapes) * ELEMENT_BYTES
    return int(counts.total * ELEMENT_BYTES + trained + copies) + stand_ins + WORKSPACE_BYTES


def checkpoint_bytes(model: ModelConfig, phase: Phase, moments: str) -> int:
    """Returns the bytes of a checkpoint: of each trained parameter the weight, its fp32 copy and two moments."""
    divided = MAIN_WEIGHT_BYTES + 2 * MOMENT_BYTES[moments]
    return parameter_counts(model, phase).num_trained * (ELEMENT_BYTES + divided)


def save_seconds(num_bytes: int, num_devices: int) -> tuple[float, float]:
    """Returns for how long the devices wait for the copy of a checkpoint to their hosts, and how long it is written.

    In the background the second costs nothing as long as it is over before the next checkpoint.
    """
    return num_bytes / num_devices / HOST_COPY_BYTES_PER_SECOND, num_bytes / DISK_BYTES_PER_SECOND
