"""The bundled model is what its card says, and its text is split by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hybridize.checkpoint import load_model, open_base
from hybridize.data import eval_blocks, tokenize
from hybridize.demo.stdlib_text import documents, is_held_out, module_key, write_text
from hybridize.hub import demo_model


def test_shape_and_size():
    base = open_base(demo_model())
    config = base.config
    assert config.num_hidden_layers >= 6
    assert config.head_dim >= 32
    assert config.num_attention_heads // config.num_key_value_heads >= 2
    assert config.max_position_embeddings >= 1024
    assert sum(path.stat().st_size for path in demo_model().iterdir()) <= 10_000_000
    card = json.loads((demo_model() / "training.json").read_text())
    assert 3_000_000 <= card["parameters"] <= 6_000_000
    assert (demo_model() / "README.md").read_text().startswith("---")


@pytest.mark.slow
def test_it_models_held_out_text_and_uses_its_context():
    model = load_model(demo_model(), torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    texts = [text for name, text in documents(held_out=True) if name in ("dataclasses.py", "inspect.py", "queue.py")]
    rows = eval_blocks(tokenize(tokenizer, texts), 1024, tokenizer.bos_token_id)[:6]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
        short = rows[:, -65:].clone()
        short[:, 0] = tokenizer.bos_token_id
        near = torch.nn.functional.cross_entropy(model(short).logits[:, :-1].transpose(1, 2), short[:, 1:], reduction="none")
    assert math.exp(float(loss.mean())) < 40
    # The same last tokens, with a thousand before them and with at most sixty-four.
    assert float(loss[:, -32:].mean()) < float(near[:, -32:].mean())


def test_the_split_is_by_name():
    held, train = ({module_key(Path(name)) for name, _ in documents(side)} for side in (True, False))
    assert held
    assert not held & train
    assert module_key(Path("test/test_heapq.py")) == module_key(Path("heapq.py")) == "heapq"
    assert module_key(Path("asyncio/tasks.py")) == "asyncio"
    assert is_held_out("dataclasses")
    assert not is_held_out("argparse")


def test_a_cut_is_a_sample_and_always_the_same(tmp_path):
    write_text(tmp_path / "a.txt", held_out=True, max_bytes=100_000)
    write_text(tmp_path / "b.txt", held_out=True, max_bytes=100_000)
    text = (tmp_path / "a.txt").read_bytes()
    assert text == (tmp_path / "b.txt").read_bytes()
    assert 20_000 < len(text) <= 100_000
    assert text.count(b"<|endoftext|>") > 2
