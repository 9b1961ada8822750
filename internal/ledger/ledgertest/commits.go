package ledgertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// same compares through JSON: that is what a ledger keeps.
func same(t *testing.T, got, want any) {
	t.Helper()
	g, w := must[[]byte](t)(json.Marshal(got)), must[[]byte](t)(json.Marshal(want))
	if string(g) != string(w) {
		t.Fatalf("got  %s\nwant %s", g, w)
	}
}

func testCommit(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	if l.Incarnation() == uuid.Nil {
		t.Fatal("no incarnation")
	}
	_, _, err := l.Get(ctx, "pay/orders")
	isError(t, err, credential.ErrNotFound)

	first := New(l.Incarnation(), "pay/orders")
	seq := must[uint64](t)(l.Commit(ctx, first, 0))
	got, at, err := l.Get(ctx, "pay/orders")
	noError(t, err)
	same(t, got, first)
	if at != seq || seq == 0 {
		t.Fatalf("commit returned sequence %d, Get %d", seq, at)
	}
	second := Next(first, time.Now().Add(time.Hour), credential.NoticeRotated, credential.NoticeRevoked)
	next := must[uint64](t)(l.Commit(ctx, second, seq))
	got, at, err = l.Get(ctx, "pay/orders")
	noError(t, err)
	same(t, got, second)
	if at != next || next <= seq {
		t.Fatalf("commits returned sequences %d and %d, Get %d", seq, next, at)
	}
	checkWhole(t, l)
}

func testStale(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	r, seq := create(t, l, "pay/orders")
	if _, err := l.Commit(ctx, Next(r, time.Time{}, credential.NoticeRotated), 0); !errors.Is(err, credential.ErrStale) {
		t.Fatalf("creating what exists: %v", err)
	}
	second := Next(r, time.Time{}, credential.NoticeRotated)
	at := must[uint64](t)(l.Commit(ctx, second, seq))
	for _, old := range []uint64{seq, seq - 1, at + 1, 1 << 40} {
		_, err := l.Commit(ctx, Next(second, time.Now().Add(time.Hour), credential.NoticeSuspended), old)
		isError(t, err, credential.ErrStale)
	}
	// The very same transition again, as after an uncertain outcome, is stale too: nothing is published twice.
	_, err := l.Commit(ctx, second, seq)
	isError(t, err, credential.ErrStale)
	_, err = l.Commit(ctx, Next(New(l.Incarnation(), "pay/other"), time.Time{}), 7)
	isError(t, err, credential.ErrStale)
	_, _, err = l.Get(ctx, "pay/other")
	isError(t, err, credential.ErrNotFound)

	got, now, err := l.Get(ctx, "pay/orders")
	noError(t, err)
	same(t, got, second)
	if now != at {
		t.Fatalf("a refused commit moved the record from %d to %d", at, now)
	}
	if has := must[bool](t)(l.HasSchedule(ctx, "pay/orders")); has {
		t.Fatal("a refused commit left its schedule")
	}
	checkWhole(t, l)
}

