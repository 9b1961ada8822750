package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/testserver"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
)

// session is a consumer's connection, past the proxy.
type session struct{ conn *pgx.Conn }

func (s session) Alive() bool { return !ended(s.conn) }
func (s session) Close()      { _ = s.conn.Close(context.Background()) }

func harness(p *testserver.Postgres, roles int) rotatortest.Harness {
	return rotatortest.Harness{New: func(tb testing.TB) rotatortest.Subject {
		t := tb.(*testing.T)
		b := newBench(t, p)
		proxy, err := testserver.NewProxy(p.Host, p.Port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(proxy.Close)
		b.cfg.Target.Host, b.cfg.Target.Port, b.cfg.Timeout = proxy.Host, proxy.Port, 20*time.Second
		b.cfg.Credential.Roles = b.cfg.Credential.Roles[:roles]
		return rotatortest.Subject{
			Rotator: b.rotator(), Again: b.rotator(), Credential: b.cfg.ID,
			Open: func(ctx context.Context, m rotators.Material) (rotatortest.Session, error) {
				conn, err := pgx.Connect(ctx, p.DSN(string(m.Reveal("username")), string(m.Reveal("password")), b.cfg.Credential.Database))
				return session{conn}, err
			},
			Break:      func() func() { proxy.Cut(); return proxy.Mend },
			LoseReply:  func() { proxy.LoseReply("COMMIT\x00", "COMMIT\x00") },
			FailBefore: func() { proxy.LoseRequest("COMMIT\x00") },
			Foreign: func() (rotators.VersionID, func() bool) {
				b.sql("CREATE ROLE %s LOGIN PASSWORD 'theirs'", b.a)
				return b.a, func() bool {
					conn, err := pgx.Connect(context.Background(), p.DSN(string(b.a), "theirs", b.cfg.Credential.Database))
					if err != nil {
						return false
					}
					return conn.Close(context.Background()) == nil
				}
			},
			Written: func() string {
				log, err := p.Log()
				if err != nil {
					t.Error(err)
				}
				return log + b.recorded.all()
			},
		}
	}}
}

func TestConformance(t *testing.T) {
	p := scram(t)
	t.Run("two roles", func(t *testing.T) { rotatortest.Run(t, harness(p, 2)) })
	t.Run("one role", func(t *testing.T) { rotatortest.Run(t, harness(p, 1)) })
}
