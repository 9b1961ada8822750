package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

// A source is restarted while commits go on, and one whose restart was interrupted is completed by the next Open: nothing
// is missing or there twice.
func TestRestartSource(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	commit := func(times int) {
		t.Helper()
		for range times {
			n++
			r := ledgertest.New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", n)))
			r.Announce = []credential.Notice{{Type: credential.NoticeRotated}}
			r.Entry.Announced = []string{credential.NoticeRotated}
			r.Entry.Hash = r.Entry.Sum()
			if _, err := l.Commit(ctx, r, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	commit(20)
	var wg sync.WaitGroup
	wg.Go(func() {
		for _, stream := range []string{ledger.EventStream, ledger.AuditStream, ledger.EventStream} {
			if err := l.RestartSource(ctx, stream); err != nil {
				t.Error(err)
			}
		}
	})
	commit(40)
	wg.Wait()
	whole(t, l)

	// The source is gone: the lag grows and shows it.
	s, err := js.Stream(ctx, ledger.EventStream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.Sources = nil
	if _, err := js.UpdateStream(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	commit(3)
	first := time.Now()
	for {
		lags, err := l.SourceLag(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if lags[0].Stream != ledger.EventStream || lags[0].Behind == 0 {
			t.Fatalf("without a source: %v", lags)
		}
		if lags[0].Behind > 200*time.Millisecond && lags[1].Behind == 0 {
			if over := lags[0].Behind - time.Since(first); over > 5*time.Second {
				t.Fatalf("it was committed %s ago, the lag is %s", time.Since(first), lags[0].Behind)
			}
			break
		}
	}
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	if err := l.CatchUp(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("CatchUp: %v", err)
	}
	stop()
	open(t, ledger.Config{Conn: nc}).Close()
	commit(3)
	whole(t, l)
	if err := l.RestartSource(ctx, ledger.WorkStream); err == nil {
		t.Error("the work stream has no source")
	}
}

// A list taken while everything changes is complete and has each credential once.
func TestListWhileCommitting(t *testing.T) {
	l := open(t, ledger.Config{Conn: connect(t, startEmbedded(t, t.TempDir()))})
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	const n = 500
	var wg sync.WaitGroup
	heads := make([]credential.Record, n)
	seqs := make([]uint64, n)
	for i := range n {
		wg.Go(func() {
			heads[i] = ledgertest.New(l.Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", i)))
			var err error
			if seqs[i], err = l.Commit(ctx, heads[i], 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	working, stop := context.WithCancel(ctx)
	for i := range n {
		wg.Go(func() {
			for working.Err() == nil {
				heads[i] = ledgertest.Next(heads[i], time.Time{})
				var err error
				if seqs[i], err = l.Commit(ctx, heads[i], seqs[i]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 6 {
		records, err := l.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[credential.ID]bool{}
		for _, r := range records {
			seen[r.ID] = true
		}
		if len(records) != n || len(seen) != n {
			t.Fatalf("%d records of %d credentials, want %d", len(records), len(seen), n)
		}
	}
	stop()
	wg.Wait()
}
