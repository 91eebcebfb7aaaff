"""The Hub: bases and hybrids pulled from it, hybrids, scores and plans pushed to it."""

from hybridize.hub.bundle import Bundle, Evidence, Statement, bundle_model
from hybridize.hub.fetch import ALIASES, DEMO, base_of, demo_model, resolve_base, shape_of, teacher_for
from hybridize.hub.push import Pushed, bundle_document, push
from hybridize.native.export import export

__all__ = [
    "ALIASES", "DEMO", "Bundle", "Evidence", "Pushed", "Statement", "base_of", "bundle_document", "bundle_model", "demo_model",
    "export", "push", "resolve_base", "shape_of", "teacher_for",
]  # fmt: skip
