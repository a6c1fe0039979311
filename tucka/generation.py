"""One route for a whole `generate`: every step, cached or not, keeps the route of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from .inputs import is_causal


def keep_prompt_routes(model: nn.Module, dispatchers_of: Callable) -> None:
    """Let every generating model inside `model` hold its routes while it generates."""
    module: Any
    for module in model.modules():
        if not _is_ours(module) and isinstance(module, GenerationMixin):
            vars(module)["generate"] = partial(_generate, model, dispatchers_of, module.generate)  # type: ignore[misc]


def release_prompt_routes(model: nn.Module) -> None:
    """Undo `keep_prompt_routes`."""
    for module in model.modules():
        if _is_ours(module):
            del vars(module)["generate"]


def _is_ours(module: nn.Module) -> bool:
    method = vars(module).get("generate")
    return isinstance(method, partial) and method.func is _generate


def _generate(model: nn.Module, dispatchers_of: Callable, method: Callable, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        whole, prompt = _chunk_size(method, kwargs) is None, _prompt_length(method, args, kwargs)
        for dispatcher in dispatchers_of(model).values():
            stack.enter_context(dispatcher.generating(whole, prompt))
        return method(*args, **kwargs)


def _chunk_size(method: Callable, options: dict[str, Any]) -> int | None:
    """The size of the chunks a prompt will be read in, if it is not read whole."""
    for config in (options.get("generation_config"), method.__self__.generation_config):  # type: ignore[attr-defined]
        if options.get("prefill_chunk_size") is None and config is not None:
            options = {**options, "prefill_chunk_size": config.prefill_chunk_size}
    return options.get("prefill_chunk_size")


def _prompt_length(method: Callable, args: tuple, options: dict[str, Any]) -> int | None:
    """Positions of the prompt of a model that reads it itself, if the arguments show them."""
    if not is_causal(method.__self__):  # type: ignore[attr-defined]
        return None
    given = (options.get("input_ids"), options.get("inputs"), options.get("inputs_embeds"), *args[:1])
    return next((value.shape[1] for value in given if isinstance(value, Tensor) and value.ndim > 1), None)
