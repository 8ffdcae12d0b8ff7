-- Samples for evaluations. Prompts are personal data: a sample that leaves the reservoir is deleted.
CREATE TABLE reservoir (
    model        text             NOT NULL,
    request_id   text             NOT NULL,
    prompt_group text             NOT NULL,
    sampled_at   timestamptz      NOT NULL,
    draw         double precision NOT NULL,
    evaluations  integer          NOT NULL DEFAULT 0,
    sample       text             NOT NULL,
    PRIMARY KEY (model, request_id)
);
CREATE INDEX reservoir_stratum ON reservoir (model, prompt_group);
CREATE INDEX reservoir_age ON reservoir (sampled_at);

-- Traffic of each group by hour, without prompts.
CREATE TABLE arrivals (
    model        text        NOT NULL,
    prompt_group text        NOT NULL,
    hour         timestamptz NOT NULL,
    samples      bigint      NOT NULL,
    PRIMARY KEY (model, prompt_group, hour)
);

CREATE TABLE evaluations (
    evaluation_id text             PRIMARY KEY,
    model         text             NOT NULL,
    trigger       text             NOT NULL,
    evaluated_at  timestamptz      NOT NULL,
    status        text             NOT NULL CHECK (status IN ('running', 'finished', 'failed', 'interrupted')),
    reason        text,
    quality       text,
    published     boolean          NOT NULL DEFAULT false
);
CREATE INDEX evaluations_of_model ON evaluations (model, evaluated_at DESC);

-- Energy that the ledger attributed to the calls of evaluations.
CREATE TABLE energy (
    purpose text             NOT NULL,
    pool    text             NOT NULL,
    joules  double precision NOT NULL,
    tokens  bigint           NOT NULL,
    PRIMARY KEY (purpose, pool)
);
