import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekit.data.documents import Document
from edgekit.data.tokens import completion, tokenise
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

EOS = 2


def chat(*turns: tuple[str, str]) -> Document:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Document(where="a.jsonl: line 5", messages=messages)


def learnt(tokenizer: Tokenizer, document: Document) -> str:
    """The text of the learnt tokens, a bar between runs."""
    tokens = tokenise(document, tokenizer, eos=EOS, chat_loss="assistant")
    edges = np.flatnonzero(np.diff(tokens.learn, prepend=False, append=False)).reshape(-1, 2)
    return "|".join(tokenizer.decode(tokens.ids[a:b], skip_special_tokens=False) for a, b in edges)


CONVERSATIONS = {
    "one-turn": [("user", "Hi"), ("assistant", "Hello there.")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")],
    "two-turns": [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "What is 2 + 2?"),
        ("assistant", "4"),
    ],
    "open-end": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "markers-inside": [("user", "Hi<|im_end|>\n"), ("assistant", "x<|im_end|>y")],
    "empty-answer": [("user", "a"), ("assistant", "")],
    "accents": [("user", "é"), ("assistant", "naïve 🤖 日本")],
    "spaces": [("user", "a"), ("assistant", "two  spaces ")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", ["tiny", "smollm2"])
def test_only_what_the_assistant_says_is_learnt(
    name: str, tokenizer: str, request: pytest.FixtureRequest
) -> None:
    turns = CONVERSATIONS[name]
    answers = [content + "<|im_end|>" for role, content in turns if role == "assistant"]
    assert learnt(request.getfixturevalue(tokenizer), chat(*turns)) == "|".join(answers)


def test_the_tokens_are_those_of_the_prompt_at_run_time(smollm2: Tokenizer) -> None:
    document = chat(*CONVERSATIONS["two-turns"])
    tokens = tokenise(document, smollm2, eos=EOS, chat_loss="assistant")
    prompt = smollm2.encode_prompt(smollm2.chat_prompt(document.messages[:3]))
    assert tokens.ids[: len(prompt)].tolist() == prompt.tolist()
    assert tokens.learn[len(prompt) :].tolist() == [True, True, False]  # 4, end, line feed


def test_an_answer_that_merges_with_its_opening(smollm2: Tokenizer) -> None:
    assert learnt(smollm2, chat(("user", "a"), ("assistant", "\n\n\nb"))).endswith(
        "\n\nb<|im_end|>"
    )


def test_all_tokens_but_the_first(smollm2: Tokenizer) -> None:
    tokens = tokenise(chat(("user", "Hi")), smollm2, eos=EOS, chat_loss="all")
    assert tokens.learn.tolist() == [False] + [True] * (len(tokens.ids) - 1)


def test_a_text_ends_with_eos_once(smollm2: Tokenizer) -> None:
    for text in ("Some words.", "Some words.<|im_end|>"):
        tokens = tokenise(Document(where="", text=text), smollm2, eos=EOS, chat_loss="all")
        assert tokens.ids.tolist() == [*smollm2.encode("Some words.").tolist(), EOS]
        assert tokens.learn.tolist() == [False] + [True] * (len(tokens.ids) - 1)


def test_an_answer_to_a_plain_prompt(smollm2: Tokenizer) -> None:
    tokens = completion("The key is", " 407", smollm2, eos=EOS)
    assert smollm2.decode(tokens.ids[tokens.learn], skip_special_tokens=False) == " 407<|im_end|>"


TEMPLATES = {
    "drops-thoughts": "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}"
    "{% else %}...{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "no-opening": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_hides_the_turns_is_refused(
    name: str, tiny_checkpoint: object, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATES[name])
    document = chat(*CONVERSATIONS["two-turns"])
    tokenizer = Tokenizer(tmp_path / "model")
    with pytest.raises(UsageError, match="line 5: the model's chat template renders"):
        tokenise(document, tokenizer, eos=EOS, chat_loss="assistant")
    assert tokenise(document, tokenizer, eos=EOS, chat_loss="all").learn[1:].all()


def test_a_conversation_without_the_assistant(tiny: Tokenizer) -> None:
    with pytest.raises(UsageError, match="line 5: the conversation has no turn"):
        tokenise(chat(("user", "Hi")), tiny, eos=EOS, chat_loss="assistant")
