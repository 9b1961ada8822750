package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/testserver"
	"github.com/rekeyhq/rekey/rotators"
)

// TestTwoRolesTakeTurns is the overlap plan by hand: both work during the overlap, the old one dies with its sessions.
func TestTwoRolesTakeTurns(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	op1, op2, op3 := b.op(0, 1), b.op(0, 2), b.op(0, 3)
	first := b.apply(r, op1)
	b.prove(r, op1, first, rotators.Accepted)
	old := b.open(first)

	second := b.apply(r, op2, b.a)
	b.prove(r, op2, second, rotators.Accepted)
	b.prove(r, op1, first, rotators.Accepted)
	if ended(old) {
		t.Fatal("the overlap ended a session")
	}
	if err := r.Disable(t.Context(), op2, b.a); err != nil {
		t.Fatal(err)
	}
	b.prove(r, op1, first, rotators.Rejected)
	b.prove(r, op2, second, rotators.Accepted)
	if !ended(old) {
		t.Fatal("the old session lives on")
	}
	if err := r.Delete(t.Context(), op2, b.a); err != nil {
		t.Fatal(err)
	}
	third := b.apply(r, op3, b.b)
	b.prove(r, op3, third, rotators.Accepted)
	b.prove(r, op1, first, rotators.Rejected)
	if got := string(third.Reveal(rotators.FieldUsername)); got != string(b.a) {
		t.Fatalf("the third generation is role %s", got)
	}
}

