"""FLOPs against torch's own counter on the plain reference."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.flops import forward_flops
from tests.model.reference import reference_logits
from tests.model.test_saisa import V, random_pack, random_weights, tiny


def test_forward_flops_equal_the_counted_ones():
    for model in (tiny(num_query_groups=4), tiny(num_query_groups=4, projector="linear")):
        pack, features = random_pack(model, [(2, 5)])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            reference_logits(
                random_weights(model), model, pack.token_ids_T, pack.positions_T, features, pack.visual_positions_I
            )
        assert forward_flops(model, num_text=7, num_visual=V) == counter.get_total_flops()
