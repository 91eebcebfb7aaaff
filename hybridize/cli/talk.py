"""The verbs that talk: generate, chat."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.shared import cli
from hybridize.errors import ConfigError

DirArg = Annotated[str, typer.Argument(metavar="DIR", help="Directory of a base or hybrid, hub id, or 'demo'.")]
SystemOpt = Annotated[Optional[str], typer.Option("--system", help="A system message before the first turn.")]  # noqa: UP045
TokensOpt = Annotated[int, typer.Option("--tokens", help="At most so many new tokens.")]
SampleOpt = Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")]
TemperatureOpt = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--temperature", help="With --sample. Default: generation_config.json's, else 1."),
]
TopPOpt = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--top-p", help="With --sample. Default: generation_config.json's, else 1."),
]
SeedOpt = Annotated[int, typer.Option("--seed", help="Of the draws.")]
DtypeOpt = Annotated[
    Optional[Literal["bfloat16", "float16", "float32"]],  # noqa: UP045
    typer.Option(help="Of the weights. Default: their own; float32 on a CPU."),
]
COMMANDS = "/reset forgets all turns, /system TEXT begins anew with a system message, /quit ends; Ctrl-C stops an answer"


@cli.command()
def generate(
    checkpoint: DirArg,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from stdin, its last line end left out.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template, as what the user says.")] = False,
    system: SystemOpt = None,
    tokens: TokensOpt = 64,
    sample: SampleOpt = False,
    temperature: TemperatureOpt = None,
    top_p: TopPOpt = None,
    seed: SeedOpt = 0,
    dtype: DtypeOpt = None,
) -> None:
    """Go on with a prompt; the text appears as it is made.

    At the end, on stderr: seconds to the first token, tokens a second, and the bytes of the cache, measured, beside the base's.
    """
    from hybridize.talk import chat_ids

    if system is not None and not chat:
        raise ConfigError("--system goes with --chat; without it the prompt is plain text")
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    speaker = _speaker(checkpoint, tokens, sample, temperature, top_p, seed, dtype)
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        ids = chat_ids(speaker.tokenizer, [*before, {"role": "user", "content": text}], checkpoint)
    else:
        ids = list(speaker.tokenizer(text)["input_ids"])
        shared.screen.write(speaker.tokenizer.decode(ids, skip_special_tokens=True))
    spoken = speaker.speak(ids, shared.screen.write, continues=not chat)
    shared.screen.write("\n")
    _figures(speaker, spoken)
    whole = spoken.text if chat else speaker.tokenizer.decode(ids, skip_special_tokens=True) + spoken.text
    shared.screen.result({**_plain(spoken), "text": whole, "tokens": spoken.ids})


@cli.command()
def chat(
    checkpoint: DirArg,
    system: SystemOpt = None,
    tokens: TokensOpt = 512,
    sample: SampleOpt = False,
    temperature: TemperatureOpt = None,
    top_p: TopPOpt = None,
    seed: SeedOpt = 0,
    dtype: DtypeOpt = None,
) -> None:
    """Talk with a checkpoint that has a chat template, at a terminal or through a pipe, a line a turn.

    /reset forgets all turns, /system TEXT begins anew with a system message, /quit or Ctrl-D ends; Ctrl-C stops an answer.
    """
    from hybridize.talk import Chat

    speaker = _speaker(checkpoint, tokens, sample, temperature, top_p, seed, dtype)
    talk = Chat(speaker, checkpoint, system)
    turns: list[dict[str, Any]] = []
    if sys.stdin.isatty():
        shared.screen.note(COMMANDS)
    for line in _lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            break
        if command in ("/reset", "/system"):
            kept = next((m["content"] for m in talk.messages if m["role"] == "system"), None)
            talk.begin(kept if command == "/reset" else rest.strip() or None)
            turns.clear()
        elif command.startswith("/"):
            shared.screen.note(f"{command}: no such command. {COMMANDS}")
        elif command:
            with _stoppable() as stopped:
                spoken = talk.answer(line.strip(), shared.screen.write, stopped)
            shared.screen.write("\n")
            _figures(speaker, spoken)
            turns.append(_plain(spoken))
    shared.screen.result({"messages": talk.messages, "turns": turns})


def _speaker(
    checkpoint: str, tokens: int, sample: bool, temperature: float | None, top_p: float | None, seed: int, dtype: str | None
) -> Any:
    """The model of a directory or hub id on the best device here, ready to speak."""
    import torch

    from hybridize.data import load_tokenizer
    from hybridize.eval.evaluate import load_for_test
    from hybridize.hub import resolve_base
    from hybridize.talk import Speaker, settings_of

    folder: Path = resolve_base(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_for_test(folder, None if dtype is None else getattr(torch, dtype))
    settings = settings_of(model, tokenizer, tokens, sample, temperature, top_p)
    torch.manual_seed(seed)
    return Speaker(model, tokenizer, settings)


def _plain(spoken: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(spoken).items() if key != "ids"}


def _figures(speaker: Any, spoken: Any) -> None:
    from hybridize.eval.table import human_bytes

    cached = spoken.prompt_tokens - spoken.read_tokens
    speed = "" if spoken.decode_tokens_per_s is None else f", then {spoken.decode_tokens_per_s:.3g} tokens/s"
    shared.screen.note(
        f"[{spoken.read_tokens} tokens read{f' behind {cached} cached' if cached else ''}, first of {spoken.new_tokens} new "
        f"after {spoken.prefill_s:.3g} s{speed}; state at {spoken.cache_tokens} tokens {human_bytes(spoken.cache_bytes)}, "
        f"base's {human_bytes(spoken.base_bytes)}]"
    )
    context = speaker.model.config.max_position_embeddings
    if spoken.cache_tokens > context:
        shared.screen.note(f"[the text is longer than the {context} tokens that the model is trained for]")


def _lines() -> Iterator[str]:
    """What is typed, a line at a time, until the input ends. At a terminal Ctrl-C drops the line that is being typed."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    # What makes input() a line that can be edited; not there on every platform.
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            shared.screen.write("\n")
            return
        except KeyboardInterrupt:
            shared.screen.write("\n")


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once asks an answer to end between two tokens, twice ends the program; gives whether it was asked."""
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
