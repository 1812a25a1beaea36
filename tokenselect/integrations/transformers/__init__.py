"""Let models of the package transformers, 5.4 or newer, attend with tokenselect.

Importing this registers an attention function and its mask function as "tokenselect", gives configs
an attribute of that name, and makes models that attend in code of their own refuse
attn_implementation="tokenselect". Options are `model.config.tokenselect = {"k": 1024, ...}`, or
`enable(model, k=1024, ...)`, which `disable()` on its result undoes.
docs/tutorials/transformers.md shows all of it.
"""

from types import TracebackType
from typing import Any, Self

import transformers

_OLDEST = (5, 4)  # as in pyproject.toml

if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
    needed = ".".join(map(str, _OLDEST))
    raise ImportError(
        f"transformers {transformers.__version__} is installed\n"
        f"  rule: tokenselect.integrations.transformers needs transformers {needed} or newer\n"
        f"  do:   pip install 'transformers>={needed}'"
    )

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
)

from tokenselect.api import AttentionInfo
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import (
    NAME,
    Options,
    TextConfigOptions,
    as_json,
    check,
    parse,
    preset_options,
)
from tokenselect.integrations.transformers.cache import TokenSelectCache
from tokenselect.integrations.transformers.causality import unwatch_logits, watch_logits
from tokenselect.integrations.transformers.interface import refuse_own_attention, text_part, watch
from tokenselect.integrations.transformers.layers import attention_forward, recorded
from tokenselect.integrations.transformers.lossless import Lossless
from tokenselect.integrations.transformers.masks import token_mask
from tokenselect.integrations.transformers.named_layers import check_layers
from tokenselect.integrations.transformers.refusals import refuse_mla, warn
from tokenselect.integrations.transformers.report import Recorder, Report, record_with
from tokenselect.integrations.transformers.rotation import RawLayers, is_raw, trained_length
from tokenselect.scalars import is_integer, plain

__all__ = [
    "NAME",
    "Enabled",
    "Lossless",
    "Options",
    "Report",
    "TokenSelectCache",
    "enable",
    "recorded",
]

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, token_mask)
setattr(PreTrainedConfig, NAME, TextConfigOptions())
watch()

# The attribute of a model that holds the innermost `Enabled` in force.
_INNERMOST = "_tokenselect_enabled"


