"""The tensor lasso's penalty, for training loops whose loss is not the model's own."""

from __future__ import annotations

from torch import Tensor, nn

from ..lasso import penalty_of
from ..model import layers_of


def lasso_penalty(model: nn.Module) -> Tensor:
    """λ times the mean absolute value of all lasso weights of the active adapters, as tensorly-torch's ``TensorLasso``.

    A transformers model that returns its own loss in training has it added there; a loss that is computed elsewhere
    (a label smoother, an own loop over logits) adds this.

    Parameters
    ----------
    model : PeftModel
        The adapted model, trained with ``lasso`` above 0.

    Returns
    -------
    Tensor, ()

    Raises
    ------
    ValueError
        If no active adapter has a tensor lasso.
    """
    penalty = penalty_of(layers_of(model))
    if penalty is None:
        raise ValueError("no active adapter has a tensor lasso; set lasso above 0 in its TuckAConfig")
    return penalty
