package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
)

// actions are the changes as "object id action", without those that change nothing.
func actions(r ApplyResult) string {
	var out []string
	for _, c := range r.Changes {
		if c.Action != config.None {
			out = append(out, fmt.Sprintf("%s %s %s", c.Object, c.ID, c.Action))
		}
	}
	return strings.Join(out, "; ")
}

func TestApply(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	ci := e.as("ci", nil, ScopeApply)
	apply := func(q ApplyRequest, want string) {
		t.Helper()
		out, err := ci.Apply(ctx, q)
		if err != nil || out.Failed > 0 {
			t.Fatalf("apply: %+v %v", out, err)
		}
		if got := actions(out); got != want {
			t.Errorf("changes: %q, want %q", got, want)
		}
	}
	q := declare("orders/db", "orders/cache")
	dry := q
	dry.DryRun = true
	apply(dry, "target db create; credential orders/cache create; credential orders/db create")
	if l, _ := e.ledger.List(ctx); len(l) != 0 {
		t.Errorf("a dry run made %d records", len(l))
	}
	apply(q, "target db create; credential orders/cache create; credential orders/db create")
	apply(q, "")
	body, _ := json.Marshal(q) // the same, written otherwise
	spaced := strings.NewReplacer(`{"role":"orders.db"}`, `{ "role" :  "orders.db" }`, `{"host":`, `{"h\u006fst" : `).Replace(string(body))
	if res, answer := e.raw(http.MethodPost, "/v1/apply", ci.token, strings.NewReader(spaced)); spaced == string(body) || res.StatusCode != http.StatusOK || strings.Contains(answer, `"update"`) {
		t.Errorf("the same with other spaces: %d %s", res.StatusCode, answer)
	}
	r, _, err := e.ledger.Get(ctx, "orders/db")
	if err != nil || r.Rev != 1 || r.Entry.Actor != "ci" || !r.Managed || r.Due.IsZero() {
		t.Errorf("record: %+v %v", r, err)
	}

	s := q.Credentials["orders/db"]
	s.Every = credential.Duration(2 * time.Hour)
	q.Credentials["orders/db"] = s
	delete(q.Credentials, "orders/cache")
	q.Targets[0].Concurrency = 5
	apply(q, "target db update; credential orders/cache unmanage; credential orders/db update")
	apply(q, "")
	if r, _, _ = e.ledger.Get(ctx, "orders/cache"); r.Managed {
		t.Error("what left the declaration is still managed")
	}
	if r, _, _ = e.ledger.Get(ctx, "orders/db"); r.Spec.Every.D() != 2*time.Hour {
		t.Errorf("every %s", r.Spec.Every)
	}
	q.Credentials["orders/cache"] = spec("orders.cache")
	apply(q, "credential orders/cache manage")
	apply(ApplyRequest{}, "target db remove; credential orders/cache unmanage; credential orders/db unmanage")
	if targets, err := e.ledger.Targets(ctx); err != nil || len(targets) != 0 {
		t.Errorf("targets: %v %v", targets, err)
	}
}

