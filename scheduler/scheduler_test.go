package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger/simledger"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/scheduler"
)

func spec(every, jitter time.Duration) credential.Spec {
	return credential.Spec{
		Target: "db", Kind: "fake", Store: "default", Owner: "shop", Environment: "test", Purpose: "tests",
		Every: credential.Duration(every), Jitter: credential.Duration(jitter),
		Overlap:      credential.Overlap{Min: credential.Duration(time.Minute), Max: credential.Duration(time.Minute)},
		StepDeadline: credential.Duration(30 * time.Second), Traits: rotators.Traits{MaxLive: 2, Countable: true},
	}
}

func TestNextInstant(t *testing.T) {
	now := time.Date(2028, 2, 29, 12, 0, 0, 0, time.UTC)
	rotated := func(every, jitter time.Duration, ago time.Duration, generation uint64) credential.Record {
		return credential.Record{ID: "shop/orders", Spec: spec(every, jitter), Generation: generation, LastRotation: now.Add(-ago)}
	}
	day := 24 * time.Hour
	tests := []struct {
		name string
		r    credential.Record
		want time.Time
	}{
		{"the first is due at once", credential.Record{ID: "shop/orders", Spec: spec(day, 0)}, now},
		{"the first without an interval too", credential.Record{ID: "shop/orders", Spec: spec(0, 0)}, now},
		{"no interval: never again", rotated(0, 0, time.Hour, 1), time.Time{}},
		{"an interval after the last", rotated(day, 0, time.Hour, 1), now.Add(23 * time.Hour)},
		{"in the past after an outage", rotated(day, 0, 365*day, 1), now.Add(-364 * day)},
		{"tried and never promoted: at once", credential.Record{ID: "shop/orders", Spec: spec(day, 0), Generation: 3}, now},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := scheduler.NextInstant(tt.r, now); !got.Equal(tt.want) {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
	t.Run("jitter is derived, within its bound, and differs", func(t *testing.T) {
		seen := map[time.Time]bool{}
		for n := range 200 {
			r := rotated(day, time.Hour, 0, 1)
			r.ID = credential.ID(fmt.Sprintf("shop/c%d", n))
			at := scheduler.NextInstant(r, now)
			if at.Before(now.Add(day)) || !at.Before(now.Add(day+time.Hour)) {
				t.Fatalf("%s: %s is outside the window", r.ID, at)
			}
			if again := scheduler.NextInstant(r, now.Add(time.Minute)); !again.Equal(at) {
				t.Fatalf("another scheduler says %s, not %s", again, at)
			}
			seen[at] = true
		}
		if len(seen) < 190 {
			t.Errorf("200 credentials share %d instants", len(seen))
		}
	})
}

// bench is a simulated ledger with schedulers and no worker: admissions show as phase admitted.
type bench struct {
	t      *testing.T
	ledger *simledger.Ledger
	mu     sync.Mutex
	rung   []credential.ID
}

func (b *bench) ring(id credential.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rung = append(b.rung, id)
}

// heard reports whether a doorbell rang for id since the last call.
func (b *bench) heard(id credential.ID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	ok := slices.Contains(b.rung, id)
	b.rung = slices.DeleteFunc(b.rung, func(r credential.ID) bool { return r == id })
	return ok
}

func (b *bench) declare(id credential.ID, s credential.Spec, change func(*credential.Record)) {
	b.t.Helper()
	r, err := credential.New(id, b.ledger.Incarnation(), s, "test", time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	if change != nil {
		change(&r)
	}
	if _, err := b.ledger.Commit(b.t.Context(), r, 0); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) record(id credential.ID) credential.Record {
	r, _, err := b.ledger.Get(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func run(t *testing.T, schedulers int, cfg scheduler.Config, f func(b *bench)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		b := &bench{t: t, ledger: simledger.New(simledger.Config{})}
		if err := b.ledger.EnsureLanes(ctx, "db", 100); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, schedulers+2)
		for _, lane := range credential.Lanes() {
			go func() {
				done <- b.ledger.Work(ctx, lane, "db", 1, func(_ context.Context, d credential.Doorbell) error {
					b.ring(d.ID)
					return nil
				})
			}()
		}
		for range schedulers {
			cfg.Ledger = b.ledger
			s := scheduler.New(cfg)
			go func() { done <- s.Run(ctx) }()
		}
		f(b)
		cancel()
		for range schedulers + 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

func rotatedAt(at time.Time, next time.Time) func(*credential.Record) {
	return func(r *credential.Record) {
		r.Generation = 1
		r.Current = &credential.Version{ID: "a", Generation: 1}
		r.LastRotation, r.NextRotation, r.Due = at, next, next
		if next.IsZero() {
			r.Due = time.Now()
		}
	}
}

func TestDueRotationIsAdmittedOnceAndRung(t *testing.T) {
	run(t, 3, scheduler.Config{}, func(b *bench) {
		b.declare("shop/new", spec(time.Hour, 0), nil)
		b.declare("shop/old", spec(time.Hour, 0), rotatedAt(time.Now(), time.Time{}))
		synctest.Wait()
		if r := b.record("shop/new"); r.Phase != credential.Admitted || r.Generation != 1 || r.Reason != "initial" {
			t.Errorf("%s generation %d, %s", r.Phase, r.Generation, r.Reason)
		}
		if r := b.record("shop/old"); r.Phase != credential.Idle || !r.NextRotation.Equal(r.LastRotation.Add(time.Hour)) {
			t.Errorf("%s, next %s", r.Phase, r.NextRotation)
		}
		time.Sleep(time.Hour - time.Second)
		if r := b.record("shop/old"); r.Phase != credential.Idle {
			t.Error("admitted early")
		}
		time.Sleep(2 * time.Second)
		if r := b.record("shop/old"); r.Phase != credential.Admitted || r.Generation != 2 || r.Reason != "interval" {
			t.Errorf("%s generation %d, %s", r.Phase, r.Generation, r.Reason)
		}
		if !b.heard("shop/new") || !b.heard("shop/old") {
			t.Error("nobody rang")
		}
	})
}

func TestOutageIsSpread(t *testing.T) {
	run(t, 2, scheduler.Config{}, func(b *bench) {
		start := time.Now()
		for n := range 60 {
			b.declare(credential.ID(fmt.Sprintf("shop/c%d", n)), spec(time.Hour, 0), rotatedAt(start.Add(-48*time.Hour), start.Add(-47*time.Hour)))
		}
		synctest.Wait()
		count := func() (n int) {
			for i := range 60 {
				if b.record(credential.ID(fmt.Sprintf("shop/c%d", i))).Phase == credential.Admitted {
					n++
				}
			}
			return n
		}
		if n := count(); n > 5 {
			t.Errorf("%d of 60 overdue rotations began at once", n)
		}
		time.Sleep(7*time.Minute + 30*time.Second)
		if n := count(); n < 15 || n > 45 {
			t.Errorf("%d of 60 began in the first half of the window", n)
		}
		time.Sleep(8 * time.Minute)
		if n := count(); n != 60 {
			t.Errorf("%d of 60 have begun after the window", n)
		}
	})
}

func TestSweepRepairsWhatWasLost(t *testing.T) {
	run(t, 1, scheduler.Config{Sweep: time.Minute}, func(b *bench) {
		b.declare("shop/later", spec(time.Hour, 0), rotatedAt(time.Now(), time.Now().Add(30*time.Minute)))
		b.declare("shop/busy", spec(time.Hour, 0), func(r *credential.Record) {
			rotatedAt(time.Now(), time.Time{})(r)
			r.Phase, r.Due = credential.Applying, time.Now().Add(10*time.Minute)
		})
		synctest.Wait()
		b.ledger.LoseSchedule("shop/later")
		b.ledger.LoseSchedule("shop/busy")
		time.Sleep(2 * time.Minute)
		set, err := b.ledger.Schedules(b.t.Context())
		if err != nil || len(set) != 2 {
			t.Errorf("schedules %v, %v", set, err)
		}
		time.Sleep(9 * time.Minute)
		if !b.heard("shop/busy") {
			t.Error("nobody rang")
		}
		time.Sleep(3 * time.Minute) // nobody worked on it: each sweep rings again once the queue has forgotten the last ring
		if !b.heard("shop/busy") {
			t.Error("a lost doorbell is never rung again")
		}
	})
}

func TestPauseAdmitsNothingAndItsEndSweeps(t *testing.T) {
	run(t, 0, scheduler.Config{}, func(b *bench) {
		if _, err := b.ledger.SetControl(b.t.Context(), credential.Control{Paused: true}, 0); err != nil {
			t.Fatal(err)
		}
		b.declare("shop/new", spec(time.Hour, 0), nil)
		ctx, cancel := context.WithCancel(b.t.Context())
		done := make(chan error, 1)
		go func() { done <- scheduler.New(scheduler.Config{Ledger: b.ledger, Sweep: time.Hour}).Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		time.Sleep(time.Minute)
		if r := b.record("shop/new"); r.Phase != credential.Idle {
			t.Errorf("%s during a pause", r.Phase)
		}
		_, seq, err := b.ledger.GetControl(b.t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.ledger.SetControl(b.t.Context(), credential.Control{}, seq); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if r := b.record("shop/new"); r.Phase != credential.Admitted {
			t.Errorf("%s after the pause", r.Phase)
		}
	})
}

func TestOrderReachesEveryRecordAlthoughTheFirstTryDied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ledger := simledger.New(simledger.Config{})
		b := &bench{t: t, ledger: ledger}
		ids := []credential.ID{"shop/a", "shop/b", "shop/gone"}
		for _, id := range ids[:2] {
			b.declare(id, spec(time.Hour, 0), rotatedAt(time.Now(), time.Now().Add(time.Hour)))
		}
		if err := ledger.EnsureLanes(t.Context(), "db", 1); err != nil {
			t.Fatal(err)
		}
		want := credential.Incident{ID: "i1", Mode: credential.ModeKill, Credentials: ids, Actor: "test"}
		want.Hash = want.Sum()
		inc, _, err := ledger.CreateIncident(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		dies := &dying{Ledger: ledger, after: 1}
		if err := scheduler.New(scheduler.Config{Ledger: dies}).Expand(t.Context(), inc); err == nil {
			t.Fatal("the first try did not fail")
		}
		s := scheduler.New(scheduler.Config{Ledger: ledger})
		for range 2 { // twice: the second changes nothing
			if err := s.SweepOnce(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for _, id := range ids[:2] {
			if r := b.record(id); r.Phase != credential.Killing || r.Epoch != 1 {
				t.Errorf("%s: %s, epoch %d", id, r.Phase, r.Epoch)
			}
		}
		if stored, _, err := ledger.GetIncident(t.Context(), "i1"); err != nil || !stored.Expanded {
			t.Errorf("expanded %v, %v", stored.Expanded, err)
		}
	})
}

// An order that meets a ledger which takes no commits is carried out as soon as it does, not at the next sweep.
func TestOrderIsInsistedOn(t *testing.T) {
	var full atomic.Bool
	full.Store(true)
	synctest.Test(t, func(t *testing.T) {
		ledger := simledger.New(simledger.Config{})
		b := &bench{t: t, ledger: ledger}
		b.declare("shop/a", spec(time.Hour, 0), rotatedAt(time.Now(), time.Now().Add(time.Hour)))
		if err := ledger.EnsureLanes(t.Context(), "db", 1); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- scheduler.New(scheduler.Config{Ledger: &refusing{Ledger: ledger, full: &full}, Sweep: time.Hour}).Run(ctx)
		}()
		synctest.Wait()
		order := credential.Incident{ID: "i1", Mode: credential.ModeKill, Credentials: []credential.ID{"shop/a"}}
		order.Hash = order.Sum()
		if _, _, err := ledger.CreateIncident(ctx, order); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		full.Store(false)
		time.Sleep(3 * time.Second)
		if r := b.record("shop/a"); r.Phase != credential.Killing {
			t.Errorf("phase %s three seconds after there was space again", r.Phase)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// refusing takes no commit while it is full.
type refusing struct {
	*simledger.Ledger
	full *atomic.Bool
}

func (f *refusing) Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	if f.full.Load() {
		return 0, errors.New("no space left on device")
	}
	return f.Ledger.Commit(ctx, r, seq)
}

func TestAlteredOrStaleOrderIsNotCarriedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ledger := simledger.New(simledger.Config{})
		b := &bench{t: t, ledger: ledger}
		b.declare("shop/a", spec(time.Hour, 0), rotatedAt(time.Now(), time.Now().Add(time.Hour)))
		if err := ledger.EnsureLanes(t.Context(), "db", 1); err != nil {
			t.Fatal(err)
		}
		s := scheduler.New(scheduler.Config{Ledger: ledger})
		altered := credential.Incident{ID: "i1", Mode: credential.ModeKill, Credentials: []credential.ID{"shop/b"}}
		altered.Hash = altered.Sum()
		altered.Credentials = []credential.ID{"shop/a"}
		if _, _, err := ledger.CreateIncident(t.Context(), altered); err != nil {
			t.Fatal(err)
		}
		if err := s.Expand(t.Context(), altered); err == nil {
			t.Error("an altered list was carried out")
		}
		over := credential.Incident{ID: "i2", Mode: credential.ModeKill, Credentials: []credential.ID{"shop/a"}, Expanded: true}
		over.Hash = over.Sum()
		if _, _, err := ledger.CreateIncident(t.Context(), over); err != nil {
			t.Fatal(err)
		}
		frozen := over
		frozen.Expanded = false // as a scheduler saw it long ago
		if err := s.Expand(t.Context(), frozen); err != nil {
			t.Error(err)
		}
		if r := b.record("shop/a"); r.Phase != credential.Idle {
			t.Errorf("phase %s", r.Phase)
		}
	})
}

// dying fails every commit after the first few.
type dying struct {
	*simledger.Ledger
	after int
}

func (d *dying) Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	if d.after == 0 {
		return 0, errors.New("dead")
	}
	d.after--
	return d.Ledger.Commit(ctx, r, seq)
}
