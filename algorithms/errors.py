"""What can be wrong with models, adapters, settings and calibration prompts."""

from neuronledger import NeuronLedgerError


class CheckpointError(NeuronLedgerError):
    """A checkpoint directory or one of its files cannot be read safely."""


class UnsupportedModelError(NeuronLedgerError):
    """A model that NeuronLedger does not reach: unknown family, fused experts, quantised weights, pickle."""


class AdapterError(NeuronLedgerError):
    """A PEFT adapter that cannot be read, or that does not belong to its base model."""


class MismatchError(NeuronLedgerError):
    """Two models that should pair differ in architecture, shapes or tokenizer."""


class NonFiniteError(NeuronLedgerError):
    """A tensor holds NaN or infinity."""


class SettingsError(NeuronLedgerError):
    """A setting, or a combination of settings, that has no meaning here."""


class CalibrationError(NeuronLedgerError):
    """Prompts that cannot be turned into calibration tokens."""


class AlignmentError(NeuronLedgerError):
    """An aligned adapter that cannot be trained as asked: a library, rows or memory that are missing, a loss lost."""
