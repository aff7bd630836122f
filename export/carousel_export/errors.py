"""Everything that an export can refuse or fail with: one line each, which names the thing and says how to mend it."""


class ExportError(Exception):
    """The model was not exported, and no bundle was written."""


class ModelError(ExportError):
    """The model cannot be exported as it is; the message names the module."""


class ExampleError(ExportError):
    """The example inputs do not fit the model, or do not show which axes are batch and time."""


class PolicyError(ExportError):
    """The policy asked for would give wrong answers with this model."""


class GraphError(ExportError):
    """An exporter could not write the model as a graph with the axes that it has to have."""


class ParityError(ExportError):
    """An exported graph says something else than eager PyTorch does."""


def one_line(error: BaseException) -> str:
    """What a foreign exception says, as one line of at most 300 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
