"""The model's operations: one file each, every one a torch.library op with a pure PyTorch reference behind it.

Ops take local tensors (never DTensors) and are functional, but for adamw_. Which implementation runs is chosen in
backends.py; `gptdist doctor` shows it.
"""

from .adamw import adamw_
from .attention import attention
from .bias_gelu import bias_gelu
from .cross_entropy import cross_entropy, linear_cross_entropy
from .decode_attention import decode_attention
from .dropout import dropout
from .embedding import tied_embedding
from .grad_norm import grad_norm
from .layer_norm import layer_norm, residual_layer_norm
from .linear import linear
from .linear_logsumexp import linear_logsumexp
from .random import dropout_key
from .rope import rope, rope_tables

__all__ = [
    "adamw_",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "decode_attention",
    "dropout",
    "dropout_key",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_logsumexp",
    "residual_layer_norm",
    "rope",
    "rope_tables",
    "tied_embedding",
]
