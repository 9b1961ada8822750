//go:build linux

package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/testserver"
)

// overlapMin is how long old and new both work in these tests.
const overlapMin = time.Second

// stepDeadline bounds a step, and with it how long a dead worker's claim holds: a third more.
const stepDeadline = 2 * time.Second

// site is one installation: directory, database, admin, and role pairs of its own.
type site struct {
	t     *testing.T
	bin   string
	dir   string // short, so that unix sockets fit
	pg    *testserver.Postgres
	super *pgx.Conn // as the superuser, in the site's database; for the test's own goroutine
	name  string    // prefix of everything in the database
	admin string    // the admin's password
	pairs []pair
	host  string // where the configuration says that the database is
	port  int
	every string
	// overlap is both its minimum and its maximum.
	overlap time.Duration
	nats    *testserver.NATS    // nil: embedded
	said    transcript          // everything that commands printed
	user    *syscall.Credential // whom processes and commands run as; nil: ourselves
	env     []string            // added to the environment of processes
	// logged are the processes whose logs a failure shows.
	logged map[string]bool
}

// pair is one credential.
type pair struct {
	id     credential.ID
	a, b   string
	owner  string
	schema string
}

type transcript struct {
	sync.Mutex
	text strings.Builder
}

func (t *transcript) add(s string) {
	t.Lock()
	defer t.Unlock()
	t.text.WriteString(s)
}

func (t *transcript) String() string {
	t.Lock()
	defer t.Unlock()
	return t.text.String()
}

// newSite prepares the database for n credentials. Nothing of rekey runs yet.
func newSite(t *testing.T, n int) *site {
	t.Helper()
	return newSiteOn(t, postgresServer(t), n)
}

func newSiteOn(t *testing.T, pg *testserver.Postgres, n int) *site {
	t.Helper()
	s := &site{
		t: t, bin: program(t), pg: pg, name: "e" + strings.ToLower(rand.Text()[:6]), admin: "adm-" + rand.Text(),
		host: pg.Host, port: pg.Port, every: "2s", overlap: overlapMin, logged: map[string]bool{},
	}
	var err error
	if s.dir, err = os.MkdirTemp(shared.dir, "s"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "admin.password"), []byte(s.admin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	setup, err := pgx.Connect(t.Context(), pg.AdminDSN())
	if err != nil {
		t.Fatal(err)
	}
	defer setup.Close(context.Background())
	for _, sql := range []string{
		"SET log_statement = 'none'", // the admin's password is ours, not the program's, to keep out of the server's log
		fmt.Sprintf("CREATE ROLE %s_adm LOGIN CREATEROLE PASSWORD '%s' IN ROLE pg_signal_backend", s.name, s.admin),
		"CREATE DATABASE " + s.name,
	} {
		if _, err := setup.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if s.super, err = pgx.Connect(t.Context(), pg.DSN(pg.User, pg.Password, s.name)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.super.Close(context.Background()) })
	for i := range n {
		p := pair{
			id: credential.ID(fmt.Sprintf("orders/c%d", i+1)), schema: fmt.Sprintf("s%d", i+1),
			a: fmt.Sprintf("%s_%da", s.name, i+1), b: fmt.Sprintf("%s_%db", s.name, i+1), owner: fmt.Sprintf("%s_%do", s.name, i+1),
		}
		s.pairs = append(s.pairs, p)
		s.sql("CREATE ROLE %s NOLOGIN", p.owner)
		s.sql("GRANT %s TO %s_adm WITH ADMIN OPTION", p.owner, s.name)
		s.sql("CREATE SCHEMA %s AUTHORIZATION %s", p.schema, p.owner)
	}
	return s
}

// unprivileged makes processes and commands run as nobody, if we are root, whom no permission binds.
func (s *site) unprivileged() {
	s.t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		s.t.Fatal(err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2, os.Chmod(shared.dir, 0o711)); err != nil {
		s.t.Fatal(err)
	}
	s.user = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	s.own()
}

// own gives everything in the site's directory to the user that it runs as.
func (s *site) own() {
	s.t.Helper()
	if s.user == nil {
		return
	}
	err := filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, int(s.user.Uid), int(s.user.Gid)))
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) sql(format string, args ...any) {
	s.t.Helper()
	if _, err := s.super.Exec(s.t.Context(), fmt.Sprintf(format, args...)); err != nil {
		s.t.Fatalf("%s: %v", fmt.Sprintf(format, args...), err)
	}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) ids() []credential.ID {
	var ids []credential.ID
	for _, p := range s.pairs {
		ids = append(ids, p.id)
	}
	return ids
}

