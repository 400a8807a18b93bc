"""Models without memory (`planner.fake_copy`), given what a real one would be given: kernels, and masks left out.

Whatever asks a tensor for values, such as a probe, or transformers' look whether a batch is packed, has no answer here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyfinetune.hf.attention import NAME
from pyfinetune.hf.patch import KINDS, candidates_in

_UNPACKED = "pyfinetune_unpacked"


def patch_shadow(model: nn.Module) -> list[str]:
    """Swap in what `patch` would swap into the real model, if it is proved there.

    Args:
        model: a model whose tensors are fake.

    Returns:
        Names of the modules that were swapped.

    Example:
        >>> patch_shadow(fake_copy(model, FakeTensorMode()))  # doctest: +SKIP
    """
    found = [candidate for candidate in candidates_in(model, KINDS) if candidate.reason is None]
    for candidate in found:
        candidate.change.apply()
    return [candidate.name for candidate in found]


def leave_masks_out(model: nn.Module) -> None:
    """Let torch's attention be told that it is causal instead of given a mask, as where no row is packed.

    transformers decides that by the values of the position ids, and makes the mask where there are none.

    Args:
        model: a model whose tensors are fake; where its attention is another one, nothing happens.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(_UNPACKED)


def takes_documents(model: nn.Module) -> bool:
    """Whether the model's attention is this package's, which is told by `cu_seq_lens` where documents are.

    Args:
        model: any model.
    """
    return any(isinstance(m, PreTrainedModel) and m.config._attn_implementation == NAME for m in model.modules())


def _unpacked_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**kwargs, "allow_is_causal_skip": True})


AttentionInterface.register(_UNPACKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(_UNPACKED, _unpacked_mask)
