"""What is measured, what must hold, and how it is shown: the verbs eval, gate, bench and report."""

from hybridize.eval.bench import bench, bench_shape
from hybridize.eval.evaluate import evaluate
from hybridize.eval.gate import gate, parse_rule
from hybridize.eval.gates import GATES
from hybridize.eval.probes import PROBES
from hybridize.eval.report import comparison_table, report

__all__ = ["GATES", "PROBES", "bench", "bench_shape", "comparison_table", "evaluate", "gate", "parse_rule", "report"]
