"""The reference runtime: runs a bundle of mtp-export with its drafter, without torch.

    with Session.open("nano-tflite") as session:
        for token in session.generate("def add(a, b):", max_new_tokens=32):
            ...

Importing this package loads no inference library; `Session.open` does.
"""

from mtp_runtime.bundle.bundle import Bundle
from mtp_runtime.bundle.contract import Manifest, read_manifest
from mtp_runtime.errors import BackendError, BundleError, ContextFullError, MtpError, RowsLostError, UserError
from mtp_runtime.generate.acceptance import Acceptance, Origin, accept_greedy
from mtp_runtime.generate.backend import Backend, Draft, TargetPass
from mtp_runtime.generate.generation import Generation
from mtp_runtime.generate.options import GenerationOptions
from mtp_runtime.generate.sampling import Constraint, Sampling
from mtp_runtime.generate.session import Session
from mtp_runtime.generate.session_batch import SessionBatch
from mtp_runtime.generate.stats import GenerationStats
from mtp_runtime.generate.trace import FinishReason, GenerationTrace, Token
from mtp_runtime.text.conversation import Conversation, Reply, Turn

__all__ = [
    "Acceptance",
    "Backend",
    "BackendError",
    "Bundle",
    "BundleError",
    "Constraint",
    "ContextFullError",
    "Conversation",
    "Draft",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationStats",
    "GenerationTrace",
    "Manifest",
    "MtpError",
    "Origin",
    "Reply",
    "RowsLostError",
    "Sampling",
    "Session",
    "SessionBatch",
    "TargetPass",
    "Token",
    "Turn",
    "UserError",
    "accept_greedy",
    "read_manifest",
]
