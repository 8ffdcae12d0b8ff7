-- Decide on a line of a batch, and count its tokens; a line that is published again is counted again, and booked once.
-- Requests per minute and concurrent requests are not limited, because batches have limits of their own. Lines leave half
-- of the tokens per minute to other requests. Their rows have no instance, so that they are not open in `open_requests`.
CREATE FUNCTION admit_line(
    p_key text, p_tenant text, p_request text, p_model text, p_tokens bigint, p_at timestamptz
) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_refusal text;
    v_account limits;
    v_accounts limits[] := '{}';
    v_minute timestamptz;
    v_used bigint;
    v_spent double precision;
    v_states jsonb := '[]';
BEGIN
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
        v_used := CASE WHEN v_account.minute_wall = v_minute THEN v_account.used_tokens ELSE 0 END;
        v_spent := NULL;
        IF v_account.grams_per_month IS NOT NULL THEN
            v_spent := coalesce((
                SELECT grams FROM months
                WHERE account = v_account.account AND month = date_trunc('month', p_at, 'UTC')
            ), 0);
        END IF;
        v_refusal := coalesce(v_refusal, CASE
            WHEN v_spent >= v_account.grams_per_month AND v_account.when_spent = 'refuse' THEN 'budget'
            -- A line that needs more than half waits for a minute in which nothing is used.
            WHEN v_used > 0 AND v_used + p_tokens > v_account.tokens_per_minute / 2 THEN 'tokens'
            WHEN p_tokens > v_account.tokens_per_minute THEN 'tokens'
        END);
        v_states := v_states || jsonb_build_object(
            'account', v_account.account,
            'requests_per_minute', NULL, 'used_requests', 0,
            'tokens_per_minute', v_account.tokens_per_minute, 'used_tokens', v_used,
            'concurrent_requests', NULL,
            'grams_per_month', v_account.grams_per_month, 'spent_grams', v_spent,
            'most_level', v_account.most_level
        );
    END LOOP;
    IF v_refusal IS NULL THEN
        UPDATE limits SET
            minute_wall = v_minute,
            used_requests = CASE WHEN minute_wall = v_minute THEN used_requests ELSE 0 END,
            used_tokens = p_tokens + CASE WHEN minute_wall = v_minute THEN used_tokens ELSE 0 END
        WHERE account IN (SELECT (unnest(v_accounts)).account);
        INSERT INTO requests AS old
            (id, key_id, tenant, model, created_at, instance, expires_at_wall, minute_wall, reserved_tokens)
        VALUES (p_request, p_key, p_tenant, p_model, p_at, '', '-infinity', v_minute, p_tokens)
        ON CONFLICT (id) DO UPDATE SET minute_wall = excluded.minute_wall, reserved_tokens = excluded.reserved_tokens
        WHERE NOT old.done;
    END IF;
    RETURN jsonb_build_object(
        'refusal', v_refusal,
        'reset_s', greatest(0, extract(epoch FROM v_minute + interval '1 minute' - clock_timestamp())),
        'accounts', v_states
    );
END
$$;
