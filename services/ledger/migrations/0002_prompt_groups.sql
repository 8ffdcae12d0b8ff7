-- Versions of learned prompt groups: what had been judged before each, counted by its groups.
CREATE TABLE prompt_groups (
    model text NOT NULL,
    version text NOT NULL,
    learned_at timestamptz NOT NULL,
    grouping jsonb NOT NULL,
    PRIMARY KEY (model, version, learned_at)
);
