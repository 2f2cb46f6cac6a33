"""peft's two functions that training scripts save and load by, for an attached model.

In a script written for peft (those of diffusers, say) they take the place of
``from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict``.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content, base_of
from paramlora.model.values import adapter_of, load_adapter_state_dict


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The factors under the keys that peft gives them: ``<path>.lora_A.weight`` ``[r, in]``.

    Args:
        model: with the adapter attached.
        adapter_name: which.

    Raises:
        AdapterError: it is not attached.
        FileError: a factor that is not 1, which these tensors do not tell; or what peft's format
            does not hold.

    Example:
        >>> import paramlora
        >>> model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
        {'0.lora_A.weight': (2, 4), '0.lora_B.weight': (3, 2)}
    """
    adapter = adapter_of(model, adapter_name)
    for path, update in adapter.updates.items():
        scale = getattr(update, "scale", 1)
        if scale != 1:
            raise FileError(
                f'"{path}" has the scale {scale:g}, which a state dict of peft\'s does not tell. '
                "Attach with an alpha as large as r, or write a file by paramlora.save_adapter."
            )
    # a model's own file of diffusers has the keys that peft gives a model it is injected into
    return dict(formats.write(adapter, "diffusers", base_of(model), component="").state)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give the attached adapter the values of `get_peft_model_state_dict`, all or none.

    Args:
        model: with the adapter attached.
        peft_model_state_dict: peft's keys and shapes, as above.
        adapter_name: which.

    Raises:
        AdapterError: it is not attached.
        FileError: the tensors are not those of this adapter.

    Example:
        >>> import paramlora
        >>> model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
        >>> set_peft_model_state_dict(model, state)
    """
    content = Content(dict(peft_model_state_dict), source="the state dict of peft's")
    read = formats.read(content, base_of(model), source="diffusers")
    # by our own names, whose loading is all or nothing
    load_adapter_state_dict(model, formats.write(read, formats.OWN).state, adapter_name)
