"""The model card: what a published model is, what it was measured to do, how to load it, and what its licence asks."""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from hybridize.core import Metric, Plan, Report, Verdict, human_bytes, plan_table, show
from hybridize.hub.layer_map import NAME as PICTURE
from hybridize.hub.licences import Licence, Terms

LENGTHS = (1024, 32768, 131072)
# What is a cost and no score.
COSTS = ("bytes", "tokens/s", "x the base")
# Tasks of lm-eval -> (data set on the Hub, its configuration): where their scores belong on a leaderboard.
SETS = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"), "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "blimp": ("nyu-mll/blimp", "default"), "boolq": ("google/boolq", "default"), "gsm8k": ("openai/gsm8k", "main"),
    "hellaswag": ("Rowan/hellaswag", "default"), "lambada_openai": ("EleutherAI/lambada_openai", "default"),
    "mmlu": ("cais/mmlu", "all"), "openbookqa": ("allenai/openbookqa", "main"), "piqa": ("ybisk/piqa", "plain_text"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card says; nothing here holds a path of this machine."""

    repo: str
    base: str
    """The base's hub id, or in words."""
    base_repo: str | None
    base_revision: str | None
    licence: Licence
    licence_names: tuple[str, ...]
    """Files that go along: texts, notices, use policies."""
    terms: tuple[Terms, ...]
    """Of Llama licences that hold: the base's, and teachers'."""
    family: str
    mixers: list[dict[str, Any]]
    plan: Plan | None
    lineage: dict[str, Any]
    """Of the hybrid."""
    state_bytes: dict[int, tuple[int, int]]
    """Length -> bytes of this model and of the base, one sequence."""
    layer_bytes: tuple[int, ...] = ()
    """At 32,768 tokens, by layer; there is a picture where it is known."""
    native: str | None = None
    """The class of an export."""
    engines: dict[str, str]
    """Engine -> how it runs an export's class; of a hybrid, that of the class it could be exported to, if any."""
    could_be: str | None = None
    """The class a hybrid could be exported to."""
    proof: tuple[dict[str, Any], ...] = ()
    """How far an export's logits are from the hybrid's."""
    approximate: str | None = None
    remote_code: bool = False
    report: Report | None = None
    baseline: Report | None = None
    verdict: Verdict | None = None
    recipe: str | None = None
    """YAML."""
    teachers: tuple[str, ...] = ()
    """Other than the base."""
    data_licence: str | None = None


def card(facts: Facts) -> str:
    """README.md: metadata for the Hub, then plain text for people."""
    from huggingface_hub import ModelCardData

    names = list(dict.fromkeys(spec["name"] for spec in facts.mixers))
    known = facts.licence
    metadata = ModelCardData(
        license=known.id, license_name=known.name if known.id == "other" else None, license_link=known.link,
        library_name="transformers", pipeline_tag="text-generation", tags=["hybridize", "hybrid", facts.family, *names],
        base_model=facts.base_repo, base_model_relation=None if facts.base_repo is None else "finetune",
        model_name=facts.repo.split("/")[1], eval_results=eval_results(facts.report),
    )  # fmt: skip
    sections = [
        _head(facts),
        _layers(facts),
        _states(facts),
        _results(facts),
        _verdict(facts),
        _use(facts),
        _making(facts),
        _terms(facts),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def eval_results(report: Report | None) -> list[Any] | None:
    """The scores of a report as the model-index of a card; None for none."""
    from huggingface_hub import EvalResult

    if report is None:
        return None
    found = []
    for name, metric in _scores(report):
        task, _, kind = name.rpartition("/")
        data, config = SETS.get(task, (task, None)) if task else ("text", None)
        found.append(EvalResult(
            task_type="text-generation", dataset_type=data, dataset_name=task or "held-out text", dataset_config=config,
            metric_type=kind, metric_name=name, metric_value=metric.value,
            metric_args={"stderr": metric.stderr, "samples": metric.samples, "unit": metric.unit},
        ))  # fmt: skip
    return found or None


def result_files(report: Report | None) -> dict[str, bytes]:
    """The same in the Hub's newer form, `.eval_results/TASK.yaml`, for tasks whose data set is on the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found: dict[str, list[Any]] = {}
    for name, metric in _scores(report) if report is not None else []:
        task, _, kind = name.rpartition("/")
        if task in SETS:
            stderr = "not known" if metric.stderr is None else f"{metric.stderr:.3g}"
            notes = f"lm-eval {task}, {kind}; {metric.samples} samples, standard error {stderr}"
            entry = EvalResultEntry(dataset_id=SETS[task][0], task_id=SETS[task][1], value=metric.value, notes=notes)
            found.setdefault(task, []).append(entry)
    return {
        f".eval_results/{task}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
        for task, entries in found.items()
    }


def _scores(report: Report) -> list[tuple[str, Metric]]:
    return [(name, metric) for name, metric in report.metrics.items() if metric.unit not in COSTS]


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _base_link(facts: Facts) -> str:
    if facts.base_repo is None:
        return facts.base
    commit = "" if facts.base_revision is None else f" at commit `{facts.base_revision}`"
    return f"[{facts.base_repo}](https://huggingface.co/{facts.base_repo}){commit}"


def _head(facts: Facts) -> str:
    count = sum(spec["name"] != "attention" for spec in facts.mixers)
    built = list(dict.fromkeys(terms.built_with for terms in facts.terms if terms.built_with))
    lines = [f"# {facts.repo.split('/')[1]}"]
    lines += [f"**{line}**" for line in built]
    lines.append(
        f"A hybrid, made with hybridize from {_base_link(facts)}: {count} of {len(facts.mixers)} attention layers were replaced."
    )
    if facts.native is not None:
        lines.append(f"It is stored as transformers' own class `{facts.native}`.")
    if facts.approximate is not None:
        lines.append(f"**The stored class does not compute quite what the hybrid did:** {facts.approximate}.")
    if facts.verdict is None:
        lines.append("**It was published without a verdict:** no gate has judged these weights.")
    elif not facts.verdict.passed:
        lines.append("**It was published without a passed verdict:** see below which gates failed.")
    return "\n\n".join(lines)


def _layers(facts: Facts) -> str:
    lines = ["## Layers"]
    if facts.layer_bytes:
        lines.append(f"![Mixer and cache of each layer]({PICTURE})")
    if facts.plan is not None:
        rows = [["layers", "mixer", "options", "seed", "parameters"]]
        for row in plan_table(facts.plan):
            options = ", ".join(f"{key}={value}" for key, value in row["options"].items() if value is not None)
            seed = str(row["conversion"].get("method", "kept"))
            rows.append([row["layers"], row["mixer"], options, seed, f"{row['parameters']:,}"])
        lines.append(_table(rows))
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _states(facts: Facts) -> str:
    if not facts.state_bytes:
        return ""
    rows = [["cache of one sequence", "this model", "the base", "share"]]
    for tokens, (own, base) in facts.state_bytes.items():
        rows.append([f"at {tokens:,} tokens", human_bytes(own), human_bytes(base), f"{own / base:.1%}"])
    return f"## Memory\n\n{_table(rows)}\n\nComputed from the config, in the model's dtype."


def _results(facts: Facts) -> str:
    if facts.report is None:
        return ""
    base = facts.baseline.metrics if facts.baseline is not None else {}
    names = [name for name, _ in _scores(facts.report)] + [
        name for name, metric in facts.report.metrics.items() if metric.unit in COSTS
    ]
    rows = [["metric", "unit", "this model", *(["the base"] if base else []), "samples"]]
    for name in names:
        metric = facts.report.metrics[name]
        other = [show(base[name]) if name in base else "-"] if base else []
        rows.append([name, metric.unit, show(metric), *other, f"{metric.samples:,}"])
    of = "the hybrid that this class was exported from" if facts.native is not None else "these weights"
    return f"## Measured\n\nWith hybridize on {of}, ± one standard error.\n\n{_table(rows)}"


def _verdict(facts: Facts) -> str:
    if facts.verdict is None:
        return ""
    rows = [["gate", "value", "limit", ""]]
    for gate in facts.verdict.gates:
        numbers = ["" if number is None else f"{number:.6g}" for number in (gate.value, gate.limit)]
        rows.append([gate.name, *numbers, "pass" if gate.passed else "FAIL"])
    details = "\n".join(f"- {gate.name}: {gate.detail}" for gate in facts.verdict.gates)
    return f"## Verdict: {'passed' if facts.verdict.passed else 'FAILED'}\n\n{_table(rows)}\n\n{details}"


def _use(facts: Facts) -> str:
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if facts.native is not None:
        load.append(f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}")')
        ways = [f"Serve it with `vllm serve {facts.repo}`." if "vLLM" in facts.engines else "vLLM does not have this class."]
        ways += [f"- {engine}: {how}" for engine, how in facts.engines.items()]
        serve = ways[0] + "\n\n" + "\n".join(ways[1:])
        before = ""
    else:
        before = "Its mixers are code of hybridize: `pip install hybridize`."
        if facts.remote_code:
            before += " Without it, leave the first line out and pass `trust_remote_code=True`: a copy of that code lies here."
        load = ["import hybridize  # registers the classes", *load]
        load.append(f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}")')
        serve = (
            f"Serve it with vLLM and hybridize's plugin: `pip install 'hybridize[vllm]'`, then `vllm serve {facts.repo}`. "
            f"`hybridize info {facts.repo}` says which engines run its mixers."
        )
        if facts.could_be is not None:
            serve += (
                f" `hybridize export {facts.repo} --out DIR` stores it as transformers' own `{facts.could_be}`, which needs "
                f"no code of ours and runs in {', '.join(facts.engines)}."
            )
    load.append(f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")')
    code = "\n".join(load)
    return "\n\n".join(part for part in ("## Use", before, f"```python\n{code}\n```", serve) if part)


def _making(facts: Facts) -> str:
    lineage, lines = facts.lineage, ["## How it was made"]
    known = "" if facts.plan is None else f" by the recipe `{facts.plan.recipe}`, seed {facts.plan.seed}"
    said = "as the publisher says" if facts.licence.source.startswith("--") else f"by {facts.licence.source}"
    lines.append(f"- **Base:** {_base_link(facts)}, licence {facts.licence.title} ({said})")
    seeded = lineage.get("calibration")
    text = "" if not seeded else (
        f"; seeds calibrated on {seeded['sequences'] * seeded['tokens']:,} tokens (sha256 `{seeded['sha256']}`)"
    )  # fmt: skip
    lines.append(f"- **Converted**{known}{text}")
    for record in lineage.get("distill", []):
        stages = ", ".join(
            f"{stage['name']} ({stage['tokens']:,} tokens)" if isinstance(stage.get("tokens"), int) else str(stage["name"])
            for stage in record["stages"]
        )
        source = f"text with sha256 `{record['text']}`" if record.get("text") else "examples"
        if any(record.get("examples") or []):
            source += "; examples with sha256 " + ", ".join(f"`{sha}`" for sha in record["examples"] if sha)
        lines.append(f"- **Trained:** {stages}, on {source}, seed {record['seed']}")
    if not lineage.get("distill"):
        lines.append("- **Trained:** not at all; weights are the conversion's")
    if facts.teachers:
        lines.append(f"- **Teacher:** {', '.join(facts.teachers)}")
    lines.append(f"- **Licence of the data:** {facts.data_licence or 'not stated'}")
    made = ", ".join(f"{name} {version}" for name, version in sorted(lineage.get("versions", {}).items()))
    lines.append(f"- **Versions:** {made}")
    if facts.report is not None:
        measured = {key: value for key, value in facts.report.versions.items() if key not in ("tokenizer",)}
        lines.append(f"- **Measured with:** {', '.join(f'{key} {value}' for key, value in sorted(measured.items()))}")
    for proof in facts.proof:
        said = ", ".join(f"{key} {value:.3g}" for key, value in proof.items() if isinstance(value, (int, float)))
        lines.append(f"- **Export's logits against the hybrid's, {proof.get('text', 'text')}:** {said}")
    text = lines[0] + "\n\n" + "\n".join(lines[1:])
    if facts.recipe is not None:
        text += f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{facts.recipe.rstrip()}\n```\n\n</details>"
    return text


def _terms(facts: Facts) -> str:
    files = ", ".join(f"[{name}]({name})" for name in facts.licence_names)
    link = f" ({facts.licence.link})" if facts.licence.link else ""
    lines = [f"## Licence\n\n{facts.licence.title}{link}, as the base's."]
    lines.append(f"Its texts and notices: {files}." if files else "The base came without a text of its licence.")
    for terms in dict.fromkeys(facts.terms):
        lines.append(terms.notice)
    return "\n\n".join(lines)


def plan_of(lineage: dict[str, Any], where: str) -> Plan | None:
    """The plan in a lineage; it lacks the base's place, which nothing here needs."""
    plan = lineage.get("plan")
    return None if plan is None else Plan.from_dict({"base": "", **json.loads(json.dumps(plan))}, where)
