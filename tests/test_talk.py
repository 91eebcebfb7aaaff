"""generate and chat: what is streamed is what generate decodes, a turn with a kept cache is a turn without, one-line errors."""

import io
import json
import os
import signal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, TextStreamer
from transformers.cache_utils import DynamicCache

from hybridize.cache import cache_bytes
from hybridize.cli import app
from hybridize.errors import ConfigError
from hybridize.hub import demo_model
from hybridize.mixers.attention import Attention
from hybridize.modeling import build_model, hybrid_config
from hybridize.talk import Chat, Pieces, Speaker, chat_ids, settings_of
from tests.distill.chats import TEMPLATE, tiny_tokenizer
from tests.tiny import SIZES, tiny_base

MIXERS = [{"name": "mamba2"}, {"name": "streaming", "window_tokens": 8, "sink_tokens": 2}, {"name": "mla"}]
# Ids that are no letter: text with them in it is not tokenised as it was said.
SILENT = [*range(6), *range(48, 64)]
# Only the last turn is shown, so that no later prompt begins with an earlier one.
LAST_TURN = TEMPLATE.replace("for m in messages", "for m in messages[-1:]").replace(
    "bos_token }}", "bos_token }}{{ messages|length }}"
)


def words_tokenizer():
    """Words with the space before them in the token, as SentencePiece has them, and bytes; a decoder drops the first space."""
    bytes_ = [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0xC3, 0xA9, 0xFF)]
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "\u2581a", "\u2581b", "c", "\n", ",", "\u2581", *bytes_])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def hybrid():
    config = hybrid_config(AutoConfig.for_model("llama", **SIZES, dtype="float32"), [dict(spec) for spec in MIXERS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(config).eval()
        # As they are initialised, most tokens repeat themselves.
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


def speaker(model, tokens=12, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    settings = settings_of(model, tokenizer, tokens, **options)
    # Random weights say EOS as soon as anything else; answers of one length are easier to compare.
    settings.eos_token_id, settings.suppress_tokens = None, SILENT
    return Speaker(model, tokenizer, settings)


def streamed(tokenizer, prompt, ids, continues):
    pieces = []
    streamer = Pieces(tokenizer, pieces.append, continues)
    streamer.put(torch.tensor([prompt]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert streamer.text() == "".join(pieces)
    return pieces


@pytest.mark.parametrize("name", ["bytes", "words"])
def test_pieces_together_are_the_text_decoded_at_once(name):
    """Random bytes hold characters of several tokens, and some that never become whole."""
    tokenizer = words_tokenizer() if name == "words" else AutoTokenizer.from_pretrained(demo_model(), local_files_only=True)
    snowmen = tokenizer("\u2603 \u2603\u2603, \U0001f600 x", add_special_tokens=False)["input_ids"]
    draw = torch.Generator().manual_seed(0)
    for round_ in range(20):
        ids = torch.randint(2, len(tokenizer), (40,), generator=draw).tolist() + snowmen
        prompt, new = ids[:3], ids[3:]
        pieces = streamed(tokenizer, prompt, new, continues=False)
        assert "".join(pieces) == tokenizer.decode(new, skip_special_tokens=True)
        assert len(pieces) > len(new) // 5
        if round_ % 2:
            prompt = tokenizer("a b\n a", add_special_tokens=False)["input_ids"]
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
            assert before + "".join(streamed(tokenizer, prompt, new, continues=True)) == whole


def test_the_library_s_streamer_loses_spaces(capsys):
    """Why there is one of our own: the space behind a line end is gone."""
    tokenizer = words_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["\u2581a", "\n", "\u2581b"])
    theirs = TextStreamer(tokenizer, skip_prompt=True)
    for value in ([[0]], *([token] for token in ids)):
        theirs.put(torch.tensor(value))
    theirs.end()
    assert capsys.readouterr().out == "a\nb\n"
    assert "".join(streamed(tokenizer, [0], ids, False)) == tokenizer.decode(ids) == "a\n b"


def test_an_answer_is_what_generate_says(hybrid):
    tokenizer, pieces = tiny_tokenizer(), []
    ids = [1, *tokenizer("hello there", add_special_tokens=False)["input_ids"]]
    spoken = speaker(hybrid).speak(ids, pieces.append)
    out = hybrid.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=SILENT)[
        0
    ].tolist()
    assert spoken.ids == out
    assert "".join(pieces) == spoken.text == tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
    assert (spoken.prompt_tokens, spoken.read_tokens, spoken.new_tokens, spoken.cache_tokens) == (12, 12, 12, 23)
    # Bytes are those of a cache that read the same.
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(torch.tensor([out[:-1]]), past_key_values=cache, use_cache=True)
    assert spoken.cache_bytes == cache_bytes(cache)
    assert spoken.base_bytes == 3 * Attention().state_bytes(hybrid.config, 23)
    assert spoken.decode_tokens_per_s > 0
    assert speaker(hybrid, tokens=1).speak(ids, pieces.append).decode_tokens_per_s is None
    # Draws follow the seed.
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(speaker(hybrid, sample=True, temperature=2.0, top_p=0.9).speak(ids, pieces.append).ids)
    assert drawn[0] == drawn[1] != drawn[2]


def turns(model, template=TEMPLATE, kept=True, kind=Speaker):
    """Two turns; without `kept` each begins with an empty cache."""
    tokenizer = tiny_tokenizer(template)
    made = kind(model, tokenizer, speaker(model, tokenizer=tokenizer).settings)
    chat, said = Chat(made, "x"), []
    for text in ("how are you?", "and now"):
        if not kept:
            made.forget()
        said.append(chat.answer(text, lambda piece: None))
    return said


class NeverLooks(Speaker):
    """A wrong variant: the cache is used whatever it holds, as far as its length goes."""

    def speak(self, ids, *args, **kwargs):
        self.held = ids[: len(self.held)]
        return super().speak(ids, *args, **kwargs)


def test_a_turn_with_a_kept_cache_is_a_turn_without(hybrid):
    kept, fresh = turns(hybrid), turns(hybrid, kept=False)
    assert [turn.ids for turn in kept] == [turn.ids for turn in fresh]
    assert [turn.cache_bytes for turn in kept] == [turn.cache_bytes for turn in fresh]
    assert kept[1].prompt_tokens - kept[1].read_tokens == kept[0].cache_tokens
    assert [turn.read_tokens for turn in fresh] == [turn.prompt_tokens for turn in fresh]


def test_text_that_a_template_rewrites_is_read_anew(hybrid):
    kept, fresh = turns(hybrid, LAST_TURN), turns(hybrid, LAST_TURN, kept=False)
    assert [turn.ids for turn in kept] == [turn.ids for turn in fresh]
    assert [turn.read_tokens for turn in kept] == [turn.prompt_tokens for turn in kept]
    short = TEMPLATE.replace("for m in messages", "for m in messages[-3:]").replace(
        "bos_token }}", "bos_token }}{{ messages|length }}"
    )
    wrong = turns(hybrid, short, kind=NeverLooks)
    assert [turn.ids for turn in wrong] != [turn.ids for turn in turns(hybrid, short, kept=False)]


def test_an_answer_that_is_stopped_stays_and_one_that_is_broken_off_leaves_nothing(hybrid):
    def run(kept):
        made = speaker(hybrid)
        chat, pieces = Chat(made, "x"), []
        first = chat.answer("hello", pieces.append, lambda: len(pieces) > 3)
        if not kept:
            made.forget()
        return chat, first, chat.answer("go on", pieces.append)

    (chat, first, kept), (_, _, fresh) = run(True), run(False)
    assert first.new_tokens < 12
    assert kept.ids == fresh.ids
    assert kept.read_tokens < fresh.read_tokens

    def broken(piece):
        raise KeyboardInterrupt

    before = list(chat.messages)
    with pytest.raises(KeyboardInterrupt):
        chat.answer("more", broken)
    assert chat.messages == before
    assert chat.speaker.cache is None
    again = chat.answer("more", str)
    assert again.read_tokens == again.prompt_tokens


def test_settings_follow_the_checkpoint_and_refuse_what_cannot_be(hybrid):
    tokenizer = tiny_tokenizer()
    own = hybrid.generation_config
    try:
        hybrid.generation_config = type(own)(temperature=0.5, top_k=7, repetition_penalty=1.3, eos_token_id=[5, 7])
        greedy, drawn = settings_of(hybrid, tokenizer, 4), settings_of(hybrid, tokenizer, 4, True, None, 0.8)
    finally:
        hybrid.generation_config = own
    assert greedy.repetition_penalty in (None, 1.0)
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.repetition_penalty) == (0.5, 0.8, 7, 1.3)
    assert greedy.eos_token_id == drawn.eos_token_id == [2, 5, 7]
    assert settings_of(hybrid, tokenizer, 4, True).top_k == 0
    wrongs = {
        "--tokens is 0, expected at least 1": (0,),
        "--temperature goes with --sample": (1, False, 0.5),
        "--temperature is 0, expected above 0": (1, True, 0.0),
        "--top-p is 1.5, expected above 0 and at most 1": (1, True, None, 1.5),
    }
    for said, wrong in wrongs.items():
        with pytest.raises(ConfigError, match=said):
            settings_of(hybrid, tokenizer, *wrong)
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        speaker(hybrid).speak([], str)
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(speaker(hybrid, tokenizer=tiny_tokenizer(None)), "x")
    with pytest.raises(ConfigError, match="refuses the conversation .no system here"):
        chat_ids(tiny_tokenizer("{{ raise_exception('no system here') }}"), [{"role": "user", "content": "a"}], "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("talk")
    base = tiny_base("llama", tmp)
    tiny_tokenizer().save_pretrained(base)
    assert app(["--quiet", "convert", str(base), "--recipe", "streaming", "--out", str(tmp / "hybrid")]) == 0
    return tmp / "hybrid"


def call(capsys, monkeypatch, *words, typed=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    capsys.readouterr()
    code = app([str(word) for word in words])
    return code, capsys.readouterr()


def test_generate_from_the_command_line(folder, capsys, monkeypatch):
    code, out = call(capsys, monkeypatch, "generate", folder, "--prompt", "-", "--tokens", "5", typed="abc\n")
    assert code == 0
    assert out.out.startswith("abc")
    assert "[3 tokens read, first of" in out.err
    assert "base's" in out.err
    code, quiet = call(capsys, monkeypatch, "generate", folder, "--prompt", "abc", "--tokens", "5", "--quiet")
    assert (quiet.out, quiet.err) == (out.out, "")
    code, out = call(capsys, monkeypatch, "generate", folder, "--prompt", "abc", "--tokens", "5", "--json", "--chat")
    value = json.loads(out.out)
    assert value["tokens"][:2] == [1, 3]
    assert value["tokens"][5] == 4
    assert value["cache_bytes"] > 0
    assert len(value["tokens"]) == value["prompt_tokens"] + value["new_tokens"]
    assert "longer than" not in out.err
    code, out = call(capsys, monkeypatch, "generate", folder, "--prompt", "a" * 140, "--tokens", "1")
    assert "longer than the 128 tokens that the model is trained for" in out.err
    code, out = call(capsys, monkeypatch, "generate", folder, "--prompt", "abc", "--system", "x")
    assert (code, out.err.count("\n")) == (2, 1)
    assert "--system goes with --chat" in out.err


def test_chat_through_a_pipe(folder, capsys, monkeypatch):
    typed = "hello\n\nagain\n/what\n/reset\nhello\n/system be brief\nhello\n/quit\nnot read\n"
    code, out = call(capsys, monkeypatch, "chat", folder, "--tokens", "4", typed=typed)
    assert code == 0
    lines = out.out.splitlines()
    assert len(lines) == 4
    assert lines[0] == lines[2]
    assert "behind" in out.err.splitlines()[1]
    assert "/what: no such command" in out.err.splitlines()[2]
    code, out = call(capsys, monkeypatch, "chat", folder, "--tokens", "4", "--json", "--system", "s", typed="hello\n")
    value = json.loads(out.out)
    assert [message["role"] for message in value["messages"]] == ["system", "user", "assistant"]
    assert len(value["turns"]) == 1


def test_ctrl_c_stops_the_answer_alone(folder, capsys, monkeypatch):
    sent = []

    def put(self, value, own=Pieces.put):
        own(self, value)
        if len(self.times) == 4 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(Pieces, "put", put)
    code, out = call(capsys, monkeypatch, "chat", folder, "--tokens", "40", "--json", typed="hello\nmore\n")
    assert code == 0
    first, second = json.loads(out.out)["turns"]
    # Releases of transformers differ in whether a token is shown before or after the question whether to stop.
    assert first["new_tokens"] in (3, 4)
    assert len(sent) == 1
    assert second["prompt_tokens"] - second["read_tokens"] == first["cache_tokens"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