// TestWhatOneRoleMakesTheOtherMayUse is the ownership rule: tables of either role belong to the owner, across rotations.
func TestWhatOneRoleMakesTheOtherMayUse(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	first := b.apply(r, b.op(0, 1))
	second := b.apply(r, b.op(0, 2), b.a)
	admin := connect(t, b.server.DSN("postgres", b.server.Password, b.cfg.Credential.Database))
	if _, err := admin.Exec(t.Context(), "GRANT CREATE ON SCHEMA public TO "+b.cfg.Credential.Owner); err != nil {
		t.Fatal(err)
	}
	run := func(m rotators.Material, statements ...string) {
		t.Helper()
		conn := b.open(m)
		for _, sql := range statements {
			if _, err := conn.Exec(t.Context(), sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
	run(first, "CREATE TABLE one (id int); INSERT INTO one VALUES (1); CREATE SEQUENCE s1; CREATE FUNCTION f1() RETURNS int LANGUAGE sql AS 'SELECT 1'")
	run(second, "INSERT INTO one VALUES (2); ALTER TABLE one ADD note text; SELECT nextval('s1'); DROP FUNCTION f1(); CREATE TABLE two (id int)")
	run(first, "ALTER TABLE two ADD note text", "DISCARD ALL", "CREATE TABLE three (id int)") // as a pooler does between clients
	if err := r.Delete(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	run(second, "DROP TABLE three; DROP TABLE one")
	third := b.apply(r, b.op(0, 3), b.b)
	run(third, "DROP TABLE two", "RESET ROLE", "CREATE TABLE four (id int)")
	var strays int
	if err := admin.QueryRow(t.Context(), "SELECT count(*) FROM pg_class c JOIN pg_roles o ON o.oid = c.relowner WHERE o.rolname = ANY ($1)",
		[]string{string(b.a), string(b.b)}).Scan(&strays); err != nil || strays != 0 {
		t.Errorf("%d objects belong to a login role: %v", strays, err)
	}
}

// TestFrozenInsideATransaction stops a worker after it has read the fence and before it sends the change, as SIGSTOP would. The
// server ends its transaction, another worker goes on, and the first wakes to nothing.
func TestFrozenInsideATransaction(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	b.apply(r, b.op(0, 1))
	for _, row := range []struct {
		name   string
		act    func(r *Rotator) error
		killed bool // what the others do meanwhile is an emergency
	}{
		{"disable", func(r *Rotator) error { return r.Disable(t.Context(), b.op(0, 2), b.a) }, false},
		{"apply", func(r *Rotator) error {
			_, m := b.compose(r, b.op(0, 8), b.a)
			_, err := r.Apply(t.Context(), b.op(0, 8), m)
			return err
		}, true},
	} {
		frozen, thaw := make(chan struct{}), make(chan struct{})
		sleeper := b.rotator()
		sleeper.idle = time.Second
		sleeper.before = func(s statement) {
			if strings.HasSuffix(s.sql, "COMMIT") {
				close(frozen)
				<-thaw
			}
		}
		result := make(chan error, 1)
		go func() { result <- row.act(sleeper) }()
		select {
		case <-frozen:
		case err := <-result:
			t.Fatalf("%s: it did not come to its commit: %v", row.name, err)
		}
		var alive rotators.Material
		began := time.Now()
		if row.killed {
			for _, id := range []rotators.VersionID{b.a, b.b} {
				if err := r.Disable(t.Context(), b.op(1, 9), id); err != nil {
					t.Fatalf("%s: disable by an emergency: %v", row.name, err)
				}
			}
		} else {
			alive = b.apply(r, b.op(0, 7), b.b)
			b.prove(r, b.op(0, 7), alive, rotators.Accepted)
		}
		t.Logf("%s: a frozen worker held the others up for %s", row.name, time.Since(began))
		before := b.catalog()
		close(thaw)
		b.wantClass(<-result, rotators.Transient) // the server says that it had rolled back
		if after := b.catalog(); after != before {
			t.Errorf("%s: the worker that woke changed\n%s\nto\n%s", row.name, before, after)
		}
		if !row.killed {
			b.prove(r, b.op(0, 7), alive, rotators.Accepted)
		}
	}
}

// TestFrozenPastItsDeadline wakes a worker after its deadline, before its timers run: it must not send.
func TestFrozenPastItsDeadline(t *testing.T) {
	ctx, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer cancel()
	if err := over(lateTimer{ctx}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// lateTimer is a context whose deadline has passed and that has not noticed.
type lateTimer struct{ context.Context }

func (lateTimer) Err() error { return nil }

// TestServerHangsAtCommit stops the whole server when the change is on its way.
func TestServerHangsAtCommit(t *testing.T) {
	p := scram(t)
	b := newBench(t, p)
	r := b.rotator(func(c *Config) { c.Timeout = time.Second })
	op := b.op(0, 1)
	_, m := b.compose(r, op)
	r.before = func(s statement) {
		if strings.HasSuffix(s.sql, "COMMIT") {
			p.Pause()
		}
	}
	_, err := r.Apply(t.Context(), op, m)
	v, proveErr := r.Prove(t.Context(), op, b.a, m)
	p.Resume()
	b.wantClass(err, rotators.Unsure)
	if v != rotators.Unknown || rotators.ClassOf(proveErr) != rotators.Transient {
		t.Errorf("a login at a hung server is %s: %v", v, proveErr)
	}
	again := b.rotator()
	if _, err := again.Apply(t.Context(), op, m); err != nil {
		t.Fatal(err)
	}
	b.prove(again, op, m, rotators.Accepted)
}

// TestDisableAgainstALoginStorm: clients that reconnect without pause have no session left when Disable returns.
func TestDisableAgainstALoginStorm(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	m := b.apply(r, b.op(0, 1))
	var stop atomic.Bool
	var logins atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var last *pgx.Conn
			for !stop.Load() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				conn, err := pgx.Connect(ctx, string(m.Reveal(rotators.FieldDSN)))
				if err == nil {
					logins.Add(1)
					shut(last)
					last = conn
				}
				cancel()
			}
			shut(last)
		})
	}
	for logins.Load() < 40 {
		time.Sleep(time.Millisecond)
	}
	if err := r.Disable(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	after := logins.Load()
	var sessions int
	if err := b.super.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE usename = $1", string(b.a)).Scan(&sessions); err != nil || sessions != 0 {
		t.Errorf("%d sessions after Disable: %v", sessions, err)
	}
	for began := time.Now(); time.Since(began) < 300*time.Millisecond; { // the clients go on trying
		b.prove(r, b.op(0, 1), m, rotators.Rejected)
	}
	stop.Store(true)
	wg.Wait()
	if late := logins.Load() - after; late != 0 {
		t.Errorf("%d logins after Disable", late)
	}
}

// TestExactlyOneRoleChanges compares the whole catalog of roles before and after each change, for awkward names, comments,
// passwords and ids.
func TestExactlyOneRoleChanges(t *testing.T) {
	b := newBench(t, scram(t))
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(from string, n int) string {
		var s strings.Builder
		for range n {
			s.WriteByte(from[random.IntN(len(from))])
		}
		return s.String()
	}
	printable := ""
	for c := byte(0x20); c < 0x7f; c++ {
		printable += string(c)
	}
	names := []string{"select", "user", "table", "null", "true", "grant", "default", "_", "__", strings.Repeat("x", 63), "role", "all"}
	for i := range 16 {
		name := pick("abcdefghijklmnopqrstuvwxyz_", 1) + pick("abcdefghijklmnopqrstuvwxyz_0123456789", random.IntN(60))
		if i < len(names) {
			name = names[i]
		}
		if strings.HasPrefix(name, "pg_") {
			continue
		}
		owner, comment := "own"+pick("abc_", 8), pick(printable+"\n\t'\\$", random.IntN(80))
		id := "team/" + pick(printable+"\n", 12)
		b.cfg.Credential = CredentialConfig{Owner: owner, Roles: []string{name}, Database: "postgres"}
		b.cfg.ID = id
		b.sql("CREATE ROLE %s NOLOGIN", ident(name))
		b.sql("CREATE ROLE %s NOLOGIN", ident(owner))
		if comment != "" {
			b.sql("COMMENT ON ROLE %s IS E'%s'", ident(name), strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(comment))
		}
		if v := b.major(); v >= 16 {
			b.sql("GRANT %s, %s TO %s WITH ADMIN OPTION", ident(name), ident(owner), b.cfg.Target.Admin.Username)
		}
		r := b.rotator()
		_, m := b.compose(r, b.op(0, 1))
		fields := m.RevealAll()
		fields["password"] = []byte(pick(printable, 1+random.IntN(60)))
		m = rotators.NewMaterial(fields)
		others := b.catalog(name, owner) // GRANT shows as a membership of the owner, too
		for _, change := range []struct {
			what string
			do   func() error
		}{
			{"apply", func() error { _, err := r.Apply(t.Context(), b.op(0, 1), m); return err }},
			{"prove", func() error {
				v, err := r.Prove(t.Context(), b.op(0, 1), rotators.VersionID(name), m)
				if v != rotators.Accepted {
					return fmt.Errorf("%s: %w", v, err)
				}
				return nil
			}},
			{"disable", func() error { return r.Disable(t.Context(), b.op(0, 2), rotators.VersionID(name)) }},
			{"enable", func() error { return r.Enable(t.Context(), b.op(0, 3), rotators.VersionID(name)) }},
			{"delete", func() error { return r.Delete(t.Context(), b.op(0, 4), rotators.VersionID(name)) }},
		} {
			if err := change.do(); err != nil {
				t.Fatalf("%s %q for %q: %v", change.what, name, id, err)
			}
			if after := b.catalog(name, owner); after != others {
				t.Fatalf("%s %q changed another role:\n%s\n%s", change.what, name, others, after)
			}
		}
		var got string
		if err := b.super.QueryRow(t.Context(), "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = $1", name).Scan(&got); err != nil {
			t.Fatal(err)
		}
		if text, f, err := splitComment(got); err != nil || text != comment || f.Credential != id || f.State != deleted {
			t.Errorf("%q: the comment %q became %q (%+v, %v)", name, comment, text, f, err)
		}
		b.sql("DROP ROLE %s", ident(name))
		b.sql("DROP ROLE %s", ident(owner))
	}
}

// FuzzLiteral asks the real server what it reads.
func FuzzLiteral(f *testing.F) {
	for _, s := range []string{"", "'", "''", `\'`, `\`, "$$", "a\nb", "; DROP ROLE x; --", "é\u202e", "' || 'x"} {
		f.Add(s)
	}
	testserver.Need(f, "postgres")
	var conn *pgx.Conn
	f.Fuzz(func(t *testing.T, s string) {
		if s != strings.ToValidUTF8(s, "") {
			return
		}
		if conn == nil {
			p := scram(t)
			c, err := pgx.Connect(context.Background(), p.AdminDSN())
			if err != nil {
				t.Fatal(err)
			}
			conn = c
		}
		results, err := conn.PgConn().Exec(context.Background(), "SELECT "+literal(s)).ReadAll()
		if err != nil || len(results) != 1 || string(results[0].Rows[0][0]) != strings.ReplaceAll(s, "\x00", "") {
			t.Fatalf("%q: %v %v", s, results, err)
		}
	})
}

// TestTakenOver: a role of another is taken over only if the configuration says so, and the refusals say what to do.
func TestTakenOver(t *testing.T) {
	b := newBench(t, scram(t))
	b.sql("CREATE ROLE %s LOGIN PASSWORD 'theirs' VALID UNTIL '2000-01-01'", b.a)
	if b.major() >= 16 {
		b.sql("GRANT %s TO %s WITH ADMIN OPTION", b.a, b.cfg.Target.Admin.Username)
	}
	r := b.rotator()
	_, m := b.compose(r, b.op(0, 1))
	before := b.catalog()
	_, err := r.Apply(t.Context(), b.op(0, 1), m)
	b.wantClass(err, rotators.Refused, "was not made by rekey", "ALTER ROLE")
	if b.catalog() != before {
		t.Error("a refused apply changed something")
	}
	if infos, err := r.Inspect(t.Context()); err != nil || len(infos) != 1 || infos[0].Ours || infos[0].Enabled {
		t.Errorf("an expired foreign role shows as %+v, %v", infos, err)
	}
	adopting := b.rotator(func(c *Config) { c.Adopted = b.a })
	if _, err := adopting.Apply(t.Context(), b.op(0, 1), m); err != nil {
		t.Fatal(err)
	}
	b.prove(adopting, b.op(0, 1), m, rotators.Accepted) // and the old expiry is gone
	if infos, err := r.Inspect(t.Context()); err != nil || len(infos) != 1 || !infos[0].Ours || !infos[0].Enabled {
		t.Errorf("the role shows as %+v, %v", infos, err)
	}

	other := b.rotator(func(c *Config) { c.ID = "team/other" })
	op := rotators.Op{ID: incarnation, Credential: "team/other", Generation: 99, Epoch: 99}
	before = b.catalog()
	_, err = other.Apply(t.Context(), op, m)
	b.wantClass(err, rotators.Refused, "belongs to credential "+b.cfg.ID)
	b.wantClass(other.Disable(t.Context(), op, b.a), rotators.Refused)
	b.wantClass(other.Delete(t.Context(), op, b.a), rotators.Refused)
	b.wantClass(other.Disable(t.Context(), b.op(0, 1), b.a), rotators.Refused, "the op is of credential")
	b.wantClass(r.Disable(t.Context(), b.op(0, 1), "postgres"), rotators.Refused, "not one of")
	if b.catalog() != before {
		t.Error("a refused change changed something")
	}
	if infos, err := other.Inspect(t.Context()); err != nil || len(infos) != 1 || infos[0].Ours || infos[0].Generation != 0 {
		t.Errorf("another's role shows as %+v, %v", infos, err)
	}

	b.sql("ALTER ROLE %s LOGIN", b.a)
	b.sql("ALTER ROLE %s SUPERUSER", b.a)
	b.wantClass(r.Disable(t.Context(), b.op(0, 2), b.a), rotators.Refused, "superuser")
	b.sql("ALTER ROLE %s NOSUPERUSER", b.a)
	b.sql("COMMENT ON ROLE %s IS 'rekey:{}'", b.a)
	b.wantClass(r.Disable(t.Context(), b.op(0, 2), b.a), rotators.Refused, "COMMENT ON ROLE")
	b.sql("COMMENT ON ROLE %s IS NULL", b.a)
	b.sql("ALTER ROLE %s LOGIN", b.cfg.Credential.Owner)
	_, err = adopting.Apply(t.Context(), b.op(0, 2), m)
	b.wantClass(err, rotators.Refused, "can log in", "NOLOGIN")
}

// TestKillOfAFreeSlot: disabling a role that others prepared, and that we never applied, leaves the fence and nothing else.
func TestKillOfAFreeSlot(t *testing.T) {
	b := newBench(t, scram(t))
	b.sql("CREATE ROLE %s NOLOGIN PASSWORD 'parked'", b.a)
	if b.major() >= 16 {
		b.sql("GRANT %s TO %s WITH ADMIN OPTION", b.a, b.cfg.Target.Admin.Username)
	}
	r := b.rotator()
	if err := r.Delete(t.Context(), b.op(1, 1), b.a); err != nil {
		t.Fatal(err)
	}
	if err := r.Disable(t.Context(), b.op(1, 1), b.a); err != nil {
		t.Fatal(err)
	}
	_, m := b.compose(r, b.op(0, 1))
	_, err := r.Apply(t.Context(), b.op(0, 1), m)
	b.wantClass(err, rotators.Conflict)
	var parked bool
	if err := b.super.QueryRow(t.Context(), "SELECT rolpassword IS NOT NULL FROM pg_authid WHERE rolname = $1", string(b.a)).Scan(&parked); err != nil || !parked {
		t.Errorf("the password that others parked is gone: %v", err)
	}
}

// TestDeletedHoldsNoVerifier: NOLOGIN alone would leave something to crack or to enable.
func TestDeletedHoldsNoVerifier(t *testing.T) {
	b := newBench(t, scram(t))
	r := b.rotator()
	b.apply(r, b.op(0, 1))
	stored := func() (verifier string, login bool) {
		t.Helper()
		if err := b.super.QueryRow(t.Context(), "SELECT coalesce(rolpassword, ''), rolcanlogin FROM pg_authid WHERE rolname = $1", string(b.a)).Scan(&verifier, &login); err != nil {
			t.Fatal(err)
		}
		return verifier, login
	}
	if v, login := stored(); !strings.HasPrefix(v, "SCRAM-SHA-256$4096:") || !login {
		t.Errorf("applied: %q %v", v, login)
	}
	if err := r.Disable(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	if v, login := stored(); v == "" || login {
		t.Errorf("disabled: %q %v", v, login)
	}
	if err := r.Delete(t.Context(), b.op(0, 2), b.a); err != nil {
		t.Fatal(err)
	}
	if v, login := stored(); v != "" || login {
		t.Errorf("deleted: %q %v", v, login)
	}
	b.wantClass(r.Enable(t.Context(), b.op(0, 3), b.a), rotators.Refused, "password was removed")
}
