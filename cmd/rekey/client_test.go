package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/integration/store/storetest"
	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/rotators/rotatortest"
	"github.com/rekeyhq/rekey/scheduler"
	"github.com/rekeyhq/rekey/workers"
)

// world is a whole engine in this process, with an issuer and a store in memory, and a configuration file that says where it is.
type world struct {
	t      *testing.T
	dir    string
	ledger *ledger.Ledger
	client *api.Client
	issuer sync.Map // credential -> *rotatortest.FakeSlots
	// broken makes every change at the issuer fail for good; stuck makes it wait.
	broken, stuck atomic.Bool
}

// faulty is an issuer that an operator has to mend.
type faulty struct {
	*rotatortest.FakeSlots
	w *world
}

func (f faulty) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	if f.w.broken.Load() {
		return rotators.Version{}, rotators.Faultf(rotators.Refused, "apply", "permission denied: GRANT something first")
	}
	for f.w.stuck.Load() && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	return f.FakeSlots.Apply(ctx, op, m)
}

func (f faulty) Close() error { return nil }

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "rekey") // a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir}
	data := filepath.Join(dir, "data")
	node, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: data})
	must(t, err)
	t.Cleanup(node.Shutdown)
	nc, err := node.Connect()
	must(t, err)
	t.Cleanup(nc.Close)
	w.ledger, err = ledger.Open(t.Context(), ledger.Config{Conn: nc})
	must(t, err)
	t.Cleanup(w.ledger.Close)
	ids, err := api.OpenIdentities(data, time.Now())
	must(t, err)
	log := slog.New(slog.DiscardHandler)
	s, err := api.New(api.Config{Ledger: w.ledger, Identities: ids, Logger: log, Kinds: config.Kinds{Targets: map[string]config.Kind{"fake": {
		Traits: func(_, _ json.RawMessage) (rotators.Traits, error) {
			return rotatortest.NewFakeSlots(rotatortest.SlotsConfig{}).Traits(), nil
		},
	}}}})
	must(t, err)
	l, err := api.Listen(api.ListenConfig{Address: defaultListen(data)})
	must(t, err)

	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	serve := func(f func() error) {
		wg.Go(func() {
			if err := f(); err != nil && ctx.Err() == nil {
				t.Errorf("engine: %v", err)
			}
		})
	}
	guard := &workers.Guard{}
	memory := &storetest.Memory{}
	worker := workers.New(workers.Config{
		Name: "w", Ledger: w.ledger, Random: rand.Reader, Logger: log, Blocked: guard.Blocked, Paused: guard.Paused,
		Store: func(string) (store.Store, error) { return memory, nil },
		Rotator: func(_ context.Context, _ credential.Target, r credential.Record) (rotators.Rotator, error) {
			f, _ := w.issuer.LoadOrStore(r.ID, rotatortest.NewFakeSlots(rotatortest.SlotsConfig{Credential: string(r.ID)}))
			return faulty{f.(*rotatortest.FakeSlots), w}, nil
		},
	})
	sched := scheduler.New(scheduler.Config{Ledger: w.ledger, Logger: log})
	serve(func() error { return guard.Watch(ctx, w.ledger, nil) })
	serve(func() error { return s.Run(ctx) })
	serve(func() error { return s.Serve(ctx, l) })
	serve(func() error { return sched.Run(ctx) })
	serve(func() error { return worker.Serve(ctx, w.ledger) })
	t.Cleanup(func() { w.stuck.Store(false); stop(); wg.Wait() })

	must(t, os.WriteFile(w.config(), []byte("version: 1\nserver:\n  data_dir: data\ncredentials: [this part is broken]\n"), 0o644))
	token, err := readToken(filepath.Join(data, api.AdminTokenFile))
	must(t, err)
	w.client, err = api.NewClient(api.ClientConfig{Address: defaultListen(data), Token: token})
	must(t, err)
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) config() string { return filepath.Join(w.dir, "rekey.yaml") }

