package ledger

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// The header keeps the instant to the nanosecond; the library's own helper would cut it to seconds, and ring early.
func TestScheduleHeader(t *testing.T) {
	r := credential.Record{ID: "pay/orders", Due: time.Date(2030, 1, 2, 3, 4, 5, 678901234, time.FixedZone("", 3600))}
	m := scheduleMessage(r)
	if got := m.Header.Get(jetstream.ScheduleHeader); got != "@at 2030-01-02T02:04:05.678901234Z" {
		t.Fatalf("schedule %q", got)
	}
	if got := m.Header.Get(jetstream.ScheduleTargetHeader); got != "$KV.rekey.due.pay.orders" {
		t.Fatalf("target %q", got)
	}
}

// loseSchedule removes a schedule behind the ledger's back, as the server may (see TestRingPurgesTheNextSchedule).
func loseSchedule(t *testing.T, l *Ledger, id credential.ID) {
	t.Helper()
	if err := l.stream.Purge(t.Context(), jetstream.WithPurgeSubject(scheduleSubject(id))); err != nil {
		t.Fatal(err)
	}
	if has, err := l.HasSchedule(t.Context(), id); err != nil || has {
		t.Fatalf("schedule %v, %v", has, err)
	}
}

func TestRearm(t *testing.T) {
	l := opened(t, nil)
	ctx := t.Context()
	due := time.Now().Add(700 * time.Millisecond)
	if _, err := l.Commit(ctx, step(l, "pay/lost", 1, due), 0); err != nil {
		t.Fatal(err)
	}
	loseSchedule(t, l, "pay/lost")
	if err := l.Rearm(ctx, "pay/lost"); err != nil {
		t.Fatal(err)
	}
	if set, err := l.Schedules(ctx); err != nil || set["pay/lost"] != 1 {
		t.Fatalf("%v, %v", set, err)
	}
	if id := firstDue(t, l); id != "pay/lost" || time.Now().Before(due) {
		t.Fatalf("%s rang %s early", id, time.Until(due))
	}
	// One whose instant has passed is not armed: its ring is on its way, or the sweep sees to it.
	if err := l.Rearm(ctx, "pay/lost"); err != nil {
		t.Fatal(err)
	}
	if has, _ := l.HasSchedule(ctx, "pay/lost"); has {
		t.Fatal("a schedule in the past was armed")
	}
}

func firstDue(t *testing.T, l *Ledger) credential.ID {
	t.Helper()
	got := make(chan credential.ID, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() {
		_ = l.Dues(ctx, 1, func(_ context.Context, id credential.ID) error {
			select {
			case got <- id:
			default:
			}
			return nil
		})
	}()
	select {
	case id := <-got:
		return id
	case <-ctx.Done():
		t.Fatal("nothing rang")
		panic("unreachable")
	}
}

// When a ring is stored the server purges the schedule's whole subject, also a newer schedule that was committed between
// the ring's making and its storing. The receiver of the ring repairs that.
func TestRingPurgesTheNextSchedule(t *testing.T) {
	l := opened(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const n = 300
	id := func(i int) credential.ID { return credential.ID(fmt.Sprintf("pay/c%d", i)) }
	soon := time.Now().Add(1500 * time.Millisecond)
	seqs := make([]uint64, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			seq, err := l.Commit(ctx, step(l, id(i), 1, soon), 0)
			if err != nil {
				t.Error(err)
			}
			seqs[i] = seq
		})
	}
	wg.Wait()
	// All ring at one instant, and at that instant all are replaced.
	later := soon.Add(4 * time.Second)
	time.Sleep(time.Until(soon.Add(-2 * time.Millisecond)))
	for i := range n {
		wg.Go(func() {
			if _, err := l.Commit(ctx, step(l, id(i), 2, later), seqs[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// Without anybody listening: how many schedules did the race cost?
	set, err := l.Schedules(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d schedules lost to the race", n-len(set), n)
	var mu sync.Mutex
	rang := map[credential.ID]bool{}
	done := make(chan struct{})
	go func() {
		_ = l.Dues(ctx, 16, func(_ context.Context, id credential.ID) error {
			mu.Lock()
			defer mu.Unlock()
			if time.Now().After(later) && !rang[id] {
				if rang[id] = true; len(rang) == n {
					close(done)
				}
			}
			return nil
		})
	}()
	select {
	case <-done:
	case <-ctx.Done():
		mu.Lock()
		defer mu.Unlock()
		t.Fatalf("only %d of %d rang at their second instant", len(rang), n)
	}
}

// The repair on its own: a ring comes for a record that is due later and has no schedule.
func TestRingRepairs(t *testing.T) {
	l := opened(t, nil)
	ctx := t.Context()
	seq, err := l.Commit(ctx, step(l, "pay/orders", 1, time.Now().Add(300*time.Millisecond)), 0)
	if err != nil {
		t.Fatal(err)
	}
	for {
		if has, err := l.HasSchedule(ctx, "pay/orders"); err != nil {
			t.Fatal(err)
		} else if !has {
			break // it rang, nobody listened
		}
	}
	if _, err := l.Commit(ctx, step(l, "pay/orders", 2, time.Now().Add(time.Hour)), seq); err != nil {
		t.Fatal(err)
	}
	loseSchedule(t, l, "pay/orders")
	if id := firstDue(t, l); id != "pay/orders" {
		t.Fatalf("rang: %s", id)
	}
	if set, err := l.Schedules(ctx); err != nil || set["pay/orders"] != 2 {
		t.Fatalf("after the ring: %v, %v", set, err)
	}
}

// A step longer than the acknowledgement's time stays with its worker; a worker that dies without a word loses it.
func TestInProgress(t *testing.T) {
	l := opened(t, nil)
	l.ackWait, l.inProgress = 400*time.Millisecond, 100*time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := l.EnsureLanes(ctx, "pg", 4); err != nil {
		t.Fatal(err)
	}
	for _, id := range []credential.ID{"pay/slow", "pay/dead"} {
		if err := l.Ring(ctx, credential.LaneWork, "pg", id, 1); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	var log []string
	slow, dead := make(chan struct{}), make(chan struct{})
	go func() {
		_ = l.pull(ctx, WorkStream, laneConsumer(credential.LaneWork, "pg"), 4, func(_ context.Context, m jetstream.Msg) error {
			meta, err := m.Metadata()
			if err != nil {
				return err
			}
			name := m.Subject()[strings.LastIndexByte(m.Subject(), '.')+1:]
			mu.Lock()
			log = append(log, fmt.Sprint(name, " ", meta.NumDelivered))
			mu.Unlock()
			switch {
			case name == "slow":
				time.Sleep(1500 * time.Millisecond)
				close(slow)
			case meta.NumDelivered == 1:
				runtime.Goexit() // as if the process were gone: neither progress nor an end is reported
			default:
				close(dead)
			}
			return nil
		})
	}()
	<-slow
	<-dead
	mu.Lock()
	defer mu.Unlock()
	count := map[string]int{}
	for _, entry := range log {
		count[entry]++
	}
	if len(log) != 3 || count["slow 1"] != 1 || count["dead 1"] != 1 || count["dead 2"] != 1 {
		t.Fatalf("deliveries: %v", log)
	}
}
