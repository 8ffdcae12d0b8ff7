-- Sums are removed by their age.
CREATE INDEX hours_by_time ON hours (hour);
