package postgres

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/testserver"
	"github.com/rekeyhq/rekey/rotators"
)

// TestReplica proves and ends sessions on a real streaming replica, also while it lags behind.
func TestReplica(t *testing.T) {
	testserver.Need(t, "postgres")
	primary, err := testserver.StartPostgres(testserver.PostgresConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { primary.Stop() })
	standby, err := primary.Replica()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { standby.Stop() })
	b := newBench(t, primary)
	b.cfg.Target.Replicas = []string{"127.0.0.1:" + strconv.Itoa(standby.Port)}
	b.cfg.Timeout = 10 * time.Second
	r := b.rotator()
	super := connect(t, standby.AdminDSN())
	replay := func(what string) {
		if _, err := super.Exec(t.Context(), "SELECT pg_wal_replay_"+what+"()"); err != nil {
			t.Fatal(err)
		}
	}
	caughtUp := func() {
		for ok := false; !ok; {
			var lsn string
			if err := b.super.QueryRow(t.Context(), "SELECT pg_current_wal_lsn()::text").Scan(&lsn); err != nil {
				t.Fatal(err)
			}
			if err := super.QueryRow(t.Context(), "SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn", lsn).Scan(&ok); err != nil {
				t.Fatal(err)
			}
		}
	}
	caughtUp() // the database of this test is there
	op := b.op(0, 1)
	replay("pause")
	m := b.apply(r, op)
	b.prove(r, op, m, rotators.Unknown) // the primary accepts, the replica does not know the role
	replay("resume")
	caughtUp()
	b.prove(r, op, m, rotators.Accepted)

	reader, err := pgx.Connect(t.Context(), standby.DSN(string(b.a), string(m.Reveal("password")), b.cfg.Credential.Database))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close(context.Background())
	replay("pause")
	short := b.rotator(func(c *Config) { c.Timeout = time.Second })
	b.wantClass(short.Disable(t.Context(), b.op(0, 2), b.a), rotators.Unsure, strconv.Itoa(standby.Port)) // it could log in there again
	b.prove(r, op, m, rotators.Unknown)                                                                   // the primary rejects, the replica still accepts
	replay("resume")
	if err := r.Disable(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	if !ended(reader) {
		t.Error("a session on the replica lives on")
	}
	b.prove(r, op, m, rotators.Rejected)

	if err := standby.Halt(); err != nil {
		t.Fatal(err)
	}
	b.prove(r, op, m, rotators.Unknown) // nobody can say what the replica would do
	b.wantClass(r.Disable(t.Context(), b.op(0, 2), b.a), rotators.Unsure, strconv.Itoa(standby.Port))
}
