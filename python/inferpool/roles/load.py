"""Loading the model of a built-in role."""

from __future__ import annotations

from inferpool.config import ChatConfig, EmbedConfig, RerankConfig, VisionConfig
from inferpool.engine.abort import AbortToken
from inferpool.engine.context import context_length
from inferpool.engine.gguf import Gguf
from inferpool.engine.memory import mapped_bytes, require_memory
from inferpool.engine.model import Model
from inferpool.models import readable, resolve
from inferpool.worker import report_loading

__all__ = ["load_model"]


def load_model(
    config: ChatConfig | EmbedConfig | RerankConfig | VisionConfig, abort: AbortToken | None
) -> Model:
    """Load the model that a config names, if it makes sense and memory will do.

    Raises:
        ModelNotFound: if there is no such model.
        ModelLoadError: if it can't be loaded, or can't fit.
        CallCancelled: if ``abort`` was set meanwhile.
    """
    gguf = Gguf(resolve(config.model))
    files = readable(config.model)
    n_ctx = min(config.n_batch, gguf.n_ctx_train)
    if isinstance(config, ChatConfig):
        n_ctx = context_length(config.n_ctx, gguf.n_ctx_train) * config.n_parallel
    elif isinstance(config, VisionConfig):
        n_ctx = context_length(config.n_ctx, gguf.n_ctx_train)
        files = [*files, *readable(config.mmproj)]
    # What an accelerator has, only its driver knows.
    if config.n_gpu_layers == 0:
        require_memory(gguf, n_bytes=mapped_bytes(files), n_ctx=n_ctx)
    return Model(gguf.path, n_gpu_layers=config.n_gpu_layers, abort=abort, progress=report_loading)
