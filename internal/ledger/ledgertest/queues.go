package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

var errAgain = errors.New("again, please")

func testScheduleRings(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	r, seq := create(t, l, "pay/later")
	due := time.Now().Add(900 * time.Millisecond) // the server's own helper would cut this to whole seconds, and ring early
	must[uint64](t)(l.Commit(ctx, Next(r, due), seq))
	r, seq = create(t, l, "pay/past")
	must[uint64](t)(l.Commit(ctx, Next(r, time.Now().Add(-time.Hour)), seq))
	if set := must[map[credential.ID]uint64](t)(l.Schedules(ctx)); set["pay/later"] != 2 {
		t.Fatalf("schedules: %v", set)
	}
	got := newInbox[credential.ID]()
	at := newInbox[time.Time]()
	stop := background(t, func(ctx context.Context) error {
		return l.Dues(ctx, 4, func(_ context.Context, id credential.ID) error { at.put(time.Now()); got.put(id); return nil })
	})
	if id := got.next(t); id != "pay/past" {
		t.Fatalf("first came %s", id)
	}
	at.next(t)
	if id := got.next(t); id != "pay/later" {
		t.Fatalf("then came %s", id)
	}
	if early := due.Sub(at.next(t)); early > 0 {
		t.Fatalf("rang %s early", early)
	}
	if set := must[map[credential.ID]uint64](t)(l.Schedules(ctx)); len(set) != 0 {
		t.Fatalf("after they rang: %v", set)
	}
	noError(t, stop())
}

func testScheduleReplaced(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	soon := time.Now().Add(700 * time.Millisecond)
	moved, mseq := create(t, l, "pay/moved")
	moved = Next(moved, soon)
	mseq = must[uint64](t)(l.Commit(ctx, moved, mseq))
	cancelled, cseq := create(t, l, "pay/cancelled")
	cancelled = Next(cancelled, soon)
	cseq = must[uint64](t)(l.Commit(ctx, cancelled, cseq))
	kept, kseq := create(t, l, "pay/kept")
	must[uint64](t)(l.Commit(ctx, Next(kept, soon), kseq))

	far := time.Now().Add(time.Hour)
	must[uint64](t)(l.Commit(ctx, Next(moved, far), mseq))
	must[uint64](t)(l.Commit(ctx, Next(cancelled, time.Time{}), cseq))
	got := newInbox[credential.ID]()
	background(t, func(ctx context.Context) error {
		return l.Dues(ctx, 4, func(_ context.Context, id credential.ID) error { got.put(id); return nil })
	})
	if id := got.next(t); id != "pay/kept" {
		t.Fatalf("%s rang, although its schedule was replaced or cancelled", id)
	}
	set := must[map[credential.ID]uint64](t)(l.Schedules(ctx))
	if len(set) != 1 || set["pay/moved"] != 3 {
		t.Fatalf("schedules: %v", set)
	}
	if !must[bool](t)(l.HasSchedule(ctx, "pay/moved")) || must[bool](t)(l.HasSchedule(ctx, "pay/cancelled")) {
		t.Fatal("HasSchedule and Schedules differ")
	}
}

func testRearm(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	isError(t, l.Rearm(ctx, "pay/nobody"), credential.ErrNotFound)
	for _, c := range []struct {
		id  credential.ID
		due time.Time
	}{{"pay/never", time.Time{}}, {"pay/later", time.Now().Add(time.Hour)}} {
		r, seq := create(t, l, c.id)
		must[uint64](t)(l.Commit(ctx, Next(r, c.due), seq))
		noError(t, l.Rearm(ctx, c.id))
		if has := must[bool](t)(l.HasSchedule(ctx, c.id)); has != !c.due.IsZero() {
			t.Fatalf("%s: after Rearm schedule is %v", c.id, has)
		}
	}
}

func testDueAgain(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	r, seq := create(t, l, "pay/orders")
	must[uint64](t)(l.Commit(ctx, Next(r, time.Now()), seq))
	var calls atomic.Int32
	done := newInbox[int32]()
	background(t, func(ctx context.Context) error {
		return l.Dues(ctx, 4, func(context.Context, credential.ID) error {
			if n := calls.Add(1); n < 2 {
				return errAgain
			}
			done.put(calls.Load())
			return nil
		})
	})
	done.next(t)
}

// testDuesShared: each ring goes to one of two schedulers.
func testDuesShared(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	other := l
	if s.Again != nil {
		other = s.Again(t)
	}
	got := newInbox[credential.ID]()
	for _, l := range []Ledger{l, other} {
		background(t, func(ctx context.Context) error {
			return l.Dues(ctx, 2, func(_ context.Context, id credential.ID) error { got.put(id); return nil })
		})
	}
	const n = 40
	for i := range n {
		r := New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", i)))
		seq := must[uint64](t)(l.Commit(ctx, r, 0))
		must[uint64](t)(l.Commit(ctx, Next(r, time.Now().Add(300*time.Millisecond)), seq))
	}
	seen := map[credential.ID]int{}
	for len(seen) < n {
		seen[got.next(t)]++
	}
	for id, times := range seen {
		if times != 1 {
			t.Errorf("%s rang %d times", id, times)
		}
	}
}

