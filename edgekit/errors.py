"""Errors raised on purpose: one line of what was given, what is allowed, what to do."""

__all__ = [
    "AdapterError",
    "BundleError",
    "EdgekitError",
    "EngineError",
    "SourceError",
    "TrainingError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
]


class EdgekitError(Exception):
    """Base of every error that is the user's to fix; the command line prints one line."""

    exit_code = 1


class UsageError(EdgekitError):
    """An argument is outside what is allowed (exit code 2)."""

    exit_code = 2


class SourceError(EdgekitError):
    """A model source is missing, damaged, or not readable safely."""


class UnsupportedError(SourceError):
    """A source is sound but of an architecture or setting that edgekit does not express."""


class AdapterError(EdgekitError):
    """An adapter is missing, damaged, of an unknown kind, or does not fit the model."""


class BundleError(EdgekitError):
    """A bundle is missing, damaged, foreign, or of another format version."""


class EngineError(EdgekitError):
    """An inference engine or device is missing or refuses the request."""


class TrainingError(EdgekitError):
    """Training cannot go on: a loss that is not finite, or a run that may not be resumed."""


class VerificationError(EdgekitError):
    """The exported graph does not say the same things as the PyTorch reference."""
