-- Judged prompts, from which prompt groups are learned: features and outcomes, not the prompts themselves.
CREATE TABLE judged (
    model        text        NOT NULL,
    request_id   text        NOT NULL,
    stratum      text        NOT NULL,
    prompt_group text        NOT NULL,
    evaluated_at timestamptz NOT NULL,
    features     integer     NOT NULL,
    looks        bytea       NOT NULL,
    answers      jsonb       NOT NULL,
    PRIMARY KEY (model, request_id)
);
CREATE INDEX judged_age ON judged (model, evaluated_at);

-- The newest version of each model's prompt groups.
CREATE TABLE prompt_groups (
    model      text        PRIMARY KEY,
    version    text,
    learned_at timestamptz NOT NULL,
    prompts    integer     NOT NULL,
    message    text        NOT NULL,
    published  boolean     NOT NULL DEFAULT false
);
