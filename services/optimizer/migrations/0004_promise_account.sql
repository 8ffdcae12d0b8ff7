-- What was promised to each model's requests and what was kept, by hour and metric: sums over requests
-- (services/optimizer/promise.py).
CREATE TABLE promise_account (
    model    text NOT NULL,
    hour     timestamptz NOT NULL,
    metric   text NOT NULL,
    requests double precision NOT NULL,
    promised double precision NOT NULL,
    kept     double precision NOT NULL,
    PRIMARY KEY (model, hour, metric)
);

-- Up to when each model's time is in the account.
CREATE TABLE promise_booked (
    model text PRIMARY KEY,
    until timestamptz
);