// Everything that is wrong is said at once, and nothing is written.
func TestApplyFindsProblemsFirst(t *testing.T) {
	e := start(t, func(c *Config) { c.Store = func(name string) bool { return name == "files" } })
	ctx := t.Context()
	change := func(f func(*credential.Spec)) credential.Spec {
		s := spec("r")
		f(&s)
		return s
	}
	for name, c := range map[string]struct {
		q    ApplyRequest
		says []string
	}{
		"target": {ApplyRequest{Targets: []credential.Target{{Name: "Bad Name", Kind: "nope"}, {Name: "x", Kind: "fake", Owner: "o", Environment: "e", Concurrency: 1, StepDeadline: credential.Duration(time.Second)}}},
			[]string{"targets.Bad Name: name: want", `there is no kind "nope"`, "concurrency 0", "owner and environment", "targets.x: host: missing"}},
		"twice": {ApplyRequest{Targets: []credential.Target{target("db"), target("db")}}, []string{"declared twice"}},
		"credentials": {ApplyRequest{Targets: []credential.Target{target("db")}, Credentials: map[credential.ID]credential.Spec{
			"orders.db": spec("a"), "orders/*": spec("b"), credential.ID("orders/" + strings.Repeat("x", 300)): spec("c"),
			"orders/a": change(func(s *credential.Spec) { s.Target = "nowhere" }),
			"orders/b": change(func(s *credential.Spec) { s.Owner = "billing" }),
			"orders/c": change(func(s *credential.Spec) { s.Environment = "production" }),
			"orders/d": change(func(s *credential.Spec) { s.Store = "elsewhere"; s.Fields = json.RawMessage(`{"role":"d"}`) }),
			"orders/e": change(func(s *credential.Spec) { s.Purpose = " "; s.Fields = json.RawMessage(`{"role":"e"}`) }),
			"orders/f": change(func(s *credential.Spec) { s.Fields = json.RawMessage(`{"rolle":"hunter2"}`) }),
			"orders/g": change(func(s *credential.Spec) { s.Fields = json.RawMessage(`{"role":7}`) }),
			"orders/h": change(func(s *credential.Spec) { s.Every = 1 }),
		}}, []string{
			`credential id "orders.db"`, `credential id "orders/*"`, "orders/xxx", `there is no target "nowhere"`, `owner: "billing", but target db has "orders"`,
			"environment", `no store "elsewhere"`, "purpose: missing", "unknown field", "role wants a string", "the least interval",
		}},
		"claims": {ApplyRequest{Targets: []credential.Target{target("db")}, Credentials: map[credential.ID]credential.Spec{"orders/a": spec("same"), "orders/b": spec("same")}},
			[]string{"credentials.orders/b: claims same, which orders/a claims already"}},
	} {
		for _, dry := range []bool{true, false} {
			c.q.DryRun = dry
			_, err := e.admin.Apply(ctx, c.q)
			refused(t, err, http.StatusUnprocessableEntity, c.says...)
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: a value is in the answer: %v", name, err)
			}
		}
	}
	if l, _ := e.ledger.List(ctx); len(l) != 0 {
		t.Errorf("%d records were made", len(l))
	}
	if l, _ := e.ledger.Targets(ctx); len(l) != 0 {
		t.Errorf("%d targets were made", len(l))
	}
}

