package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rekeyhq/rekey/rotators"
)

// scanEvery is the time between two looks for sessions. A login that had passed the check of the role before our commit
// shows up as a session within it, and two looks must find none.
const scanEvery = 100 * time.Millisecond

// endSessions ends every session of role, on the primary through conn and on each replica through its own connection. dead
// says that the role was made NOLOGIN: a replica's scan counts only once it has replayed that. Any failure is Unsure,
// because the change before it was committed, except a missing privilege, which is Refused.
func (r *Rotator) endSessions(ctx context.Context, step string, op rotators.Op, conn *pgx.Conn, role string, dead bool) error {
	for i, h := range r.hosts {
		if i > 0 {
			replica, err := r.admin(ctx, step, h)
			if err != nil {
				return rotators.Faultf(rotators.Unsure, step, "changed on the primary, but its sessions on replica %s are unknown: %w", h, err)
			}
			defer shut(replica)
			conn = replica
		}
		if err := r.endSessionsOn(ctx, conn, op, role, dead); err != nil {
			class, remedy := rotators.Unsure, ""
			if pg := new(pgconn.PgError); errors.As(err, &pg) && pg.Code == noPrivilege {
				class, remedy = rotators.Refused, fmt.Sprintf("; run as a superuser: GRANT pg_signal_backend TO %s", ident(r.target.Admin.Username))
			}
			return rotators.Faultf(class, step, "changed, but its sessions on %s may live on: %w%s", h, err, remedy)
		}
	}
	return nil
}

func (r *Rotator) endSessionsOn(ctx context.Context, conn *pgx.Conn, op rotators.Op, role string, dead bool) error {
	terminate := "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = " + literal(role) + " AND pid <> pg_backend_pid()"
	const canLogin = "SELECT coalesce((SELECT rolcanlogin FROM pg_roles WHERE rolname = $1), false)"
	tick := time.NewTicker(scanEvery)
	defer tick.Stop()
	for empty, attempt := 0, 0; ; attempt++ {
		if attempt == 0 { // the same two again and again
			r.note(ctx, op, canLogin)
			r.note(ctx, op, terminate)
		}
		login := false
		if err := conn.QueryRow(ctx, canLogin, role).Scan(&login); err != nil {
			return err
		}
		tag, err := conn.Exec(ctx, terminate)
		if err != nil {
			return err
		}
		if tag.RowsAffected() > 0 || dead && login {
			empty = 0
		} else {
			empty++
		}
		if r.scanned != nil {
			r.scanned(attempt)
		}
		if empty == 2 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d sessions at the last look: %w", tag.RowsAffected(), ctx.Err())
		case <-tick.C:
		}
	}
}
