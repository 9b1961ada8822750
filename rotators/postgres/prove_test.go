package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/testserver"
	"github.com/rekeyhq/rekey/rotators"
)

// picky is a server whose pg_hba.conf treats a role by the group that it is in, and has no line for a role without a group.
func picky(t *testing.T) *testserver.Postgres {
	p := start(t, "picky", testserver.PostgresConfig{})
	super := connect(t, p.AdminDSN())
	hba := "host all postgres,/^adm_ 127.0.0.1/32 scram-sha-256\n"
	for _, method := range []string{"reject", "password", "md5", "trust", "scram-sha-256"} {
		group := "hba_" + method[:2]
		if _, err := super.Exec(t.Context(), "CREATE ROLE "+group); err != nil && !strings.Contains(err.Error(), duplicateRole) {
			t.Fatal(err)
		}
		hba += fmt.Sprintf("host all +%s 127.0.0.1/32 %s\n", group, method)
	}
	hba = strings.Replace(hba, "postgres,/^adm_", "postgres,+hba_admin", 1) // regular expressions are new in 16
	if _, err := super.Exec(t.Context(), "CREATE ROLE hba_admin"); err != nil && !strings.Contains(err.Error(), duplicateRole) {
		t.Fatal(err)
	}
	path := filepath.Join(p.DataDir(), "pg_hba.conf")
	if err := os.WriteFile(path, []byte(hba), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := super.Exec(t.Context(), "SELECT pg_reload_conf()"); err != nil {
		t.Fatal(err)
	}
	for { // a role without a group is refused as soon as the file is read
		conn, err := pgx.Connect(t.Context(), p.DSN("hba_re", "x", "postgres"))
		shut(conn)
		if err != nil && strings.Contains(err.Error(), "pg_hba.conf") {
			return p
		}
	}
}

// TestVerdictByMethod asks real servers that answer in every way.
func TestVerdictByMethod(t *testing.T) {
	p := picky(t)
	for _, row := range []struct {
		group string
		right rotators.Verdict
		wrong rotators.Verdict
	}{
		{"hba_sc", rotators.Accepted, rotators.Rejected},
		{"hba_md", rotators.Accepted, rotators.Rejected}, // a SCRAM verifier makes md5 mean SCRAM
		{"hba_re", rotators.Unknown, rotators.Unknown},
		{"", rotators.Unknown, rotators.Unknown},       // no line in pg_hba.conf: also 28000
		{"hba_tr", rotators.Unknown, rotators.Unknown}, // anybody is let in, which proves nothing
		{"hba_pa", rotators.Unknown, rotators.Unknown}, // we do not send the plaintext
	} {
		t.Run("group "+row.group, func(t *testing.T) {
			b := newBench(t, p)
			b.sql("GRANT hba_admin TO %s", b.cfg.Target.Admin.Username)
			r := b.rotator()
			op := b.op(0, 1)
			m := b.apply(r, op)
			if row.group != "" {
				b.sql("GRANT %s TO %s", row.group, b.a)
			}
			b.prove(r, op, m, row.right)
			fields := m.RevealAll()
			fields["password"] = []byte("wrong")
			b.prove(r, op, rotators.NewMaterial(fields), row.wrong)

			b.sql("ALTER ROLE %s NOLOGIN", b.a)
			dead := rotators.Rejected
			if row.right == rotators.Unknown {
				dead = rotators.Unknown
			}
			b.prove(r, op, m, dead)
			found, err := r.Check(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fatal := ""
			for _, f := range found {
				if f.Fatal {
					fatal += f.Message + f.Remedy
				}
			}
			// Role b is in no group, so there is always a finding about it.
			aboutA := strings.Contains(fatal, string(b.a))
			if aboutA != (row.right == rotators.Unknown) {
				t.Errorf("findings: %s", fatal)
			}
			if row.group == "hba_tr" && !strings.Contains(fatal, "without asking for a password") || row.group == "hba_pa" && !strings.Contains(fatal, "by SCRAM") {
				t.Errorf("findings: %s", fatal)
			}
		})
	}
}

// TestTrustIsAFinding: on a server that trusts everybody no login is a proof, and Check says so before anything is rotated.
func TestTrustIsAFinding(t *testing.T) {
	b := newBench(t, start(t, "trust", testserver.PostgresConfig{Trust: true}))
	r := b.rotator()
	look := func() {
		t.Helper()
		found, err := r.Check(t.Context())
		if err != nil || len(found) != 2 {
			t.Fatalf("%v, %v", found, err)
		}
		for _, f := range found {
			if !f.Fatal || !strings.Contains(f.Message, "trust") || !strings.Contains(f.Remedy, "scram-sha-256") {
				t.Errorf("%+v", f)
			}
		}
	}
	look()
	m := b.apply(r, b.op(0, 1))
	b.prove(r, b.op(0, 1), m, rotators.Unknown)
	look()
}

// TestUnknownIsExplained: what is neither a yes nor a no of the issuer says why, and whether a human is needed.
func TestUnknownIsExplained(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	op := b.op(0, 1)
	m := b.apply(r, op)
	want := func(r *Rotator, class rotators.Class, text ...string) {
		t.Helper()
		v, err := r.Prove(t.Context(), op, b.a, m)
		if v != rotators.Unknown {
			t.Errorf("got %s", v)
		}
		b.wantClass(err, class, text...)
	}
	b.sql("ALTER ROLE %s CONNECTION LIMIT 0", b.a)
	want(r, rotators.Transient, "53300")
	b.sql("ALTER ROLE %s CONNECTION LIMIT -1", b.a)

	b.sql("REVOKE CONNECT ON DATABASE %s FROM public", b.cfg.Credential.Database)
	want(r, rotators.Refused, "42501")
	b.sql("GRANT CONNECT ON DATABASE %s TO public", b.cfg.Credential.Database)

	want(b.rotator(func(c *Config) { c.Credential.Database = "nowhere" }), rotators.Refused, "3D000")
	want(b.rotator(func(c *Config) { c.Credential.Probe = "SELECT 1 FROM pg_authid" }), rotators.Refused, "42501", "probe")
	want(b.rotator(func(c *Config) { c.Credential.Probe = "SELECT 1; SELECT 2" }), rotators.Refused, "probe")
	want(b.rotator(func(c *Config) { c.Target.Port = 1 }), rotators.Transient, "connect")
	b.prove(b.rotator(func(c *Config) { c.Credential.Probe = "CREATE TEMP TABLE x (id int)" }), op, m, rotators.Accepted)

	b.sql("ALTER ROLE %s RESET ROLE", b.a)
	want(r, rotators.Refused, "acts as", b.cfg.Credential.Owner)
	b.sql("ALTER ROLE %s SET ROLE %s", b.a, b.cfg.Credential.Owner)
	revoke := fmt.Sprintf("REVOKE %s FROM %s", b.cfg.Credential.Owner, b.a)
	if b.major() >= 16 { // a grant belongs to who made it
		revoke += " GRANTED BY " + b.cfg.Target.Admin.Username
	}
	b.sql("%s", revoke)
	want(r, rotators.Refused, "GRANT")

	v, err := r.Prove(t.Context(), op, b.b, m)
	if v != rotators.Unknown {
		t.Errorf("the secret of another role is %s", v)
	}
	b.wantClass(err, rotators.Refused)
}

// TestEnvironmentIsIgnored: the driver reads PG* variables and files of its own; ours says all.
func TestEnvironmentIsIgnored(t *testing.T) {
	b := newBench(t, scram(t))
	for k, v := range map[string]string{
		"PGHOST": "198.51.100.1", "PGPORT": "1", "PGUSER": "nobody", "PGPASSWORD": "no", "PGDATABASE": "no", "PGSSLMODE": "verify-full",
		"PGAPPNAME": "intruder", "PGOPTIONS": "-c role=none", "PGTARGETSESSIONATTRS": "standby", "PGREQUIREAUTH": "none", "PGCONNECT_TIMEOUT": "1",
		"PGSSLROOTCERT": "/nonexistent", "PGPASSFILE": "/nonexistent",
	} {
		t.Setenv(k, v)
	}
	r := b.rotator()
	m := b.apply(r, b.op(0, 1))
	b.prove(r, b.op(0, 1), m, rotators.Accepted)
}

// TestTLSModes: each mode refuses what it must, and none falls back to plaintext.
func TestTLSModes(t *testing.T) {
	p := start(t, "tls", testserver.PostgresConfig{TLS: true})
	plain := scram(t)
	other := filepath.Join(t.TempDir(), "other.pem")
	if pem, err := os.ReadFile(start(t, "tls2", testserver.PostgresConfig{TLS: true}).CAFile); err != nil || os.WriteFile(other, pem, 0o600) != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		mode, ca, host string
		server         *testserver.Postgres
		works          bool
	}{
		{"", p.CAFile, "localhost", p, true},
		{VerifyFull, p.CAFile, "127.0.0.1", p, true},
		{VerifyFull, p.CAFile, "db.example.com", p, false},
		{VerifyFull, other, "localhost", p, false},
		{VerifyFull, "", "localhost", p, false},
		{VerifyFull, "/nonexistent.pem", "localhost", p, false},
		{VerifyCA, p.CAFile, "db.example.com", p, true},
		{VerifyCA, other, "localhost", p, false},
		{VerifyCA, "", "localhost", p, false},
		{Require, "", "db.example.com", p, true},
		{Disable, "", "localhost", p, true},
		{VerifyFull, p.CAFile, "localhost", plain, false},
		{Require, "", "localhost", plain, false},
	} {
		t.Run(fmt.Sprintf("%s,%s,%s", row.mode, filepath.Base(row.ca), row.host), func(t *testing.T) {
			b := newBench(t, row.server)
			_, m := b.compose(b.rotator(), b.op(0, 1))
			if _, err := b.rotator().Apply(t.Context(), b.op(0, 1), m); err != nil {
				t.Fatal(err)
			}
			b.cfg.Target.TLS, b.cfg.Target.Host = TLS{Mode: row.mode, CAFile: row.ca}, row.host
			r := b.rotator()
			r.dialFunc = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, fmt.Sprintf("%s:%d", row.server.Host, row.server.Port))
			}
			v, proveErr := r.Prove(t.Context(), b.op(0, 1), b.a, m)
			err := r.Disable(t.Context(), b.op(0, 2), b.a)
			if row.works {
				if v != rotators.Accepted || err != nil {
					t.Fatalf("%s %v; %v", v, proveErr, err)
				}
				return
			}
			if v != rotators.Unknown {
				t.Errorf("the verdict is %s", v)
			}
			b.wantClass(proveErr, rotators.Transient)
			b.wantClass(err, rotators.Transient)
		})
	}
}

