"""Pictures in prompts: placeholders become image tokens, pictures the embeddings behind them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit.bundle import VisionFacts
from edgekit.errors import UsageError
from edgekit.runtime.engine import Floats
from edgekit.runtime.images import ImageProcessor, Picture, read_image

__all__ = ["Vision"]

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages], str]


class Vision:
    """What a bundle needs beside its decoder to read pictures."""

    def __init__(
        self, processor: ImageProcessor, facts: VisionFacts, look: Callable[[Floats], Floats]
    ) -> None:
        """Put the parts together.

        Args:
            processor: from pictures to pixels.
            facts: how pictures come into prompts.
            look: from pixels to embeddings, the engine's graph.
        """
        self.processor, self._facts, self._look = processor, facts, look

    def features(self, pictures: Sequence[Picture]) -> Floats:
        """Embeddings of pictures one after the other, fp32 `[N * tokens, D]`.

        Raises:
            UsageError: for a picture that cannot be read.
            EngineError: if Pillow is not installed.
        """
        return self.look(self.pixels(pictures))

    def pixels(self, pictures: Sequence[Picture]) -> Floats:
        """Pictures scaled and normalised, fp32 `[N, 3, H, W]`; errors as `features`."""
        return self.processor([read_image(picture) for picture in pictures])

    def look(self, pixels: Floats) -> Floats:
        """The same for pixels `[N, 3, H, W]` that the processor made."""
        found = self._look(pixels)
        joined: Floats = found.reshape(-1, found.shape[-1])
        return joined

    def prompt(self, text: str, pictures: int) -> str:
        """The prompt with its placeholders turned into markers and image tokens.

        Args:
            text: with one placeholder per picture, or with none: then they come first.
            pictures: how many there are.

        Raises:
            UsageError: if the placeholders are not as many as the pictures.
        """
        facts = self._facts
        given = text.count(facts.placeholder)
        if given not in (0, pictures):
            raise UsageError(
                f"{given} placeholders {facts.placeholder!r} given for {pictures} pictures; "
                "allowed: as many, or none"
            )
        if not given:
            text = f"{facts.placeholder}\n" * pictures + text
        image = facts.before + facts.image_token * facts.tokens + facts.after
        return text.replace(facts.placeholder, image)

    def chat_prompt(self, render: Render, messages: Messages, pictures: int) -> str:
        """A conversation as a prompt, with placeholders in its first message of the user.

        Some templates take a message as a list of parts and write the placeholder themselves, some
        take it as a text alone; which it is shows in what they write.

        Args:
            render: applies the model's chat template.
            messages: `{"role": ..., "content": ...}` each, contents as text.
            pictures: how many there are.

        Raises:
            UsageError: if the template refuses the messages either way.
        """
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
        listed, plain = [], []
        for i, message in enumerate(messages):
            here, text = pictures if i == first else 0, message.get("content", "")
            parts = [*[{"type": "image"}] * here, {"type": "text", "text": text}]
            listed.append({**message, "content": parts})
            plain.append({**message, "content": f"{self._facts.placeholder}\n" * here + text})
        try:
            prompt = render(listed)
        except UsageError:
            return render(plain)
        said = all(str(message.get("content", "")).strip() in prompt for message in messages)
        whole = said and prompt.count(self._facts.placeholder) == pictures
        return prompt if whole else render(plain)
