//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/testserver"
)

// wants fails the test unless a command ended with the code and said all of the texts.
func (s *site) wants(what string, r result, code int, texts ...string) {
	s.t.Helper()
	if r.code != code {
		s.t.Errorf("%s: exit code %d, want %d\n%s", what, r.code, code, r.all())
	}
	for _, text := range texts {
		if !strings.Contains(r.errors, text) {
			s.t.Errorf("%s: does not say %q:\n%s", what, text, r.all())
		}
	}
	if strings.Contains(r.all(), "panic") || strings.Contains(r.all(), "goroutine ") {
		s.t.Errorf("%s: panicked:\n%s", what, r.all())
	}
	lines := strings.Split(strings.TrimSpace(r.errors), "\n")
	s.t.Logf("%s: %.300s", what, strings.Join(lines[max(0, len(lines)-2):], " | "))
}

// snapshot is what must not change: records, targets, roles with their verifiers and comments, and the store's files.
func (s *site) snapshot(l *ledger.Ledger) map[string]any {
	s.t.Helper()
	shot := map[string]any{}
	records, err := l.List(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, r := range records {
		shot["record "+string(r.ID)] = fmt.Sprint(r.Rev, r.Entry.Hash)
	}
	targets, err := l.Targets(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, t := range targets {
		shot["target "+t.Name] = string(t.Fields)
	}
	shot["roles"] = s.roles(s.super)
	files, _ := filepath.Glob(s.path("secrets/*.age"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			s.t.Fatal(err)
		}
		shot["file "+filepath.Base(f)] = string(b)
	}
	return shot
}

// roles is everything that rekey could change about the site's roles.
func (s *site) roles(conn *pgx.Conn) []string {
	s.t.Helper()
	rows, err := conn.Query(s.t.Context(), `SELECT concat_ws(' ', a.rolname, a.rolcanlogin, a.rolpassword, a.rolvaliduntil, shobj_description(a.oid, 'pg_authid'),
(SELECT string_agg(m.roleid::text, ',' ORDER BY 1) FROM pg_auth_members m WHERE m.member = a.oid)) FROM pg_authid a WHERE a.rolname LIKE $1 ORDER BY 1`, s.name+`\_%`)
	if err != nil {
		s.t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		s.t.Fatal(err)
	}
	return lines
}

func TestBadDeclarations(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	good := s.yaml("bad", 4222)
	credentials, ok := strings.CutPrefix(good[strings.Index(good, "credentials:\n"):], "credentials:\n")
	if !ok {
		t.Fatal(good)
	}
	same := strings.Replace(credentials, "orders/c1:", "orders/c2:", 1)
	second := func(id string) string {
		return strings.NewReplacer("orders/c1:", id+":", "_1a", "_2a", "_1b", "_2b").Replace(credentials)
	}
	for _, c := range []struct {
		what, yaml string
		says       []string
	}{
		{"unknown key", strings.Replace(good, "    every:", "    evry: 1h\n    every:", 1), []string{"bad.yaml:", "evry"}},
		{"unknown key of the provider", strings.Replace(good, "    owner_role:", "    ownerrole: x\n    owner_role:", 1), []string{"bad.yaml:", "ownerrole"}},
		{"dots in an id", good + second(`"orders/c.2"`), []string{"bad.yaml:", "orders/c.2"}},
		{"a wildcard in an id", good + second(`"orders/*"`), []string{"bad.yaml:", "orders/*"}},
		{"a deep wildcard in an id", good + second(`"orders/>"`), []string{"bad.yaml:", "orders/>"}},
		{"an id of 300 characters", good + second(`"orders/`+strings.Repeat("x", 293)+`"`), []string{"bad.yaml:", "63"}},
		{"two credentials claiming one role", good + same, []string{"bad.yaml:", s.pairs[0].a, "orders/c1"}},
		{"not YAML", good + "\t- {", []string{"bad.yaml:"}},
	} {
		config := s.write("bad", c.yaml)
		s.wants(c.what+", validate", s.cli(config, "validate"), 2, c.says...)
		s.wants(c.what+", apply", s.cli(config, "apply"), 2, c.says...)
		s.wants(c.what+", server", s.cli(config, "server"), 2, c.says...)
	}
	if left, _ := filepath.Glob(s.path("bad.d")); len(left) > 0 {
		t.Error("a server with a wrong configuration made a data directory")
	}
	several := strings.NewReplacer("    every:", "    evry: 1h\n    every:", "concurrency: 20", "concurrency: -1", "tls: {mode: disable}", "tls: {mode: maybe}").Replace(good)
	s.wants("several mistakes at once", s.cli(s.write("bad", several), "validate"), 2, "evry", "concurrency", "tls.mode")
	r := s.cli(s.path("bad.yaml"), "validate", "--output", "json")
	s.wants("several mistakes as JSON", r, 2)
	var answer struct {
		Valid    bool
		Problems []struct {
			Line, Column int
			Path, Field  string
		}
	}
	if err := json.Unmarshal([]byte(r.out), &answer); err != nil || answer.Valid || len(answer.Problems) != 3 || answer.Problems[0].Line == 0 {
		t.Errorf("%v: %s", err, r.out)
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	s.every = "0s"
	config := s.configure("one")
	s.wants("no server yet, no token", s.cli(config, "status"), 5, "rekey server")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	s.settled(config)
	l := s.ledger(config)
	before := s.snapshot(l)

	long := "orders/" + strings.Repeat("x", 293)
	ids := []string{long, "orders.c1", "orders/c.1", "orders/*", "orders/>", "*/c1", "orders", "/", "", "orders/c1/x", "Orders/c1", "orders/c1\n"}
	commands := [][]string{{"kill", "--reason", "x", "--yes"}, {"status"}, {"get"}, {"rotate"}, {"hold"}, {"pause"}, {"audit", "list"}}
	for i, id := range ids {
		for j, args := range commands {
			if i > 0 && j > 0 { // all ids with one command, all commands with one id
				break
			}
			if r := s.cli(config, append(args, id)...); r.code != 2 || r.out != "" {
				s.wants(fmt.Sprintf("%q %q", args, id), r, 2)
			}
		}
	}
	s.wants("unknown credential", s.cli(config, "rotate", "orders/nobody"), 4, "orders/nobody", "rekey status")
	s.wants("kill without a reason", s.cli(config, "kill", "orders/c1", "--yes"), 2, "--reason")
	s.wants("kill without --yes", s.cli(config, "kill", "orders/c1", "--reason", "x"), 2, "--yes")
	s.wants("restore of what lives", s.cli(config, "restore", "orders/c1"), 3)
	s.wants("rollback outside an overlap", s.cli(config, "rollback", "orders/c1"), 3)
	s.wants("unknown event type", s.cli(config, "events", "rotatted"), 2, "rotatted")
	s.wants("unknown flag", s.cli(config, "status", "--frobnicate"), 2, "frobnicate")

	wrong := s.path("wrong.token")
	if err := os.WriteFile(wrong, []byte("rk_"+strings.Repeat("a", 43)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.wants("wrong token", s.cli(config, "status", "--token-file", wrong), 5)
	s.wants("wrong token, kill", s.cli(config, "kill", "orders/c1", "--reason", "x", "--yes", "--token-file", wrong), 5)
	s.wants("no token file", s.cli(config, "status", "--token-file", s.path("missing")), 5, "missing")
	s.wants("second server on the data directory", s.cli(s.write("two", strings.ReplaceAll(s.yaml("one", freePort(t)), "one.sock", "two.sock")), "server"), 1, "one.d")
	s.wants("second server on the port", s.cli(s.write("three", s.yaml("three", s.natsPort(config))), "server"), 1, fmt.Sprint(s.natsPort(config)))
	s.wants("worker without an external NATS", s.cli(config, "worker"), 1, "nats.url")
	if !p.running() {
		t.Fatal("the first server died of it")
	}
	if after := s.snapshot(l); !reflect.DeepEqual(before, after) {
		t.Errorf("something changed:\n%v\n%v", before, after)
	}
	p.kill()
	s.wants("server not running", s.cli(config, "status"), 6, "rekey server --config "+config)
}

func TestBadTargets(t *testing.T) {
	t.Parallel()
	took(t)
	s := newSite(t, 1)
	s.every = "0s"
	config := s.configure("one")
	p := s.run("one", "server", config)
	s.ready(p)
	s.begin(config)
	s.settled(config)
	l := s.ledger(config)
	s.sql("CREATE ROLE %s_weak LOGIN PASSWORD '%s'", s.name, s.admin)
	s.sql("CREATE ROLE %s_mute LOGIN CREATEROLE PASSWORD '%s'", s.name, s.admin)
	s.sql("CREATE ROLE %s_theirs LOGIN PASSWORD 'not-ours'", s.name)
	if err := os.WriteFile(s.path("wrong.password"), []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path("loose.password"), []byte(s.admin+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.path("loose.password"), 0o644); err != nil { // whatever the umask
		t.Fatal(err)
	}
	trusting, err := testserver.StartPostgres(testserver.PostgresConfig{Trust: true})
	if err != nil {
		t.Fatal(err)
	}
	defer trusting.Stop()
	there, err := pgx.Connect(t.Context(), trusting.AdminDSN())
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close(context.Background())
	for _, sql := range []string{fmt.Sprintf("CREATE ROLE %s_adm LOGIN CREATEROLE PASSWORD '%s' IN ROLE pg_signal_backend", s.name, s.admin), "CREATE DATABASE " + s.name} {
		if _, err := there.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	foreign := s.roles(there)

	before := s.snapshot(l)
	base := s.yaml("one", s.natsPort(config))
	target := func(change ...string) string {
		y := base[strings.Index(base, "  db:\n"):strings.Index(base, "credentials:\n")]
		return strings.NewReplacer(append([]string{"  db:\n", "  bad:\n"}, change...)...).Replace(y)
	}
	credential := func(change ...string) string {
		y := base[strings.Index(base, "  orders/c1:"):]
		return strings.NewReplacer(append([]string{"orders/c1", "orders/bad", "target: db", "target: bad", "_1a", "_9a", "_1b", "_9b", "_1o", "_9o"}, change...)...).Replace(y)
	}
	with := func(target, credential string) string {
		return strings.Replace(base, "credentials:\n", target+"credentials:\n", 1) + credential
	}
	port := fmt.Sprintf("port: %d", s.pg.Port)
	user := s.name + "_adm"
	for _, c := range []struct {
		what, yaml string
		says       []string
	}{
		{"unreachable database", with(target(port, fmt.Sprintf("port: %d", freePort(t))), credential()), []string{"orders/bad", "refused"}},
		{"trust authentication", with(target(port, fmt.Sprintf("port: %d", trusting.Port)), credential()), []string{"orders/bad", "without asking for a password", "scram-sha-256"}},
		{"wrong admin password", with(target("admin.password", "wrong.password"), credential()), []string{"orders/bad", "password authentication failed", "wrong.password"}},
		{"no admin password", with(target("admin.password", "no.password"), credential()), []string{"orders/bad", "no.password"}},
		{"admin password that others may read", with(target("admin.password", "loose.password"), credential()), []string{"orders/bad", "chmod 600"}},
		{"missing CREATEROLE", with(target("username: "+user, "username: "+s.name+"_weak"), credential()), []string{"orders/bad", "ALTER ROLE", "CREATEROLE"}},
		{"missing pg_signal_backend", with(target("username: "+user, "username: "+s.name+"_mute"), credential()), []string{"orders/bad", "GRANT pg_signal_backend TO"}},
		{"missing database", with(target("database: "+s.name, "database: nowhere"), credential()), []string{"orders/bad", "nowhere"}},
		{"somebody else's role", with(target(), credential(s.name+"_1a", s.name+"_theirs")), []string{"orders/bad", s.name + "_theirs", "adopt it"}},
	} {
		path := s.write("change", c.yaml)
		// Another file name, the same server.
		r := s.cli(path, "apply", "--server", s.listen(config), "--token-file", filepath.Join(s.dataDir(config), "admin.token"))
		s.wants(c.what, r, 2, c.says...)
		if after := s.snapshot(l); !reflect.DeepEqual(before, after) {
			t.Errorf("%s: something changed:\n%v\n%v", c.what, before, after)
		}
	}
	if now := s.roles(there); !reflect.DeepEqual(foreign, now) {
		t.Errorf("roles on the server that trusts everybody changed: %v, were %v", now, foreign)
	}
	// The same server still does its work.
	s.must(config, "rotate", "orders/c1", "--wait=revoked", "--timeout", "60s")
	s.settled(config)
	s.judgeBut(l, s.name+"_weak", s.name+"_mute", s.name+"_theirs")
	s.verified(config)
}
