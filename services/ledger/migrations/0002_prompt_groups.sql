-- Versions of learned prompt groups, each with the counts of earlier judgments re-aggregated by its groups.
CREATE TABLE prompt_groups (
    model text NOT NULL,
    version text NOT NULL,
    learned_at timestamptz NOT NULL,
    grouping jsonb NOT NULL,
    PRIMARY KEY (model, version, learned_at)
);
