-- Quality out of sample: what every evaluation says of the policies in force before it (shared/prequential.py).
CREATE TABLE quality_scores (
    evaluation_id text        NOT NULL,
    metric        text        NOT NULL,
    model         text        NOT NULL,
    evaluated_at  timestamptz NOT NULL,
    score         jsonb       NOT NULL,
    PRIMARY KEY (evaluation_id, metric)
);
CREATE INDEX quality_scores_age ON quality_scores (evaluated_at);
