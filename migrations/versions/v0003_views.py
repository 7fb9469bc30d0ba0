"""Views for those who read SQL: patches, protected neurons, histories, capacity, evaluations, events by name.

They hold nothing of their own, and docs/registry.md describes them. A later migration that rebuilds a table under one
of them drops the views first and creates its own afterwards.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the views."""
    extract = PAYLOAD[op.get_bind().dialect.name]
    for name, query in VIEWS.items():
        op.execute(sa.text(f"CREATE VIEW {name} AS {query.format(**extract)}"))


def downgrade() -> None:
    """Drop the views; no table changes."""
    for name in reversed(VIEWS):
        op.execute(sa.text(f"DROP VIEW {name}"))


PAYLOAD = {
    "sqlite": {
        "patch": "CASE WHEN json_valid(e.payload) THEN json_extract(e.payload, '$.patch') END",
        "dimension": "CASE WHEN json_valid(e.payload) THEN json_extract(e.payload, '$.dimension') END",
        "reason": "CASE WHEN json_valid(e.payload) THEN json_extract(e.payload, '$.reason') END",
    },
    "postgresql": {
        "patch": "CAST(CAST(e.payload AS jsonb) ->> 'patch' AS integer)",
        "dimension": "CAST(e.payload AS jsonb) ->> 'dimension'",
        "reason": "CAST(e.payload AS jsonb) ->> 'reason'",
    },
}

VIEWS = {
    "v_patches": """
        SELECT l.name AS lineage, p.sequence AS patch, d.name AS dimension, p.kind AS method, p.state AS state,
               p.identification_id AS identification,
               p.neurons_selected AS neurons_selected, p.neurons_protected AS neurons_already_protected,
               p.neurons_modified AS neurons_modified, p.rows_unchanged AS rows_unchanged,
               (SELECT count(*) FROM patch_modules AS c WHERE c.patch_id = p.id) AS modules,
               p.parameters_modified AS parameters_modified,
               CAST(p.parameters_modified AS DOUBLE PRECISION) / p.parameters_total AS modified_share,
               CAST(p.parameters_modified AS DOUBLE PRECISION) / p.linear_parameters_total AS modified_linear_share,
               p.digest_before AS digest_before, p.digest_after AS digest_after, p.artifact_digest AS artifact,
               p.actor AS actor, coalesce(p.reason, '') AS reason, p.failure AS failure,
               p.created_at AS created_at, p.applied_at AS applied_at, p.reverted_at AS reverted_at
        FROM patches AS p
        JOIN lineages AS l ON l.id = p.lineage_id
        JOIN safety_dimensions AS d ON d.id = p.dimension_id
    """,
    "v_protected_neurons": """
        SELECT l.name AS lineage, m.name AS module, m.block AS block, m.kind AS kind, n.neuron AS neuron,
               p.sequence AS patch, d.name AS dimension, p.applied_at AS protected_since, p.actor AS actor
        FROM protected_neurons AS n
        JOIN lineages AS l ON l.id = n.lineage_id
        JOIN model_modules AS m ON m.id = n.module_id
        JOIN patches AS p ON p.id = n.patch_id
        JOIN safety_dimensions AS d ON d.id = p.dimension_id
    """,
    "v_capacity": """
        SELECT l.name AS lineage, m.position AS position, m.name AS module, m.block AS block, m.kind AS kind,
               m.out_features AS neurons, coalesce(c.protected, 0) AS protected,
               m.out_features - coalesce(c.protected, 0) AS unprotected
        FROM lineages AS l
        JOIN model_modules AS m ON m.model_id = l.subject_id
        LEFT JOIN (
            SELECT n.lineage_id AS lineage_id, n.module_id AS module_id, count(*) AS protected
            FROM protected_neurons AS n GROUP BY n.lineage_id, n.module_id
        ) AS c ON c.lineage_id = l.id AND c.module_id = m.id
    """,
    "v_evaluations": """
        SELECT l.name AS lineage, e.stage AS stage, p.sequence AS patch, d.name AS dimension, e.metric AS metric,
               e.value AS value, e.numerator AS numerator, e.n AS n,
               e.interval_low AS interval_low, e.interval_high AS interval_high,
               e.judge AS judge, e.judge_version AS judge_version, e.state_digest AS state_digest,
               e.actor AS actor, e.created_at AS created_at
        FROM evaluations AS e
        JOIN lineages AS l ON l.id = e.lineage_id
        LEFT JOIN patches AS p ON p.id = e.patch_id
        LEFT JOIN safety_dimensions AS d ON d.id = e.dimension_id
    """,
    "v_events": """
        SELECT e.sequence AS event, e.created_at AS created_at, e.actor AS actor, e.action AS action,
               e.subject_kind AS subject_kind, e.subject_name AS subject_name,
               CASE WHEN e.subject_kind = 'lineage' THEN e.subject_name END AS lineage,
               {patch} AS patch,
               CASE WHEN e.subject_kind = 'dimension' THEN e.subject_name ELSE coalesce({dimension}, d.name) END
                   AS dimension,
               {reason} AS reason, e.payload AS payload, e.hash AS hash
        FROM ledger_events AS e
        LEFT JOIN lineages AS l ON e.subject_kind = 'lineage' AND l.name = e.subject_name
        LEFT JOIN patches AS p ON p.lineage_id = l.id AND p.sequence = {patch}
        LEFT JOIN safety_dimensions AS d ON d.id = p.dimension_id
    """,
    "v_neuron_history": """
        SELECT l.name AS lineage, m.name AS module, n.neuron AS neuron, i.created_at AS happened_at,
               'identified' AS what, d.name AS dimension, i.id AS identification, h.sequence AS patch,
               n.score AS score, n.rank AS rank, n.disposition AS disposition, i.actor AS actor
        FROM lineages AS l
        JOIN model_modules AS m ON m.model_id = l.subject_id
        JOIN identifications AS i ON i.lineage_id = l.id
        JOIN identified_neurons AS n ON n.identification_id = i.id AND n.module_id = m.id
        JOIN safety_dimensions AS d ON d.id = i.dimension_id
        LEFT JOIN patches AS h ON h.id = n.protected_by
        UNION ALL
        SELECT l.name, m.name, n.neuron, p.applied_at, 'claimed', d.name, p.identification_id, p.sequence,
               NULL, NULL, NULL, p.actor
        FROM lineages AS l
        JOIN model_modules AS m ON m.model_id = l.subject_id
        JOIN patches AS p ON p.lineage_id = l.id AND p.applied_at IS NOT NULL
        JOIN identified_neurons AS n ON n.identification_id = p.identification_id AND n.module_id = m.id
             AND n.disposition = 'selected'
        JOIN safety_dimensions AS d ON d.id = p.dimension_id
        UNION ALL
        SELECT l.name, m.name, n.neuron, p.reverted_at, 'reverted', d.name, p.identification_id, p.sequence,
               NULL, NULL, NULL,
               (SELECT e.actor FROM v_events AS e
                WHERE e.action = 'patch.reverted' AND e.lineage = l.name AND e.patch = p.sequence)
        FROM lineages AS l
        JOIN model_modules AS m ON m.model_id = l.subject_id
        JOIN patches AS p ON p.lineage_id = l.id AND p.reverted_at IS NOT NULL
        JOIN identified_neurons AS n ON n.identification_id = p.identification_id AND n.module_id = m.id
             AND n.disposition = 'selected'
        JOIN safety_dimensions AS d ON d.id = p.dimension_id
    """,
}
"""In the order of their making: the history of neurons reads the events."""
