"""NLSR in the demo: a lineage of its own with a control beside it, and a lineage that both methods patch.

The settings were chosen on this laboratory (docs/nlsr.md): at the default β of 0.9 and half of the modules its patches
repair next to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from algorithms.laboratory import Laboratory
from algorithms.nlsr_settings import nlsr_settings
from algorithms.settings import FgsnSettings
from governance.demo_steps import (
    PatchFigures,
    StageFigures,
    measure_stage,
    patch_dimension,
    patch_figures,
    patch_sentence,
)
from governance.patch_artifact import open_artifact
from governance.workspace import Workspace
from registry import claims, queries

LINEAGE = "nlsr"
CONTROL = "nlsr-random-control"
COMBINED = "fgsn-and-nlsr"
LINEAGES = (LINEAGE, CONTROL, COMBINED)
CHOSEN: dict[str, Any] = {"beta": 0.3, "sparsity": 0.5, "selection": "all", "layers": "0..2"}
COMBINED_SPARSITY = 0.7
"""Where FGSN has patched already, less has to be transplanted, and at 0.5 the task began to suffer."""


@dataclass(frozen=True)
class PatchClaims:
    """How many neurons one applied patch wrote, as its artifact has it, and claims, as the registry has it."""

    patch: int
    method: str
    dimension: str
    written: int
    claimed: int


@dataclass(frozen=True)
class ClaimsProof:
    """What the claims of a lineage say of its patches.

    Attributes:
        patches: every applied patch.
        claims: rows of `protected_neurons` of this lineage.
        neurons: different neurons that the artifacts of its patches hold.
        written_twice: neurons that two artifacts hold.
        agree: whether the claims of every patch are the neurons of its artifact.
    """

    patches: tuple[PatchClaims, ...]
    claims: int
    neurons: int
    written_twice: int
    agree: bool

    @property
    def proves(self) -> bool:
        """Whether no neuron was modified twice, and every modified one is claimed."""
        return self.agree and not self.written_twice and self.claims == self.neurons

    @property
    def sentence(self) -> str:
        """What was compared, and what came of it."""
        written = " + ".join(f"{patch.written:,} ({patch.method}, {patch.dimension})" for patch in self.patches)
        verdict = "no neuron was modified twice" if self.proves else "NEURONS WERE MODIFIED TWICE OR NOT CLAIMED"
        return f"Both methods: {written} = {self.claims:,} claims on {self.neurons:,} different neurons: {verdict}."


@dataclass(frozen=True)
class NlsrFigures:
    """What the demo shows of NLSR; `stages` begins with the fine-tuned model."""

    settings: dict[str, Any]
    chosen: str
    stages: tuple[StageFigures, ...]
    patches: tuple[PatchFigures, ...]
    control_stages: tuple[StageFigures, ...]
    control_patches: tuple[PatchFigures, ...]
    combined_stages: tuple[StageFigures, ...]
    combined_patches: tuple[PatchFigures, ...]
    claims: ClaimsProof


def show_nlsr(
    workspace: Workspace,
    laboratory: Laboratory,
    names: list[str],
    fgsn: FgsnSettings,
    say: Callable[[str], None],
) -> NlsrFigures:
    """Patch every dimension by NLSR, then the first one by FGSN and the second one by NLSR in another lineage.

    Args:
        workspace: of the demo, with `LINEAGES` made.
        laboratory: the models and prompts.
        names: the dimensions, at least two.
        fgsn: settings of the demo's FGSN patches.
        say: told each step in a sentence.
    """
    settings = nlsr_settings("default", {**CHOSEN, "seed": fgsn.seed})
    random = settings.model_copy(update={"region_score": "random"})
    say("Patching another lineage by NLSR: neurons of an extrapolated reference take the place of the model's own.")

    def patched(lineage: str, dimension: str, method: Any) -> tuple[PatchFigures, StageFigures]:
        summary = patch_dimension(workspace, lineage, dimension, method, "default")
        say(patch_sentence(summary))
        return patch_figures(summary), measure_stage(workspace, laboratory, lineage, "head", f"after {dimension}")

    tuned = measure_stage(workspace, laboratory, LINEAGE, "subject")
    own = [patched(LINEAGE, name, settings) for name in names]
    say("Setting a control beside it: random neurons of the same modules, the same transplantation, the same share.")
    # The draw does not depend on the dimension, so one patch is the control of the whole lineage.
    control = [patched(CONTROL, names[0], random)]
    say("Patching one dimension by FGSN and the next one by NLSR, in one lineage.")
    smaller = settings.model_copy(update={"sparsity": COMBINED_SPARSITY})
    both = [patched(COMBINED, names[0], fgsn), patched(COMBINED, names[1], smaller)]
    proof = claims_proof(workspace, COMBINED)
    say(proof.sentence)
    return NlsrFigures(
        settings=settings.model_dump(mode="json"),
        chosen=", ".join(f"{name} {value}" for name, value in CHOSEN.items()),
        stages=(tuned, *(stage for _, stage in own)),
        patches=tuple(patch for patch, _ in own),
        control_stages=tuple(stage for _, stage in control),
        control_patches=tuple(patch for patch, _ in control),
        combined_stages=(tuned, *(stage for _, stage in both)),
        combined_patches=tuple(patch for patch, _ in both),
        claims=proof,
    )


def claims_proof(workspace: Workspace, lineage_name: str) -> ClaimsProof:
    """Compare the claims of a lineage with what the artifacts of its applied patches hold.

    Raises:
        RecordNotFoundError: no lineage of that name.
    """
    with workspace.registry.read() as session:
        lineage = queries.get_lineage(session, lineage_name)
        names = {number: name for name, number in queries.module_ids(session, lineage.subject_id).items()}
        claimed: dict[int, set[tuple[str, int]]] = {}
        for claim in claims.claims(session, lineage.id):
            module = names[claim.module_id]
            claimed.setdefault(claim.patch_id, set()).update((module, neuron) for neuron in claim.neurons)
        applied = queries.applied_patches(session, lineage.id)
        written = {}
        for patch in applied:
            with open_artifact(workspace.store.path(patch.artifact_digest or "")) as artifact:
                written[patch.id] = {
                    (module.name, neuron)
                    for module in artifact.modules
                    for neuron in artifact.rows(module.name).tolist()
                }
        neurons = set().union(*written.values()) if written else set()
        return ClaimsProof(
            patches=tuple(
                PatchClaims(
                    patch=patch.sequence,
                    method=patch.kind,
                    dimension=patch.dimension.name,
                    written=len(written[patch.id]),
                    claimed=len(claimed.get(patch.id, ())),
                )
                for patch in applied
            ),
            claims=sum(map(len, claimed.values())),
            neurons=len(neurons),
            written_twice=sum(map(len, written.values())) - len(neurons),
            agree=written == {patch.id: claimed.get(patch.id, set()) for patch in applied}
            and set(claimed) <= set(written),
        )
