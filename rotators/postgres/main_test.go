package postgres

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/testserver"
	"github.com/rekeyhq/rekey/rotators"
)

// servers holds the servers that tests of this package share. Each test uses roles of its own.
var servers = struct {
	sync.Mutex
	running map[string]*testserver.Postgres
}{running: map[string]*testserver.Postgres{}}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, p := range servers.running {
		_ = p.Stop()
	}
	os.Exit(code)
}

// start returns the shared server of that name, started at its first use.
func start(t *testing.T, name string, cfg testserver.PostgresConfig) *testserver.Postgres {
	t.Helper()
	testserver.Need(t, "postgres")
	servers.Lock()
	defer servers.Unlock()
	if p := servers.running[name]; p != nil {
		return p
	}
	p, err := testserver.StartPostgres(cfg)
	if err != nil {
		t.Fatal(err)
	}
	servers.running[name] = p
	return p
}

func scram(t *testing.T) *testserver.Postgres { return start(t, "scram", testserver.PostgresConfig{}) }

// bench is one credential on a real server: a database, an admin that is no superuser, and two role names.
type bench struct {
	t        *testing.T
	server   *testserver.Postgres
	super    *pgx.Conn
	cfg      Config
	adminPW  string
	a, b     rotators.VersionID
	recorded *record
	made     []rotators.Material // every secret that compose made
}

type record struct {
	sync.Mutex
	text []string
}