// TestUnixSocket: the same by a socket's folder.
func TestUnixSocket(t *testing.T) {
	p := scram(t)
	b := newBench(t, p)
	b.cfg.Target.Host, b.cfg.Target.TLS = p.SocketDir, TLS{}
	r := b.rotator()
	m := b.apply(r, b.op(0, 1))
	b.prove(r, b.op(0, 1), m, rotators.Accepted)
	if ended(b.open(m)) {
		t.Error("the URL does not work")
	}
	if f := new(rotators.Fault); errors.As(r.Disable(t.Context(), b.op(0, 2), b.a), &f) {
		t.Error(f)
	}
	b.prove(r, b.op(0, 1), m, rotators.Rejected)
}

// TestServerDown: a dead server is Transient and Unknown, and says nothing about the secret.
func TestServerDown(t *testing.T) {
	testserver.Need(t, "postgres")
	p, err := testserver.StartPostgres(testserver.PostgresConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop() })
	b := newBench(t, p)
	r := b.rotator(func(c *Config) { c.Timeout = 5 * time.Second })
	m := b.apply(r, b.op(0, 1))
	p.Kill()
	b.prove(r, b.op(0, 1), m, rotators.Unknown)
	b.wantClass(r.Disable(t.Context(), b.op(0, 2), b.a), rotators.Transient)
	if _, err := r.Check(t.Context()); rotators.ClassOf(err) != rotators.Transient {
		t.Errorf("check: %v", err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	b.prove(r, b.op(0, 1), m, rotators.Accepted) // fsync is off, but only the process died
}
