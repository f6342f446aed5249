"""What the stages of a pipeline send each other: states of packs, whose sizes every process knows from the plan.

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
        rows_in: of each chunk of this process and each pack of the step, in order, the rows that it takes (under
            sequence parallelism this process's part).
        rows_out: the rows that it gives.
    """

    def __init__(
        self,
        pp_group: ProcessGroup,
        config: TransformerConfig,
        rows_in: Sequence[Sequence[int]],
        rows_out: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(pp_group, config)
        group_size = config.microbatch_group_size_per_vp_stage or pp_group.size()
        sizes = len(rows_in[0]), len(rows_in), group_size
        self.from_previous = shapes(rows_in, config, packs_received(*sizes, leads=self.is_pp_first_stage))
        self.from_next = shapes(rows_out[::-1], config, packs_received(*sizes, leads=self.is_pp_last_stage))

    def _communicate_shapes(self, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        """Returns the shapes of what comes from the previous and from the next stage, where megatron-core asks them."""
        return next(self.from_previous) if recv_prev else None, next(self.from_next) if recv_next else None


def packs_received(num_packs: int, num_chunks: int, group_size: int, leads: bool) -> list[tuple[int, int]]:
    """Returns (chunk, pack) of what a process receives from its neighbour, in order; the same forward and backward.

    The neighbour sends what it computes in the order of the schedule. Of two chunks and groups of two packs:

        pack     0 1 0 1 2 3 2 3
        chunk    0 0 1 1 0 0 1 1     of the neighbour, counted from the last one backward

    The process's own chunk that takes it is the same, but the next where it leads.

    Args:
        num_packs: of the step.
        num_chunks: stages of each process.
        group_size: packs that a chunk takes before the next chunk does.
        leads: the process is the first of the pass (of the pipeline forward, from its end backward), so that its
            neighbour is the pass's last, whose last chunk sends nothing.
    """
    table = get_schedule_table(num_packs, num_chunks, group_size)
    return [(chunk + leads, pack) for pack, chunk in table if not leads or chunk < num_chunks - 1]


def shapes(
    num_rows: Sequence[Sequence[int]], config: TransformerConfig, received: Sequence[tuple[int, int]]
) -> Iterator[list[int]]:
    """Yields the shapes [rows, batch, D] of the states (or of their gradients) of packs."""
    for chunk, pack in received:
        yield [num_rows[chunk][pack], 1, config.hidden_size]
