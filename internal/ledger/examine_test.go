package ledger_test

import (
	"context"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

// examine reads everything and lists what does not belong together.
func examine(t *testing.T, l *ledger.Ledger) ([]credential.Record, []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for l.CatchUp(ctx) != nil { // a request may be lost with its connection
		if ctx.Err() != nil {
			lags, err := l.SourceLag(t.Context())
			t.Fatalf("the sourced streams do not catch up: %v, %v", lags, err)
		}
	}
	records, err := l.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var es []events.Event
	if err := l.Events(ctx, ledger.Query{}, func(e events.Event) error { es = append(es, e); return nil }); err != nil {
		t.Fatal(err)
	}
	var as []credential.Entry
	if err := l.Audit(ctx, ledger.Query{}, func(e credential.Entry, _ uint64) error { as = append(as, e); return nil }); err != nil {
		t.Fatal(err)
	}
	return records, ledgertest.Whole(records, es, as)
}