func testRefused(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	for name, change := range map[string]func(r *credential.Record){
		"id with a dot":       func(r *credential.Record) { r.ID = "pay/or.ders"; r.Entry.Credential = r.ID },
		"id with a wildcard":  func(r *credential.Record) { r.ID = "pay/*"; r.Entry.Credential = r.ID },
		"id with >":           func(r *credential.Record) { r.ID = ">/x"; r.Entry.Credential = r.ID },
		"id without team":     func(r *credential.Record) { r.ID = "orders"; r.Entry.Credential = r.ID },
		"rev 0":               func(r *credential.Record) { r.Rev, r.Entry.Rev = 0, 0; r.Entry.Hash = r.Entry.Sum() },
		"entry of another":    func(r *credential.Record) { r.Entry.Credential = "pay/x"; r.Entry.Hash = r.Entry.Sum() },
		"entry of other rev":  func(r *credential.Record) { r.Entry.Rev = 9; r.Entry.Hash = r.Entry.Sum() },
		"entry edited":        func(r *credential.Record) { r.Entry.Actor = "somebody" },
		"entry without time":  func(r *credential.Record) { r.Entry.At = time.Time{}; r.Entry.Hash = r.Entry.Sum() },
		"another incarnation": func(r *credential.Record) { r.Incarnation = uuid.New() },
		"announced twice": func(r *credential.Record) {
			r.Announce = []credential.Notice{{Type: credential.NoticeRotated}, {Type: credential.NoticeRotated}}
		},
	} {
		r := New(l.Incarnation(), "pay/orders")
		if change(&r); r.Entry.Credential != "pay/orders" && r.ID != "pay/orders" {
			r.Entry.Hash = r.Entry.Sum()
		}
		_, err := l.Commit(ctx, r, 0)
		if err == nil || errors.Is(err, credential.ErrStale) || errors.Is(err, credential.ErrUncertain) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	r := New(l.Incarnation(), "pay/orders")
	r.Schema++
	_, err := l.Commit(ctx, r, 0)
	isError(t, err, credential.ErrSchema)

	over, cancel := context.WithCancel(ctx)
	cancel()
	_, err = l.Commit(over, New(l.Incarnation(), "pay/orders"), 0)
	isError(t, err, context.Canceled)
	if errors.Is(err, credential.ErrUncertain) {
		t.Fatal("a commit that never began is said to be uncertain")
	}
	for _, id := range []credential.ID{"", "a", "a/b/c", "a.b/c", "A/b", "*/*"} {
		if _, _, err := l.Get(ctx, id); err == nil || errors.Is(err, credential.ErrNotFound) {
			t.Errorf("Get(%q): %v", id, err)
		}
	}
	if records := must[[]credential.Record](t)(l.List(ctx)); len(records) != 0 {
		t.Fatalf("refused commits left %d records", len(records))
	}
	checkWhole(t, l)
}

// testRace: of many commits that start from the same sequence, one wins.
func testRace(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	r, seq := create(t, l, "pay/orders")
	var wg sync.WaitGroup
	errs := make([]error, 32)
	for i := range errs {
		n := Next(r, time.Time{}, credential.NoticeRotated)
		n.Reason = fmt.Sprint(i)
		wg.Go(func() { _, errs[i] = l.Commit(ctx, n, seq) })
	}
	wg.Wait()
	won := -1
	for i, err := range errs {
		switch {
		case err == nil && won >= 0:
			t.Fatalf("commits %d and %d both won", won, i)
		case err == nil:
			won = i
		default:
			isError(t, err, credential.ErrStale)
		}
	}
	got, _, err := l.Get(ctx, "pay/orders")
	noError(t, err)
	if won < 0 || got.Reason != fmt.Sprint(won) {
		t.Fatalf("commit %d won, the record is of %q", won, got.Reason)
	}
	checkWhole(t, l)
}

// testEviction: a stale commit fails alone, whoever shares its batch.
func testEviction(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	const n = 120
	ids := make([]credential.ID, n)
	errs, seqs := make([]error, n), make([]uint64, n)
	for i := range ids {
		ids[i] = credential.ID(fmt.Sprintf("pay/c%03d", i))
	}
	stale := map[int]bool{3: true, 64: true, 119: true}
	for i := range stale {
		create(t, l, ids[i])
	}
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			seqs[i], errs[i] = l.Commit(ctx, Next(credential.Record{
				Schema: credential.Schema, ID: ids[i], Incarnation: l.Incarnation(), Phase: credential.Idle,
				Spec: credential.Spec{Owner: "o", Environment: "e", Purpose: "p"},
			}, time.Now().Add(time.Hour), credential.NoticeRotated), 0)
		})
	}
	wg.Wait()
	for i := range n {
		if stale[i] {
			isError(t, errs[i], credential.ErrStale)
			continue
		}
		noError(t, errs[i])
		if _, at, err := l.Get(ctx, ids[i]); err != nil || at != seqs[i] {
			t.Fatalf("%s: commit said %d, Get says %d, %v", ids[i], seqs[i], at, err)
		}
	}
	set := must[map[credential.ID]uint64](t)(l.Schedules(ctx))
	if len(set) != n-len(stale) {
		t.Fatalf("%d schedules, want %d", len(set), n-len(stale))
	}
	checkWhole(t, l)
}

