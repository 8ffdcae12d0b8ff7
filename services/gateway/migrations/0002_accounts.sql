-- Limits, requests with their footprints, and sums by hour and month.
--
-- An account is a key, 'key/ID', or all keys of a tenant, 'tenant/NAME'. Times that end in _wall are this server's
-- clock, by which every gateway measures alike; all others are event time.

-- Limits of an account, NULL: none, with what was used of them in one minute.
CREATE TABLE limits (
    account text PRIMARY KEY,
    requests_per_minute integer,
    tokens_per_minute bigint,
    concurrent_requests integer,
    grams_per_month double precision,
    most_level text,
    when_spent text NOT NULL DEFAULT 'refuse',
    minute_wall timestamptz NOT NULL DEFAULT '-infinity',
    used_requests integer NOT NULL DEFAULT 0,
    used_tokens bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- Gateways that run; one that does not renew its row has died, and its requests are not open any more.
CREATE TABLE instances (id text PRIMARY KEY, expires_at_wall timestamptz NOT NULL);

-- Every admitted request: open, then answered or not, then with its footprint.
CREATE TABLE requests (
    id text PRIMARY KEY,
    record text,
    key_id text NOT NULL,
    tenant text,
    model text NOT NULL,
    created_at timestamptz NOT NULL,
    instance text NOT NULL,
    expires_at_wall timestamptz NOT NULL,
    minute_wall timestamptz NOT NULL,
    reserved_tokens bigint NOT NULL,
    done boolean NOT NULL DEFAULT false,
    answered boolean NOT NULL DEFAULT false,
    pool text,
    level text,
    zone text,
    prompt_tokens bigint,
    completion_tokens bigint,
    estimated_j double precision,
    estimated_g double precision,
    estimate_source text,
    reference_g double precision,
    energy_j double precision,
    intensity_g_per_kwh double precision,
    operational_g double precision,
    embodied_g double precision,
    total_g double precision
) WITH (fillfactor = 70);
CREATE INDEX requests_open_by_key ON requests (key_id) WHERE NOT done;
CREATE INDEX requests_open_by_tenant ON requests (tenant) WHERE NOT done;
CREATE INDEX requests_by_time ON requests (created_at);

-- Sums of `requests` by the hour in which they were received; kept when those are removed.
CREATE TABLE hours (
    key_id text NOT NULL,
    tenant text,
    hour timestamptz NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens numeric NOT NULL,
    completion_tokens numeric NOT NULL,
    metered bigint NOT NULL,
    joules double precision NOT NULL,
    priced bigint NOT NULL,
    grams double precision NOT NULL,
    compared bigint NOT NULL,
    saved_grams double precision NOT NULL,
    estimated_joules double precision NOT NULL,
    estimated_grams double precision NOT NULL,
    PRIMARY KEY (key_id, hour)
);
CREATE INDEX hours_by_tenant ON hours (tenant, hour);

-- What an account has spent of its carbon budget: attributed grams, and estimates where there are none yet.
CREATE TABLE months (
    account text NOT NULL,
    month timestamptz NOT NULL,
    grams double precision NOT NULL,
    PRIMARY KEY (account, month)
);

CREATE FUNCTION accounts_of(p_key text, p_tenant text) RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT array_remove(ARRAY['key/' || p_key, 'tenant/' || p_tenant], NULL)
$$;

-- What one request adds to the sums.
CREATE FUNCTION share_of(r requests) RETURNS hours LANGUAGE sql IMMUTABLE AS $$
    SELECT r.key_id, r.tenant, date_trunc('hour', r.created_at, 'UTC'),
           (r.answered OR r.energy_j IS NOT NULL)::int::bigint,
           coalesce(r.prompt_tokens, 0)::numeric, coalesce(r.completion_tokens, 0)::numeric,
           (r.energy_j IS NOT NULL)::int::bigint, coalesce(r.energy_j, 0),
           (r.total_g IS NOT NULL)::int::bigint, coalesce(r.total_g, 0),
           (r.reference_g - r.total_g IS NOT NULL)::int::bigint, coalesce(r.reference_g - r.total_g, 0),
           CASE WHEN r.energy_j IS NULL THEN coalesce(r.estimated_j, 0) ELSE 0 END,
           CASE WHEN r.total_g IS NULL THEN coalesce(r.estimated_g, 0) ELSE 0 END
$$;

-- Keeps the sums equal to the rows, in whatever order answers and footprints arrive, and however often.
CREATE FUNCTION add_to_sums() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WITH changes AS (
        SELECT n.key_id, n.tenant, n.hour,
               sum(n.requests - o.requests) AS requests,
               sum(n.prompt_tokens - o.prompt_tokens) AS prompt_tokens,
               sum(n.completion_tokens - o.completion_tokens) AS completion_tokens,
               sum(n.metered - o.metered) AS metered, sum(n.joules - o.joules) AS joules,
               sum(n.priced - o.priced) AS priced, sum(n.grams - o.grams) AS grams,
               sum(n.compared - o.compared) AS compared, sum(n.saved_grams - o.saved_grams) AS saved_grams,
               sum(n.estimated_joules - o.estimated_joules) AS estimated_joules,
               sum(n.estimated_grams - o.estimated_grams) AS estimated_grams
        FROM new_rows JOIN old_rows USING (id)
        CROSS JOIN LATERAL share_of(new_rows) AS n CROSS JOIN LATERAL share_of(old_rows) AS o
        GROUP BY n.key_id, n.tenant, n.hour
    ), by_hour AS (
        INSERT INTO hours SELECT * FROM changes
        ON CONFLICT (key_id, hour) DO UPDATE SET
            requests = hours.requests + excluded.requests,
            prompt_tokens = hours.prompt_tokens + excluded.prompt_tokens,
            completion_tokens = hours.completion_tokens + excluded.completion_tokens,
            metered = hours.metered + excluded.metered, joules = hours.joules + excluded.joules,
            priced = hours.priced + excluded.priced, grams = hours.grams + excluded.grams,
            compared = hours.compared + excluded.compared, saved_grams = hours.saved_grams + excluded.saved_grams,
            estimated_joules = hours.estimated_joules + excluded.estimated_joules,
            estimated_grams = hours.estimated_grams + excluded.estimated_grams
    )
    INSERT INTO months
    SELECT account, date_trunc('month', hour, 'UTC'), sum(grams + estimated_grams)
    FROM changes CROSS JOIN LATERAL unnest(accounts_of(key_id, tenant)) AS account
    GROUP BY 1, 2
    ON CONFLICT (account, month) DO UPDATE SET grams = months.grams + excluded.grams;
    RETURN NULL;
END
$$;
CREATE TRIGGER add_to_sums AFTER UPDATE ON requests
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION add_to_sums();

-- Requests of a key, or of a tenant, that are open, counted up to a limit. Two queries, so that each uses its index.
CREATE FUNCTION open_requests(p_key text, p_tenant text, p_most integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_open integer;
BEGIN
    IF p_key IS NOT NULL THEN
        SELECT count(*) INTO v_open FROM (
            SELECT FROM requests AS r JOIN instances AS i ON i.id = r.instance
            WHERE NOT r.done AND r.key_id = p_key AND r.expires_at_wall > v_now AND i.expires_at_wall > v_now
            LIMIT p_most
        ) AS rows;
    ELSE
        SELECT count(*) INTO v_open FROM (
            SELECT FROM requests AS r JOIN instances AS i ON i.id = r.instance
            WHERE NOT r.done AND r.tenant = p_tenant AND r.expires_at_wall > v_now AND i.expires_at_wall > v_now
            LIMIT p_most
        ) AS rows;
    END IF;
    RETURN v_open;
END
$$;

-- Decide on one request, and count it in the same transaction: the rows of its accounts stay locked until the end.
CREATE FUNCTION admit(
    p_key text, p_tenant text, p_request text, p_model text, p_tokens bigint, p_at timestamptz, p_instance text,
    p_lease_s double precision
) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_refusal text;
    v_account limits;
    v_accounts limits[] := '{}';
    v_minute timestamptz;
    v_open integer;
    v_spent double precision;
    v_states jsonb := '[]';
BEGIN
    -- A crash of PostgreSQL may lose the counts of its last second; waiting for the disk would cost every request more.
    PERFORM set_config('synchronous_commit', 'off', true);
    IF p_key <> 'anonymous' AND NOT EXISTS (SELECT FROM api_keys WHERE id = p_key AND revoked_at IS NULL) THEN
        RETURN jsonb_build_object('refusal', 'revoked', 'reset_s', 0, 'accounts', v_states);
    END IF;
    FOR v_account IN
        SELECT * FROM limits WHERE account = ANY (accounts_of(p_key, p_tenant)) ORDER BY account FOR UPDATE
    LOOP
        v_accounts := v_accounts || v_account;
    END LOOP;
    v_minute := date_trunc('minute', clock_timestamp(), 'UTC');
    FOREACH v_account IN ARRAY v_accounts LOOP
        v_minute := greatest(v_minute, v_account.minute_wall);
    END LOOP;
    FOREACH v_account IN ARRAY v_accounts LOOP
        IF v_account.minute_wall < v_minute THEN
            v_account.used_requests := 0;
            v_account.used_tokens := 0;
        END IF;
        v_open := NULL;
        IF v_account.concurrent_requests IS NOT NULL THEN
            v_open := open_requests(
                CASE WHEN v_account.account LIKE 'key/%' THEN p_key END,
                CASE WHEN v_account.account LIKE 'tenant/%' THEN p_tenant END, v_account.concurrent_requests
            );
        END IF;
        v_spent := NULL;
        IF v_account.grams_per_month IS NOT NULL THEN
            v_spent := coalesce((
                SELECT grams FROM months
                WHERE account = v_account.account AND month = date_trunc('month', p_at, 'UTC')
            ), 0);
        END IF;
        v_refusal := coalesce(v_refusal, CASE
            WHEN v_spent >= v_account.grams_per_month AND v_account.when_spent = 'refuse' THEN 'budget'
            WHEN v_account.used_requests >= v_account.requests_per_minute THEN 'requests'
            WHEN v_account.used_tokens + p_tokens > v_account.tokens_per_minute THEN 'tokens'
            WHEN v_open >= v_account.concurrent_requests THEN 'concurrent'
        END);
        v_states := v_states || jsonb_build_object(
            'account', v_account.account,
            'requests_per_minute', v_account.requests_per_minute, 'used_requests', v_account.used_requests,
            'tokens_per_minute', v_account.tokens_per_minute, 'used_tokens', v_account.used_tokens,
            'concurrent_requests', v_account.concurrent_requests,
            'grams_per_month', v_account.grams_per_month, 'spent_grams', v_spent,
            'most_level', v_account.most_level
        );
    END LOOP;
    IF v_refusal IS NULL THEN
        UPDATE limits SET
            minute_wall = v_minute,
            used_requests = 1 + CASE WHEN minute_wall = v_minute THEN used_requests ELSE 0 END,
            used_tokens = p_tokens + CASE WHEN minute_wall = v_minute THEN used_tokens ELSE 0 END
        WHERE account IN (SELECT (unnest(v_accounts)).account);
        INSERT INTO requests (id, key_id, tenant, model, created_at, instance, expires_at_wall, minute_wall, reserved_tokens)
        VALUES (p_request, p_key, p_tenant, p_model, p_at, p_instance,
                clock_timestamp() + make_interval(secs => p_lease_s), v_minute, p_tokens);
    END IF;
    RETURN jsonb_build_object(
        'refusal', v_refusal,
        'reset_s', greatest(0, extract(epoch FROM v_minute + interval '1 minute' - clock_timestamp())),
        'accounts', v_states
    );
END
$$;

-- Book requests that are over: correct the tokens reserved in this minute, and add what is known of the answers.
CREATE FUNCTION finish(p_rows jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM pg_advisory_xact_lock(hashtext('sprout.gateway.sums'));
    -- Those that were admitted while PostgreSQL was away.
    INSERT INTO requests (id, key_id, tenant, model, created_at, instance, expires_at_wall, minute_wall, reserved_tokens)
    SELECT id, key_id, tenant, model, created_at, '', '-infinity', '-infinity', 0
    FROM jsonb_populate_recordset(NULL::requests, p_rows) ON CONFLICT DO NOTHING;
    WITH corrections AS (
        SELECT account, r.minute_wall, sum(n.prompt_tokens + n.completion_tokens - r.reserved_tokens) AS tokens
        FROM jsonb_populate_recordset(NULL::requests, p_rows) AS n JOIN requests AS r USING (id)
        CROSS JOIN LATERAL unnest(accounts_of(r.key_id, r.tenant)) AS account
        WHERE NOT r.done AND n.completion_tokens IS NOT NULL
        GROUP BY 1, 2
    ), locked AS (
        SELECT l.account, c.tokens FROM limits AS l JOIN corrections AS c USING (account, minute_wall)
        ORDER BY l.account FOR UPDATE OF l
    )
    UPDATE limits SET used_tokens = greatest(0, limits.used_tokens + locked.tokens)
    FROM locked WHERE limits.account = locked.account;
    UPDATE requests AS r SET
        done = true, answered = n.answered, record = coalesce(r.record, n.record),
        pool = coalesce(r.pool, n.pool), level = coalesce(r.level, n.level), zone = coalesce(r.zone, n.zone),
        prompt_tokens = coalesce(r.prompt_tokens, n.prompt_tokens),
        completion_tokens = coalesce(r.completion_tokens, n.completion_tokens),
        estimated_j = n.estimated_j, estimated_g = n.estimated_g, estimate_source = n.estimate_source,
        reference_g = n.reference_g
    FROM jsonb_populate_recordset(NULL::requests, p_rows) AS n
    WHERE r.id = n.id AND NOT r.done;
END
$$;

-- Book footprints, each once; those of requests of other producers are left out.
CREATE FUNCTION book(p_rows jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('sprout.gateway.sums'));
    UPDATE requests AS r SET
        record = coalesce(r.record, n.record), pool = n.pool, level = n.level, zone = n.zone,
        prompt_tokens = coalesce(n.prompt_tokens, r.prompt_tokens), completion_tokens = n.completion_tokens,
        energy_j = n.energy_j, intensity_g_per_kwh = n.intensity_g_per_kwh, operational_g = n.operational_g,
        embodied_g = n.embodied_g, total_g = n.total_g
    FROM jsonb_populate_recordset(NULL::requests, p_rows) AS n
    WHERE r.id = n.id AND r.energy_j IS NULL AND (r.record = n.record) IS NOT FALSE;
END
$$;