func testDoorbell(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/early", 1)) // before the lanes exist
	noError(t, l.EnsureLanes(ctx, "pg", 2))
	noError(t, l.EnsureLanes(ctx, "pg", 3)) // again, with another limit
	for range 3 {
		noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 7)) // repeated: one doorbell
	}
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 8)) // a higher rev rings again
	got := newInbox[credential.Doorbell]()
	stop := background(t, func(ctx context.Context) error {
		return l.Work(ctx, credential.LaneWork, "pg", 1, func(_ context.Context, b credential.Doorbell) error { got.put(b); return nil })
	})
	for _, want := range []credential.Doorbell{
		{Lane: credential.LaneWork, Target: "pg", ID: "pay/early", Rev: 1, Delivery: 1},
		{Lane: credential.LaneWork, Target: "pg", ID: "pay/orders", Rev: 7, Delivery: 1},
		{Lane: credential.LaneWork, Target: "pg", ID: "pay/orders", Rev: 8, Delivery: 1},
	} {
		if b := got.next(t); b != want {
			t.Fatalf("got %+v, want %+v", b, want)
		}
	}
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 8)) // done, and within the window: still one
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 9))
	if b := got.next(t); b.Rev != 9 {
		t.Fatalf("a doorbell rang twice: %+v", b)
	}
	noError(t, stop())
	for _, err := range []error{
		l.Ring(ctx, "sideways", "pg", "pay/orders", 1), l.Ring(ctx, credential.LaneWork, "p.g", "pay/orders", 1),
		l.Ring(ctx, credential.LaneWork, "pg", "pay.x/orders", 1), l.EnsureLanes(ctx, "pg", 0), l.EnsureLanes(ctx, "*", 1),
	} {
		if err == nil {
			t.Error("a bad lane, target, id or limit was accepted")
		}
	}
}

func testDoorbellAgain(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	noError(t, l.EnsureLanes(ctx, "pg", 1))
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 1))
	got := newInbox[uint64]()
	background(t, func(ctx context.Context) error {
		return l.Work(ctx, credential.LaneWork, "pg", 4, func(_ context.Context, b credential.Doorbell) error {
			got.put(b.Delivery)
			if b.Delivery < 3 {
				return errAgain
			}
			return nil
		})
	})
	for want := uint64(1); want <= 3; want++ {
		if n := got.next(t); n != want {
			t.Fatalf("delivery %d, want %d", n, want)
		}
	}
}

func testLanes(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	noError(t, l.EnsureLanes(ctx, "pg", 1))
	noError(t, l.EnsureLanes(ctx, "pg_2", 1))
	block, started := make(chan struct{}), newInbox[credential.Doorbell]()
	work := func(lane credential.Lane, target string, hold bool) {
		background(t, func(ctx context.Context) error {
			return l.Work(ctx, lane, target, 4, func(_ context.Context, b credential.Doorbell) error {
				started.put(b)
				if hold {
					<-block
				}
				return nil
			})
		})
	}
	work(credential.LaneWork, "pg", true)
	work(credential.LaneRevoke, "pg", false)
	work(credential.LaneWork, "pg_2", false)
	t.Cleanup(func() { close(block) })
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/slow", 1))
	if b := started.next(t); b.ID != "pay/slow" {
		t.Fatalf("got %+v", b)
	}
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/waits", 1))
	// The work lane of pg is full; neither its revoke lane nor another target waits for it.
	noError(t, l.Ring(ctx, credential.LaneRevoke, "pg", "pay/slow", 2))
	if b := started.next(t); b.Lane != credential.LaneRevoke || b.Target != "pg" {
		t.Fatalf("got %+v", b)
	}
	noError(t, l.Ring(ctx, credential.LaneWork, "pg_2", "pay/other", 1))
	if b := started.next(t); b.Target != "pg_2" {
		t.Fatalf("got %+v", b)
	}
}

