"""Run by test_served.py in a process of its own: serves one hybrid with vLLM and compares every distribution with the hybrid's.

    python -m tests.vllm_plugin.serve '{"family": "llama", "mixers": ["attention", "mamba2"], "dtype": "float32"}'

Prints one line of JSON: the RMS ratio of log-probabilities over prompts and continuations, the same of the hybrid itself in
that dtype, and whether the greedy choice is the same wherever the hybrid is not undecided.
"""

import json
import os
import sys
import tempfile

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
VOCABULARY, NEW = 64, 8


def main(case: dict) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    from hybridize.vllm_plugin import register
    from tests.vllm_plugin.toys import model_of

    register()
    family, mixers, dtype = case.pop("family"), case.pop("mixers"), case.pop("dtype")
    options = case.pop("vllm", {})
    model = model_of(family, mixers, max_position_embeddings=512, **case)
    # Rounded as vLLM rounds, computed in fp32: what differs is vLLM's arithmetic.
    keep = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".A_log", ".dt_bias", ".D"))}
    model = model.to(getattr(torch, dtype)).float()
    model.load_state_dict({**model.state_dict(), **keep})
    found, expected, own, same = [], [], [], True
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        # Prefix caching wants states from within a prompt, which vLLM's scan for CPUs does not give.
        llm = LLM(
            folder, dtype=dtype, skip_tokenizer_init=True, max_model_len=256, max_logprobs=VOCABULARY, max_num_seqs=4, seed=0,
            **{"enforce_eager": True, "enable_prefix_caching": False, "gpu_memory_utilization": 0.2, **options},
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (37, 5, 150)]
        every = SamplingParams(
            temperature=0, max_tokens=NEW, prompt_logprobs=VOCABULARY, logprobs=VOCABULARY, detokenize=False, ignore_eos=True
        )
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], every, use_tqdm=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        said = answer.outputs[0]
        tokens = torch.tensor([prompt + list(said.token_ids)])
        with torch.no_grad():
            logits, rounded = (run(tokens).logits[0, :-1] for run in (model, narrow))
        own.append(rounded.double().log_softmax(-1))
        rows = [*answer.prompt_logprobs[1:], *said.logprobs]
        expected.append(logits.double().log_softmax(-1))
        found.append(torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in rows], dtype=torch.float64))
        two = logits[len(prompt) - 1 :].topk(2)
        sure = two.values[:, 0] - two.values[:, 1] > 0.1
        same &= bool((two.indices[:, 0] == torch.tensor(said.token_ids))[sure].all())
    found, expected, own = torch.cat(found), torch.cat(expected), torch.cat(own)
    ratio, of_own = (((one - expected).norm() / expected.norm()).item() for one in (found, own))
    print(json.dumps({"ratio": ratio, "own": of_own, "same": same}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