class Enabled:
    """The changes that `enable` made to a model; `disable()` or the end of a block undoes them.

    inner  the `Enabled` that came after this one and is still in force, or None
    """

    def __init__(self, model: Any, options: dict[str, Any], record: int = 0) -> None:
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise InvalidProblem(
                f"enable() of a {type(model).__name__}",
                "enable() takes a model of transformers, which has a config",
                "pass the model that from_pretrained returned",
            )
        record = plain(record)
        if not is_integer(record) or record < 0:
            raise InvalidProblem(
                f"record={record!r}",
                "record is an integer >= 0: how many calls of each layer to keep",
                "pass an int of 0 or more, or leave it out for 0",
            )
        config = model.config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None) is not None:
            raise refuse_mla(config)
        parsed = parse(options)
        check(parsed)
        everywhere = parsed, *map(parsed.of, parsed.layers)
        for one in {options.select: options for options in everywhere}.values():
            _warn_of_length(config, one)
        self._model, self._part, self._config = model, text_part(model, config), config
        check_layers(parsed, config)
        self._implementation = config._attn_implementation
        self._part.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise refuse_own_attention(model)
        # The part is watched by now; with others around it, logits come from the whole.
        self._watches_the_whole = watch_logits(model)
        self._options = vars(config).get(NAME)
        config.tokenselect = self._given = options
        self.inner: Enabled | None = None
        self._outer: Enabled | None = getattr(self._part, _INNERMOST, None)
        if self._outer is not None:
            self._outer.inner = self
        setattr(self._part, _INNERMOST, self)
        self._is_on = True
        self._recorder = Recorder(record)
        record_with(config, self._recorder)
        self._raw: RawLayers | None = None
        if parsed.needs_raw_keys and not is_raw(self._part):
            try:
                self._raw = RawLayers(self._part)
            except BaseException:
                self.disable()
                raise

    def disable(self) -> None:
        """Attend as before `enable`; a second call changes nothing.

        Options that were set in the config meanwhile stay there.
        """
        if not self._is_on:
            return
        if self.inner is not None:
            raise InvalidProblem(
                "disable() of an outer enable(): the model was enabled again after it",
                "the last enable() is disabled first",
                "call .inner.disable() on this before, or use enable() in `with` blocks",
            )
        self._is_on = False
        if self._raw is not None:
            self._raw.remove()
        if self._watches_the_whole:
            unwatch_logits(self._model)
        self._part.set_attn_implementation(self._implementation)
        if vars(self._config).get(NAME) is self._given:
            if self._options is None:
                del self._config.tokenselect
            else:
                self._config.tokenselect = self._options
        if self._outer is None:
            delattr(self._part, _INNERMOST)
            record_with(self._config, None)
        else:
            self._outer.inner = None
            record_with(self._config, self._outer._recorder)
            setattr(self._part, _INNERMOST, self._outer)

    def report(self) -> Report:
        """Return what the layers' calls did since `enable` or the last `reset`, as a table.

        All of it is counted for the last `enable` in force. On a GPU, this waits for it.

        >>> print(handle.report())  # doctest: +SKIP
        layer  dense  calls  reused  cached  attended  mass kept  least  backend
            0      1     19       0   310.0      52.0      61.3%  40.2%   native
        """
        return self._recorder.report()

    def infos(self) -> dict[int, list[AttentionInfo]]:
        """Return the `AttentionInfo` of each layer's last `record` calls that selected."""
        return self._recorder.infos()

    def reset(self) -> None:
        """Count and keep anew from here on."""
        self._recorder.reset()

    def __enter__(self) -> Self:
        if not self._is_on:
            raise InvalidProblem(
                f"`with` {self!r}",
                "a disabled enable() stays disabled",
                "call enable(model, ...) again",
            )
        return self

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._given.items())
        state = "" if self._is_on else ", disabled"
        return f"<enable({type(self._part).__name__}{options}){state}>"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error that left the block may have kept others from being disabled before.
        if error is not None and self.inner is not None:
            self.inner.__exit__(kind, error, trace)
        self.disable()


def _warn_of_length(config: Any, options: Options) -> None:
    """Warn if contiguous positions exceed the distances that the model was trained on."""
    select, trained = options.select, trained_length(config)
    k = "k_max" if isinstance(select.k, float) else "k"
    if select.positions != "contiguous" or trained is None or select[k] is None:
        return
    sizes = (select.n_sink, select[k], select.n_local)
    if sum(sizes) > trained:
        warn(
            f"n_sink + {k} + n_local = {' + '.join(map(str, sizes))} = {sum(sizes)} tokens, in a "
            f"model for {trained}: contiguous positions keep distances below the size of the "
            f"selection, so choose a smaller {k}"
        )


def enable(model: Any, preset: str | None = None, *, record: int = 0, **options: Any) -> Enabled:
    """Let a model attend with tokenselect, until `.disable()` or the end of a `with` block.

    preset   "faithful", "extrapolate" or "paper", as in `SelectConfig`; options change what it sets
    options  fields of SelectConfig, and theta, max_reuse, backend, chunk, prefill, dense_below,
             layers: see `Options`. They take the place of config.tokenselect, as a whole
    record   keep the `AttentionInfo` of each layer's last so many calls, in `.infos()`, and let
             `.report()` know what only they tell. It takes time, and is not saved

    Options that move keys (positions="contiguous", another score_at than "true") run the model
    twice over 16 tokens, to observe how it rotates; while in force, they make it cache raw keys.

    Raises InvalidProblem for an unknown option or a bad value, UnknownBackend, and
    UnsupportedProblem for a model that cannot work. The first call shows what `backend` can run.
    Warns where contiguous positions come out longer than max_position_embeddings, and of a model
    whose layers all slide.
    """
    return Enabled(model, as_json(preset_options(preset) | options), record)
