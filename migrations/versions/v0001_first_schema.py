"""The first schema: models, dimensions, lineages, identifications, patches, claims and the ledger.

Written out, so that this version stays what it is when `registry.schema` moves on. The triggers hold what constraints
cannot: a ledger that only grows, and claims that stay where they are while their patch is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME = sa.String(length=255)
WORD = sa.String(length=16)
DIGEST = sa.String(length=64)
TIMESTAMP = sa.String(length=27)


def upgrade() -> None:
    """Create every table and trigger."""
    create_models()
    create_dimensions()
    create_lineages()
    create_identifications()
    create_patches()
    create_neurons()
    create_measurements()
    create_ledger()
    if op.get_bind().dialect.name == "postgresql":
        # Lineages and identifications name patches, which come later; SQLite takes such a key inside the table.
        for table in ("lineages", "identifications"):
            name = f"fk_{table}_head_patch_id_patches"
            op.create_foreign_key(op.f(name), table, "patches", ["head_patch_id"], ["id"])
        statements = POSTGRESQL_TRIGGERS
    else:
        statements = SQLITE_TRIGGERS
    for statement in statements:
        op.execute(sa.text(statement))


def create_models() -> None:
    """The registered models, their files, tensors and linear modules."""
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("role", WORD, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("architecture", NAME, nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("linear_parameters", sa.BigInteger(), nullable=False),
        sa.Column("state_digest", DIGEST, nullable=False),
        sa.Column("digest_algorithm", WORD, nullable=False),
        sa.Column("tokenizer_digest", DIGEST, nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.CheckConstraint("kind IN ('checkpoint', 'adapter')", name=op.f("ck_models_kind")),
        sa.CheckConstraint("role IN ('base', 'aligned', 'subject', 'reference')", name=op.f("ck_models_role")),
        sa.ForeignKeyConstraint(["base_model_id"], ["models.id"], name=op.f("fk_models_base_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("name", name=op.f("uq_models_name")),
    )
    op.create_table(
        "model_files",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("modified_ns", sa.BigInteger(), nullable=False),
        sa.Column("sha256", DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_files_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_files")),
        sa.UniqueConstraint("model_id", "file", name=op.f("uq_model_files_model_id_file")),
    )
    op.create_table(
        "model_tensors",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("dtype", WORD, nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("sha256", DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_tensors_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_tensors")),
        sa.UniqueConstraint("model_id", "name", name=op.f("uq_model_tensors_model_id_name")),
    )
    op.create_table(
        "model_modules",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.Column("kind", NAME, nullable=False),
        sa.Column("tensor", sa.Text(), nullable=False),
        sa.Column("out_features", sa.Integer(), nullable=False),
        sa.Column("in_features", sa.Integer(), nullable=False),
        sa.Column("transposed", sa.Boolean(), nullable=False),
        sa.Column("input_group", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_modules_model_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_modules")),
        sa.UniqueConstraint("model_id", "name", name=op.f("uq_model_modules_model_id_name")),
        sa.UniqueConstraint("model_id", "position", name=op.f("uq_model_modules_model_id_position")),
    )


def create_dimensions() -> None:
    """Safety dimensions and prompt sets."""
    op.create_table(
        "safety_dimensions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_safety_dimensions")),
        sa.UniqueConstraint("name", name=op.f("uq_safety_dimensions_name")),
    )
    op.create_table(
        "prompt_sets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("dimension_id", sa.Integer(), nullable=True),
        sa.Column("purpose", WORD, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_filter", sa.JSON(), nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("digest", DIGEST, nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.CheckConstraint(
            "purpose IN ('harmful', 'benign', 'heldout', 'evaluation')", name=op.f("ck_prompt_sets_purpose")
        ),
        sa.ForeignKeyConstraint(
            ["dimension_id"], ["safety_dimensions.id"], name=op.f("fk_prompt_sets_dimension_id_safety_dimensions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompt_sets")),
    )
    op.create_index(op.f("ix_prompt_sets_dimension_id"), "prompt_sets", ["dimension_id"])


def create_lineages() -> None:
    """Lineages and the present state of their working checkpoints."""
    op.create_table(
        "lineages",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("subject_id", sa.Integer(), nullable=False),
        sa.Column("aligned_id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("working_path", sa.Text(), nullable=False),
        sa.Column("head_patch_id", sa.Integer(), nullable=True),
        sa.Column("state", WORD, nullable=False),
        sa.Column("state_digest", DIGEST, nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.CheckConstraint("state IN ('active', 'closed')", name=op.f("ck_lineages_state")),
        sa.ForeignKeyConstraint(["aligned_id"], ["models.id"], name=op.f("fk_lineages_aligned_id_models")),
        sa.ForeignKeyConstraint(["base_id"], ["models.id"], name=op.f("fk_lineages_base_id_models")),
        sa.ForeignKeyConstraint(
            ["head_patch_id"], ["patches.id"], name=op.f("fk_lineages_head_patch_id_patches"), use_alter=True
        ),
        sa.ForeignKeyConstraint(["subject_id"], ["models.id"], name=op.f("fk_lineages_subject_id_models")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lineages")),
        sa.UniqueConstraint("name", name=op.f("uq_lineages_name")),
    )
    op.create_table(
        "lineage_files",
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("modified_ns", sa.BigInteger(), nullable=False),
        sa.Column("sha256", DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_lineage_files_lineage_id_lineages")),
        sa.PrimaryKeyConstraint("lineage_id", "file", name=op.f("pk_lineage_files")),
    )
    op.create_table(
        "lineage_tensors",
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("dtype", WORD, nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("sha256", DIGEST, nullable=False),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_lineage_tensors_lineage_id_lineages")),
        sa.PrimaryKeyConstraint("lineage_id", "name", name=op.f("pk_lineage_tensors")),
    )


def create_identifications() -> None:
    """Identifications and their scores, but for the neurons, which name patches."""
    op.create_table(
        "identifications",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("dimension_id", sa.Integer(), nullable=False),
        sa.Column("method", WORD, nullable=False),
        sa.Column("preset", NAME, nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("settings_digest", DIGEST, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("head_patch_id", sa.Integer(), nullable=True),
        sa.Column("state_digest", DIGEST, nullable=False),
        sa.Column("library_versions", sa.JSON(), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("artifact_digest", DIGEST, nullable=True),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.CheckConstraint("method IN ('fgsn', 'nlsr')", name=op.f("ck_identifications_method")),
        sa.ForeignKeyConstraint(
            ["dimension_id"], ["safety_dimensions.id"], name=op.f("fk_identifications_dimension_id_safety_dimensions")
        ),
        sa.ForeignKeyConstraint(
            ["head_patch_id"], ["patches.id"], name=op.f("fk_identifications_head_patch_id_patches"), use_alter=True
        ),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_identifications_lineage_id_lineages")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_identifications")),
    )
    op.create_index(
        op.f("ix_identifications_lineage_id_dimension_id"), "identifications", ["lineage_id", "dimension_id"]
    )
    op.create_table(
        "identification_prompt_sets",
        sa.Column("identification_id", sa.Integer(), nullable=False),
        sa.Column("prompt_set_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["identification_id"], ["identifications.id"], name=op.f("fk_identification_prompt_sets_identification")
        ),
        sa.ForeignKeyConstraint(
            ["prompt_set_id"], ["prompt_sets.id"], name=op.f("fk_identification_prompt_sets_prompt_set_id_prompt_sets")
        ),
        sa.PrimaryKeyConstraint("identification_id", "prompt_set_id", name=op.f("pk_identification_prompt_sets")),
    )
    op.create_table(
        "layer_scores",
        sa.Column("identification_id", sa.Integer(), nullable=False),
        sa.Column("block", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("gap", sa.Float(53), nullable=True),
        sa.Column("growth", sa.Float(53), nullable=True),
        sa.Column("in_scope", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["identification_id"],
            ["identifications.id"],
            name=op.f("fk_layer_scores_identification_id_identifications"),
        ),
        sa.PrimaryKeyConstraint("identification_id", "block", name=op.f("pk_layer_scores")),
    )


def create_patches() -> None:
    """Patches and the decisions on them."""
    op.create_table(
        "patches",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("identification_id", sa.Integer(), nullable=False),
        sa.Column("dimension_id", sa.Integer(), nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("parent_patch_id", sa.Integer(), nullable=True),
        sa.Column("digest_before", DIGEST, nullable=False),
        sa.Column("digest_after", DIGEST, nullable=True),
        sa.Column("artifact_digest", DIGEST, nullable=True),
        sa.Column("parameters_modified", sa.BigInteger(), nullable=False),
        sa.Column("parameters_total", sa.BigInteger(), nullable=False),
        sa.Column("linear_parameters_total", sa.BigInteger(), nullable=False),
        sa.Column("neurons_selected", sa.BigInteger(), nullable=False),
        sa.Column("neurons_protected", sa.BigInteger(), nullable=False),
        sa.Column("neurons_modified", sa.BigInteger(), nullable=False),
        sa.Column("rows_unchanged", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("applied_at", TIMESTAMP, nullable=True),
        sa.Column("reverted_at", TIMESTAMP, nullable=True),
        sa.CheckConstraint("kind IN ('fgsn', 'nlsr')", name=op.f("ck_patches_kind")),
        sa.CheckConstraint(
            "state IN ('planned', 'applying', 'applied', 'reverting', 'reverted', 'rejected')",
            name=op.f("ck_patches_state"),
        ),
        sa.CheckConstraint("sequence >= 1", name=op.f("ck_patches_sequence")),
        sa.ForeignKeyConstraint(
            ["dimension_id"], ["safety_dimensions.id"], name=op.f("fk_patches_dimension_id_safety_dimensions")
        ),
        sa.ForeignKeyConstraint(
            ["identification_id"], ["identifications.id"], name=op.f("fk_patches_identification_id_identifications")
        ),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_patches_lineage_id_lineages")),
        sa.ForeignKeyConstraint(["parent_patch_id"], ["patches.id"], name=op.f("fk_patches_parent_patch_id_patches")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patches")),
        sa.UniqueConstraint("lineage_id", "id", name=op.f("uq_patches_lineage_id_id")),
        sa.UniqueConstraint("lineage_id", "sequence", name=op.f("uq_patches_lineage_id_sequence")),
    )
    op.create_table(
        "patch_modules",
        sa.Column("patch_id", sa.Integer(), nullable=False),
        sa.Column("module_id", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("rows_unchanged", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("norm_before", sa.Float(53), nullable=True),
        sa.Column("norm_after", sa.Float(53), nullable=True),
        sa.Column("update_norms", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["module_id"], ["model_modules.id"], name=op.f("fk_patch_modules_module_id_model_modules")
        ),
        sa.ForeignKeyConstraint(["patch_id"], ["patches.id"], name=op.f("fk_patch_modules_patch_id_patches")),
        sa.PrimaryKeyConstraint("patch_id", "module_id", name=op.f("pk_patch_modules")),
    )
    op.create_table(
        "approvals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Integer(), nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.Column("decision", WORD, nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.CheckConstraint("decision IN ('approved', 'refused')", name=op.f("ck_approvals_decision")),
        sa.ForeignKeyConstraint(["patch_id"], ["patches.id"], name=op.f("fk_approvals_patch_id_patches")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approvals")),
    )
    op.create_index(op.f("ix_approvals_patch_id"), "approvals", ["patch_id"])


def create_neurons() -> None:
    """What is said and claimed of single neurons and directions."""
    op.create_table(
        "identified_neurons",
        sa.Column("identification_id", sa.Integer(), nullable=False),
        sa.Column("module_id", sa.Integer(), nullable=False),
        sa.Column("neuron", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("score", sa.Float(53), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=True),
        sa.Column("disposition", WORD, nullable=False),
        sa.Column("protected_by", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "disposition IN ('selected', 'benign-overlap', 'protected')", name=op.f("ck_identified_neurons_disposition")
        ),
        sa.CheckConstraint("neuron >= 0", name=op.f("ck_identified_neurons_neuron")),
        sa.ForeignKeyConstraint(
            ["identification_id"],
            ["identifications.id"],
            name=op.f("fk_identified_neurons_identification_id_identifications"),
        ),
        sa.ForeignKeyConstraint(
            ["module_id"], ["model_modules.id"], name=op.f("fk_identified_neurons_module_id_model_modules")
        ),
        sa.ForeignKeyConstraint(
            ["protected_by"], ["patches.id"], name=op.f("fk_identified_neurons_protected_by_patches")
        ),
        sa.PrimaryKeyConstraint("identification_id", "module_id", "neuron", name=op.f("pk_identified_neurons")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "protected_neurons",
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("module_id", sa.Integer(), nullable=False),
        sa.Column("neuron", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("patch_id", sa.Integer(), nullable=False),
        sa.CheckConstraint("neuron >= 0", name=op.f("ck_protected_neurons_neuron")),
        sa.ForeignKeyConstraint(
            ["lineage_id", "patch_id"],
            ["patches.lineage_id", "patches.id"],
            name=op.f("fk_protected_neurons_lineage_id_patch_id_patches"),
        ),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_protected_neurons_lineage_id_lineages")),
        sa.ForeignKeyConstraint(
            ["module_id"], ["model_modules.id"], name=op.f("fk_protected_neurons_module_id_model_modules")
        ),
        sa.PrimaryKeyConstraint("lineage_id", "module_id", "neuron", name=op.f("pk_protected_neurons")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_protected_neurons_patch_id"), "protected_neurons", ["patch_id"])
    op.create_table(
        "protected_directions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("module_id", sa.Integer(), nullable=False),
        sa.Column("patch_id", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.CheckConstraint("rank >= 1", name=op.f("ck_protected_directions_rank")),
        sa.ForeignKeyConstraint(
            ["lineage_id", "patch_id"],
            ["patches.lineage_id", "patches.id"],
            name=op.f("fk_protected_directions_lineage_id_patch_id_patches"),
        ),
        sa.ForeignKeyConstraint(
            ["lineage_id"], ["lineages.id"], name=op.f("fk_protected_directions_lineage_id_lineages")
        ),
        sa.ForeignKeyConstraint(
            ["module_id"], ["model_modules.id"], name=op.f("fk_protected_directions_module_id_model_modules")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_protected_directions")),
        sa.UniqueConstraint(
            "lineage_id", "module_id", "patch_id", name=op.f("uq_protected_directions_lineage_id_module_id_patch_id")
        ),
    )
    op.create_index(op.f("ix_protected_directions_patch_id"), "protected_directions", ["patch_id"])


def create_measurements() -> None:
    """Evaluations."""
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("lineage_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=True),
        sa.Column("patch_id", sa.Integer(), nullable=True),
        sa.Column("stage", NAME, nullable=False),
        sa.Column("dimension_id", sa.Integer(), nullable=True),
        sa.Column("metric", NAME, nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("numerator", sa.Integer(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("interval_low", sa.Float(53), nullable=True),
        sa.Column("interval_high", sa.Float(53), nullable=True),
        sa.Column("judge", NAME, nullable=True),
        sa.Column("judge_version", NAME, nullable=True),
        sa.Column("prompt_set_id", sa.Integer(), nullable=True),
        sa.Column("generation", sa.JSON(), nullable=False),
        sa.Column("state_digest", DIGEST, nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.ForeignKeyConstraint(
            ["dimension_id"], ["safety_dimensions.id"], name=op.f("fk_evaluations_dimension_id_safety_dimensions")
        ),
        sa.ForeignKeyConstraint(["lineage_id"], ["lineages.id"], name=op.f("fk_evaluations_lineage_id_lineages")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_evaluations_model_id_models")),
        sa.ForeignKeyConstraint(["patch_id"], ["patches.id"], name=op.f("fk_evaluations_patch_id_patches")),
        sa.ForeignKeyConstraint(
            ["prompt_set_id"], ["prompt_sets.id"], name=op.f("fk_evaluations_prompt_set_id_prompt_sets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index(op.f("ix_evaluations_lineage_id"), "evaluations", ["lineage_id"])
    op.create_index(op.f("ix_evaluations_patch_id"), "evaluations", ["patch_id"])


def create_ledger() -> None:
    """The audit ledger."""
    op.create_table(
        "ledger_events",
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("created_at", TIMESTAMP, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.Column("action", NAME, nullable=False),
        sa.Column("subject_kind", NAME, nullable=False),
        sa.Column("subject_name", NAME, nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("previous_hash", DIGEST, nullable=False),
        sa.Column("hash", DIGEST, nullable=False),
        sa.CheckConstraint("sequence >= 1", name=op.f("ck_ledger_events_sequence")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_ledger_events")),
    )
    op.create_index(
        op.f("ix_ledger_events_subject_kind_subject_name"), "ledger_events", ["subject_kind", "subject_name"]
    )


SQLITE_TRIGGERS = (
    # INSERT OR REPLACE removes the row that is in the way without firing DELETE triggers: hence the checks on INSERT.
    """
    CREATE TRIGGER ledger_events_continue BEFORE INSERT ON ledger_events
    WHEN NEW.sequence IS NOT 1 + (SELECT coalesce(max(sequence), 0) FROM ledger_events)
      OR NEW.previous_hash IS NOT coalesce(
           (SELECT hash FROM ledger_events WHERE sequence = NEW.sequence - 1), printf('%064d', 0))
    BEGIN SELECT RAISE(ABORT, 'a ledger event continues the chain'); END
    """,
    """
    CREATE TRIGGER ledger_events_no_update BEFORE UPDATE ON ledger_events
    BEGIN SELECT RAISE(ABORT, 'ledger events are append-only'); END
    """,
    """
    CREATE TRIGGER ledger_events_no_delete BEFORE DELETE ON ledger_events
    BEGIN SELECT RAISE(ABORT, 'ledger events are append-only'); END
    """,
    """
    CREATE TRIGGER protected_neurons_no_second BEFORE INSERT ON protected_neurons
    WHEN EXISTS (
      SELECT 1 FROM protected_neurons
      WHERE lineage_id = NEW.lineage_id AND module_id = NEW.module_id AND neuron = NEW.neuron)
    BEGIN SELECT RAISE(ABORT, 'neuron is already protected'); END
    """,
    """
    CREATE TRIGGER protected_neurons_no_update BEFORE UPDATE ON protected_neurons
    BEGIN SELECT RAISE(ABORT, 'a claim is never moved'); END
    """,
    """
    CREATE TRIGGER protected_neurons_no_release BEFORE DELETE ON protected_neurons
    WHEN (SELECT state FROM patches WHERE id = OLD.patch_id) = 'applied'
    BEGIN SELECT RAISE(ABORT, 'the claims of an applied patch are not released'); END
    """,
)

POSTGRESQL_TRIGGERS = (
    """
    CREATE FUNCTION ledger_events_continue() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE last_sequence integer; last_hash text;
    BEGIN
      SELECT sequence, hash INTO last_sequence, last_hash FROM ledger_events ORDER BY sequence DESC LIMIT 1;
      IF NEW.sequence <> coalesce(last_sequence, 0) + 1
         OR NEW.previous_hash <> coalesce(last_hash, repeat('0', 64)) THEN
        RAISE EXCEPTION 'a ledger event continues the chain' USING ERRCODE = 'integrity_constraint_violation';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER ledger_events_continue BEFORE INSERT ON ledger_events
    FOR EACH ROW EXECUTE FUNCTION ledger_events_continue()
    """,
    """
    CREATE FUNCTION ledger_events_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      RAISE EXCEPTION 'ledger events are append-only' USING ERRCODE = 'integrity_constraint_violation';
    END $$
    """,
    """
    CREATE TRIGGER ledger_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_events
    FOR EACH STATEMENT EXECUTE FUNCTION ledger_events_append_only()
    """,
    """
    CREATE FUNCTION protected_neurons_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      RAISE EXCEPTION 'a claim is never moved' USING ERRCODE = 'integrity_constraint_violation';
    END $$
    """,
    """
    CREATE TRIGGER protected_neurons_no_update BEFORE UPDATE OR TRUNCATE ON protected_neurons
    FOR EACH STATEMENT EXECUTE FUNCTION protected_neurons_fixed()
    """,
    """
    CREATE FUNCTION protected_neurons_no_release() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM released JOIN patches ON patches.id = released.patch_id WHERE patches.state = 'applied') THEN
        RAISE EXCEPTION 'the claims of an applied patch are not released'
          USING ERRCODE = 'integrity_constraint_violation';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER protected_neurons_no_release AFTER DELETE ON protected_neurons
    REFERENCING OLD TABLE AS released
    FOR EACH STATEMENT EXECUTE FUNCTION protected_neurons_no_release()
    """,
)
