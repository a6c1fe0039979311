"""Registers TuckA with PEFT, out of PEFT's tree.

PEFT finds a method through an enum, `peft.PeftType`, and four dictionaries that `peft.utils.register_peft_method`
fills. An enum cannot be extended through its public interface, so the member is added here and nowhere else.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

PEFT_TYPE = "TUCKA"


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `peft.PeftType`, adding it if PEFT does not have it yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    # EnumType.__setattr__ refuses names that are members, and this one now is.
    type.__setattr__(PeftType, name, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT resolve ``peft_type="TUCKA"`` to `config_cls` and `model_cls`; a second call does nothing."""
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type(PEFT_TYPE)) is config_cls:
        return
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_cls, model_cls=model_cls)
