package api

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/rekeyhq/rekey/internal/credential"
)

func TestRequests(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	const id = credential.ID("orders/db")
	e.apply(declare(id))
	ops := e.as("ops-1", nil, ScopeRead, ScopeRotate, ScopeOperate)

	_, err := ops.Steer(ctx, "orders/bd", credential.Rotate, "")
	refused(t, err, http.StatusNotFound, `there is no credential "orders/bd"`, "did you mean orders/db?")
	_, err = ops.Steer(ctx, id, credential.Hold, "")
	refused(t, err, http.StatusConflict, "there is no overlap to hold (phase idle)")

	c, err := ops.Steer(ctx, id, credential.Rotate, "because")
	if err != nil || c.Phase != "admitted" || c.Generation != 1 || c.Reason != "because" {
		t.Fatalf("rotate: %+v %v", c, err)
	}
	r, _, _ := e.ledger.Get(ctx, id)
	if r.Entry.Actor != "ops-1" || r.Entry.Detail != "because" || r.Due.IsZero() {
		t.Errorf("entry %+v, due %s: want the identity as actor and a schedule that rings now", r.Entry, r.Due)
	}
	_, err = ops.Steer(ctx, id, credential.Rotate, "")
	refused(t, err, http.StatusConflict, "generation 1 is in flight (admitted)")

	e.drive(id, credential.Idle)
	e.drive(id, credential.Draining)
	c, err = ops.Get(ctx, id)
	if err != nil || c.Current == nil || c.Old == nil || c.Old.ID == c.Current.ID || c.OverlapUntil.IsZero() || c.AgeSeconds <= 0 || c.Reference != "files:orders/db" {
		t.Errorf("in the overlap: %+v %v", c, err)
	}
	if c, err = ops.Steer(ctx, id, credential.Hold, "wait"); err != nil || !c.Hold || c.State != "held" {
		t.Errorf("hold: %+v %v", c, err)
	}
	if c, err = ops.Steer(ctx, id, credential.Resume, ""); err != nil || c.Hold {
		t.Errorf("resume: %+v %v", c, err)
	}
	if c, err = ops.Steer(ctx, id, credential.Rollback, ""); err != nil || c.Phase != "reverting" || c.Generation != 3 {
		t.Errorf("rollback: %+v %v", c, err)
	}
	rev := c.Rev
	for range 2 { // the second changes nothing
		if c, err = ops.Steer(ctx, id, credential.Pause, ""); err != nil || !c.Paused || c.Rev != rev+1 {
			t.Errorf("pause: %+v %v", c, err)
		}
	}
}

// Many at once: each request is committed, none is lost.
func TestRequestsRace(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	e.drive("orders/db", credential.Idle)
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			verb := []credential.Verb{credential.Pause, credential.Resume}[i%2]
			_, err := e.admin.Steer(t.Context(), "orders/db", verb, "")
			if err != nil && !strings.Contains(err.Error(), "neither paused") {
				t.Errorf("%s: %v", verb, err)
			}
		})
	}
	wg.Wait()
	if v, err := e.admin.Verify(t.Context()); err != nil || v.Found != 0 {
		t.Errorf("verify: %+v %v", v, err)
	}
}

// flaky answers commits and orders as a ledger does whose replies get lost.
type flaky struct {
	Ledger
	mu sync.Mutex
	// lose is how many writes are made without their reply; drop how many are neither made nor answered.
	lose, drop int
	// fail is after how many writes everything fails; negative for never.
	fail   int
	writes int
}

// around counts, and breaks, one write. Lanes are not compared and set: their replies are not lost here.
func (f *flaky) around(write func() error) error { return f.write(write, true) }

func (f *flaky) write(write func() error, cas bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail >= 0 && f.writes >= f.fail {
		return errDead
	}
	f.writes++
	if cas && f.drop > 0 {
		f.drop--
		return credential.ErrUncertain
	}
	err := write()
	if cas && err == nil && f.lose > 0 {
		f.lose--
		return credential.ErrUncertain
	}
	return err
}

type deadError struct{}

func (deadError) Error() string { return "the process died" }

var errDead = deadError{}

func (f *flaky) Commit(ctx context.Context, r credential.Record, seq uint64) (n uint64, err error) {
	err = f.around(func() error { n, err = f.Ledger.Commit(ctx, r, seq); return err })
	return n, err
}

func (f *flaky) CreateIncident(ctx context.Context, i credential.Incident) (out credential.Incident, n uint64, err error) {
	err = f.around(func() error { out, n, err = f.Ledger.CreateIncident(ctx, i); return err })
	if err == nil {
		return out, n, nil
	}
	return out, n, err
}

func (f *flaky) PutTarget(ctx context.Context, t credential.Target, seq uint64) (n uint64, err error) {
	err = f.around(func() error { n, err = f.Ledger.PutTarget(ctx, t, seq); return err })
	return n, err
}

