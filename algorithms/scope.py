"""Which linear modules a run of either method has in scope."""

from collections.abc import Iterable

from algorithms.architectures import LinearModule
from algorithms.errors import MismatchError, SettingsError
from algorithms.nlsr_settings import NlsrSettings
from algorithms.settings import FgsnSettings
from algorithms.weights import WeightSource


def require_same_modules(subject: WeightSource, *others: WeightSource) -> None:
    """Refuse models of other modules or shapes.

    Raises:
        MismatchError: names the module.
    """
    for other in others:
        for name, module in subject.modules.items():
            paired = other.modules.get(name)
            if paired is None or (paired.out_features, paired.in_features) != (module.out_features, module.in_features):
                raise MismatchError(
                    f"{other.path} has no module {name} of shape {module.out_features} × {module.in_features}",
                    "Use models of one architecture",
                )


def depth_of(source: WeightSource) -> int:
    """How many transformer blocks a model has."""
    return 1 + max(module.block for module in source.modules.values())


def fixed_blocks(depth: int, settings: FgsnSettings | NlsrSettings) -> range | None:
    """The blocks of `all` or of an explicit range; None where the gap curve decides.

    Raises:
        SettingsError: the range ends beyond the last block.
    """
    if settings.layers == "all":
        return range(depth)
    explicit = settings.block_range
    if explicit is None:
        return None
    if explicit[1] >= depth:
        raise SettingsError(
            f"layers = {settings.layers} ends beyond the last block, {depth - 1}", "Count blocks from 0"
        )
    return range(explicit[0], explicit[1] + 1)


def modules_of_kinds(source: WeightSource, kinds: Iterable[str]) -> list[LinearModule]:
    """The linear modules of these kinds, such as q_proj; all where no kind is given.

    Raises:
        SettingsError: the model has no module of a kind.
    """
    wanted = set(kinds)
    known = {module.kind for module in source.modules.values()}
    unknown = sorted(wanted - known)
    if unknown:
        raise SettingsError(
            f"The model has no linear modules of kind {unknown[0]}", f"Use some of {', '.join(sorted(known))}"
        )
    return [module for module in source.modules.values() if not wanted or module.kind in wanted]
