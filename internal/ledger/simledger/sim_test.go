package simledger_test

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
	"github.com/rekeyhq/rekey/internal/ledger/simledger"
)

// The real one satisfies the suite's interface too; here so that both are seen side by side.
var (
	_ ledgertest.Ledger = (*simledger.Ledger)(nil)
	_ ledgertest.Ledger = (*ledger.Ledger)(nil)
)

func TestConformance(t *testing.T) {
	ledgertest.Run(t, func(t *testing.T) ledgertest.Subject {
		l := simledger.New(simledger.Config{})
		return ledgertest.Subject{Ledger: l, Acknowledge: func(_ *testing.T, id credential.ID, consumer string, body []byte) {
			l.Acknowledge(id, consumer, body)
		}}
	})
}

func TestFates(t *testing.T) {
	for _, c := range []struct {
		fate    simledger.Fate
		want    error
		written bool // at once
		later   bool // after a second
	}{
		{simledger.Pass, nil, true, true},
		{simledger.Lose, credential.ErrUncertain, false, false},
		{simledger.LoseReply, credential.ErrUncertain, true, true},
		{simledger.Late, credential.ErrUncertain, false, true},
		{simledger.Stale, credential.ErrStale, false, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			next := simledger.Pass
			l := simledger.New(simledger.Config{Fate: func(credential.Record) simledger.Fate { return next }})
			ctx := t.Context()
			first := ledgertest.New(l.Incarnation(), "pay/orders")
			seq, err := l.Commit(ctx, first, 0)
			if err != nil {
				t.Fatal(err)
			}
			next = c.fate
			second := ledgertest.Next(first, time.Now().Add(time.Hour), credential.NoticeRotated)
			if _, err := l.Commit(ctx, second, seq); !errors.Is(err, c.want) {
				t.Errorf("fate %d: %v", c.fate, err)
			}
			look := func(when string, want bool) {
				t.Helper()
				o := l.Observe()
				written := o.Records[0].Rev == 2
				if has, _ := l.HasSchedule(ctx, "pay/orders"); written != want || has != want || len(o.Events) == 1 != want || len(o.Entries) == 2 != want {
					t.Errorf("fate %d, %s: rev %d, schedule %v, %d events, %d entries", c.fate, when, o.Records[0].Rev, has, len(o.Events), len(o.Entries))
				}
				for _, v := range credential.Audit(o) {
					t.Errorf("fate %d: %s", c.fate, v)
				}
			}
			look("at once", c.written)
			time.Sleep(time.Second)
			synctest.Wait()
			look("later", c.later)
		})
	}
}

// A late commit that finds another one in its place is not written.
func TestLateLoses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next := simledger.Pass
		l := simledger.New(simledger.Config{Fate: func(credential.Record) simledger.Fate { return next }})
		ctx := t.Context()
		r := ledgertest.New(l.Incarnation(), "pay/orders")
		seq, _ := l.Commit(ctx, r, 0)
		next = simledger.Late
		if _, err := l.Commit(ctx, ledgertest.Next(r, time.Time{}, credential.NoticeSuspended), seq); !errors.Is(err, credential.ErrUncertain) {
			t.Fatal(err)
		}
		next = simledger.Pass
		if _, err := l.Commit(ctx, ledgertest.Next(r, time.Time{}, credential.NoticeRotated), seq); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if o := l.Observe(); len(o.Events) != 1 || o.Events[0].Type != credential.NoticeRotated || o.Records[0].Rev != 2 {
			t.Fatalf("%+v", o)
		}
	})
}

// Years pass in a bubble: a schedule rings at its instant, to the nanosecond.
func TestBubbleClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := simledger.New(simledger.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		due := time.Now().Add(400*24*time.Hour + 123456789)
		r := ledgertest.New(l.Incarnation(), "pay/orders")
		seq, _ := l.Commit(ctx, r, 0)
		if _, err := l.Commit(ctx, ledgertest.Next(r, due), seq); err != nil {
			t.Fatal(err)
		}
		err := l.Dues(ctx, 1, func(_ context.Context, id credential.ID) error {
			if now := time.Now(); !now.Equal(due) {
				t.Errorf("rang at %s, want %s", now, due)
			}
			cancel()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// Another clock than the bubble's: it moves by hand, and Wake makes the ledger look.
func TestManualClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
		l := simledger.New(simledger.Config{Now: func() time.Time { return now }})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := ledgertest.New(l.Incarnation(), "pay/orders")
		seq, _ := l.Commit(ctx, r, 0)
		if _, err := l.Commit(ctx, ledgertest.Next(r, now.Add(time.Hour)), seq); err != nil {
			t.Fatal(err)
		}
		rang := false
		go func() {
			_ = l.Dues(ctx, 1, func(context.Context, credential.ID) error { rang = true; return nil })
		}()
		synctest.Wait()
		now = now.Add(59 * time.Minute)
		l.Wake()
		if synctest.Wait(); rang {
			t.Fatal("rang early")
		}
		now = now.Add(time.Minute)
		l.Wake()
		if synctest.Wait(); !rang {
			t.Fatal("did not ring")
		}
	})
}

// A worker that dies in the middle leaves its doorbell for another, half a minute later.
func TestWorkerDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := simledger.New(simledger.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if err := errors.Join(l.EnsureLanes(ctx, "pg", 1), l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 1)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_ = l.Work(ctx, credential.LaneWork, "pg", 4, func(_ context.Context, b credential.Doorbell) error {
			if b.Delivery == 1 {
				runtime.Goexit()
			}
			if after := time.Since(began); after != 30*time.Second {
				t.Errorf("delivered again after %s", after)
			}
			cancel()
			return nil
		})
	})
}

func TestLosses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := simledger.New(simledger.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := ledgertest.New(l.Incarnation(), "pay/orders")
		seq, _ := l.Commit(ctx, r, 0)
		if _, err := l.Commit(ctx, ledgertest.Next(r, time.Now().Add(time.Hour)), seq); err != nil {
			t.Fatal(err)
		}
		l.LoseSchedule("pay/orders")
		if has, _ := l.HasSchedule(ctx, "pay/orders"); has {
			t.Fatal("the schedule is not lost")
		}
		if err := l.Rearm(ctx, "pay/orders"); err != nil {
			t.Fatal(err)
		}
		if has, _ := l.HasSchedule(ctx, "pay/orders"); !has {
			t.Fatal("the schedule is not repaired")
		}
		if err := errors.Join(l.EnsureLanes(ctx, "pg", 1), l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 1)); err != nil {
			t.Fatal(err)
		}
		l.LoseDoorbells()
		if err := l.Ring(ctx, credential.LaneWork, "pg", "pay/orders", 1); err != nil { // not a repetition: it was forgotten
			t.Fatal(err)
		}
		n := 0
		go func() {
			_ = l.Work(ctx, credential.LaneWork, "pg", 1, func(context.Context, credential.Doorbell) error { n++; return nil })
		}()
		if synctest.Wait(); n != 1 {
			t.Fatalf("%d doorbells", n)
		}
	})
}