func (r *record) all() string {
	r.Lock()
	defer r.Unlock()
	return strings.Join(r.text, "\n")
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func newBench(t *testing.T, p *testserver.Postgres) *bench {
	t.Helper()
	n := strings.ToLower(rand.Text()[:8])
	b := &bench{
		t: t, server: p, super: connect(t, p.AdminDSN()), adminPW: "admin-" + rand.Text(), recorded: &record{},
		a: rotators.VersionID("r" + n + "_a"), b: rotators.VersionID("r" + n + "_b"),
	}
	b.sql("CREATE ROLE adm_%s LOGIN CREATEROLE PASSWORD '%s' IN ROLE pg_signal_backend", n, b.adminPW)
	b.sql("CREATE DATABASE db_%s", n)
	b.cfg = Config{
		ID:     "team/" + n,
		Target: TargetConfig{Host: p.Host, Port: p.Port, Admin: Admin{Username: "adm_" + n, Password: "file:/run/admin"}, TLS: TLS{Mode: Disable}},
		Credential: CredentialConfig{
			Owner: "own_" + n, Roles: []string{string(b.a), string(b.b)}, Database: "db_" + n,
		},
		Resolve: func(_ context.Context, ref string) ([]byte, error) {
			if ref != "file:/run/admin" {
				return nil, fmt.Errorf("no such reference: %s", ref)
			}
			return []byte(b.adminPW), nil
		},
		Record: func(_ context.Context, _ rotators.Op, s string) {
			b.recorded.Lock()
			defer b.recorded.Unlock()
			b.recorded.text = append(b.recorded.text, s)
		},
	}
	t.Cleanup(b.searchForSecrets)
	return b
}

// searchForSecrets looks for every password of the test in what was recorded and in what the server logged.
func (b *bench) searchForSecrets() {
	log, err := b.server.Log()
	if err != nil {
		b.t.Error(err)
	}
	passwords := [][]byte{}
	for _, m := range b.made {
		passwords = append(passwords, m.Reveal(rotators.FieldPassword))
	}
	for _, pw := range passwords {
		if strings.Contains(log, string(pw)) {
			b.t.Error("a password is in the server's log")
		}
		if strings.Contains(b.recorded.all(), string(pw)) {
			b.t.Error("a password is in the recorded statements")
		}
	}
	if strings.Contains(b.recorded.all(), "SCRAM-SHA-256$") {
		b.t.Error("a verifier is in the recorded statements")
	}
}

func (b *bench) sql(format string, args ...any) {
	b.t.Helper()
	if _, err := b.super.Exec(context.Background(), fmt.Sprintf(format, args...)); err != nil {
		b.t.Fatalf("%s: %v", format, err)
	}
}

func (b *bench) rotator(change ...func(*Config)) *Rotator {
	b.t.Helper()
	cfg := b.cfg
	for _, f := range change {
		f(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

var incarnation = uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8")

func (b *bench) op(epoch, generation uint64) rotators.Op {
	return rotators.Op{ID: rotators.NewOpID(incarnation, b.cfg.ID, generation), Credential: b.cfg.ID, Generation: generation, Epoch: epoch}
}

func (b *bench) compose(r *Rotator, op rotators.Op, inUse ...rotators.VersionID) (rotators.VersionID, rotators.Material) {
	b.t.Helper()
	id, m, err := r.Compose(op, inUse, rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	b.made = append(b.made, m)
	return id, m
}

// apply composes and applies, and wants success.
func (b *bench) apply(r *Rotator, op rotators.Op, inUse ...rotators.VersionID) rotators.Material {
	b.t.Helper()
	id, m := b.compose(r, op, inUse...)
	v, err := r.Apply(b.t.Context(), op, m)
	if err != nil || v.ID != id {
		b.t.Fatalf("apply: %v, %v", v.ID, err)
	}
	return m
}

func (b *bench) prove(r *Rotator, op rotators.Op, m rotators.Material, want rotators.Verdict) {
	b.t.Helper()
	v, err := r.Prove(b.t.Context(), op, rotators.VersionID(m.Reveal(rotators.FieldUsername)), m)
	if v != want || err != nil && want != rotators.Unknown {
		b.t.Fatalf("prove %s: got %s, want %s: %v", m.Reveal(rotators.FieldUsername), v, want, err)
	}
}

// wantClass wants a *Fault of this class whose text mentions each of these.
func (b *bench) wantClass(err error, want rotators.Class, text ...string) {
	b.t.Helper()
	if err == nil {
		b.t.Fatalf("want an error of class %s, got none", want)
	}
	if f := new(rotators.Fault); !errors.As(err, &f) {
		b.t.Fatalf("not a *Fault: %T %v", err, err)
	}
	if got := rotators.ClassOf(err); got != want {
		b.t.Fatalf("got class %s, want %s: %v", got, want, err)
	}
	for _, s := range text {
		if !strings.Contains(err.Error(), s) {
			b.t.Errorf("the error does not mention %q: %v", s, err)
		}
	}
}

func (b *bench) open(m rotators.Material) *pgx.Conn {
	b.t.Helper()
	return connect(b.t, string(m.Reveal(rotators.FieldDSN)))
}

// ended reports whether the server has closed the session.
func ended(conn *pgx.Conn) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return conn.Ping(ctx) != nil
}

// catalog is every role as the server holds it, except those named: to see that nothing else changed.
func (b *bench) catalog(except ...string) string {
	b.t.Helper()
	rows, err := b.super.Query(context.Background(), `SELECT coalesce(row(a.*)::text, '') || coalesce(shobj_description(a.oid, 'pg_authid'), '') ||
 coalesce((SELECT string_agg(setconfig::text, ';') FROM pg_db_role_setting s WHERE s.setrole = a.oid), '') ||
 coalesce((SELECT string_agg(m::text, ';' ORDER BY m::text) FROM pg_auth_members m WHERE m.member = a.oid OR m.roleid = a.oid), '')
 FROM pg_authid a WHERE NOT rolname = ANY ($1) ORDER BY oid`, except)
	if err != nil {
		b.t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		b.t.Fatal(err)
	}
	var out bytes.Buffer
	for _, l := range lines {
		out.WriteString(l + "\n")
	}
	return out.String()
}

// major is the server's version.
func (b *bench) major() int { return version(b.super) }
