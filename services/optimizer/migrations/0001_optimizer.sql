-- Decayed sums of each model's footprints: energy, time, traffic (services/optimizer/costs.py).
CREATE TABLE consumption (
    model      text PRIMARY KEY,
    state      jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- Ids of the last footprints counted, so that a redelivered one is ignored. Written in one transaction with the
-- consumption that they are counted into; the oldest are deleted.
CREATE TABLE counted (
    request_id text PRIMARY KEY,
    position   bigint GENERATED ALWAYS AS IDENTITY
);
CREATE INDEX counted_position ON counted (position);

-- Every evaluation that is not too old, as published; quality is estimated from them.
CREATE TABLE evaluations (
    evaluation_id text PRIMARY KEY,
    model         text NOT NULL,
    evaluated_at  timestamptz NOT NULL,
    message       jsonb NOT NULL
);
CREATE INDEX evaluations_age ON evaluations (model, evaluated_at);

-- The last policy of each model: its version, and what a new one is compared with.
CREATE TABLE policies (
    model   text PRIMARY KEY,
    version bigint NOT NULL,
    message jsonb NOT NULL
);
