"""Which weights are decayed."""

from typing import Any

from torch import nn


def weight_decay_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on all but biases and norms (MAE, appendix A.1).

    What has one dimension is a bias or belongs to a norm; what gets no gradient is in no group.

    Args:
        model: any module.
        weight_decay: of the parameters that are decayed.

    Returns:
        Two groups for a torch optimizer, with a ``name`` for the log: "weights", and
        "biases_and_norms_no_decay", which has none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": weight_decay,
            "name": "weights",
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim <= 1],
            "weight_decay": 0.0,
            "name": "biases_and_norms_no_decay",
        },
    ]