func (f *flaky) DeleteTarget(ctx context.Context, name string, seq uint64) error {
	return f.around(func() error { return f.Ledger.DeleteTarget(ctx, name, seq) })
}

func (f *flaky) EnsureLanes(ctx context.Context, name string, n int) error {
	return f.write(func() error { return f.Ledger.EnsureLanes(ctx, name, n) }, false)
}

func (f *flaky) RemoveLanes(ctx context.Context, name string) error {
	return f.write(func() error { return f.Ledger.RemoveLanes(ctx, name) }, false)
}

func (f *flaky) SetControl(ctx context.Context, c credential.Control, seq uint64) (n uint64, err error) {
	err = f.around(func() error { n, err = f.Ledger.SetControl(ctx, c, seq); return err })
	return n, err
}

func (f *flaky) set(lose, drop, fail int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lose, f.drop, f.fail, f.writes = lose, drop, fail, 0
}

func wrapped(f *flaky) func(*Config) {
	return func(c *Config) { f.Ledger, f.fail = c.Ledger, -1; c.Ledger = f }
}

// A lost reply is no second rotation, and a lost request is made again.
func TestLostReplies(t *testing.T) {
	f := &flaky{}
	e := start(t, wrapped(f))
	ctx := t.Context()
	e.apply(declare("orders/db"))
	for _, c := range []struct{ lose, drop int }{{1, 0}, {0, 1}, {0, 3}} {
		e.drive("orders/db", credential.Draining)
		before, _, _ := e.ledger.Get(ctx, "orders/db")
		f.set(c.lose, c.drop, -1)
		v, err := e.admin.Steer(ctx, "orders/db", credential.Rollback, "")
		if err != nil || v.Generation != before.Generation+1 || v.Rev != before.Rev+1 {
			t.Errorf("rollback with %+v: generation %d -> %d, rev %d -> %d, %v", c, before.Generation, v.Generation, before.Rev, v.Rev, err)
		}
		f.set(c.lose, c.drop, -1)
		i, err := e.admin.Order(ctx, "orders/db", "kill", "", "")
		if err != nil || len(i.Credentials) != 1 {
			t.Errorf("kill with %+v: %+v %v", c, i, err)
		}
		f.set(c.lose, c.drop, -1)
		if _, err := e.admin.SetControl(ctx, c.drop != 3, ""); err != nil {
			t.Errorf("control with %+v: %v", c, err)
		}
		f.set(0, 0, -1)
	}
	// Nothing goes: the answer says so, and that repeating is safe.
	f.set(0, 1000, -1)
	_, err := e.admin.Order(ctx, "orders/db", "kill", "", "")
	refused(t, err, http.StatusServiceUnavailable, "it is unknown whether the order was written: repeat it with incident")
	f.set(0, 0, 0)
	_, err = e.admin.Steer(ctx, "orders/db", credential.Pause, "")
	refused(t, err, http.StatusServiceUnavailable, "the ledger does not answer")
	if strings.Contains(err.Error(), errDead.Error()) {
		t.Errorf("the answer shows the ledger's error: %v", err)
	}
}

func TestEmergency(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	e.apply(declare("orders/db", "orders/cache"))
	e.drive("orders/db", credential.Draining)
	sec := e.as("responder", nil, ScopeEmergency)

	_, err := sec.Order(ctx, "orders/dbx", "kill", "", "")
	refused(t, err, http.StatusNotFound, "did you mean orders/db?")
	first, err := sec.Order(ctx, "orders/db", "kill", "leak-7", "leaked in a log")
	if err != nil || first.ID != "leak-7" || first.Actor != "responder" || first.Expanded || first.Complete || first.Credentials[0].Reached {
		t.Fatalf("kill: %+v %v", first, err)
	}
	stored, _, err := e.ledger.GetIncident(ctx, "leak-7")
	if err != nil || stored.Hash != stored.Sum() || stored.Reason != "leaked in a log" || stored.Credentials[0] != "orders/db" {
		t.Errorf("stored: %+v %v", stored, err)
	}
	again, err := sec.Order(ctx, "orders/db", "kill", "leak-7", "told differently")
	if err != nil || again.CreatedAt != first.CreatedAt || again.Reason != first.Reason {
		t.Errorf("repeated: %+v %v", again, err)
	}
	_, err = sec.Order(ctx, "orders/cache", "kill", "leak-7", "")
	refused(t, err, http.StatusConflict, "incident leak-7 is another order (kill of orders/db)")
	_, err = sec.Order(ctx, "orders/db", "replace", "leak-7", "")
	refused(t, err, http.StatusConflict, "is another order")
	_, err = sec.Order(ctx, "orders/db", "kill", "Not An Id", "")
	refused(t, err, http.StatusUnprocessableEntity, "incident")
	_, err = sec.Incident(ctx, "none")
	refused(t, err, http.StatusNotFound)

	// Carried out: the scheduler's part, then the worker's.
	e.expand("leak-7")
	if i, _ := sec.Incident(ctx, "leak-7"); !i.Expanded || i.Complete || !i.Credentials[0].Reached || i.Credentials[0].Disabled {
		t.Errorf("expanded: %+v", i)
	}
	_, err = sec.Order(ctx, "orders/db", "replace", "", "")
	refused(t, err, http.StatusConflict, "restore it, which makes a new version")
	e.drive("orders/db", credential.Suspended)
	if i, _ := sec.Incident(ctx, "leak-7"); !i.Complete || !i.Credentials[0].Disabled || !i.Credentials[0].Proven {
		t.Errorf("suspended: %+v", i)
	}
	if _, err := e.admin.Steer(ctx, "orders/db", credential.Restore, ""); err != nil {
		t.Error(err)
	}
	// The repeat after everything is still the same order: nothing happens to the restored credential.
	if again, err := sec.Order(ctx, "orders/db", "kill", "leak-7", ""); err != nil || !again.Complete {
		t.Errorf("repeated after restore: %+v %v", again, err)
	}

	r, err := sec.Order(ctx, "orders/cache", "replace", "", "")
	if err != nil || len(r.ID) != 36 || r.Mode != "replace" {
		t.Errorf("replace: %+v %v", r, err)
	}
}