// process part of a configuration: data directory and listener carry the configuration's name, so that several processes can live side
// by side; store, target and credentials are common.
func (s *site) yaml(name string, port int) string {
	var y strings.Builder
	fmt.Fprintf(&y, "version: 1\nserver:\n  data_dir: ./%s.d\n  listen: unix:./%s.sock\n  log: {level: debug}\n", name, name)
	if s.nats != nil {
		fmt.Fprintf(&y, "nats: {url: %q, creds: %q}\n", s.nats.URL, "file:"+s.nats.CredsFile)
	} else {
		fmt.Fprintf(&y, "nats: {port: %d}\n", port)
	}
	fmt.Fprintf(&y, "stores:\n  default: {kind: file, dir: ./secrets}\n")
	fmt.Fprintf(&y, `targets:
  db:
    kind: postgres
    environment: test
    owner: team-orders
    host: %s
    port: %d
    database: %s
    admin: {username: %s_adm, password: "file:./admin.password"}
    tls: {mode: disable}
    concurrency: 20
    step_deadline: %s
credentials:
`, s.host, s.port, s.name, s.name, stepDeadline)
	for _, p := range s.pairs {
		fmt.Fprintf(&y, `  %s:
    target: db
    owner: team-orders
    environment: test
    purpose: the end-to-end tests
    owner_role: %s
    roles: [%s, %s]
    every: %s
    overlap: {min: %s, max: %s}
`, p.id, p.owner, p.a, p.b, s.every, s.overlap, s.overlap)
	}
	return y.String()
}

// write puts a configuration into the site's directory and returns its path.
func (s *site) write(name, yaml string) string {
	s.t.Helper()
	path := s.path(name + ".yaml")
	if err := os.WriteFile(path, []byte(yaml), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if s.user != nil {
		if err := os.Chown(path, int(s.user.Uid), int(s.user.Gid)); err != nil {
			s.t.Fatal(err)
		}
	}
	return path
}

// configure writes a configuration with a free port for an embedded NATS.
func (s *site) configure(name string) string {
	s.t.Helper()
	return s.write(name, s.yaml(name, freePort(s.t)))
}

// again writes a configuration once more after the site has changed, and keeps its port.
func (s *site) again(config string) {
	s.t.Helper()
	name := strings.TrimSuffix(filepath.Base(config), ".yaml")
	s.write(name, s.yaml(name, s.natsPort(config)))
}

func (s *site) natsPort(config string) int {
	b, err := os.ReadFile(config)
	if err != nil {
		s.t.Fatal(err)
	}
	port := 0
	if _, rest, ok := strings.Cut(string(b), "nats: {port: "); ok {
		_, _ = fmt.Sscanf(rest, "%d", &port)
	}
	return port
}

func (s *site) listen(config string) string {
	return "unix:" + strings.TrimSuffix(config, ".yaml") + ".sock"
}

func (s *site) dataDir(config string) string { return strings.TrimSuffix(config, ".yaml") + ".d" }

// logins lists the site's roles that may log in, the admin apart, as the database says.
func (s *site) logins() []string {
	s.t.Helper()
	rows, err := s.super.Query(s.t.Context(), "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname LIKE $1 AND rolname <> $2", s.name+`\_%`, s.name+"_adm")
	if err != nil {
		s.t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		s.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// apply declares what the configuration says. It repeats where a loaded machine did not answer a check within the step's deadline.
func (s *site) apply(config string) {
	s.t.Helper()
	eventually(s.t, 2*time.Minute, "apply", func() (bool, string) {
		r := s.cli(config, "apply")
		if r.code != 0 && !strings.Contains(r.errors, "deadline exceeded") {
			s.t.Fatalf("rekey apply: exit code %d\n%s", r.code, r.all())
		}
		return r.code == 0, r.all()
	})
}

// restore ends a kill. It is refused while the second sweep is under way.
func (s *site) restore(config, id string) {
	s.t.Helper()
	eventually(s.t, 30*time.Second, "restore", func() (bool, string) {
		r := s.cli(config, "restore", id)
		if r.code != 0 && !strings.Contains(r.errors, "wait until it is suspended") {
			s.t.Fatalf("rekey restore: exit code %d\n%s", r.code, r.all())
		}
		return r.code == 0, r.all()
	})
}

// quiet stops the calendar: nothing new begins, and what is under way comes to its end.
func (s *site) quiet(config string) {
	s.t.Helper()
	s.every = "0s"
	s.again(config)
	s.apply(config)
	s.settled(config)
}

// settled waits until every credential is idle and nothing is wrong with it.
func (s *site) settled(config string) {
	s.t.Helper()
	eventually(s.t, 90*time.Second, "everything comes to rest", func() (bool, string) {
		list, err := s.status(config)
		if err != nil {
			return false, err.Error()
		}
		var busy []string
		for _, c := range list {
			if c.Phase != "idle" || c.State != "ok" || c.Worker != "" {
				why := ""
				if c.Failure != nil {
					why = c.Failure.Message
				}
				busy = append(busy, fmt.Sprintf("%s generation %d is %s in %s, worker %q %s", c.ID, c.Generation, c.State, c.Phase, c.Worker, why))
			}
		}
		return len(list) == len(s.pairs) && len(busy) == 0, strings.Join(busy, "; ")
	})
}
