"""What a run imports only once it trains; a fork server that has imported it saves each process a third of a second."""

import importlib

from common.images import formats

for name in (
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.models.mimo",
    "megatron.core.transformer.multi_token_prediction",
    "torch.utils.serialization.config",
):
    importlib.import_module(name)
formats()
