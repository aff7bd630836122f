"""Export PyTorch models with recurrent layers as bundles, and prove that they say what the eager model says."""

from carousel_export.errors import ExampleError, ExportError, GraphError, ModelError, ParityError, PolicyError
from carousel_export.export import export, parity
from carousel_export.imported.importing import import_model
from carousel_export.policies import Carry, Causal, Full, Lookahead, Policy
from carousel_export.tune import Tuning, tune
from carousel_export.viterbi import viterbi_decode

__all__ = [
    "Carry",
    "Causal",
    "ExampleError",
    "ExportError",
    "Full",
    "GraphError",
    "Lookahead",
    "ModelError",
    "ParityError",
    "Policy",
    "PolicyError",
    "Tuning",
    "export",
    "import_model",
    "parity",
    "tune",
    "viterbi_decode",
]
