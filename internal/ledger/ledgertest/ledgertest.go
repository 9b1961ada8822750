// Package ledgertest is the conformance suite of ledgers: what schedulers, workers and the API rely on, whichever ledger is
// behind them.
package ledgertest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// Ledger is what the suite exercises. *ledger.Ledger and *simledger.Ledger implement it.
type Ledger interface {
	Incarnation() uuid.UUID
	Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error)
	List(ctx context.Context) ([]credential.Record, error)
	Watch(ctx context.Context, fn func(credential.Record), ready func()) error
	Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error)

	GetTarget(ctx context.Context, name string) (credential.Target, uint64, error)
	PutTarget(ctx context.Context, t credential.Target, seq uint64) (uint64, error)
	DeleteTarget(ctx context.Context, name string, seq uint64) error
	Targets(ctx context.Context) ([]credential.Target, error)
	WatchTargets(ctx context.Context, fn func(string, *credential.Target), ready func()) error

	CreateIncident(ctx context.Context, inc credential.Incident) (credential.Incident, uint64, error)
	UpdateIncident(ctx context.Context, inc credential.Incident, seq uint64) (uint64, error)
	GetIncident(ctx context.Context, id string) (credential.Incident, uint64, error)
	Incidents(ctx context.Context) ([]credential.Incident, error)
	WatchIncidents(ctx context.Context, fn func(credential.Incident), ready func()) error

	GetControl(ctx context.Context) (credential.Control, uint64, error)
	SetControl(ctx context.Context, c credential.Control, seq uint64) (uint64, error)
	WatchControl(ctx context.Context, fn func(credential.Control), ready func()) error

	Dues(ctx context.Context, limit int, fn func(context.Context, credential.ID) error) error
	Schedules(ctx context.Context) (map[credential.ID]uint64, error)
	HasSchedule(ctx context.Context, id credential.ID) (bool, error)
	Rearm(ctx context.Context, id credential.ID) error

	EnsureLanes(ctx context.Context, target string, concurrency int) error
	RemoveLanes(ctx context.Context, target string) error
	Ring(ctx context.Context, lane credential.Lane, target string, id credential.ID, rev uint64) error
	Work(ctx context.Context, lane credential.Lane, target string, limit int, fn func(context.Context, credential.Doorbell) error) error
	Acks(ctx context.Context, limit int, fn func(ctx context.Context, id credential.ID, consumer string, body []byte, at time.Time) error) error

	Events(ctx context.Context, q ledger.Query, fn func(events.Event) error) error
	Audit(ctx context.Context, q ledger.Query, fn func(credential.Entry, uint64) error) error
	CatchUp(ctx context.Context) error
}

// Subject is one empty ledger under test.
type Subject struct {
	Ledger Ledger
	// Again opens the same ledger once more, as another process would; nil where there is only one.
	Again func(t *testing.T) Ledger
	// Acknowledge publishes a consumer's acknowledgement.
	Acknowledge func(t *testing.T, id credential.ID, consumer string, body []byte)
}

// patience bounds every wait of the suite; it is far above what any step takes.
const patience = 20 * time.Second

// Run runs the suite; open makes an empty ledger for each of its tests.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, s Subject)
	}{
		{"commit", testCommit},
		{"stale", testStale},
		{"refused", testRefused},
		{"one of many wins", testRace},
		{"a stale one among many", testEviction},
		{"writers in turn", testWriters},
		{"events and audit", testHistory},
		{"history by query", testQuery},
		{"list", testList},
		{"watch", testWatch},
		{"schedule rings", testScheduleRings},
		{"schedule replaced and cancelled", testScheduleReplaced},
		{"schedule repaired", testRearm},
		{"due again after an error", testDueAgain},
		{"dues are shared", testDuesShared},
		{"targets", testTargets},
		{"incidents", testIncidents},
		{"control", testControl},
		{"doorbell", testDoorbell},
		{"doorbell again after an error", testDoorbellAgain},
		{"lanes are apart", testLanes},
		{"concurrency of a target", testConcurrency},
		{"lanes removed", testLanesRemoved},
		{"clean stop", testCleanStop},
		{"acknowledgements", testAcks},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

// within is a context that ends before the test does.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func isError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

// background runs a blocking call until the test ends, or until the returned function ends it and returns its error.
func background(t *testing.T, run func(ctx context.Context) error) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(patience):
			return errors.New("it does not end with its context")
		}
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

// inbox collects values from other goroutines.
type inbox[T any] struct{ ch chan T }

func newInbox[T any]() inbox[T] { return inbox[T]{make(chan T, 4096)} }

func (b inbox[T]) put(v T) { b.ch <- v }

// next waits for a value.
func (b inbox[T]) next(t *testing.T) T {
	t.Helper()
	select {
	case v := <-b.ch:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// until waits for a value that satisfies ok and drops those before.
func (b inbox[T]) until(t *testing.T, ok func(T) bool) T {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case v := <-b.ch:
			if ok(v) {
				return v
			}
		case <-deadline:
			t.Fatal("what was waited for did not come")
		}
	}
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// create commits a new record and returns it with its sequence.
func create(t *testing.T, l Ledger, id credential.ID) (credential.Record, uint64) {
	t.Helper()
	r := New(l.Incarnation(), id)
	return r, must[uint64](t)(l.Commit(within(t), r, 0))
}

// history reads every event and audit entry.
func history(t *testing.T, l Ledger) ([]events.Event, []credential.Entry) {
	t.Helper()
	ctx := within(t)
	noError(t, l.CatchUp(ctx))
	var es []events.Event
	var as []credential.Entry
	noError(t, l.Events(ctx, ledger.Query{}, func(e events.Event) error { es = append(es, e); return nil }))
	noError(t, l.Audit(ctx, ledger.Query{}, func(e credential.Entry, _ uint64) error { as = append(as, e); return nil }))
	return es, as
}

// checkWhole fails unless every commit up to each record's rev, and nothing else, left its audit entry and its events.
func checkWhole(t *testing.T, l Ledger) {
	t.Helper()
	records := must[[]credential.Record](t)(l.List(within(t)))
	es, as := history(t, l)
	if problems := Whole(records, es, as); len(problems) > 0 {
		t.Fatalf("%d problems, such as: %s", len(problems), problems[0])
	}
}

// Whole lists where records, events and audit entries do not belong together: each commit up to each record's rev has exactly
// its entry, chained, and exactly the events that it announced.
func Whole(records []credential.Record, es []events.Event, as []credential.Entry) []string {
	var problems []string
	o := credential.Observation{Records: records, Entries: as, Events: []credential.Seen{}}
	if o.Entries == nil {
		o.Entries = []credential.Entry{}
	}
	seen := map[string]bool{}
	known := map[credential.ID]bool{}
	for _, r := range records {
		known[r.ID] = true
	}
	for _, e := range es {
		if seen[e.ID] {
			problems = append(problems, "event "+e.ID+" is there twice")
		}
		seen[e.ID] = true
		if !known[credential.ID(e.Subject)] {
			problems = append(problems, "event of "+e.Subject+", which has no record")
		}
		o.Events = append(o.Events, credential.Seen{
			Credential: credential.ID(e.Subject), Type: "credential." + events.Short(e.Type), Rev: e.Data.Rev, ID: e.ID,
		})
	}
	for _, a := range as {
		if !known[a.Credential] {
			problems = append(problems, "audit entry of "+string(a.Credential)+", which has no record")
		}
	}
	for _, v := range credential.Audit(o) {
		if v.Invariant == 5 || v.Invariant == 10 {
			problems = append(problems, v.String())
		}
	}
	slices.Sort(problems)
	return problems
}
