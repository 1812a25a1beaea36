"""The backend that a class path of vLLM stands for: ours where it was asked for, else vLLM's own.

vLLM resolves a path when a layer of attention is made, with the engine's config at hand. On a CPU
it takes the path of `CPU_ATTN` (or of multi-head latent attention) whatever backend is asked for;
on CUDA, that of the backend.
"""

from typing import Any

import vllm
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tokenselect.integrations.options import NAME
from tokenselect.integrations.vllm import BACKEND, PATHS
from tokenselect.integrations.vllm.support import is_asked_for, options_of, refuse

_MINOR = "0.32"
logger = init_logger(f"vllm.{NAME}")


def __getattr__(name: str) -> Any:
    if name not in (BACKEND, *PATHS):
        raise AttributeError(name)
    config = get_current_vllm_config()
    if name != BACKEND and not is_asked_for(config):
        model = config.model_config
        if model is not None and getattr(model.hf_config, NAME, None) is not None:
            logger.warning_once(
                "config.%s is set, and attention is vLLM's own: say --attention-backend %s",
                *(NAME, BACKEND),
            )
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if vllm.__version__.split("+")[0].rpartition(".")[0] != _MINOR:
        raise refuse(
            f"vLLM {vllm.__version__}",
            f"this is for vLLM {_MINOR}: what a backend is given changes with each minor version",
            f"install vLLM {_MINOR}, or another version of tokenselect",
        )
    if name in ("CPU_MLA", "AMX_MLA"):
        raise refuse(
            "a model with multi-head latent attention",
            "its cache holds latents, and making keys of all of them at each step is the cost that "
            "selection is to save",
            f"leave --attention-backend {BACKEND} out for this model",
        )
    if name == BACKEND and not current_platform.is_cuda():
        raise refuse(
            f"the platform {current_platform.device_name}",
            "this is for CPUs, by the name of CPU_ATTN, and for NVIDIA's GPUs",
            "serve on one of these, or use another backend",
        )
    options_of(config, set())  # what is wrong with them is known before weights are loaded
    if name == BACKEND:
        from tokenselect.integrations.vllm import cuda

        return cuda.Backend
    from tokenselect.integrations.vllm import cpu

    return cpu.Backend
