"""Let vLLM 0.32 decode with tokenselect: `--attention-backend TOKENSELECT`.

vLLM finds `register` through the entry point `vllm.general_plugins`, in every process. Without
the plugin the name is unknown to vLLM, which then refuses to start. Options are those of
`config.tokenselect`: `--hf-overrides '{"tokenselect": {"k": 1024}}'`, or the model's config.json.
docs/serving.md has all of it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["BACKEND", "register"]

BACKEND = "TOKENSELECT"
# The class paths by which vLLM chooses attention on a CPU, and their stand-ins in `chosen`.
PATHS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")


def register() -> Any:
    """Make the backend known to vLLM in this process; return its member of vLLM's enum.

    A second call changes nothing. Nobody's attention changes until the backend is asked for.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    here = f"{__name__}.chosen"
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, f"{here}.{BACKEND}")
        # vLLM sends its config to processes that have not loaded plugins yet: what is sent there
        # has to bring the plugin along.
        AttentionBackendEnum[BACKEND].__reduce_ex__ = lambda protocol: (register, ())
        for name in PATHS:
            if name in AttentionBackendEnum.__members__:
                register_backend(AttentionBackendEnum[name], f"{here}.{name}")
        # vLLM's own name for a backend from outside, which only one plugin can have.
        if not AttentionBackendEnum.CUSTOM.is_overridden():
            register_backend(AttentionBackendEnum.CUSTOM, f"{here}.{BACKEND}")
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        before = WorkerWrapperBase.initialize_from_config
        WorkerWrapperBase.initialize_from_config = _looked_at(before)
    return AttentionBackendEnum[BACKEND]


def _looked_at(before: Callable[..., None]) -> Callable[..., None]:
    """Return what a worker does once its model is there, after a look at the model's layers.

    A model can name a backend to its layers, which vLLM then takes whatever was asked for.
    """

    @wraps(before)
    def initialize_from_config(self: Any, *args: Any, **more: Any) -> None:
        from tokenselect.integrations.vllm.support import is_asked_for

        if is_asked_for(self.vllm_config):
            from tokenselect.integrations.vllm.backend import refuse_others

            refuse_others(self.vllm_config)
        before(self, *args, **more)

    return initialize_from_config
