"""The chat template that a `.litertlm` carries: the checkpoint's, written for LiteRT-LM's renderer and proven there."""

from mtp_export.bundle.stock_template.check import check_renders, check_template
from mtp_export.bundle.stock_template.compose import habits_of, stock_template

__all__ = ["check_renders", "check_template", "habits_of", "stock_template"]