// declare applies credentials and waits until each has its first version.
func (w *world) declare(ids ...credential.ID) {
	w.t.Helper()
	q := api.ApplyRequest{
		Targets:     []credential.Target{{Name: "db", Kind: "fake", Environment: "test", Owner: "orders", Concurrency: 4, StepDeadline: credential.Duration(5 * time.Second)}},
		Credentials: map[credential.ID]credential.Spec{},
	}
	for _, id := range ids {
		q.Credentials[id] = credential.Spec{
			Target: "db", Kind: "fake", Store: "files", Owner: "orders", Environment: "test", Purpose: "the order database",
			Every: credential.Duration(24 * time.Hour), StepDeadline: credential.Duration(5 * time.Second),
			Overlap: credential.Overlap{Min: credential.Duration(2500 * time.Millisecond), Max: credential.Duration(2500 * time.Millisecond)},
		}
	}
	_, err := w.client.Apply(w.t.Context(), q)
	must(w.t, err)
	for _, id := range ids {
		w.until(id, func(c api.Credential) bool { return c.Current != nil && c.Phase == "idle" })
	}
}

func (w *world) until(id credential.ID, is func(api.Credential) bool) api.Credential {
	w.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		c, err := w.client.Get(w.t.Context(), id)
		if err == nil && is(c) {
			return c
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: %+v %v", id, c, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// rekey runs a command as a user would, without a terminal.
func (w *world) rekey(args ...string) (code int, stdout, stderr string) {
	return w.rekeyIn(w.t.Context(), "", args...)
}

func (w *world) rekeyIn(ctx context.Context, stdin string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(ctx, append([]string{"--config", w.config()}, args...), strings.NewReader(stdin), &out, &errs, func(string) string { return "" })
	return code, out.String(), errs.String()
}

// expect runs a command and wants its code and that it says each of these, on either stream.
func (w *world) expect(code int, command string, says ...string) string {
	w.t.Helper()
	got, out, errs := w.rekey(strings.Fields(command)...)
	if got != code {
		w.t.Errorf("rekey %s: code %d, want %d\n%s%s", command, got, code, out, errs)
	}
	for _, s := range says {
		if !strings.Contains(out+errs, s) {
			w.t.Errorf("rekey %s does not say %q:\n%s%s", command, s, out, errs)
		}
	}
	return out
}

func TestCommands(t *testing.T) {
	w := newWorld(t)
	w.expect(0, "status", "no credentials yet")
	w.declare("orders/db", "orders/cache")

	table := w.expect(0, "status", "CREDENTIAL", "orders/cache", "orders/db", "ok")
	for _, line := range strings.Split(table, "\n") {
		if len(line) > 80 {
			t.Errorf("wider than 80 columns: %q", line)
		}
	}
	w.expect(0, "status orders/db", "the order database", "generation     1", "every          1d")
	w.expect(0, "status --state parked", "no credential fits")
	var list []api.Credential
	if err := json.Unmarshal([]byte(w.expect(0, "status -o json")), &list); err != nil || len(list) != 2 {
		t.Errorf("json: %v %d", err, len(list))
	}
	w.expect(0, "targets", "db", "fake", "2")
	w.expect(0, "version", "rekey")
	w.expect(0, "get orders/db", "files:orders/db")

	out := w.expect(0, "rotate orders/db --wait", "orders/db: generation 2 is promoted")
	if strings.Contains(out, "is put into the store") {
		t.Error("progress is on standard output")
	}
	w.expect(3, "rotate orders/db", "orders/db: ")
	w.until("orders/db", func(c api.Credential) bool { return c.Phase == "idle" })
	w.expect(0, "rotate orders/db orders/cache --wait=revoked", "orders/db: generation 3 is revoked", "orders/cache: generation 2 is revoked")
	w.expect(3, "hold orders/db", "there is no overlap to hold")
	w.expect(3, "restore orders/db", "it is not suspended")
	w.expect(4, "rotate orders/bd", `there is no credential "orders/bd"; did you mean orders/db?`, "rekey status")
	w.expect(2, "rotate orders", "want team/name")
	w.expect(2, "rotate orders/db --wait=tomorrow", "want promoted or revoked")
	w.expect(2, "pause", "want credential ids, or --all")
	w.expect(2, "pause orders/db --all", "want credential ids, or --all")

	w.expect(0, "pause orders/db --reason migration", "no step starts")
	w.expect(3, "rotate orders/db", "it is paused")
	w.expect(0, "status", "paused")
	w.expect(0, "resume orders/db", "goes on")
	w.expect(0, "pause --all --reason freeze", "the whole fleet: no step starts")
	w.expect(0, "status", "the whole fleet was paused by admin", "freeze")
	w.expect(0, "resume --all", "the whole fleet: goes on")

	w.expect(0, "audit verify", "nothing is missing, edited or out of order")
	w.expect(0, "audit list orders/db", "admin: declare", "admin: pause", "migration")
	w.expect(0, "events rotated orders/db", "generation 1", "generation 3")
	if got := w.expect(0, "events revoked orders/"); strings.Contains(got, "rotated") || !strings.Contains(got, "orders/cache") {
		t.Errorf("filtered events: %s", got)
	}
	w.expect(2, "events exploded", "want one of rotated")
	w.expect(2, "events orders/db orders/", "one credential or one team")
	for line := range strings.SplitSeq(strings.TrimSpace(w.expect(0, "events -o json")), "\n") {
		var e api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.SpecVersion != "1.0" {
			t.Errorf("%s: %v", line, err)
		}
	}
}

func TestEmergencyCommands(t *testing.T) {
	w := newWorld(t)
	w.declare("orders/db", "orders/cache")
	w.expect(2, "kill orders/db", "say why")
	w.expect(2, "kill orders/db --reason leak", "stops working at once", "repeat with --yes")
	if c, _ := w.client.Get(t.Context(), "orders/db"); c.State != "ok" {
		t.Errorf("state %s after a kill that was refused", c.State)
	}
	w.expect(0, "kill orders/db --reason leak --yes --incident leak-1 --wait", "every version is disabled, and was refused at a login")
	c := w.until("orders/db", func(c api.Credential) bool { return c.State == "suspended" })
	w.expect(0, "kill orders/db --reason leak --yes --incident leak-1 --wait", "every version is disabled") // the same order
	if again, _ := w.client.Get(t.Context(), "orders/db"); again.Epoch != c.Epoch {
		t.Errorf("the repeated order raised the epoch from %d to %d", c.Epoch, again.Epoch)
	}
	w.expect(3, "kill orders/cache --reason leak --yes --incident leak-1", "is another order")
	w.expect(0, "status", "suspended", "rekey restore orders/db")
	w.expect(3, "rotate orders/db", "restore it first")
	w.expect(3, "replace orders/db --reason x --yes", "restore it")
	w.expect(0, "restore orders/db", "a new version is on its way")
	w.until("orders/db", func(c api.Credential) bool { return c.State == "ok" && c.Phase == "idle" && c.Current != nil })
	w.expect(0, "replace orders/cache --reason stolen --yes --wait", "replaced; the old version is proven dead")
	w.expect(0, "audit verify")
}

func TestWaitFails(t *testing.T) {
	w := newWorld(t)
	w.declare("orders/db", "orders/cache")
	w.broken.Store(true)
	w.expect(7, "rotate orders/db --wait", "orders/db is parked", "GRANT something first", "rekey resume orders/db")
	w.expect(0, "status", "parked", "GRANT something first")
	w.broken.Store(false)
	w.expect(0, "resume orders/db")
	w.until("orders/db", func(c api.Credential) bool { return c.State == "ok" && c.Generation == c.Current.Generation })

	w.stuck.Store(true)
	w.expect(7, "rotate orders/cache --wait --timeout 200ms", "not within ", "goes on rotating")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // as Ctrl-C does
	defer cancel()
	code, out, errs := w.rekeyIn(ctx, "", "kill", "orders/cache", "--reason", "x", "--yes", "--wait")
	if code != exitWait || !strings.Contains(errs, "stopped watching") || !strings.Contains(errs, "goes on") {
		t.Errorf("interrupted: %d %s%s", code, out, errs)
	}
}

func TestIdentityCommands(t *testing.T) {
	w := newWorld(t)
	w.declare("orders/db")
	token := filepath.Join(w.dir, "ci.token")
	w.expect(0, "identity add ci --scope read --token-out "+token, "its token is in")
	info, err := os.Stat(token)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("token file: %v %v", info, err)
	}
	w.expect(0, "identity list", "admin", "all", "ci", "read")
	w.expect(0, "--token-file "+token+" status", "orders/db")
	w.expect(5, "--token-file "+token+" rotate orders/db", "identity ci has the scopes read; this needs rotate")
	w.expect(3, "identity add ci --scope read", "there is an identity of that name")
	w.expect(1, "identity add other --scope read --token-out "+token, "file exists")
	w.expect(2, "identity add Other --scope everything", `scope "everything"`, "name")
	w.expect(0, "identity remove ci", "removed ci")
	w.expect(5, "--token-file "+token+" status", "unknown or was removed")
	w.expect(3, "identity remove admin", "last identity with the scope admin")
	w.expect(4, "identity remove nobody")
	w.expect(5, "--token-file /nowhere/x status", "there is no token in /nowhere/x")
}

// Without a server every command says so, how to start one, and code 6; a mistake in the file does not hide it.
func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	w := &world{t: t, dir: dir}
	must(t, os.WriteFile(w.config(), []byte("server: {data_dir: d}\n"), 0o644))
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "d", api.AdminTokenFile), []byte("rekey_x\n"), 0o600))
	for _, command := range []string{"status", "rotate a/b", "pause --all", "audit verify", "events", "targets", "identity list"} {
		w.expect(6, command, "did not answer", "rekey server --config "+w.config())
	}
	must(t, os.Remove(w.config()))
	w.expect(2, "status", "where is the server?", "REKEY_SERVER")
	w.expect(2, "--server 192.0.2.1:80 --token-file "+filepath.Join(dir, "d", api.AdminTokenFile)+" status", "in the clear")
	w.expect(2, "status --output yaml", "want table or json")
	w.expect(2, "frobnicate", "unknown command", "rekey --help")
	w.expect(2, "audit frobnicate", "unknown command")
	w.expect(2, "status --frob", "unknown flag", "rekey status --help")
	w.expect(0, "help exit-codes", "8  audit verify found violations")
}

