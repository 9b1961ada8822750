package ledgertest

import (
	"context"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

func testTargets(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	type change struct {
		name   string
		target *credential.Target
	}
	got, ready := newInbox[change](), newInbox[bool]()
	background(t, func(ctx context.Context) error {
		return l.WatchTargets(ctx, func(name string, t *credential.Target) { got.put(change{name, t}) }, func() { ready.put(true) })
	})
	ready.next(t)
	_, _, err := l.GetTarget(ctx, "pg")
	isError(t, err, credential.ErrNotFound)
	pg := credential.Target{Name: "pg", Kind: "postgres", Owner: "o", Environment: "test", Concurrency: 4}
	seq := must[uint64](t)(l.PutTarget(ctx, pg, 0))
	_, err = l.PutTarget(ctx, pg, 0)
	isError(t, err, credential.ErrStale)
	pg.Concurrency = 5
	next := must[uint64](t)(l.PutTarget(ctx, pg, seq))
	_, err = l.PutTarget(ctx, pg, seq)
	isError(t, err, credential.ErrStale)
	stored, at, err := l.GetTarget(ctx, "pg")
	noError(t, err)
	same(t, stored, pg)
	if at != next {
		t.Fatalf("sequence %d, want %d", at, next)
	}
	isError(t, l.DeleteTarget(ctx, "pg", seq), credential.ErrStale)
	noError(t, l.DeleteTarget(ctx, "pg", next))
	_, _, err = l.GetTarget(ctx, "pg")
	isError(t, err, credential.ErrNotFound)
	if all := must[[]credential.Target](t)(l.Targets(ctx)); len(all) != 0 {
		t.Fatalf("a deleted target is listed: %v", all)
	}
	last := got.until(t, func(c change) bool { return c.target == nil })
	if last.name != "pg" {
		t.Fatalf("%s was deleted", last.name)
	}
	must[uint64](t)(l.PutTarget(ctx, pg, 0)) // the name is free again
	_, err = l.PutTarget(ctx, pg, 0)
	isError(t, err, credential.ErrStale)
	if c := got.next(t); c.target == nil || c.target.Concurrency != 5 {
		t.Fatalf("made again: %+v", c)
	}
	if all := must[[]credential.Target](t)(l.Targets(ctx)); len(all) != 1 || all[0].Name != "pg" {
		t.Fatalf("listed: %v", all)
	}
	if _, err := l.PutTarget(ctx, credential.Target{Name: "p.g"}, 0); err == nil {
		t.Fatal("a name of two tokens was accepted")
	}
}

func testIncidents(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	inc := credential.Incident{
		ID: "inc-1", Mode: credential.ModeKill, Credentials: []credential.ID{"pay/a", "pay/b"}, Hash: "h", Actor: "alice",
		CreatedAt: time.Now().UTC(),
	}
	stored, seq, err := l.CreateIncident(ctx, inc)
	noError(t, err)
	same(t, stored, inc)
	again := inc
	again.Credentials = []credential.ID{"pay/c"}
	stored, at, err := l.CreateIncident(ctx, again)
	isError(t, err, credential.ErrStale)
	same(t, stored, inc) // the first one, so that a replay can be told from a conflict
	if at != seq {
		t.Fatalf("sequence %d, want %d", at, seq)
	}
	got, ready := newInbox[credential.Incident](), newInbox[bool]()
	background(t, func(ctx context.Context) error {
		return l.WatchIncidents(ctx, got.put, func() { ready.put(true) })
	})
	same(t, got.next(t), inc)
	ready.next(t)
	inc.Expanded = true
	if _, err := l.UpdateIncident(ctx, inc, 0); err == nil {
		t.Fatal("an update without sequence was accepted")
	}
	must[uint64](t)(l.UpdateIncident(ctx, inc, seq))
	_, err = l.UpdateIncident(ctx, inc, seq)
	isError(t, err, credential.ErrStale)
	same(t, got.next(t), inc)
	all := must[[]credential.Incident](t)(l.Incidents(ctx))
	if len(all) != 1 || !all[0].Expanded {
		t.Fatalf("listed: %+v", all)
	}
	_, _, err = l.GetIncident(ctx, "inc-2")
	isError(t, err, credential.ErrNotFound)
	if _, _, err := l.CreateIncident(ctx, credential.Incident{ID: "a.b"}); err == nil {
		t.Fatal("an id of two tokens was accepted")
	}
}

func testControl(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	c, seq, err := l.GetControl(ctx)
	noError(t, err)
	if c.Paused || seq != 0 {
		t.Fatalf("never set: %+v at %d", c, seq)
	}
	got, ready := newInbox[credential.Control](), newInbox[bool]()
	background(t, func(ctx context.Context) error { return l.WatchControl(ctx, got.put, func() { ready.put(true) }) })
	ready.next(t)
	paused := credential.Control{Paused: true, Actor: "alice", At: time.Now().UTC()}
	seq = must[uint64](t)(l.SetControl(ctx, paused, 0))
	_, err = l.SetControl(ctx, credential.Control{}, 0)
	isError(t, err, credential.ErrStale)
	same(t, got.next(t), paused)
	must[uint64](t)(l.SetControl(ctx, credential.Control{Actor: "bob"}, seq))
	if c := got.next(t); c.Paused {
		t.Fatalf("then: %+v", c)
	}
	c, _, err = l.GetControl(ctx)
	noError(t, err)
	if c.Paused || c.Actor != "bob" {
		t.Fatalf("in the end: %+v", c)
	}
}