// expand does to the ledger what the scheduler does with an order.
func (e *env) expand(incident string) {
	e.t.Helper()
	i, seq, err := e.ledger.GetIncident(e.t.Context(), incident)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, id := range i.Credentials {
		r, at, err := e.ledger.Get(e.t.Context(), id)
		if err != nil {
			e.t.Fatal(err)
		}
		next, _, err := credential.Next(r, credential.Request{Verb: credential.Verb(i.Mode), Actor: i.Actor, Reason: i.Reason, Incident: i.ID}, e.server.Now())
		if err != nil {
			e.t.Fatal(err)
		}
		if _, err := e.ledger.Commit(e.t.Context(), next, at); err != nil {
			e.t.Fatal(err)
		}
	}
	i.Expanded = true
	if _, err := e.ledger.UpdateIncident(e.t.Context(), i, seq); err != nil {
		e.t.Fatal(err)
	}
}

func TestControl(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	if c, err := e.admin.Control(ctx); err != nil || c.Paused {
		t.Fatalf("%+v %v", c, err)
	}
	c, err := e.admin.SetControl(ctx, true, "maintenance")
	if err != nil || !c.Paused || c.Actor != "admin" || c.Reason != "maintenance" {
		t.Errorf("pause: %+v %v", c, err)
	}
	again, err := e.admin.SetControl(ctx, true, "again")
	if err != nil || again != c {
		t.Errorf("paused again: %+v %v", again, err)
	}
	if c, err = e.admin.SetControl(ctx, false, ""); err != nil || c.Paused {
		t.Errorf("resume: %+v %v", c, err)
	}
}

func TestListPagesAndFilters(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	e.apply(declare("orders/a", "orders/b", "billing/a", "billing/b", "billing/c"))
	eventually(t, "inventory", func() bool { l, err := e.admin.List(ctx, Filter{}); return err == nil && len(l) == 5 })
	var got []string
	path := "/v1/credentials?limit=2"
	for path != "" {
		var page CredentialList
		if err := e.admin.short(ctx, http.MethodGet, strings.SplitN(path, "?", 2)[0], queryOf(path), nil, &page); err != nil {
			t.Fatal(err)
		}
		for _, c := range page.Credentials {
			got = append(got, c.ID)
		}
		path = ""
		if page.Next != "" {
			path = "/v1/credentials?limit=2&after=" + page.Next
		}
	}
	if strings.Join(got, " ") != "billing/a billing/b billing/c orders/a orders/b" {
		t.Errorf("pages: %v", got)
	}
	for _, c := range []struct {
		f    Filter
		want int
	}{{Filter{Team: "orders"}, 2}, {Filter{Target: "db"}, 5}, {Filter{Target: "x"}, 0}, {Filter{Owner: "orders"}, 5}, {Filter{Environment: "prod"}, 0}, {Filter{State: "parked,ok"}, 5}, {Filter{State: "parked"}, 0}} {
		if l, err := e.admin.List(ctx, c.f); err != nil || len(l) != c.want {
			t.Errorf("%+v: %d, %v", c.f, len(l), err)
		}
	}
	targets, err := e.admin.Targets(ctx)
	if err != nil || len(targets) != 1 || targets[0].Credentials != 5 {
		t.Errorf("targets: %+v %v", targets, err)
	}
	res, body := e.raw(http.MethodGet, "/v1/credentials?stat=parked", e.admin.token, nil)
	if res.StatusCode != http.StatusUnprocessableEntity {
		t.Errorf("unknown parameter: %d %s", res.StatusCode, body)
	}
}

func queryOf(path string) url.Values {
	u, _ := url.Parse(path)
	return u.Query()
}
