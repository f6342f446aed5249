"""What the stages of a pipeline send each other: text states of packs, whose sizes every process knows from the plan.

Megatron-core's stages ask each other for the shape of every message before it, and the host waits for the answer. Here
they take it from the packs: all processes of a replica have the same ones in the same order.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup


class StageMessages(P2PCommunicator):
    """Megatron-core's messages between stages, with shapes that are known.

    Args:
        pp_group: the pipeline.
        config: of the model.
        num_rows: of each pack of the step, in order, on this process (a part of them under sequence parallelism).
        num_chunks: stages of each process.
    """

    def __init__(
        self, pp_group: ProcessGroup, config: TransformerConfig, num_rows: Sequence[int], num_chunks: int
    ) -> None:
        super().__init__(pp_group, config)
        group_size = config.microbatch_group_size_per_vp_stage or pp_group.size()
        is_first, is_last = self.is_pp_first_stage, self.is_pp_last_stage
        self.from_previous, self.from_next = (
            shapes(num_rows, config, packs_received(len(num_rows), num_chunks, group_size, leads))
            for leads in (is_first, is_last)
        )

    def _communicate_shapes(self, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        """Returns the shapes of what comes from the previous and from the next stage, where megatron-core asks them."""
        return next(self.from_previous) if recv_prev else None, next(self.from_next) if recv_next else None


def packs_received(num_packs: int, num_chunks: int, group_size: int, leads: bool) -> list[int]:
    """Returns which packs a process receives from its neighbour, in order; the same forward and backward.

    The neighbour sends what it computes in the order of the schedule. Of two chunks and groups of two packs:

        pack     0 1 0 1 2 3 2 3
        chunk    0 0 1 1 0 0 1 1     of the neighbour, counted from the last one backward

    Args:
        num_packs: of the step.
        num_chunks: stages of each process.
        group_size: packs that a chunk takes before the next chunk does.
        leads: the process is the first of the pass (of the pipeline forward, from its end backward), so that its
            neighbour is the pass's last, whose last chunk sends nothing.
    """
    table = get_schedule_table(num_packs, num_chunks, group_size)
    return [pack for pack, chunk in table if not leads or chunk < num_chunks - 1]


def shapes(num_rows: Sequence[int], config: TransformerConfig, packs: Sequence[int]) -> Iterator[list[int]]:
    """Yields the shapes [rows, batch, D] of the text states (or of their gradients) of packs."""
    for pack in packs:
        yield [num_rows[pack], 1, config.hidden_size]
