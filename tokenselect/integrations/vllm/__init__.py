"""Let vLLM 0.32 decode with tokenselect: `--attention-backend TOKENSELECT`.

vLLM finds `register` through the entry point `vllm.general_plugins`, in every process. Without
the plugin the name is unknown to vLLM, which then refuses to start. Options are those of
`config.tokenselect`: `--hf-overrides '{"tokenselect": {"k": 1024}}'`, or the model's config.json.
docs/serving.md has all of it.
"""

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
    return AttentionBackendEnum[BACKEND]
