"""Makes AFLoRA known to PEFT, which has no hook for methods from elsewhere.

PEFT keys every method by a member of the enum `PeftType`, so a member is added. Importing
`edgekit.adapters.aflora` does it; an adapter can be loaded only after that.
"""

from peft import PeftType

__all__ = ["NAME", "add_type", "register"]

NAME = "AFLORA"


def add_type() -> None:
    """Add `PeftType.AFLORA`, once."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)  # an enum refuses setattr


def register() -> None:
    """Register configuration and model with PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    from edgekit.adapters.aflora.config import AFLoraConfig
    from edgekit.adapters.aflora.model import AFLoraModel

    if NAME in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name=NAME.lower(), config_cls=AFLoraConfig, model_cls=AFLoraModel, prefix="aflora_"
    )
