"""How much a projection still learns: small and steady gradients score low (AFLoRA, section 2).

    I_t = |G_t|,   M_t = beta1 M_{t-1} + (1 - beta1) I_t,   U_t = |I_t - M_t|,
    V_t = beta2 V_{t-1} + (1 - beta2) U_t,   score = mean(M_t * V_t)

M and V begin at 0 and are not corrected for it. With the cadence `window` a mean of |G| over some
steps takes the place of I_t, and enters when the next window begins, as the authors' code has it.
"""

from collections.abc import Mapping
from typing import Literal

import torch

__all__ = ["Cadence", "GradientScore"]

Cadence = Literal["step", "window"]


class GradientScore:
    """Running statistics of one projection's gradient."""

    def __init__(
        self, *, beta1: float, beta2: float, cadence: Cadence = "step", window: int = 10
    ) -> None:
        """Begin without having seen a gradient.

        Args:
            beta1: of the mean of |G|.
            beta2: of the mean of its deviation.
            cadence: `step` counts every gradient, `window` the mean of `window` of them.
            window: steps.
        """
        self._betas, self._window = (beta1, beta2), window if cadence == "window" else None
        self._mean: torch.Tensor | None = None
        self._spread: torch.Tensor | None = None
        self._running: torch.Tensor | None = None
        self._seen = 0

    @torch.no_grad()
    def observe(self, gradient: torch.Tensor) -> None:
        """Count a gradient, any shape; always the same one."""
        magnitude = gradient.detach().abs()
        if self._window is None:
            self._push(magnitude)
            return
        place = self._seen % self._window
        if place == 0:
            self._push(torch.zeros_like(magnitude) if self._running is None else self._running)
            self._running = magnitude
        elif self._running is not None:
            self._running = self._running + (magnitude - self._running) / (place + 1)
        self._seen += 1

    @property
    def value(self) -> float:
        """The score; 0 before the first gradient."""
        if self._mean is None or self._spread is None:
            return 0.0
        return float((self._mean * self._spread).mean())

    @property
    def elements(self) -> torch.Tensor:
        """The product of both statistics, element by element, flat; empty before a gradient."""
        if self._mean is None or self._spread is None:
            return torch.empty(0)
        return (self._mean * self._spread).flatten()

    @property
    def nbytes(self) -> int:
        """Memory that the statistics hold."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `load` needs, by name."""
        kept = {"mean": self._mean, "spread": self._spread, "running": self._running}
        found = {name: tensor for name, tensor in kept.items() if tensor is not None}
        return found | {"seen": torch.tensor(self._seen)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._mean, self._spread = tensors.get("mean"), tensors.get("spread")
        self._running, self._seen = tensors.get("running"), int(tensors["seen"])

    def _push(self, magnitude: torch.Tensor) -> None:
        beta1, beta2 = self._betas
        if self._mean is None or self._spread is None:
            self._mean, self._spread = torch.zeros_like(magnitude), torch.zeros_like(magnitude)
        self._mean = beta1 * self._mean + (1 - beta1) * magnitude
        self._spread = beta2 * self._spread + (1 - beta2) * (magnitude - self._mean).abs()
