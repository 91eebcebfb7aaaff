"""Stage `sft`: the loss against a dense form in fp64, and that neither padding, packing nor the split of a step matters."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from hybridize.checkpoint import load_model
from hybridize.distill import loop
from hybridize.distill.chat import read_chats
from hybridize.distill.rows import ChatBatch, ChatBlocks, collate
from hybridize.distill.run import load_pair
from hybridize.distill.sft import Sft
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS as MIXERS_TABLE
from hybridize.modeling import build_model, hybrid_config
from tests.distill.chats import chat_pair, tiny_tokenizer, write_chats
from tests.distill.pair import KEEP, STREAMING
from tests.tiny import SIZES
from tests.tolerances import assert_close

SMALL = {"tokens": 4096, "seq_tokens": 48, "rows": 4}
CPU = torch.device("cpu")
# Full attention, a window and a state: each has its own way of keeping texts apart.
MIXERS = (STREAMING, KEEP, {"name": "mamba2"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return chat_pair(tmp_path_factory.mktemp("pair"), MIXERS)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_chats(tiny_tokenizer(), write_chats(tmp_path_factory.mktemp("chats") / "c.jsonl"), 48)


def step_of(folders, options):
    student, teacher, trained = load_pair(folders[1], folders[0], options, "sft", {}, CPU)
    assert teacher is None
    return options.start(student, teacher, None), trained


def taken(step, trained, batch, shares):
    """(loss, gradient) of a step divided as `shares` says: {rows: share}."""
    for p in trained.values():
        p.grad = None
    loss, start = 0, 0
    for rows, share in shares:
        loss = loss + share * step(batch[start : start + rows], share)["loss"]
        start += rows
    return loss, torch.cat([p.grad.flatten() for p in trained.values()])


def dense(folder, texts, prompts=False):
    """Cross-entropy of each text alone, in fp64, mean over all learnt tokens; with its gradient."""
    model = load_model(folder, torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for text in texts:
        ids = torch.from_numpy(text.ids).long()[None]
        logits = model(ids).logits[0, :-1]
        learnt = torch.ones(len(text.ids) - 1, dtype=torch.bool) if prompts else torch.from_numpy(text.learnt[1:])
        total = total + F.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum")
        count += int(learnt.sum())
    loss = total / count
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mean_over_learnt_tokens(folders, examples, packed):
    options = Sft(**SMALL, packed=packed)
    step, trained = step_of(folders, options)
    blocks = ChatBlocks(examples, 48, 4, 0, packed)
    batch = blocks.batch(0)
    texts = [text for index in range(4) for lane in blocks._row(index) for text in lane]
    assert (len(texts) > 4) == packed
    expected = dense(folders[1], texts)
    found = taken(step, trained, batch, [(4, 1.0)])
    assert_close(found[0], expected[0], "fp32")
    assert_close(found[1], expected[1], "fp32", grad=True)
    # A loss that counted prompts, or rows that saw each other, would not pass.
    with pytest.raises(AssertionError):
        assert_close(found[0], dense(folders[1], texts, prompts=True)[0], "fp32")
    if packed:
        joined = ChatBatch(ids=batch.ids, learnt=batch.learnt, positions=torch.arange(batch.ids.shape[-1]).expand_as(batch.ids))
        with pytest.raises(AssertionError):
            assert_close(taken(step, trained, joined, [(4, 1.0)])[0], expected[0], "fp32")


def test_a_step_may_be_divided_anyhow(folders, examples):
    """The share is by learnt tokens: by rows, the loss of an example would depend on its neighbours."""
    options = Sft(**SMALL, packed=False)
    step, trained = step_of(folders, options)
    batch = ChatBlocks(examples, 48, 4, 0, False).batch(1)
    whole = taken(step, trained, batch, [(4, options.weight(batch) / options.weight(batch))])
    parts = [(1, options.weight(batch[:1]) / options.weight(batch)), (3, options.weight(batch[1:]) / options.weight(batch))]
    divided = taken(step, trained, batch, parts)
    assert_close(divided[0], whole[0], "fp32")
    assert_close(divided[1], whole[1], "fp32", grad=True)
    with pytest.raises(AssertionError):
        assert_close(taken(step, trained, batch, [(1, 0.25), (3, 0.75)])[1], whole[1], "fp32", grad=True)


def test_the_loop_takes_shares_by_what_the_stage_counts(folders, examples):
    options = Sft(**{**SMALL, "rows": 1, "accumulate": 4}, packed=False)
    step, trained = step_of(folders, options)
    batch = ChatBlocks(examples, 48, 4, 0, False).batch(1)
    whole = taken(step, trained, batch, [(4, 1.0)])
    for p in trained.values():
        p.grad = None

    class One:
        process_index, num_processes, device = 0, 1, CPU

    run = loop.Run(accelerator=One, seed=0, scratch=None, metrics=None, progress=None)
    losses = loop.gradients(run, options, step, trained, batch, None).losses
    assert losses["loss"] == pytest.approx(float(whole[0]), rel=1e-5)
    assert_close(torch.cat([p.grad.flatten() for p in trained.values()]), whole[1], "fp32", grad=True)


def test_padding_does_not_count(folders, examples):
    options = Sft(**SMALL, packed=False)
    step, trained = step_of(folders, options)
    texts = sorted((item[0] for item in examples.items), key=lambda text: len(text.ids))
    short, long = collate([([text],) for text in texts[:3]]), collate([([text],) for text in [*texts[:3], texts[-1]]])
    assert long.ids.shape[-1] > short.ids.shape[-1]
    a, b = taken(step, trained, short, [(3, 1.0)]), taken(step, trained, long[:3], [(3, 1.0)])
    assert_close(b[0], a[0], "fp32")
    assert_close(b[1], a[1], "fp32", grad=True)


@pytest.mark.parametrize("name", MIXERS_TABLE.names())
def test_texts_of_a_row_do_not_see_each_other_whatever_the_mixer(name, examples):
    config = AutoConfig.for_model("qwen3", **SIZES, dtype="float32")
    first = {"name": "mamba2"} if name == "gmu" else {"name": name}
    own = {"name": name, "reads": 0} if name == "gmu" else {"name": name}
    model = build_model(hybrid_config(config, [first, own, KEEP])).eval()
    texts = [item[0] for item in examples.items[:4]]
    packed = collate([(texts,)])
    options = Sft(**SMALL)
    with torch.no_grad():
        together = options.hidden_states(model, packed)[0, 0]
        alone = torch.cat([options.hidden_states(model, collate([([text],)]))[0, 0] for text in texts])
        joined = model.model(packed.ids[0], use_cache=False).last_hidden_state[0]
    assert_close(together, alone, "fp32")
    with pytest.raises(AssertionError):
        assert_close(joined, alone, "fp32")


def test_checkpointing_and_bf16_change_nothing_they_should_not(folders, examples):
    batch = ChatBlocks(examples, 48, 4, 0, True).batch(0)
    plain = taken(*step_of(folders, Sft(**SMALL)), batch, [(4, 1.0)])
    assert torch.equal(taken(*step_of(folders, Sft(**SMALL, gradient_checkpointing=True)), batch, [(4, 1.0)])[1], plain[1])
    step, trained = step_of(folders, Sft(**SMALL, dtype="bf16"))
    half = taken(step, trained, batch, [(4, 1.0)])
    assert half[1].dtype == torch.float32
    torch.testing.assert_close(half[0], plain[0], rtol=0.02, atol=0)
    assert not torch.equal(half[0], plain[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": [{"name": "kl"}]}, "expected none: the loss of this stage is its own"),
        ({"restore_qk": 1.5}, "restore_qk is 1.5"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"recall_fall": -1.0}, "recall_fall -1.0"),
        ({"beta": 0.1}, "unknown option 'beta'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        STAGES.build({"name": "sft", **SMALL, **options})
