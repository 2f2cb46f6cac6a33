"""The entries "attention" and "all-linear": the layers that they mean in the model at hand."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import nn

from paramlora.model.classes import is_linear
from paramlora.update.compat import ANY_CONVOLUTION

Place = tuple[str, nn.Module, str, torch.Tensor]  # module path, module, tensor's name, tensor

# what transformers, diffusers, timm and torch call the projections of an attention, by the ends of
# their paths; some are also names of other layers, so they count inside of an attention alone
_PROJECTIONS = frozenset(
    """
    q k v o qkv proj out query key value dense output projection
    q_proj k_proj v_proj o_proj out_proj qkv_proj kv_proj in_proj
    query_proj key_proj value_proj output_proj query_key_value
    q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj
    c_attn q_attn c_proj att_proj Wqkv Wq Wk Wv Wo wq wk wv wo
    q_lin k_lin v_lin out_lin linear_q linear_k linear_v linear_out
    q_head k_head v_head post_proj project_q project_k project_v attention_out
    to_q to_k to_v to_kv to_qkv to_out to_out.0 to_query to_key to_value
    add_q_proj add_k_proj add_v_proj to_add_out to_added_kv to_added_qkv proj_attn proj_out
    """.split()
)
_OF_TORCH = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_HEADS = ("score", "classifier")  # peft's SEQ_CLS_HEAD_NAMES


def attention(model: nn.Module, places: Iterable[Place]) -> list[Place]:
    """The projections of queries, keys and values, fused or not, and of what an attention gives."""
    modules = dict(model.named_modules())
    return [one for one in places if _projects(one, modules)]


def all_linear(model: nn.Module, places: Iterable[Place]) -> list[Place]:
    """The weights of all linear layers but the head, as peft's "all-linear" chooses them
    (peft.tuners.tuners_utils._maybe_include_all_linear_layers)."""
    # by identity, as a head may be tied, and have any name
    head = _head(model)
    return [
        one for one in places if one[2] == "weight" and is_linear(one[1]) and one[1] is not head
    ]


PRESETS: dict[str, Callable[[nn.Module, Iterable[Place]], list[Place]]] = {
    "attention": attention,
    "all-linear": all_linear,
}


def grouped(paths: Iterable[str]) -> str:
    """The last names of layers, by how many have them.

    Example:
        >>> grouped(["0.q", "0.k", "0.out.0", "1.q", "1.k", "1.out.0", "head"])
        'q, k, out.0 (2 layers each); head (1 layer)'
    """
    by_count: dict[int, list[str]] = {}
    for name, count in Counter(map(_last_name, paths)).items():
        by_count.setdefault(count, []).append(name)
    return "; ".join(spelled_group(names, count) for count, names in by_count.items())


def spelled_group(names: list[str], count: int) -> str:
    """Names of which there are as many layers each."""
    each = " each" if len(names) > 1 else ""
    return f"{', '.join(names)} ({count} layer{'s' * (count > 1)}{each})"


def _last_name(path: str) -> str:
    """The end of a path from its last component that is no number."""
    parts = path.split(".")
    named = [i for i, part in enumerate(parts) if not part.isdigit()]
    return ".".join(parts[named[-1] :]) if named else path


def _projects(place: Place, modules: dict[str, nn.Module]) -> bool:
    path, module, name, _ = place
    # torch's attention has its projections as parameters, without layers
    if isinstance(module, nn.MultiheadAttention):
        return name in _OF_TORCH
    parts = path.split(".")
    # also the end of two parts, as "to_out.0" of diffusers
    known = bool(_PROJECTIONS & {parts[-1], ".".join(parts[-2:])})
    return name == "weight" and known and _mixes(module) and _in_attention(parts, modules)


def _mixes(module: nn.Module) -> bool:
    """Whether a layer is linear, also one that is written as a convolution of single points."""
    if isinstance(module, ANY_CONVOLUTION):
        return set(module.kernel_size) == {1} and module.groups == 1
    return is_linear(module)


def _in_attention(parts: list[str], modules: dict[str, nn.Module]) -> bool:
    """Whether what holds a layer, or holds that, says in its name or class that it attends."""
    for depth in range(1, min(len(parts), 2) + 1):
        above = parts[:-depth]
        kind = type(modules[".".join(above)]).__name__
        said = f"{above[-1]} {kind}".lower() if above else ""
        said = said.replace("attentions", "")  # diffusers' lists of whole transformers
        if "attention" in said or "attn" in said or kind.endswith("Attention"):
            return True
    return False


def _head(model: nn.Module) -> object:
    """What a model of transformers makes its outputs with; peft leaves it as it is."""
    told = getattr(model, "get_output_embeddings", None)
    if not callable(told):
        return None
    head = told()
    # a base model without a head has the method too, and gives None
    if head is not None:
        return head
    return next((model._modules[name] for name in _HEADS if name in model._modules), None)
