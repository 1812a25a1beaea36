"""What the layers that select did: counted, logged now and then, and given to Prometheus.

Numbers of requests and tokens are known on the host; what a call finds out (reuse, retained mass,
how many tokens it attended to) is looked at in one step of `_EVERY`.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from tokenselect.api import AttentionInfo
from tokenselect.integrations.options import NAME

logger = init_logger(f"vllm.{NAME}")
_EVERY = 16
_SECONDS = 30.0


class Metrics:
    """Sums since the last line in the log, and counters of Prometheus since the start."""

    def __init__(self) -> None:
        self.wants_info = False
        self._steps = 0
        self._counters = _counters()
        self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._sums = dict.fromkeys(_NAMES, 0.0)
        self._least = math.inf

    def step(self, prompts: int, short: int, selecting: int) -> None:
        """Count the requests of a step of the engine, and log what was counted now and then."""
        if time.monotonic() - self._since > _SECONDS:
            if self._sums["selecting_tokens"] or self._sums["dense_tokens"]:
                logger.info("%s", self)
            self._begin()
        self.wants_info = self._steps % _EVERY == 0
        self._steps += selecting > 0
        self._add("prompt_steps", prompts)
        self._add("dense_tokens", short)
        self._add("selecting_tokens", selecting)

    def add(self, info: AttentionInfo, lengths: list[int], at: Tensor | None) -> None:
        """Count what one layer's call told.

        at  the rows of the requests in it; None: they are all of its rows
        """
        its = slice(None) if at is None else at
        count, mass = info.selection.count[its], info.retained_mass[its]
        mass = mass[mass.isfinite()]
        self._add("sampled_calls", len(lengths))
        self._add("sampled_reused_calls", int(info.reused[its].sum()))
        self._add("sampled_cached_tokens", sum(lengths))
        self._add("sampled_attended_tokens", float(count.double().mean(1).sum()))
        self._add("sampled_mass_heads", mass.numel())
        self._add("sampled_mass", float(mass.sum(dtype=torch.float64)))
        if mass.numel():
            self._least = min(self._least, float(mass.min()))

    def _add(self, name: str, value: float) -> None:
        self._sums[name] += value
        if self._counters and value:
            self._counters[name].inc(value)

    def __str__(self) -> str:
        s = self._sums

        def share(part: str, whole: str) -> str:
            return f"{s[part] / s[whole]:.1%}" if s[whole] else "-"

        least = f"{self._least:.1%}" if self._least < math.inf else "-"
        return (
            f"tokenselect: {s['selecting_tokens']:,.0f} tokens decoded selecting, "
            f"{s['dense_tokens']:,.0f} densely, below dense_below; attended to "
            f"{share('sampled_attended_tokens', 'sampled_cached_tokens')} of the cached tokens, "
            f"reused {share('sampled_reused_calls', 'sampled_calls')} of the selections, retained "
            f"mass {share('sampled_mass', 'sampled_mass_heads')} (least {least})"
        )


_NAMES = {
    "prompt_steps": "Chunks of prompts read, densely",
    "dense_tokens": "Tokens decoded densely, in requests shorter than dense_below",
    "selecting_tokens": "Tokens decoded selecting",
    "sampled_calls": f"Requests in layers' calls that selected, in one step of {_EVERY}",
    "sampled_reused_calls": "Of these, those that reused a selection",
    "sampled_cached_tokens": "Tokens that these had cached",
    "sampled_attended_tokens": "Tokens that these attended to",
    "sampled_mass_heads": "Heads of these whose retained mass is known",
    "sampled_mass": "Sum of these heads' retained mass",
}


def _counters() -> dict[str, Any]:
    """Return counters `tokenselect_..._total`, none without prometheus_client."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return {}
    return {name: Counter(f"{NAME}_{name}", text) for name, text in _NAMES.items()}


METRICS = Metrics()
