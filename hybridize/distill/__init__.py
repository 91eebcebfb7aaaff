"""Training a hybrid to answer as its teacher does."""

from hybridize.distill.job import check_sources
from hybridize.distill.losses import LOSSES
from hybridize.distill.run import build_stages, distill, metrics_path
from hybridize.distill.stages import STAGES
from hybridize.distill.teachers import check_for_run
from hybridize.distill.teaching import plan_lesson, teach

__all__ = [
    "LOSSES", "STAGES", "build_stages", "check_for_run", "check_sources", "distill", "metrics_path", "plan_lesson", "teach",
]  # fmt: skip
