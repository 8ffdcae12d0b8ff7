-- What each model's requests consumed and how many there were, as decayed sums (services/optimizer/consumption.py).
CREATE TABLE consumption (
    model      text PRIMARY KEY,
    state      jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- The last footprints counted, so that one that is delivered again does not count twice. Written in one transaction with
-- what it was counted into; the oldest go.
CREATE TABLE counted (
    request_id text PRIMARY KEY,
    position   bigint GENERATED ALWAYS AS IDENTITY
);
CREATE INDEX counted_position ON counted (position);

-- Every evaluation that still matters, as it was published; quality is added up from these.
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