// testConcurrency: the target's limit holds across workers.
func testConcurrency(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	other := l
	if s.Again != nil {
		other = s.Again(t)
	}
	const limit, bells = 3, 24
	noError(t, l.EnsureLanes(ctx, "pg", limit))
	for i := range bells {
		noError(t, l.Ring(ctx, credential.LaneWork, "pg", credential.ID(fmt.Sprintf("pay/c%d", i)), 1))
	}
	var now, most atomic.Int32
	gate := make(chan struct{})
	done := newInbox[credential.ID]()
	for _, l := range []Ledger{l, other} {
		background(t, func(ctx context.Context) error {
			return l.Work(ctx, credential.LaneWork, "pg", 8, func(_ context.Context, b credential.Doorbell) error {
				n := now.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				<-gate
				now.Add(-1)
				done.put(b.ID)
				return nil
			})
		})
	}
	eventually(t, "as many at once as allowed", func() bool { return now.Load() == limit })
	close(gate)
	seen := map[credential.ID]bool{}
	for len(seen) < bells {
		seen[done.next(t)] = true
	}
	if m := most.Load(); m > limit {
		t.Fatalf("%d at once, the limit is %d", m, limit)
	}
}

func testLanesRemoved(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	never := func(context.Context, credential.Doorbell) error { return nil }
	isError(t, l.Work(ctx, credential.LaneWork, "pg", 1, never), credential.ErrNotFound)
	noError(t, l.EnsureLanes(ctx, "pg", 1))
	ended := newInbox[error]()
	began := newInbox[credential.ID]()
	go func() {
		ended.put(l.Work(ctx, credential.LaneWork, "pg", 1, func(_ context.Context, b credential.Doorbell) error {
			began.put(b.ID)
			return nil
		}))
	}()
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 1))
	began.next(t)
	noError(t, l.Ring(ctx, credential.LaneRevoke, "pg", "pay/orders", 1))
	noError(t, l.RemoveLanes(ctx, "pg"))
	noError(t, l.RemoveLanes(ctx, "pg")) // again
	isError(t, ended.next(t), credential.ErrNotFound)
	// Made again it starts empty: the doorbells went with the lanes.
	noError(t, l.EnsureLanes(ctx, "pg", 1))
	noError(t, l.Ring(ctx, credential.LaneRevoke, "pg", "pay/new", 5))
	got := newInbox[credential.ID]()
	background(t, func(ctx context.Context) error {
		return l.Work(ctx, credential.LaneRevoke, "pg", 1, func(_ context.Context, b credential.Doorbell) error { got.put(b.ID); return nil })
	})
	if id := got.next(t); id != "pay/new" {
		t.Fatalf("a doorbell of the removed lane came: %s", id)
	}
}

// testCleanStop: what is under way is finished, undisturbed, before Work returns; what has not begun is left for others.
func testCleanStop(t *testing.T, s Subject) {
	l, ctx := s.Ledger, within(t)
	noError(t, l.EnsureLanes(ctx, "pg", 1))
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/first", 1))
	noError(t, l.Ring(ctx, credential.LaneWork, "pg", "pay/second", 1))
	began, finish := newInbox[credential.ID](), make(chan struct{})
	var finished atomic.Bool
	working, cancel := context.WithCancel(ctx)
	ended := newInbox[error]()
	go func() {
		ended.put(l.Work(working, credential.LaneWork, "pg", 1, func(ctx context.Context, b credential.Doorbell) error {
			began.put(b.ID)
			<-finish
			if ctx.Err() != nil {
				t.Error("the work's context ended with the stop")
			}
			finished.Store(true)
			return nil
		}))
	}()
	if id := began.next(t); id != "pay/first" {
		t.Fatalf("began with %s", id)
	}
	cancel()
	select {
	case err := <-ended.ch:
		t.Fatalf("Work returned while a call was under way: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(finish)
	noError(t, ended.next(t))
	if !finished.Load() {
		t.Fatal("Work returned before the call")
	}
	got := newInbox[credential.ID]()
	background(t, func(ctx context.Context) error {
		return l.Work(ctx, credential.LaneWork, "pg", 1, func(_ context.Context, b credential.Doorbell) error { got.put(b.ID); return nil })
	})
	if id := got.next(t); id != "pay/second" {
		t.Fatalf("the finished doorbell came again: %s", id)
	}
}

func testAcks(t *testing.T, s Subject) {
	l := s.Ledger
	s.Acknowledge(t, "pay/orders", "shop", []byte("7"))
	type ack struct {
		id       credential.ID
		consumer string
		body     string
	}
	got := newInbox[ack]()
	var calls atomic.Int32
	background(t, func(ctx context.Context) error {
		return l.Acks(ctx, 2, func(_ context.Context, id credential.ID, consumer string, body []byte, at time.Time) error {
			if calls.Add(1) == 1 {
				return errAgain
			}
			if since := time.Since(at); since < 0 || since > time.Minute {
				t.Errorf("published %s ago", since)
			}
			got.put(ack{id, consumer, string(body)})
			return nil
		})
	})
	if a := got.next(t); a != (ack{"pay/orders", "shop", "7"}) {
		t.Fatalf("got %+v", a)
	}
}