// testWriters: several writers change the same few records as fast as they can; no rev is lost or skipped.
func testWriters(t *testing.T, s Subject) {
	const writers, each = 8, 12
	ids := []credential.ID{"pay/a", "pay/b", "pay/c"}
	ls := []Ledger{s.Ledger}
	if s.Again != nil {
		ls = append(ls, s.Again(t))
	}
	ctx := within(t)
	for _, id := range ids {
		create(t, s.Ledger, id)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			l, id := ls[w%len(ls)], ids[w%len(ids)]
			for done := 0; done < each; {
				r, seq, err := l.Get(ctx, id)
				if err == nil {
					_, err = l.Commit(ctx, Next(r, time.Time{}, credential.NoticeRotated), seq)
				}
				switch {
				case err == nil:
					done++
				case !errors.Is(err, credential.ErrStale):
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
	var revs uint64
	for _, r := range must[[]credential.Record](t)(s.Ledger.List(ctx)) {
		revs += r.Rev
	}
	if want := uint64(len(ids) + writers*each); revs != want {
		t.Fatalf("%d revs after %d commits", revs, want)
	}
	checkWhole(t, s.Ledger)
}

func testHistory(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	r, seq := create(t, l, "pay/orders")
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Millisecond)
	r.Generation, r.Epoch = 4, 2
	r = Next(r, time.Time{}, credential.NoticeRotated)
	r.Announce[0] = credential.Notice{
		Type: credential.NoticeRotated, Generation: 4, Reason: "manual", ValidUntil: until, Gap: credential.Duration(1500 * time.Millisecond),
		Grade: "proven", Message: "m", Lagging: []string{"shop"},
	}
	must[uint64](t)(l.Commit(ctx, r, seq))
	es, as := history(t, l)
	if len(es) != 1 || len(as) != 2 {
		t.Fatalf("%d events and %d entries, want 1 and 2", len(es), len(as))
	}
	want := events.Event{
		ID:   events.NewID(l.Incarnation(), "pay/orders", 2, events.Rotated),
		Type: events.Rotated, Source: "/rekey/" + l.Incarnation().String(), Subject: "pay/orders", Time: r.Entry.At, Sequence: 1,
		Data: events.Data{
			Credential: "pay/orders", Generation: 4, Epoch: 2, Rev: 2, Owner: "payments", Environment: "test",
			Store: "files", Reference: "files:pay/orders", Reason: "manual", Message: "m", ValidUntil: until, GapSeconds: 1.5, Grade: "proven",
			Lagging: []string{"shop"},
		},
	}
	same(t, es[0], want)
	same(t, as[1], r.Entry)
}

func testQuery(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	for _, id := range []credential.ID{"pay/a", "pay/b", "shop/a"} {
		r, seq := create(t, l, id)
		must[uint64](t)(l.Commit(ctx, Next(r, time.Time{}, credential.NoticeRotated, credential.NoticeOverdue), seq))
	}
	noError(t, l.CatchUp(ctx))
	count := func(q ledger.Query) (n int) {
		t.Helper()
		noError(t, l.Events(ctx, q, func(events.Event) error { n++; return nil }))
		return n
	}
	entries := func(q ledger.Query) (n int) {
		t.Helper()
		noError(t, l.Audit(ctx, q, func(credential.Entry, uint64) error { n++; return nil }))
		return n
	}
	for _, c := range []struct {
		q               ledger.Query
		events, entries int
	}{
		{ledger.Query{}, 6, 6},
		{ledger.Query{Team: "pay"}, 4, 4},
		{ledger.Query{Team: "pay", Name: "b"}, 2, 2},
		{ledger.Query{Name: "a"}, 4, 4},
		{ledger.Query{Team: "nobody"}, 0, 0},
		{ledger.Query{Types: []string{events.Overdue}}, 3, 6},
		{ledger.Query{Types: []string{events.Overdue, events.Rotated}, Team: "shop"}, 2, 2},
		{ledger.Query{After: 4}, 2, 2},
		{ledger.Query{Since: time.Now().Add(time.Minute)}, 0, 0},
		{ledger.Query{Since: time.Now().Add(-time.Minute)}, 6, 6},
	} {
		if n, m := count(c.q), entries(c.q); n != c.events || m != c.entries {
			t.Errorf("%+v: %d events and %d entries, want %d and %d", c.q, n, m, c.events, c.entries)
		}
	}
	halt := errors.New("enough")
	isError(t, l.Events(ctx, ledger.Query{}, func(events.Event) error { return halt }), halt)
	if err := l.Events(ctx, ledger.Query{Team: "a.b"}, func(events.Event) error { return nil }); err == nil {
		t.Error("a team that is two tokens was accepted")
	}
	// Following sees what comes later, once each.
	got := newInbox[events.Event]()
	stop := background(t, func(ctx context.Context) error {
		return l.Events(ctx, ledger.Query{Follow: true, Types: []string{events.Suspended}}, func(e events.Event) error { got.put(e); return nil })
	})
	r, seq, err := l.Get(ctx, "pay/a")
	noError(t, err)
	must[uint64](t)(l.Commit(ctx, Next(r, time.Time{}, credential.NoticeSuspended), seq))
	if e := got.next(t); e.Subject != "pay/a" || e.Type != events.Suspended || e.Sequence != 7 {
		t.Fatalf("followed to %+v", e)
	}
	isError(t, stop(), context.Canceled)
}

func testList(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	if got := must[[]credential.Record](t)(l.List(ctx)); len(got) != 0 {
		t.Fatalf("an empty ledger lists %d records", len(got))
	}
	const n = 700 // more than one pull
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, err := l.Commit(ctx, New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", i))), 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got := must[[]credential.Record](t)(l.List(ctx))
	ids := map[credential.ID]bool{}
	for _, r := range got {
		ids[r.ID] = true
	}
	if len(got) != n || len(ids) != n {
		t.Fatalf("%d records of %d credentials, want %d", len(got), len(ids), n)
	}
}

func testWatch(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	a, seq := create(t, l, "pay/a")
	create(t, l, "pay/b")
	got, ready := newInbox[credential.Record](), newInbox[bool]()
	var initial []credential.ID
	primed := false
	stop := background(t, func(ctx context.Context) error {
		return l.Watch(ctx, func(r credential.Record) {
			if !primed {
				initial = append(initial, r.ID)
				return
			}
			got.put(r)
		}, func() { primed = true; ready.put(true) })
	})
	ready.next(t)
	if slices.Sort(initial); !slices.Equal(initial, []credential.ID{"pay/a", "pay/b"}) {
		t.Fatalf("before ready: %v", initial)
	}
	a = Next(a, time.Time{})
	must[uint64](t)(l.Commit(ctx, a, seq))
	same(t, got.next(t), a)
	create(t, l, "pay/c")
	if r := got.next(t); r.ID != "pay/c" {
		t.Fatalf("then came %s", r.ID)
	}
	isError(t, stop(), context.Canceled)

	empty := newInbox[bool]()
	background(t, func(ctx context.Context) error {
		return l.WatchIncidents(ctx, func(credential.Incident) {}, func() { empty.put(true) })
	})
	empty.next(t) // ready also where there is nothing
}
