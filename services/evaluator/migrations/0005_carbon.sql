-- Carbon that the ledger attributed to a model's requests and to its evaluations, by hour, for the evaluator's budget.
CREATE TABLE carbon (
    model         text             NOT NULL,
    hour          timestamptz      NOT NULL,
    evaluation_id text             NOT NULL, -- empty: requests
    calls         bigint           NOT NULL,
    grams         double precision NOT NULL,
    PRIMARY KEY (model, hour, evaluation_id)
);
