"""The two losses against trl's trainers on the same batches: what an independent implementation makes of the same rows."""

import json
import warnings

import pytest
import torch
from datasets import Dataset

from hybridize.checkpoint import load_model
from hybridize.distill.chat import read_chats, read_pairs
from hybridize.distill.dpo import Dpo
from hybridize.distill.rows import collate, pack
from hybridize.distill.sft import Sft
from tests.distill.chats import chat_pair, tiny_tokenizer, write_chats, write_lines, write_pairs
from tests.tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return chat_pair(tmp_path_factory.mktemp("pair"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain(config, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(gradient_checkpointing=False, **CPU, **options)


def compared(ours, theirs):
    assert_close(ours[0], theirs[0], "fp32")
    assert_close(ours[1], theirs[1], "fp32", grad=True)


def slopes(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["messages", "prompt", "text"])
def test_sft(folders, tmp_path, kind):
    from trl import SFTConfig, SFTTrainer

    rows = [row for row in lines(write_chats(tmp_path / "all.jsonl")) if kind in row]
    model = load_model(folders[1], torch.float32)
    args = plain(
        SFTConfig, output_dir=str(tmp_path / "o"), max_length=48, per_device_train_batch_size=8,
        assistant_only_loss=kind == "messages",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    theirs = (loss.detach(), slopes(model))
    model.zero_grad()
    options = Sft(tokens=4096, seq_tokens=48, rows=8)
    texts = [item[0] for item in read_chats(tiny_tokenizer(), write_lines(tmp_path / "c.jsonl", rows), 48).items]
    ours = collate([([text],) for text in texts])
    # trl puts no BOS before text without a template; the ids of the rest must be the same set of rows.
    drop = 0 if kind == "messages" else 1
    expected = sorted(row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True))
    assert sorted(text.ids[drop:].tolist() for text in texts) == expected
    if drop:
        ours = collate(
            [([type(t)(ids=t.ids[1:], learnt=t.learnt[1:] & (torch.arange(len(t.ids) - 1) > 0).numpy())],) for t in texts]
        )
    step = options.start(model, None, ours)
    found = step(ours, 1.0)["loss"]
    compared((found, slopes(model)), theirs)
    model.zero_grad()
    if not drop:
        packed = collate([(row,) for row in pack(texts, 48)])
        assert len(packed) < len(texts)
        compared((step(packed, 1.0)["loss"], slopes(model)), theirs)


@pytest.mark.parametrize("normalised", [False, True])
def test_dpo(folders, tmp_path, normalised):
    from trl import DPOConfig, DPOTrainer

    path = write_pairs(tmp_path / "p.jsonl", 8)
    student, reference = load_model(folders[1], torch.float32), load_model(folders[0], torch.float32)
    args = plain(
        DPOConfig, output_dir=str(tmp_path / "o"), max_length=48, per_device_train_batch_size=8, beta=0.3,
        loss_type="sigmoid_norm" if normalised else "sigmoid",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=student, ref_model=reference, args=args, train_dataset=Dataset.from_list(lines(path)),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    theirs = (loss.detach(), slopes(student))
    student.zero_grad()
    options = Dpo(tokens=4096, seq_tokens=48, rows=8, beta=0.3, length_normalised=normalised)
    tokenizer = tiny_tokenizer()
    # trl puts no BOS before text without a template.
    tokenizer.bos_token = None
    ours = collate([tuple([text] for text in item) for item in read_pairs(tokenizer, path, 48).items])
    parts = options.start(student, reference.requires_grad_(False), ours)(ours, 1.0)
    compared((parts["loss"], slopes(student)), theirs)
    student.zero_grad()
    wrong = Dpo(tokens=4096, seq_tokens=48, rows=8, beta=0.3, length_normalised=not normalised)
    with pytest.raises(AssertionError):
        compared((wrong.start(student, reference, ours)(ours, 1.0)["loss"], slopes(student)), theirs)


def test_a_known_template_gets_its_marks_from_trl(tmp_path):
    """Qwen's template as it is served has none."""
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tiny_tokenizer(qwen2_5_chat_template)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    (item,) = read_chats(tokenizer, write_lines(tmp_path / "c.jsonl", rows), 512).items
    learnt = tokenizer.decode(item[0].ids[item[0].learnt])
    assert "ho" in learnt
    assert "hi" not in learnt
    assert "hi" in tokenizer.decode(item[0].ids)
