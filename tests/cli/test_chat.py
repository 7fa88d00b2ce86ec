import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.cli.chat import Conversation
from edgekit.runtime import GenerationOptions, Model, load

Edgekit = Callable[..., Any]


@pytest.fixture(scope="module")
def model(lawcat_bundle: Path) -> Model:
    return load(lawcat_bundle, engine="openvino")


def say(pieces: Iterable[str]) -> str:
    return "".join(pieces)


def fresh_answer(model: Model, messages: list[dict[str, str]], options: GenerationOptions) -> str:
    return model.generate(model.chat_prompt(messages), max_new_tokens=options.max_new_tokens)


def test_second_turn_equals_reading_the_whole_conversation(model: Model) -> None:
    options = GenerationOptions(max_new_tokens=12)
    talk = Conversation(model, options)
    say(talk.answer("hello"))
    said = [*talk.messages, {"role": "user", "content": "and then?"}]
    assert say(talk.answer("and then?")) == fresh_answer(model, said, options)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def ending_at_once(bundle: Path) -> Model:
    """A random model rarely ends by itself: what it says to "hello" is the token that ends."""
    model = load(bundle, engine="openvino")
    prompt = model.chat_prompt([{"role": "user", "content": "hello"}])
    first = int(model.session().append(model.tokenizer.encode_prompt(prompt))[0].argmax())
    facts = replace(model.manifest.model, eos_token_ids=(first,))
    model.manifest = replace(model.manifest, model=facts)
    return model


def test_only_new_turns_are_read(lawcat_bundle: Path) -> None:
    model = ending_at_once(lawcat_bundle)
    prompt = model.tokenizer.encode_prompt(
        model.chat_prompt([{"role": "user", "content": "hello"}])
    )
    talk = Conversation(model, GenerationOptions(max_new_tokens=4))
    say(talk.answer("hello"))
    assert talk.stats is not None
    assert talk.stats.endings == ("end of text",)
    say(talk.answer("more"))
    both = model.tokenizer.encode_prompt(model.chat_prompt(talk.messages[:3]))
    assert talk.stats.prompt_tokens == len(both) - len(prompt)


def test_repetitions_of_turns_read_before_are_penalised(
    lawcat_bundle: Path, tmp_path: Path
) -> None:
    model = ending_at_once(lawcat_bundle)
    talk = Conversation(model, GenerationOptions(max_new_tokens=4))
    say(talk.answer("hello"))
    talk.save(tmp_path / "kept")
    # A penalty this high leaves only tokens that no turn has used.
    settings = {"repetition_penalty": 1e6, "max_new_tokens": 60, "ignore_eos": True}
    other = Conversation(model, GenerationOptions(**settings))
    other.load(tmp_path / "kept")
    answer = say(other.answer("zq"))
    whole = model.chat_prompt(other.messages[:3])
    assert other.stats is not None
    assert other.stats.prompt_tokens < len(model.tokenizer.encode_prompt(whole))
    assert answer == model.generate(whole, **settings)


def test_save_and_load_go_on_where_they_were(model: Model, tmp_path: Path) -> None:
    options = GenerationOptions(max_new_tokens=6)
    talk = Conversation(model, options)
    say(talk.answer("hello"))
    talk.save(tmp_path / "kept")
    expected = say(talk.answer("go on"))
    other = Conversation(model, options)
    other.load(tmp_path / "kept")
    assert len(other.messages) == 2
    assert say(other.answer("go on")) == expected


def test_commands_from_a_pipe(
    edgekit: Edgekit, lawcat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    lines = ("hello", "", f"/save {kept}", "/reset", f"/load {kept}", "again", "/exit", "unread")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = edgekit("chat", lawcat_bundle, "-n", "3", "--stats")
    assert done.code == 0, done.err
    assert done.err.count("new tokens") == 2
    assert kept.is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fly", "'/fly' is not a command; known: /reset, /save FILE, /load FILE, /exit"),
        ("/save", "'/save' is not a command"),
        ("/load nowhere", "nowhere.json: cannot be read"),
    ],
)
def test_faulty_command_from_a_pipe_fails(
    edgekit: Edgekit, lawcat_bundle: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    done = edgekit("chat", lawcat_bundle)
    assert done.code == 2
    assert message in done.err
