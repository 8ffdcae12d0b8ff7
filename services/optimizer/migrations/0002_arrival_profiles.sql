-- Decayed sums of every pool's arrivals by hour of day (services/optimizer/capacity.py), for the forecast of endpoints.
CREATE TABLE arrival_profiles (
    pool       text PRIMARY KEY,
    state      jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