// What the state forbids is refused before anything is written, also beside what would be possible.
func TestApplyRefusedByState(t *testing.T) {
	e := start(t)
	ctx := t.Context()
	q := declare("orders/db")
	e.apply(q)
	e.drive("orders/db", credential.Draining)
	q = declare("orders/db", "orders/new")
	s := q.Credentials["orders/db"]
	s.Store = "elsewhere"
	q.Credentials["orders/db"] = s
	q.DryRun = true
	out, err := e.admin.Apply(ctx, q)
	if err != nil || out.Refused != 1 || out.Applied || !strings.Contains(actions(out), "orders/db refused") {
		t.Errorf("dry run: %+v %v", out, err)
	}
	q.DryRun = false
	_, err = e.admin.Apply(ctx, q)
	refused(t, err, http.StatusConflict, "nothing was changed", "credentials.orders/db", "consumers read it in store files")
	if _, _, err := e.ledger.Get(ctx, "orders/new"); !errors.Is(err, credential.ErrNotFound) {
		t.Errorf("the other one was made: %v", err)
	}
	// What only the machine knows is asked of it: an adoption that a worker tries at this moment is not to be changed.
	q = declare("orders/db", "orders/taken")
	s = q.Credentials["orders/taken"]
	s.Adopt = &credential.Adopt{Version: "a", Material: map[string]string{"password": "env:OLD"}}
	q.Credentials["orders/taken"] = s
	e.apply(q)
	r, seq, err := e.ledger.Get(ctx, "orders/taken")
	if err != nil {
		t.Fatal(err)
	}
	claimed, _, err := credential.Next(r, credential.Tick{Worker: "w"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.ledger.Commit(ctx, claimed, seq); err != nil {
		t.Fatal(err)
	}
	s.Purpose = "another"
	q.Credentials["orders/taken"] = s
	q.Credentials["orders/new"] = spec("orders.new")
	_, err = e.admin.Apply(ctx, q)
	refused(t, err, http.StatusConflict, "credentials.orders/taken", "its adoption is being tried just now")
	if _, _, err := e.ledger.Get(ctx, "orders/new"); !errors.Is(err, credential.ErrNotFound) {
		t.Errorf("the other one was made: %v", err)
	}
	// A role that something unmanaged still uses is not for the taking.
	q = ApplyRequest{Targets: []credential.Target{target("db")}, Credentials: map[credential.ID]credential.Spec{"orders/new": spec("orders.db")}}
	_, err = e.admin.Apply(ctx, q)
	refused(t, err, http.StatusUnprocessableEntity, "claims orders.db, which orders/new claims already", "its versions are still in use")
}

// The process dies after each of its writes in turn: applying again makes the rest, and what was made is not made twice.
func TestApplyResumes(t *testing.T) {
	f := &flaky{}
	e := start(t, wrapped(f))
	ctx := t.Context()
	before := ApplyRequest{Targets: []credential.Target{target("db"), target("old")}, Credentials: map[credential.ID]credential.Spec{}}
	for _, id := range []credential.ID{"orders/changed", "orders/gone", "orders/same"} {
		before.Credentials[id] = spec(id.Token())
	}
	after := ApplyRequest{Targets: []credential.Target{target("db"), target("fresh")}, Credentials: map[credential.ID]credential.Spec{}}
	for _, id := range []credential.ID{"orders/changed", "orders/made", "orders/same"} {
		after.Credentials[id] = spec(id.Token())
	}
	s := after.Credentials["orders/changed"]
	s.Purpose = "something else"
	after.Credentials["orders/changed"] = s

	died := 0
	for n := 0; ; n++ {
		if n > 50 {
			t.Fatal("it never ends")
		}
		f.set(0, 0, -1)
		e.apply(before)
		made, _, err := e.ledger.Get(ctx, "orders/made")
		known := err == nil
		same, _, _ := e.ledger.Get(ctx, "orders/same")
		f.set(0, 0, n)
		out, err := e.admin.Apply(ctx, after)
		if err != nil {
			t.Fatalf("died after %d writes: %v", n, err)
		}
		if out.Failed > 0 {
			died++
			for _, c := range out.Changes {
				if strings.Contains(c.Error, errDead.Error()) {
					t.Errorf("the answer shows the ledger's error: %s", c.Error)
				}
			}
		}
		f.set(0, 0, -1)
		e.apply(after)
		if got := actions(e.apply(after)); got != "" {
			t.Errorf("after %d writes, again and again: %q remains", n, got)
		}
		for id, managed := range map[credential.ID]bool{"orders/changed": true, "orders/made": true, "orders/same": true, "orders/gone": false} {
			r, _, err := e.ledger.Get(ctx, id)
			if err != nil || r.Managed != managed {
				t.Errorf("after %d writes: %s managed %v, %v", n, id, r.Managed, err)
			}
		}
		if r, _, _ := e.ledger.Get(ctx, "orders/same"); r.Rev != same.Rev {
			t.Errorf("after %d writes: what is the same was written again", n)
		}
		if r, _, _ := e.ledger.Get(ctx, "orders/made"); known && r.Rev != made.Rev+1 || !known && r.Rev != 1 {
			t.Errorf("after %d writes: rev %d, known before: %v", n, r.Rev, known)
		}
		targets, _ := e.ledger.Targets(ctx)
		if len(targets) != 2 {
			t.Errorf("after %d writes: targets %v", n, targets)
		}
		if out.Failed == 0 {
			break
		}
	}
	if died < 5 {
		t.Errorf("only %d deaths: the test proves little", died)
	}
	t.Logf("died %d times", died)
	// Lost replies change nothing either.
	e.apply(before)
	after.Credentials["orders/lost"] = spec("orders.lost")
	f.set(50, 0, -1)
	if out, err := e.admin.Apply(ctx, after); err != nil || out.Failed > 0 {
		t.Errorf("with lost replies: %+v %v", out, err)
	}
	if r, _, err := e.ledger.Get(ctx, "orders/lost"); err != nil || r.Rev != 1 {
		t.Errorf("made, its reply lost: rev %d, %v", r.Rev, err)
	}
	if v, err := e.admin.Verify(ctx); err != nil || v.Found > 0 {
		t.Errorf("verify: %+v %v", v, err)
	}
}
