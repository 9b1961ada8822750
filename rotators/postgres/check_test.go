package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/rekeyhq/rekey/rotators"
)

func findings(t *testing.T, r *Rotator) (all, fatal string) {
	t.Helper()
	found, err := r.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		line := f.Message + " -> " + f.Remedy + "\n"
		all += line
		if f.Fatal {
			fatal += line
		}
	}
	return all, fatal
}

func TestWrongAdminPassword(t *testing.T) {
	b := newBench(t, scram(t))
	right := b.adminPW
	b.adminPW = "not-the-password"
	r := b.rotator()
	_, m := b.compose(r, b.op(0, 1))
	_, err := r.Apply(t.Context(), b.op(0, 1), m)
	b.wantClass(err, rotators.Refused, "file:/run/admin", b.cfg.Target.Admin.Username)
	if strings.Contains(err.Error(), b.adminPW) {
		t.Error("the error holds the password")
	}
	if _, fatal := findings(t, r); !strings.Contains(fatal, "file:/run/admin") {
		t.Errorf("findings: %s", fatal)
	}
	b.adminPW = right // the reference is read at every connection
	if _, err := r.Apply(t.Context(), b.op(0, 1), m); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		err  error
		want rotators.Class
	}{
		{errors.New("no such file"), rotators.Refused},
		{rotators.Faultf(rotators.Throttled, "read", "slow down"), rotators.Throttled},
		{fmt.Errorf("vault: %w", context.DeadlineExceeded), rotators.Transient},
	} {
		broken := b.rotator(func(c *Config) { c.Resolve = func(context.Context, string) ([]byte, error) { return nil, row.err } })
		b.wantClass(broken.Disable(t.Context(), b.op(0, 2), b.a), row.want, "file:/run/admin")
	}
}

