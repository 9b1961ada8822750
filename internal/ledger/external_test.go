package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
	"github.com/rekeyhq/rekey/internal/testserver"
)

func startNATS(t *testing.T, cfg testserver.NATSConfig) *testserver.NATS {
	t.Helper()
	testserver.Need(t, "nats")
	n, err := testserver.StartNATS(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func dial(t *testing.T, n *testserver.NATS) *nats.Conn {
	t.Helper()
	nc, err := ledger.Connect(t.Context(), ledger.ConnectConfig{URL: n.URL, CredsFile: n.CredsFile, CAFile: n.CAFile, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// wipe empties the account for the next subtest.
func wipe(t *testing.T, nc *nats.Conn) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ledger.EventStream, ledger.AuditStream, ledger.WorkStream, ledger.AckStream, ledger.LedgerStream} {
		if err := js.DeleteStream(t.Context(), name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Fatal(err)
		}
	}
}

func TestExternalConformance(t *testing.T) {
	t.Parallel() // it mostly waits
	for name, nodes := range map[string]int{"one": 1, "cluster": 3} {
		t.Run(name, func(t *testing.T) {
			if nodes > 1 && testing.Short() {
				t.Skip("the cluster takes a while")
			}
			n := startNATS(t, testserver.NATSConfig{Nodes: nodes})
			ledgertest.Run(t, func(t *testing.T) ledgertest.Subject {
				nc := dial(t, n)
				wipe(t, nc)
				return ledgertest.Subject{
					Ledger:      open(t, ledger.Config{Conn: nc, Replicas: nodes}),
					Again:       func(t *testing.T) ledgertest.Ledger { return open(t, ledger.Config{Conn: dial(t, n)}) },
					Acknowledge: acknowledge(nc),
				}
			})
		})
	}
}

// A server that hangs gives no answer: the outcome is unknown, and a reload shows one of the two.
func TestHungServer(t *testing.T) {
	n := startNATS(t, testserver.NATSConfig{})
	l := open(t, ledger.Config{Conn: dial(t, n), Timeout: 400 * time.Millisecond})
	ctx := t.Context()
	r := ledgertest.New(l.Incarnation(), "pay/orders")
	seq, err := l.Commit(ctx, r, 0)
	if err != nil {
		t.Fatal(err)
	}
	n.Pause(0)
	next := ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated)
	if _, err := l.Commit(ctx, next, seq); !errors.Is(err, credential.ErrUncertain) {
		t.Fatalf("commit to a hung server: %v", err)
	}
	n.Resume(0)
	reload := func() (credential.Record, uint64) {
		for {
			if r, seq, err := l.Get(ctx, "pay/orders"); err == nil {
				return r, seq
			}
		}
	}
	// The batch was on its way and is written when the server wakes: the reply was lost, not the commit. Whoever repeats the
	// transition is stale, and its event is there once.
	for got, at := reload(); got.Rev != next.Rev; got, at = reload() {
		if at != seq {
			t.Fatalf("rev %d at sequence %d", got.Rev, at)
		}
	}
	if _, err := l.Commit(ctx, next, seq); !errors.Is(err, credential.ErrStale) {
		t.Fatalf("the same transition again: %v", err)
	}
	whole(t, l)
}

// Every kill loses the connection, some in the middle of a batch. Nothing that was acknowledged is lost, nothing is torn, and
// watches and queues go on by themselves.
func TestServerKilled(t *testing.T) {
	n := startNATS(t, testserver.NATSConfig{})
	l := open(t, ledger.Config{Conn: dial(t, n), Timeout: time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	var mu sync.Mutex
	seen := map[credential.ID]uint64{}
	ready := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = l.Watch(ctx, func(r credential.Record) {
			mu.Lock()
			defer mu.Unlock()
			if r.Rev < seen[r.ID] {
				t.Errorf("watch went back from rev %d to %d", seen[r.ID], r.Rev)
			}
			seen[r.ID] = r.Rev
		}, func() { close(ready) })
	})
	<-ready
	followed := map[string]int{}
	wg.Go(func() {
		_ = l.Events(ctx, ledger.Query{Follow: true}, func(e events.Event) error {
			mu.Lock()
			defer mu.Unlock()
			followed[e.ID]++
			return nil
		})
	})

	acked := map[credential.ID]uint64{}
	working, stop := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for i := range 6 {
		id := credential.ID(fmt.Sprintf("pay/c%d", i))
		writers.Go(func() {
			for working.Err() == nil {
				r, seq, err := l.Get(ctx, id)
				switch {
				case errors.Is(err, credential.ErrNotFound):
					r, seq = ledgertest.New(l.Incarnation(), id), 0
				case err != nil:
					time.Sleep(20 * time.Millisecond) // no server
					continue
				default:
					r = ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated)
				}
				if _, err := l.Commit(ctx, r, seq); err == nil {
					mu.Lock()
					acked[id] = r.Rev
					mu.Unlock()
				}
			}
		})
	}
	progress := func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		var sum uint64
		for _, rev := range acked {
			sum += rev
		}
		return sum
	}
	for range 4 {
		for before := progress(); progress() < before+40; {
			time.Sleep(5 * time.Millisecond)
		}
		n.Kill(0)
		if err := n.Start(0); err != nil {
			t.Fatal(err)
		}
	}
	for before := progress(); progress() < before+40; { // it goes on after the last kill
		time.Sleep(5 * time.Millisecond)
	}
	stop()
	writers.Wait()

	final := map[credential.ID]uint64{}
	published := 0
	for _, r := range whole(t, l) {
		final[r.ID] = r.Rev
		published += int(r.Rev) - 1 // the first commit announces nothing
	}
	for id, rev := range acked {
		if final[id] < rev {
			t.Errorf("%s: rev %d was acknowledged, the ledger has %d", id, rev, final[id])
		}
	}
	schedules, err := l.Schedules(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for id, rev := range final {
		if rev > 1 && schedules[id] != rev {
			t.Errorf("%s: rev %d, its schedule is of rev %d", id, rev, schedules[id])
		}
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		mu.Lock()
		same := len(seen) == len(final) && len(followed) >= published
		for id, rev := range final {
			same = same && seen[id] == rev
		}
		mu.Unlock()
		if same {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the watch has not seen everything: %v, want %v", seen, final)
		}
	}
	cancel()
	wg.Wait()
	for id, times := range followed {
		if times != 1 {
			t.Errorf("event %s was followed to %d times", id, times)
		}
	}
	if len(followed) != published {
		t.Errorf("followed to %d events, %d were published", len(followed), published)
	}
}

// Losing the leader of a replicated ledger loses nothing.
func TestClusterLeaderKilled(t *testing.T) {
	t.Parallel() // it mostly waits
	if testing.Short() {
		t.Skip("the cluster takes a while")
	}
	n := startNATS(t, testserver.NATSConfig{Nodes: 3})
	nc := dial(t, n)
	l := open(t, ledger.Config{Conn: nc, Replicas: 3, Timeout: 2 * time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	r := ledgertest.New(l.Incarnation(), "pay/orders")
	seq, err := l.Commit(ctx, r, 0)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(ctx, ledger.LedgerStream)
	if err != nil {
		t.Fatal(err)
	}
	leader := n.Named(stream.CachedInfo().Cluster.Leader)
	if leader < 0 {
		t.Fatalf("no leader among ours: %q", stream.CachedInfo().Cluster.Leader)
	}
	n.Kill(leader)
	next := ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated)
	for {
		if _, err = l.Commit(ctx, next, seq); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		if got, _, gerr := l.Get(ctx, "pay/orders"); gerr == nil && got.Rev == next.Rev {
			break // it was written, only the reply was lost
		}
	}
	if err := n.Start(leader); err != nil {
		t.Fatal(err)
	}
	// The sourced streams catch up, although the server takes up to half a minute to try again.
	whole(t, l)
	if has, err := l.HasSchedule(ctx, "pay/orders"); err != nil || !has {
		t.Fatalf("schedule: %v, %v", has, err)
	}
}

func TestConnectRefusals(t *testing.T) {
	n := startNATS(t, testserver.NATSConfig{TLS: true})
	good := ledger.ConnectConfig{URL: n.URL, CredsFile: n.CredsFile, CAFile: n.CAFile}
	nc, err := ledger.Connect(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	for name, change := range map[string]func(*ledger.ConnectConfig){
		"no url":         func(c *ledger.ConnectConfig) { c.URL = "" },
		"anonymous":      func(c *ledger.ConnectConfig) { c.CredsFile = "" },
		"no such file":   func(c *ledger.ConnectConfig) { c.CredsFile = "/nonexistent" },
		"unknown CA":     func(c *ledger.ConnectConfig) { c.CAFile = "" },
		"nobody listens": func(c *ledger.ConnectConfig) { c.URL = "tls://127.0.0.1:1" },
	} {
		cfg := good
		change(&cfg)
		nc, err := ledger.Connect(t.Context(), cfg)
		if err == nil {
			nc.Close()
			t.Errorf("%s: connected", name)
			continue
		}
		if !strings.HasPrefix(err.Error(), "connect to NATS") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if nc, err := ledger.Connect(ctx, good); err == nil {
		nc.Close() // it was faster than the context's end
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// whole fails unless records, events and audit entries belong together, and returns the records.
func whole(t *testing.T, l *ledger.Ledger) []credential.Record {
	t.Helper()
	records, problems := examine(t, l)
	if len(problems) > 0 {
		t.Fatalf("%d problems, such as: %s", len(problems), problems[0])
	}
	return records
}
