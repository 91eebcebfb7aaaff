"""Training a hybrid to answer as its teacher does."""

from hybridize.distill.job import check_sources
from hybridize.distill.losses import LOSSES
from hybridize.distill.run import distill, metrics_path
from hybridize.distill.stages import STAGES
from hybridize.distill.teaching import plan_lesson, teach

__all__ = ["LOSSES", "STAGES", "check_sources", "distill", "metrics_path", "plan_lesson", "teach"]