// TestMissingPrivileges: each refusal names the statement that mends it, and that statement does.
func TestMissingPrivileges(t *testing.T) {
	b := newBench(t, scram(t))
	admin := b.cfg.Target.Admin.Username
	r := b.rotator()
	if all, _ := findings(t, r); all != "" {
		t.Fatalf("findings on a sound target: %s", all)
	}
	b.sql("ALTER ROLE %s NOCREATEROLE", admin)
	_, m := b.compose(r, b.op(0, 1))
	_, err := r.Apply(t.Context(), b.op(0, 1), m)
	mend := fmt.Sprintf(`ALTER ROLE "%s" CREATEROLE`, admin)
	b.wantClass(err, rotators.Refused, mend, fmt.Sprintf(`CREATE ROLE "%s" NOLOGIN`, b.cfg.Credential.Owner))
	if _, fatal := findings(t, r); !strings.Contains(fatal, mend) {
		t.Errorf("findings: %s", fatal)
	}
	b.sql("%s", mend)
	if _, err := r.Apply(t.Context(), b.op(0, 1), m); err != nil {
		t.Fatal(err)
	}

	b.sql("REVOKE pg_signal_backend FROM %s", admin)
	open := b.open(m)
	err = r.Disable(t.Context(), b.op(0, 2), b.a)
	mend = fmt.Sprintf(`GRANT pg_signal_backend TO "%s"`, admin)
	b.wantClass(err, rotators.Refused, mend)
	b.prove(r, b.op(0, 1), m, rotators.Rejected) // logins are refused at least
	if ended(open) {
		t.Error("a session ended although Disable failed to end it")
	}
	if _, fatal := findings(t, r); !strings.Contains(fatal, mend) {
		t.Errorf("findings: %s", fatal)
	}
	b.sql("%s", mend)
	if err := r.Disable(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	if !ended(open) {
		t.Error("the session lives on")
	}
}

// TestPreparedByOthers: roles that the admin did not make need ADMIN OPTION from PostgreSQL 16 on, and nothing more before.
func TestPreparedByOthers(t *testing.T) {
	b := newBench(t, scram(t))
	for _, role := range []string{string(b.a), string(b.b), b.cfg.Credential.Owner} {
		b.sql("CREATE ROLE %s NOLOGIN", role)
	}
	r := b.rotator()
	_, m := b.compose(r, b.op(0, 1))
	_, err := r.Apply(t.Context(), b.op(0, 1), m)
	if b.major() >= 16 {
		admin := b.cfg.Target.Admin.Username
		want := fmt.Sprintf(`GRANT "%s" TO "%s" WITH ADMIN OPTION`, b.a, admin)
		b.wantClass(err, rotators.Refused, want)
		if _, fatal := findings(t, r); strings.Count(fatal, "WITH ADMIN OPTION") != 3 {
			t.Errorf("findings: %s", fatal)
		}
		b.sql("GRANT %s, %s, %s TO %s WITH ADMIN OPTION", b.a, b.b, b.cfg.Credential.Owner, admin)
		_, err = r.Apply(t.Context(), b.op(0, 1), m)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.prove(r, b.op(0, 1), m, rotators.Accepted)
	if all, _ := findings(t, r); all != "" {
		t.Errorf("findings: %s", all)
	}
}

func TestCheckFindsWhatIsOff(t *testing.T) {
	b := newBench(t, scram(t))
	b.sql("CREATE ROLE %s LOGIN", b.a)
	b.sql("CREATE ROLE %s LOGIN", b.cfg.Credential.Owner)
	if b.major() >= 16 {
		b.sql("GRANT %s, %s TO %s WITH ADMIN OPTION", b.a, b.cfg.Credential.Owner, b.cfg.Target.Admin.Username)
	}
	b.sql("CREATE SCHEMA s_%s AUTHORIZATION %s", b.a, b.a)
	before := b.catalog()
	all, fatal := findings(t, b.rotator(func(c *Config) { c.Credential.Database = "nowhere" }))
	for _, want := range []string{"was not made by rekey", "NOLOGIN", `database "nowhere" does not exist`} {
		if !strings.Contains(fatal, want) {
			t.Errorf("no fatal finding mentions %q:\n%s", want, fatal)
		}
	}
	if want := "REASSIGN OWNED BY"; !strings.Contains(all, want) || strings.Contains(fatal, want) {
		t.Errorf("objects of one role:\n%s", all)
	}
	all, fatal = findings(t, b.rotator(func(c *Config) {
		b.adminPW = b.server.Password
		c.Target.Admin.Username = "postgres"
	}))
	if want := "is a superuser"; !strings.Contains(all, want) || strings.Contains(fatal, want) {
		t.Errorf("a superuser as admin:\n%s", all)
	}
	if b.catalog() != before {
		t.Error("Check changed something")
	}
	b.sql("DROP SCHEMA s_%s", b.a)
}

// TestEveryStatementIsRecorded: what the server saw of the admin is what was recorded, secrets apart.
func TestEveryStatementIsRecorded(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	b.apply(r, b.op(0, 1))
	if err := r.Disable(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	log, err := b.server.Log()
	if err != nil {
		t.Fatal(err)
	}
	recorded, seen := b.recorded.all(), 0
	for line := range strings.Lines(log) {
		_, sql, ok := strings.Cut(line, b.cfg.Target.Admin.Username+"@postgres LOG:  statement: ")
		if !ok {
			continue
		}
		seen++
		for stmt := range strings.SplitSeq(strings.TrimSpace(sql), "; ") {
			stmt, _, _ = strings.Cut(stmt, "'SCRAM-SHA-256$")
			stmt, _, _ = strings.Cut(stmt, "ANY (")
			stmt, _, _ = strings.Cut(stmt, "rolname = ") // arguments are recorded as $1
			if !strings.Contains(recorded, stmt) {
				t.Errorf("not recorded: %s", stmt)
			}
		}
	}
	if seen < 9 {
		t.Errorf("the log shows %d statements of the admin", seen)
	}
	for _, want := range []string{"PASSWORD '[redacted]'", "NOLOGIN PASSWORD NULL", "pg_terminate_backend", "COMMENT ON ROLE"} {
		if !strings.Contains(recorded, want) {
			t.Errorf("nothing recorded holds %q", want)
		}
	}
}

// TestTheSearchFindsAPlantedLeak: searchForSecrets would notice.
func TestTheSearchFindsAPlantedLeak(t *testing.T) {
	b := newBench(t, scram(t))
	b.sql("CREATE ROLE %s LOGIN PASSWORD 'planted-%s'", b.a, b.a)
	if log, err := b.server.Log(); err != nil || !strings.Contains(log, "planted-"+string(b.a)) {
		t.Errorf("the server's log does not show statements: %v", err)
	}
}
