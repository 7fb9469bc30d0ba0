"""Smallest records that the tests of the registry need."""

from sqlalchemy.orm import Session

from registry.schema import Identification, Lineage, Model, ModelModule, Patch, PatchState, SafetyDimension

DIGEST = "a" * 64


def add_model(session: Session, name: str, *, modules: int = 2, out_features: int = 8) -> Model:
    """A model with linear modules of `out_features` neurons each."""
    model = Model(
        name=name, role="subject", kind="checkpoint", path=f"/models/{name}", architecture="LlamaForCausalLM",
        parameters=1000, linear_parameters=800, state_digest=DIGEST, actor="ada",
    )  # fmt: skip
    model.modules = [
        ModelModule(
            position=number, name=f"model.layers.{number}.mlp.up_proj", block=number, kind="up_proj",
            tensor=f"model.layers.{number}.mlp.up_proj.weight", out_features=out_features, in_features=4,
            transposed=False, input_group=f"model.layers.{number}.mlp.up_proj",
        )
        for number in range(modules)
    ]  # fmt: skip
    session.add(model)
    session.flush()
    return model


def add_lineage(session: Session, name: str = "assistant", *, modules: int = 2, out_features: int = 8) -> Lineage:
    """A lineage on a subject of its own."""
    subject = add_model(session, f"{name}-subject", modules=modules, out_features=out_features)
    lineage = Lineage(
        name=name,
        subject=subject,
        aligned=subject,
        base=subject,
        working_path="/work",
        state_digest=DIGEST,
        actor="ada",
    )
    session.add(lineage)
    session.flush()
    return lineage


def add_patch(session: Session, lineage: Lineage, *, sequence: int = 1, state: PatchState = "applying") -> Patch:
    """A patch with a dimension and an identification of its own."""
    dimension = SafetyDimension(name=f"{lineage.name}-{sequence}-{state}", actor="ada")
    session.add(dimension)
    session.flush()
    identification = Identification(
        lineage_id=lineage.id, dimension_id=dimension.id, method="fgsn", settings_digest=DIGEST, seed=0,
        state_digest=DIGEST, actor="ada",
    )  # fmt: skip
    session.add(identification)
    session.flush()
    patch = Patch(
        lineage_id=lineage.id, sequence=sequence, identification_id=identification.id, dimension_id=dimension.id,
        kind="fgsn", state=state, digest_before=DIGEST, parameters_total=1000, linear_parameters_total=800, actor="ada",
    )  # fmt: skip
    session.add(patch)
    session.flush()
    return patch