// Violations end with their own code.
func TestViolationsHaveTheirCode(t *testing.T) {
	var out bytes.Buffer
	v := api.VerifyResult{Credentials: 1, Entries: 3, Found: 1, Violations: []api.Violation{{Invariant: 10, Credential: "orders/db", Message: "audit entry 2 was edited"}}}
	must(t, showVerified(&out, v))
	if !strings.Contains(out.String(), "invariant 10: orders/db: audit entry 2 was edited") {
		t.Error(out.String())
	}
	for code, err := range map[int]error{
		exitOK: nil, exitError: errors.New("x"), exitRefused: &api.Error{Status: 409}, exitNotFound: fmt.Errorf("x: %w", &api.Error{Status: 404}),
		exitUnauthorised: &api.Error{Status: 403}, exitUsage: &api.Error{Status: 422}, exitUnreachable: errors.Join(nil, api.ErrUnreachable),
		exitViolations: &exit{exitViolations, io.EOF},
	} {
		if got := codeOf(err); got != code {
			t.Errorf("%v: code %d, want %d", err, got, code)
		}
	}
}

// Every command explains itself with an example, and completes ids where it takes them.
func TestHelpAndCompletion(t *testing.T) {
	w := newWorld(t)
	w.declare("orders/db")
	root := newRoot(&app{stdout: io.Discard, stderr: io.Discard, getenv: os.Getenv, now: time.Now})
	for _, c := range root.Commands() {
		for _, c := range append(c.Commands(), c) {
			for line := range strings.SplitSeq(c.Long, "\n") {
				if len(line) > 80 {
					t.Errorf("%s: help wider than 80 columns: %q", c.CommandPath(), line)
				}
			}
			if c.Runnable() && (c.Long == "" || c.Example == "" || len(c.Short) > 68) {
				t.Errorf("%s: long %d, example %d, short %q", c.CommandPath(), len(c.Long), len(c.Example), c.Short)
			}
		}
	}
	for _, command := range []string{"status", "rotate", "kill", "hold", "get", "audit list", "events"} {
		_, out, errs := w.rekey(append([]string{"__complete"}, append(strings.Fields(command), "or")...)...)
		if !strings.Contains(out, "orders/db\tok, the order database") {
			t.Errorf("complete %s or: %s%s", command, out, errs)
		}
	}
	_, out, _ := w.rekey("completion", "bash")
	if !strings.Contains(out, "__start_rekey") {
		t.Error("no completion for bash")
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0s", 90 * time.Second: "1m30s", 26 * time.Hour: "1d2h", -time.Hour: "1h", 24 * time.Hour: "1d", 59 * time.Second: "59s"} {
		if got := span(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	now := time.Now()
	if until(time.Time{}, now) != "" || until(now.Add(time.Hour), now) != "in 1h" || until(now.Add(-time.Hour), now) != "1h ago" || until(now, now) != "now" {
		t.Error("until")
	}
}
