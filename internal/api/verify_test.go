package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// forged answers reads as a ledger does that somebody has tampered with.
type forged struct {
	Ledger
	entries func([]credential.Entry) []credential.Entry
	events  func([]events.Event) []events.Event
	records func([]credential.Record) []credential.Record
}

func (f *forged) Audit(ctx context.Context, q ledger.Query, fn func(credential.Entry, uint64) error) error {
	if f.entries == nil {
		return f.Ledger.Audit(ctx, q, fn)
	}
	var all []credential.Entry
	if err := f.Ledger.Audit(ctx, q, func(e credential.Entry, _ uint64) error { all = append(all, e); return nil }); err != nil {
		return err
	}
	for i, e := range f.entries(all) {
		if err := fn(e, uint64(i+1)); err != nil {
			return err
		}
	}
	return nil
}

func (f *forged) Events(ctx context.Context, q ledger.Query, fn func(events.Event) error) error {
	if f.events == nil {
		return f.Ledger.Events(ctx, q, fn)
	}
	var all []events.Event
	if err := f.Ledger.Events(ctx, q, func(e events.Event) error { all = append(all, e); return nil }); err != nil {
		return err
	}
	for _, e := range f.events(all) {
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

func (f *forged) List(ctx context.Context) ([]credential.Record, error) {
	rs, err := f.Ledger.List(ctx)
	if f.records != nil && err == nil {
		rs = f.records(rs)
	}
	return rs, err
}

func without[T any](list []T, i int) []T { return append(append([]T{}, list[:i]...), list[i+1:]...) }

// find is the place of a credential's nth entry.
func find(es []credential.Entry, id credential.ID, rev uint64) int {
	for i, e := range es {
		if e.Credential == id && e.Rev == rev {
			return i
		}
	}
	panic("no such entry")
}

func TestVerifyFindsTampering(t *testing.T) {
	f := &forged{}
	e := start(t, func(c *Config) { f.Ledger = c.Ledger; c.Ledger = f })
	e.apply(declare("orders/db", "orders/cache"))
	e.drive("orders/db", credential.Draining)
	e.drive("orders/cache", credential.Idle)
	ctx := t.Context()
	v, err := e.admin.Verify(ctx)
	if err != nil || v.Found != 0 || v.Credentials != 2 || v.Entries < 10 || v.Events < 2 || v.Truncated != 0 {
		t.Fatalf("untouched: %+v %v", v, err)
	}
	last := func(es []credential.Entry) int {
		n := -1
		for i, e := range es {
			if e.Credential == "orders/db" {
				n = i
			}
		}
		return n
	}
	for name, c := range map[string]struct {
		entries   func([]credential.Entry) []credential.Entry
		events    func([]events.Event) []events.Event
		records   func([]credential.Record) []credential.Record
		says      string
		truncated int
	}{
		"edited": {entries: func(es []credential.Entry) []credential.Entry {
			es[find(es, "orders/db", 3)].Actor = "somebody else"
			return es
		}, says: "10 orders/db audit entry 3 was edited"},
		"edited and hashed anew": {entries: func(es []credential.Entry) []credential.Entry {
			i := find(es, "orders/db", 3)
			es[i].Actor = "somebody else"
			es[i].Hash = es[i].Sum()
			return es
		}, says: "10 orders/db audit entry 4 does not follow entry 3"},
		"dropped": {entries: func(es []credential.Entry) []credential.Entry { return without(es, find(es, "orders/db", 3)) },
			says: "10 orders/db audit entries 3 to 3 are missing"},
		"the last dropped": {entries: func(es []credential.Entry) []credential.Entry { return without(es, last(es)) }, says: "10 orders/db the last audit entry is"},
		"the last edited and hashed anew": {entries: func(es []credential.Entry) []credential.Entry {
			i := last(es)
			es[i].Actor = "somebody else"
			es[i].Hash = es[i].Sum()
			return es
		}, says: "10 orders/db the last audit entry is"},
		"the first dropped": {entries: func(es []credential.Entry) []credential.Entry { return without(es, find(es, "orders/db", 1)) }, truncated: 1},
		"reordered": {entries: func(es []credential.Entry) []credential.Entry {
			i, j := find(es, "orders/db", 3), find(es, "orders/db", 4)
			es[i], es[j] = es[j], es[i]
			return es
		}, says: "10 orders/db audit entries 3 to 3 are missing"},
		"all dropped": {entries: func(es []credential.Entry) []credential.Entry {
			var kept []credential.Entry
			for _, e := range es {
				if e.Credential != "orders/db" {
					kept = append(kept, e)
				}
			}
			return kept
		}, says: "10 orders/db there are no audit entries"},
		"event dropped": {events: func(es []events.Event) []events.Event { return es[1:] }, says: "is missing"},
		"event twice":   {events: func(es []events.Event) []events.Event { return append(es, es[0]) }, says: "is in the stream 2 times"},
		"event of no entry": {events: func(es []events.Event) []events.Event {
			x := es[0]
			x.ID = events.NewID(e.ledger.Incarnation(), x.Subject, x.Data.Rev, events.Overdue)
			x.Type = events.Overdue
			return append(es, x)
		}, says: "was published, but no audit entry announces it"},
		"event of nobody": {events: func(es []events.Event) []events.Event { x := es[0]; x.Subject = "orders/ghost"; return append(es, x) }, says: "5 orders/ghost"},
		"record rolled back": {records: func(rs []credential.Record) []credential.Record {
			for i := range rs {
				if rs[i].ID == "orders/db" {
					rs[i].Entry.Hash = strings.Repeat("0", 64)
				}
			}
			return rs
		}, says: "10 orders/db the last audit entry is"},
	} {
		t.Run(name, func(t *testing.T) {
			f.entries, f.events, f.records = c.entries, c.events, c.records
			defer func() { f.entries, f.events, f.records = nil, nil, nil }()
			v, err := e.admin.Verify(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var said []string
			for _, x := range v.Violations {
				said = append(said, fmt.Sprintf("%d %s %s", x.Invariant, x.Credential, x.Message))
			}
			if c.says != "" && !strings.Contains(strings.Join(said, "\n"), c.says) || (c.says == "") != (v.Found == 0) || v.Truncated != c.truncated {
				t.Errorf("found %q, truncated %d; want %q, %d", said, v.Truncated, c.says, c.truncated)
			}
		})
	}
}

// Verifying while commits go on finds nothing wrong.
func TestVerifyDuringCommits(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, verb := range []credential.Verb{credential.Pause, credential.Resume} {
				if _, err := e.admin.Steer(context.Background(), "orders/db", verb, ""); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for range 20 {
		if v, err := e.admin.Verify(t.Context()); err != nil || v.Found > 0 {
			t.Errorf("%+v %v", v, err)
		}
	}
	close(stop)
	<-done
}

func TestStreams(t *testing.T) {
	e := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e.apply(declare("orders/db", "billing/db"))
	got := make(chan Event, 100)
	followed := make(chan error, 1)
	go func() {
		followed <- e.admin.Events(ctx, StreamQuery{Follow: true, Types: []string{"rotated"}}, func(e Event) error { got <- e; return nil })
	}()
	e.drive("orders/db", credential.Draining)
	for _, generation := range []uint64{1, 2} {
		select {
		case ev := <-got:
			if ev.Type != events.Rotated || ev.Subject != "orders/db" || ev.Data.Generation != generation || ev.SpecVersion != "1.0" || ev.Sequence == 0 {
				t.Errorf("event: %+v", ev)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the stream does not follow")
		}
	}
	cancel()
	if err := <-followed; err == nil || ctx.Err() == nil {
		t.Errorf("the end of a followed stream: %v", err)
	}

	ctx = t.Context()
	count := func(q StreamQuery) (n int, last uint64) {
		if err := e.admin.Audit(ctx, q, func(a AuditEntry) error { n++; last = a.Sequence; return nil }); err != nil {
			t.Error(err)
		}
		return n, last
	}
	all, last := count(StreamQuery{})
	one, _ := count(StreamQuery{Credential: "orders/db"})
	rest, _ := count(StreamQuery{After: last - 2})
	young, _ := count(StreamQuery{Since: "1h"})
	none, _ := count(StreamQuery{Since: time.Now().Add(time.Hour).UTC().Format(time.RFC3339)})
	if all < 10 || one != all-1 || rest != 2 || young != all || none != 0 {
		t.Errorf("all %d, of one %d, after %d, young %d, of the future %d", all, one, rest, young, none)
	}
	for q, says := range map[*StreamQuery]string{
		{Types: []string{"exploded"}}: "want one of rotated", {Since: "yesterday"}: "want an instant", {Credential: "x"}: "team/name", {Team: "*"}: "team",
	} {
		refused(t, e.admin.Events(ctx, *q, nil), http.StatusUnprocessableEntity, says)
	}
}
