"""AFLoRA (arXiv 2403.13269) as a PEFT method; importing this makes PEFT know it.

Example:
    >>> from peft import get_peft_model                              # doctest: +SKIP
    >>> from edgekit.adapters.aflora import AFLoraCallback, AFLoraConfig
    >>> model = get_peft_model(model, AFLoraConfig(task_type="CAUSAL_LM"))   # doctest: +SKIP
    >>> Trainer(model, args, callbacks=[AFLoraCallback()], ...).train()      # doctest: +SKIP
"""

from edgekit.adapters.aflora.registration import add_type, register

add_type()  # the configuration below names the type

from edgekit.adapters.aflora.config import AFLoraConfig  # noqa: E402
from edgekit.adapters.aflora.fold import fold_to_lora  # noqa: E402
from edgekit.adapters.aflora.layer import AFLoraLayer  # noqa: E402
from edgekit.adapters.aflora.model import AFLoraModel  # noqa: E402
from edgekit.adapters.callback import AFLoraCallback  # noqa: E402
from edgekit.adapters.controller import FreezeController, FreezeEvent  # noqa: E402
from edgekit.adapters.plan import FreezePlan  # noqa: E402

register()

__all__ = [
    "AFLoraCallback",
    "AFLoraConfig",
    "AFLoraLayer",
    "AFLoraModel",
    "FreezeController",
    "FreezeEvent",
    "FreezePlan",
    "fold_to_lora",
]
