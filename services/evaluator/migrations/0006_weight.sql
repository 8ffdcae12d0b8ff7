-- Number of sampled prompts that a judged prompt stands for: more than 1 in groups that are judged thinly.
ALTER TABLE judged ADD COLUMN weight double precision NOT NULL DEFAULT 1;
